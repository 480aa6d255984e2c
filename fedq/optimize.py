"""A sweep whose cells Optuna chooses: more accuracy, fewer bytes; extra ``study``.

``hydra/sweeper=optuna`` in place of the grid, with Hydra's grammar for the space: a list or
``choice()`` is categorical, ``range()`` goes in steps, ``interval()`` is continuous, and
``tag(log, ...)`` and ``tag(int, ...)`` say how. (Hydra's own plug-in, hydra-optuna-sweeper 1.2,
needs an Optuna below 3.)

Trials are cells like any other. A search that goes on tells Optuna of the cells that are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from fedq import config, sweep
from fedq.errors import ConfigError
from fedq.random import derive
from fedq.threads import usable_cores

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Space = Mapping[str, "BaseDistribution"]


def search(
    base: Path, wanted: config.Search, display: sweep.Display, *, jobs: int | None = None
) -> list[sweep.Ended]:
    """Run trials until there are as many as wanted; return how they ended.

    Accuracy is maximised and bytes are minimised by Optuna's ``TPESampler``, seeded. Trials have no
    float baseline.

    Args:
      base: The sweep's directory.
      wanted: What to search.
      display: Shows progress.
      jobs: Trials at a time; None is as many as the cores allow.

    Raises:
      ConfigError: If Optuna is missing, or the space is none.
    """
    if find_spec("optuna") is None:
        raise ConfigError("hydra/sweeper=optuna needs Optuna: pip install -e '.[study]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {override.key_or_group: distribution(override) for override in wanted.space}
    earlier = [list(request) for request in _earlier(base, space)]
    seed = (
        derive(wanted.seed, len(earlier), "search") % 2**32
    )  # what went on does not repeat itself
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
    )
    ended = sweep.run(base, sweep.plan(base, earlier), display, jobs=jobs) if earlier else []
    for end in ended:
        if end.summary is not None:
            params = _params(end.cell.overrides, space)
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=dict(space), values=_values(end)
                )
            )
    while (left := wanted.trials - len(ended)) > 0:
        division = sweep.share([config.load(wanted.fixed)] * left, jobs, usable_cores())
        trials = [study.ask(dict(space)) for _ in range(division.jobs)]
        requests = [_request(wanted, trial.params) for trial in trials]
        batch = sweep.run(base, sweep.plan(base, requests), display, jobs=jobs)
        values = {end.cell.overrides: _values(end) for end in batch}
        for trial, request in zip(trials, requests, strict=True):
            found = values[tuple(request)]
            state = None if found else optuna.trial.TrialState.FAIL
            study.tell(trial, found, state=state)
        ended += batch
    return ended


def _request(wanted: config.Search, params: Mapping[str, Any]) -> list[str]:
    chosen = [f"{key}={value}" for key, value in params.items()]
    return [*wanted.fixed, "baseline=false", *chosen]


def _earlier(base: Path, space: Space) -> Iterator[tuple[str, ...]]:
    """Yield the trials that are there: overrides that name every option of the space."""
    for _, found in sweep.manifests(base):
        overrides = tuple(found["overrides"])
        if _params(overrides, space).keys() == space.keys():
            yield overrides


def _params(overrides: Sequence[str], space: Space) -> dict[str, Any]:
    """Return the options of the space that overrides set, as Optuna's distributions hold them."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, _, text in (override.partition("=") for override in overrides):
        if key in space:
            kind = space[key]
            read = int if isinstance(kind, IntDistribution) else float
            found[key] = text if isinstance(kind, CategoricalDistribution) else read(text)
    return found


def _values(end: sweep.Ended) -> list[float] | None:
    if end.summary is None:
        return None
    sent = end.summary["uplink_bytes"] + end.summary["downlink_bytes"]
    return [float(end.summary["accuracy"]), float(sent)]


def distribution(override: Override) -> BaseDistribution:
    """Return where Optuna looks for an option.

    Raises:
      ConfigError: If there is nothing between its bounds.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    tags: set[str] = getattr(value, "tags", set())
    try:
        if isinstance(value, IntervalSweep):
            if "int" in tags:
                low, high = int(value.start or 0), int(value.end or 0)
                return IntDistribution(low, high, log="log" in tags)
            return FloatDistribution(value.start or 0.0, value.end or 0.0, log="log" in tags)
        if isinstance(value, RangeSweep):
            steps = list(value.range())
            if not steps:
                raise ValueError("the range is empty")
            step = steps[1] - steps[0] if len(steps) > 1 else 1
            if all(isinstance(x, int) for x in steps):
                return IntDistribution(int(steps[0]), int(steps[-1]), step=int(step))
            return FloatDistribution(steps[0], steps[-1], step=step)
    except ValueError as error:
        raise ConfigError(f"cannot search '{override.input_line}': {error}") from error
    return CategoricalDistribution(config.values(override))
