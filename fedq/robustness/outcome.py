"""What an evaluation found: plain values, which a card keeps as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

#: ``upper``: the truth is at most the value (accuracy under the attacks tried); ``lower``: at least
#: (what the attacks tried got out); ``estimate``: neither, up to the interval.
Bound = Literal["upper", "lower", "estimate"]
#: ``measured``; ``invalid``: a gate failed, so the value says nothing; ``withheld``: too few
#: samples for the claim; ``skipped``: it does not apply; ``failed``: a promise was broken.
Status = Literal["measured", "invalid", "withheld", "skipped", "failed"]


@dataclasses.dataclass(frozen=True)
class Gate:
    """One check against false assurance.

    Attributes:
      name: In a few words, such as ``gradients not masked``.
      passed: Whether it held.
      detail: The figures it was judged by, in one sentence.
    """

    name: str
    passed: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a plot; all curves of an outcome share its axes.

    Attributes:
      label: In the legend.
      x: Abscissae, finite.
      y: Ordinates, as many, finite.
      dashed: Drawn so: for what the others are compared with.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture of an outcome.

    Attributes:
      title: Of the plot.
      x_label: With unit.
      y_label: With unit.
      curves: At least one.
      log: Both axes are logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One figure of a card, of the deployed model unless it says otherwise.

    Attributes:
      name: Of the figure, unique in the evaluation, such as ``worst case, L-inf 0.1``.
      metric: What the value is, such as ``accuracy`` or ``TPR at 0.1 % FPR``.
      value: The figure; None if there is none.
      unit: Of the value: ``share`` (shown in percent), ``dB``, ``epsilon``, ``AUC``, ``count``.
      twin: The same figure of the float twin; None where there is none.
      interval: Confidence interval of the value, (low, high), and ``confidence`` its level.
      bound: Which side of the truth the value is on.
      status: Whether it may be relied on. A failed gate makes ``measured`` ``invalid``.
      reason: Why the status is not ``measured``.
      threat: What the attacker knows and can do, in one sentence.
      budget: What was spent: steps, restarts, queries, shadow models, examples.
      gates: Checks against false assurance.
      details: Further figures, JSON-ready; a list of mappings is shown as a table.
      plot: A picture, or None.

    Example:
      >>> gate = Gate("gradients not masked", False, "97 % of the gradients are zero")
      >>> Outcome(name="PGD", metric="accuracy", value=0.95, gates=(gate,)).status
      'invalid'
    """

    name: str
    metric: str
    value: float | None = None
    unit: str = "share"
    twin: float | None = None
    interval: tuple[float, float] | None = None
    confidence: float = 0.95
    bound: Bound = "estimate"
    status: Status = "measured"
    reason: str = ""
    threat: str = ""
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plot: Plot | None = None

    def __post_init__(self) -> None:
        failed = [gate for gate in self.gates if not gate.passed]
        if failed and self.status == "measured":
            object.__setattr__(self, "status", "invalid")
            object.__setattr__(self, "reason", "; ".join(gate.detail for gate in failed))

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values; the inverse of :meth:`from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Outcome:
        """Return the outcome of :meth:`to_json`, or of its JSON."""
        plain = dict(values)
        interval, plot = plain["interval"], plain["plot"]
        plain["interval"] = None if interval is None else (interval[0], interval[1])
        plain["gates"] = tuple(Gate(**gate) for gate in plain["gates"])
        if plot is not None:
            curves = tuple(
                Curve(c["label"], tuple(c["x"]), tuple(c["y"]), c["dashed"]) for c in plot["curves"]
            )
            plain["plot"] = Plot(**{**plot, "curves": curves})
        return cls(**plain)
