"""Does the noise keep its promise? Canaries against whole rounds of a run's own mechanism."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from fedq import records  # noqa: F401  (sets what Flower reads at import)
from fedq.client import Task
from fedq.codecs.identity import Identity
from fedq.engines.stream import WrappedGrid
from fedq.errors import ConfigError
from fedq.layout import Layout, Vector
from fedq.privacy._ledger import gaussian_epsilon, gaussian_rdp
from fedq.privacy.audit import one_run_epsilon
from fedq.privacy.base import Mechanism
from fedq.random import derive, generator
from fedq.registry import register
from fedq.results import read_summary
from fedq.robustness.base import Evaluation, Family, Work
from fedq.robustness.outcome import Gate, Outcome
from fedq.robustness.subject import Subject
from fedq.strategy import FedQ

# isort: split
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

#: Of the fitted interval: a mechanism whose audit is tight stays below its claim this often.
CONFIDENCE = 0.999
#: Share of the claimed noise that the positive control runs with, the first that can be coded.
TOO_LITTLE = (0.1, 0.3)
_FIRST_NODE = 2
_LARGEST = 50_000


@register("evaluation", "dp_audit")
class DpAudit(Evaluation):
    """Audit of client-level differential privacy by canaries.

    The run's mechanism, with the bound and the noise that the run had, protects rounds of canary
    clients: each sends a random direction, ten times the bound, or nothing, by the toss of a coin.
    The auditor sees what the rounds release and correlates each canary with it. The empirical
    epsilon is that of the two normal distributions of scores (Andrew et al. 2024); a bound that
    needs no fit is beside it (Steinke et al. 2023). If either exceeds what the accountant states of
    the same releases, the promise is broken. Below it, nothing is proved: an audit finds faults,
    not their absence.

    Args:
      canaries: Clients with one canary each.
      rounds: Releases to audit at most; fewer than the run's are a weaker test, not a wrong one.
    """

    family: ClassVar[Family] = "privacy"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"canaries": 100, "rounds": 1})

    canaries: int = 400
    rounds: int = 10

    def __post_init__(self) -> None:
        if self.canaries < 50:
            raise ConfigError(f"canaries must be at least 50, not {self.canaries}")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, not {self.rounds}")

    def unsuitable(self, subject: Subject) -> str:
        """Name runs that promise nothing to clients."""
        privacy = subject.experiment.privacy
        if privacy.unit is None:
            return "the run promises no differential privacy (privacy=none)"
        if privacy.unit != "client":
            return (
                f"the promise is to each {privacy.unit}; canary clients audit promises to clients"
            )
        if "privacy" not in (read_summary(subject.path) or {}):
            return "the run has no summary that states its privacy"
        return ""

    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Run the rounds, and one with too little noise as a control."""
        stated = (read_summary(subject.path) or {})["privacy"]
        seed = derive(work.seed, "dp_audit")
        mechanism = dataclasses.replace(
            subject.experiment.privacy,
            clip=float(stated["clip"]),
            noise_multiplier=float(stated["noise_multiplier"]),
            epsilon=None,
            seeded=True,
        )
        size = min(sum(t.size for t in map(np.asarray, subject.tensors.values())), _LARGEST)
        releases = max(1, min(self.rounds, int(stated["releases"])))
        audit = _Audit(mechanism, self.canaries, size, releases, seed)
        found = audit.run()
        work.step(1, 2)
        control = _control(audit, found.claim)
        work.step(2, 2)
        return [_outcome(found, audit, stated, control)]


@dataclasses.dataclass(frozen=True)
class _Found:
    """What an audit saw.

    Attributes:
      claim: Epsilon that the accountant states of these releases.
      epsilon: Of the scores' distributions.
      low: Its interval.
      high: Likewise.
      bound: That the run exceeds at 95 %, from right guesses alone.
      guessed: The same for canaries that never took part.
    """

    claim: float
    epsilon: float
    low: float
    high: float
    bound: float
    guessed: float


@dataclasses.dataclass(frozen=True)
class _Audit:
    mechanism: Mechanism
    canaries: int
    size: int
    releases: int
    seed: int

    def canary(self, client: int) -> Vector:
        """Return a client's direction, of norm 1."""
        x = generator(derive(self.seed, client, "canary")).standard_normal(self.size)
        return (x / np.linalg.norm(x)).astype(np.float32)

    def run(self) -> _Found:
        """Run whole rounds of canaries through the client's and the server's code."""
        layout = Layout.flat(self.size)
        included = generator(derive(self.seed, "coins")).random(self.canaries) < 0.5
        directions = [self.canary(client) for client in range(self.canaries)]
        loud = np.float32(10 * self.mechanism.clip)  # clipping is a part of what is audited

        def answer(message: Message, client: int) -> Message:
            task = Task.open(message, layout)
            delta = directions[client] * (loud if included[client] else np.float32(0))
            return task.reply(delta, examples=1, client=client)

        strategy = FedQ(layout=layout, codec=Identity(), privacy=self.mechanism, seed=self.seed)
        state = strategy.initial(np.zeros(self.size, np.float32))
        grid = _Canaries(answer, self.canaries)
        for _ in range(self.releases):
            state, report = strategy.run_round(grid, state)
            if report.rejected:
                raise ConfigError(f"canaries were rejected: {report.reasons[0]}")
        report_of = self.mechanism.report(state.privacy)
        scores = np.array([direction @ state.weights for direction in directions])
        strangers = np.array(
            [self.canary(self.canaries + i) @ state.weights for i in range(self.canaries)]
        )
        delta = self.mechanism.delta
        guesses = self.canaries // 10 * 2
        return _Found(
            float(report_of["epsilon"]),
            *_fitted(scores[included], scores[~included], delta),
            one_run_epsilon(included, scores, guesses, delta),
            one_run_epsilon(included, strangers, guesses, delta, CONFIDENCE),
        )


