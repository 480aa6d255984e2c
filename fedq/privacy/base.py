"""What a privacy mechanism is: what clients do to updates, what the server adds, what it costs."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedq import registry
from fedq.aggregators.base import Aggregator, Stream
from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.privacy._entropy import Entropy
from fedq.privacy._ledger import Ledger, Rdp, dp_accounting, rdp_epsilon, smallest
from fedq.random import derive

if TYPE_CHECKING:
    from fedq.experiment import Experiment

#: Said of every run whose noise an adversary could make again.
SEEDED = "noise was seeded: for experiments only"


PREFIX = "privacy."  #: of tensors in a checkpoint


@dataclass(frozen=True)
class Round:
    """What both ends know of a round.

    Attributes:
      number: From 1.
      seed: The run's.
      cohort: Clients that were asked.
      size: Coordinates of an update, d.
      batch_size: Examples per local step, where the mechanism depends on it.
      epochs: Of local training, likewise.
    """

    number: int
    seed: int
    cohort: int
    size: int
    batch_size: int = 1
    epochs: int = 1


@dataclass(frozen=True)
class Protected:
    """An update as it leaves a client.

    Attributes:
      delta: (d,) float32, for the codec.
      codes: Packed noisy integers, sent in place of the codec's payload.
      within: Whether the update needed no clipping, if the server asks.
    """

    delta: Vector
    codes: bytes | None = None
    within: bool | None = None


@dataclass(frozen=True)
class Contribution:
    """What the server knows of one update that a released sum holds."""

    client: int
    examples: int
    within: bool | None = None


@dataclass(frozen=True)
class PrivacyState:
    """What the next round's privacy depends on; part of a checkpoint.

    Attributes:
      clip: Bound on an update's Euclidean norm.
      noise_multiplier: As given, or as calibrated to the budget at the start.
      ledger: What clients have spent.
    """

    clip: float
    noise_multiplier: float
    ledger: Ledger = dataclasses.field(default_factory=Ledger)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return what a checkpoint holds as tensors; :meth:`load` reads them."""
        return {
            PREFIX + "clients": self.ledger.clients,
            PREFIX + "releases": self.ledger.releases,
            PREFIX + "rdp": self.ledger.rdp,
            PREFIX + "steps": self.ledger.steps,
            PREFIX + "share": self.ledger.share,
        }

    def meta(self) -> dict[str, float]:
        """Return what a checkpoint holds as JSON."""
        return {"clip": self.clip, "noise_multiplier": self.noise_multiplier}

    @classmethod
    def load(
        cls, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, float] | None
    ) -> PrivacyState | None:
        """Return the state of a checkpoint, None if it has none."""
        if meta is None:
            return None
        columns = "clients", "releases", "rdp", "steps", "share"
        named = (tensors[PREFIX + name] for name in columns)
        return cls(meta["clip"], meta["noise_multiplier"], Ledger(*named))


class Privacy:
    """How updates are protected; frozen, registered, chosen by ``privacy=``.

    This class is no protection at all; mechanisms derive from :class:`Mechanism`.
    """

    group: ClassVar[str] = "privacy"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: Whose data is protected, None for no guarantee.
    unit: ClassVar[str | None] = None
    #: Whether clients send packed integers in place of a codec's payload.
    integers: ClassVar[bool] = False
    #: Whether all updates weigh the same, as a bound on each one's part in the sum needs.
    uniform: ClassVar[bool] = False
    #: Whether noise derives from the run's seed, and is no secret.
    seeded: bool = False
    #: Whether clients say if their updates were clipped.
    asks_within: ClassVar[bool] = False

    def check(self, experiment: Experiment) -> None:
        """Refuse an experiment under which the mechanism guarantees nothing."""
        return

    def initial(self) -> PrivacyState | None:
        """Return the state before the first round."""
        return None

    def at(self, state: PrivacyState | None) -> Self:
        """Return the mechanism as it stands in the next round."""
        return self

    def about(
        self, number: int, seed: int, cohort: int, size: int, task: Mapping[str, Any]
    ) -> Round:
        """Return what both ends know of a round; ``task`` is what else a request says."""
        return Round(number, seed, cohort, size)

    def request(self, about: Round) -> Mapping[str, Any]:
        """Return what a request says of privacy, JSON-ready."""
        return {}

    def entropy(self, about: Round, client: int | None = None) -> Entropy:
        """Return the randomness of noise: the server's, or a client's."""
        return Entropy()

    # --- on a client ---------------------------------------------------------------------------

    def refusal(self, examples: int, about: Round) -> str | None:
        """Return why a client with so many examples takes no part, None if it does."""
        return None

    def protect(self, delta: Vector, about: Round, entropy: Entropy) -> Protected:
        """Return a trained (d,) update as it may leave the client."""
        return Protected(delta)

    # --- on the server -------------------------------------------------------------------------

    def stream(
        self, aggregator: Aggregator, about: Round, capacity: int, reference: Vector | None = None
    ) -> Stream:
        """Return where the round's updates, or as many sums of them as ``capacity``, go.

        ``reference`` is the server's own update, (d,) float32.
        """
        return aggregator.stream(about.size, capacity, reference)

    def received(self, delta: Vector) -> Vector:
        """Return a decoded (d,) float32 update with what the server itself enforces."""
        return delta

    def unpack(self, payload: bytes | memoryview, about: Round) -> NDArray[np.int64]:
        """Return the integers of a payload; only asked of mechanisms with ``integers``."""
        raise NotImplementedError

    def release(self, mean: NDArray[Any], replies: int, about: Round, entropy: Entropy) -> Vector:
        """Return what the round publishes, (d,) float32, from the stream's result."""
        return np.asarray(mean, np.float32)

    def after(
        self,
        state: PrivacyState | None,
        accepted: Sequence[Contribution],
        about: Round,
        entropy: Entropy,
    ) -> PrivacyState | None:
        """Return the state after a round whose sum was released."""
        return state

    def calibrated(
        self, state: PrivacyState | None, releases: int, needed: int, about: Round
    ) -> PrivacyState | None:
        """Return the first state with the least noise for ``releases`` of one client.

        Args:
          state: Before the first round.
          releases: Rounds that the client asked most often is asked in.
          needed: Updates below which a round releases nothing.
          about: Seed, cohort and size.
        """
        return state

    def exhausted(
        self, state: PrivacyState | None, clients: Sequence[int | None], needed: int, about: Round
    ) -> bool:
        """Whether a round with these clients could exceed the budget.

        Args:
          state: Before the round.
          clients: Whom it would ask; None for one that was never heard.
          needed: Updates below which it would release nothing.
          about: The round.
        """
        return False

    def report(self, state: PrivacyState | None) -> dict[str, Any] | None:
        """Return what a line of ``rounds.jsonl`` says, None without a guarantee."""
        return None

    def statement(
        self, state: PrivacyState | None, clients: int, *, masked: bool = False
    ) -> dict[str, Any]:
        """Return what the summary says; nothing without a guarantee.

        Args:
          state: After the last round.
          clients: In the federation.
          masked: Whether secure aggregation showed the server sums only.
        """
        return {}


def positive(value: float | None, option: str, advice: str) -> None:
    """Refuse what is not a finite positive number."""
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"privacy.{option} must be finite and positive, not {value}; {advice}")


@dataclass(frozen=True, kw_only=True)
class Mechanism(Privacy):
    """A mechanism with noise, a clipping bound and a budget: what all of them share.

    Args:
      clip: Bound on the Euclidean norm of what one unit of privacy adds to a sum.
      noise_multiplier: z, the noise's standard deviation in units of the bound.
      epsilon: Budget: the run stops before it is exceeded; without ``noise_multiplier`` it also
        decides the least noise with which all rounds can be run.
      delta: The probability for which epsilon may not hold; below one over the number of clients.
      seeded: Whether noise derives from the run's seed. It is then no secret: for experiments that
        must be repeatable. Devices refuse it.
    """

    clip: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    seeded: bool = False

    #: What is true only under these conditions.
    assumptions: ClassVar[tuple[str, ...]] = ()
    relation: ClassVar[str]
    against: ClassVar[str]
    accountant: ClassVar[str] = "RDP"

    def __post_init__(self) -> None:
        positive(self.clip, "clip", "a median norm of updates is a good start")
        positive(
            self.noise_multiplier, "noise_multiplier", "0.5 to 2 is usual; privacy=none is no noise"
        )
        positive(self.epsilon, "epsilon", "1 to 10 is usual, null is no budget")
        if not 0 < self.delta < 1:
            raise ConfigError(
                f"privacy.delta must be in (0, 1), not {self.delta}; choose it below one over the "
                "number of clients, such as 1e-5"
            )
        if self.noise_multiplier is None and self.epsilon is None:
            raise ConfigError(
                f"privacy={self.name} needs privacy.noise_multiplier (such as 1) or a budget, "
                "privacy.epsilon (such as 8)"
            )

    def initial(self) -> PrivacyState:
        """Return the state before the first round; noise that is to be calibrated is infinite."""
        dp_accounting()
        return PrivacyState(self.clip, self.noise_multiplier or math.inf)

    def at(self, state: PrivacyState | None) -> Self:
        """Return the mechanism with the round's own bound and noise."""
        assert state is not None
        multiplier = state.noise_multiplier if math.isfinite(state.noise_multiplier) else None
        return dataclasses.replace(self, clip=state.clip, noise_multiplier=multiplier)

    def request(self, about: Round) -> Mapping[str, Any]:
        """Return the round's mechanism, and among how many the noise may be shared."""
        return {"privacy": registry.to_config(self), "cohort": about.cohort}

    @property
    def sigma(self) -> float:
        """The noise multiplier, which :meth:`at` has settled."""
        if self.noise_multiplier is None:
            raise ConfigError("the noise is not calibrated yet; give privacy.noise_multiplier")
        return self.noise_multiplier

    def entropy(self, about: Round, client: int | None = None) -> Entropy:
        """Return the randomness of noise: the operating system's, or seeded if asked."""
        if not self.seeded:
            return Entropy()
        who: tuple[int, ...] = () if client is None else (client,)
        return Entropy(derive(about.seed, about.number, *who, "privacy"))

    def epsilon_of(self, rdp: Rdp) -> float:
        """Return the epsilon of a total, (orders,)."""
        return rdp_epsilon(rdp, self.delta)

    def spent(self, ledger: Ledger) -> float:
        """Return an epsilon that no client exceeds."""
        return self.epsilon_of(ledger.worst())

    def report(self, state: PrivacyState | None) -> dict[str, Any]:
        """Return the running epsilon, and what it is of."""
        assert state is not None
        return {
            "epsilon": self.spent(state.ledger),
            "delta": self.delta,
            "unit": self.unit,
            "releases": int(state.ledger.releases.max(initial=0)),
            "clip": state.clip,
            "noise_multiplier": state.noise_multiplier,
        }

    def statement(
        self, state: PrivacyState | None, clients: int, *, masked: bool = False
    ) -> dict[str, Any]:
        """Return mechanism, guarantee and conditions, in words that can stand alone."""
        caveats = [SEEDED] if self.seeded else []
        if self.delta >= 1 / clients:
            caveats.append(f"delta is not below 1 / {clients} clients: it may hide a whole client")
        return {
            "mechanism": self.name,
            **self.report(state),
            "budget": self.epsilon,
            "relation": self.relation,
            "against": self.against,
            "accountant": self.accountant,
            "assumptions": list(self.assumptions),
            "caveats": caveats,
        }