def _control(audit: _Audit, claim: float) -> Gate:
    """Check that noise far below the claimed one is refuted."""
    assert audit.mechanism.noise_multiplier is not None
    problem = ""
    for share in TOO_LITTLE:
        noise = share * audit.mechanism.noise_multiplier
        broken = dataclasses.replace(audit.mechanism, noise_multiplier=noise)
        try:
            found = dataclasses.replace(audit, mechanism=broken, releases=1).run()
        except ConfigError as error:  # so little that its codes cannot carry it
            problem = str(error)
            continue
        # The claim of a single release with all of the noise is below that of several.
        return Gate(
            "positive control",
            found.low > claim or found.bound > claim,
            f"with {share:g} of the noise one release shows epsilon {found.low:.2f} or more, "
            f"above the claimed {claim:.2f}",
        )
    return Gate("positive control", False, f"no control could run: {problem}")


def _outcome(found: _Found, audit: _Audit, stated: Mapping[str, Any], control: Gate) -> Outcome:
    limit = found.claim
    whole = audit.releases == int(stated["releases"])
    if whole:
        limit = max(limit, float(stated["epsilon"]))
    broken = max(found.low, found.bound) > limit
    reason = (
        f"the audit proves epsilon {max(found.low, found.bound):.2f}, above {limit:.2f}"
        if broken
        else ""
    )
    return Outcome(
        name="canaries",
        metric="empirical epsilon",
        value=found.epsilon,
        unit="epsilon",
        interval=(found.low, found.high),
        confidence=CONFIDENCE,
        bound="lower",
        status="failed" if broken else "measured",
        reason=reason,
        threat=f"The adversary of the promise ({stated['against']}): it knows every canary, and "
        "sees what rounds release.",
        budget={
            "canaries": audit.canaries,
            "releases": audit.releases,
            "coordinates": audit.size,
            "delta": audit.mechanism.delta,
        },
        gates=(
            control,
            Gate(
                "negative control",
                found.guessed == 0.0,
                f"canaries that took no part show epsilon {found.guessed:.2f}",
            ),
        ),
        details={
            "accountant, of these releases": found.claim,
            "accountant, of the run": float(stated["epsilon"]),
            "releases of the run": int(stated["releases"]),
            "bound from guesses (95 %)": found.bound,
            "noise multiplier": audit.mechanism.noise_multiplier,
            "clip": audit.mechanism.clip,
        },
    )


def _fitted(
    inside: NDArray[Any], outside: NDArray[Any], delta: float
) -> tuple[float, float, float]:
    """Return the epsilon of two normal distributions of one variance, and its interval.

    With d the distance of means in deviations, it is that of a Gaussian release with noise
    multiplier 1 / d; d has standard error ``sqrt(1/m + 1/n + d**2 / (2 (m + n - 2)))``.

    Reference:
      Andrew et al. 2024, "One-shot empirical privacy estimation for federated learning", ICLR.
    """
    m, n = len(inside), len(outside)
    freedom = m + n - 2
    variance = ((m - 1) * inside.var(ddof=1) + (n - 1) * outside.var(ddof=1)) / freedom
    distance = float(inside.mean() - outside.mean()) / math.sqrt(max(float(variance), 1e-30))
    error = math.sqrt(1 / m + 1 / n + distance**2 / (2 * freedom))
    reach = float(ndtri((1 + CONFIDENCE) / 2)) * error

    def epsilon(d: float) -> float:
        return gaussian_epsilon(gaussian_rdp(1 / d), delta) if d > _NOTHING else 0.0

    return epsilon(distance), epsilon(distance - reach), epsilon(distance + reach)


_NOTHING = 1e-3


class _Canaries(WrappedGrid):
    """A grid whose nodes answer in this process."""

    def __init__(self, answer: Callable[[Message, int], Message], clients: int) -> None:
        self._answer, self._clients = answer, clients
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, numbered as the local engine does."""
        return range(_FIRST_NODE, _FIRST_NODE + self._clients)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes."""
        return [NodeInfo(node_id=node) for node in self.get_node_ids()]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield each node's answer."""
        for message in messages:
            yield self._answer(message, message.metadata.dst_node_id - _FIRST_NODE)