@dataclass(frozen=True, kw_only=True)
class ClientLevel(Mechanism):
    """A mechanism whose unit of privacy is a client: all that it ever sends."""

    unit: ClassVar[str | None] = "client"
    uniform: ClassVar[bool] = True
    relation: ClassVar[str] = (
        "zero-out: one client's term in the sum is replaced by zero in every round that asks it"
    )
    assumptions: ClassVar[tuple[str, ...]] = (
        "who is asked in which round is known to the adversary: no amplification by sampling is"
        " claimed, and a client pays for the rounds that hold its update",
        "whether a client answers does not depend on its data",
    )

    def check(self, experiment: Experiment) -> None:
        """Refuse rules whose result one client can move without a bound, and cohorts of one."""
        if experiment.aggregator.name != "mean":
            raise ConfigError(
                f"privacy={self.name} adds noise to a sum; choose aggregator=mean: how far one "
                f"client moves {experiment.aggregator.name} has no bound in the clipping norm"
            )
        if experiment.clients_per_round == 1 and isinstance(experiment.clients_per_round, int):
            raise ConfigError(_ONE)

    def request(self, about: Round) -> Mapping[str, Any]:
        """Return the round's mechanism, and among how many the noise may be shared."""
        if about.cohort < 2:
            raise ConfigError(_ONE)
        return super().request(about)

    @abc.abstractmethod
    def rdp(self, replies: int, about: Round) -> Rdp:
        """Return what a released sum of ``replies`` updates costs each of them, (orders,)."""

    def after(
        self,
        state: PrivacyState | None,
        accepted: Sequence[Contribution],
        about: Round,
        entropy: Entropy,
    ) -> PrivacyState:
        """Return the state with a release in its ledger."""
        assert state is not None
        clients = [one.client for one in accepted]
        ledger = state.ledger.charged(clients, self.rdp(len(accepted), about))
        return dataclasses.replace(state, ledger=ledger)

    def calibrated(
        self, state: PrivacyState | None, releases: int, needed: int, about: Round
    ) -> PrivacyState:
        """Return the first state; its last release may hold no more than ``needed`` updates."""
        assert state is not None
        if self.epsilon is None or math.isfinite(state.noise_multiplier):
            return state
        budget, obstacles = self.epsilon, []

        def enough(noise_multiplier: float) -> bool:
            trial = dataclasses.replace(self, noise_multiplier=noise_multiplier)
            try:
                total = trial.rdp(needed, about)
                if releases > 1:
                    total = total + (releases - 1) * trial.rdp(about.cohort, about)
            except ConfigError as error:  # so little noise, or so much, that codes cannot carry it
                obstacles.append(error)
                return False
            return trial.epsilon_of(total) <= budget

        found = smallest(enough)
        if found is None:
            advice = "no noise reaches the budget; raise privacy.epsilon or privacy.delta"
            raise obstacles[0] if obstacles else ConfigError(advice)
        return dataclasses.replace(state, noise_multiplier=found)

    def exhausted(
        self, state: PrivacyState | None, clients: Sequence[int | None], needed: int, about: Round
    ) -> bool:
        """Whether a round with these clients could exceed the budget."""
        assert state is not None
        if self.epsilon is None:
            return False
        _, spent = state.ledger.of(clients)
        return self.epsilon_of(spent.max(axis=0) + self.rdp(needed, about)) > self.epsilon


_ONE = (
    "a cohort of one client is no crowd to hide in: its noisy update is released alone; raise "
    "clients_per_round to at least 2, or choose privacy=none"
)
