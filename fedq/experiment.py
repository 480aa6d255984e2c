"""An experiment: everything that decides a run, as one frozen value."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from fedq import registry
from fedq.budgets.base import bits_of
from fedq.codecs.error_feedback import ErrorFeedback
from fedq.errors import ConfigError, unknown
from fedq.training_config import TrainingConfig

#: Experiment fields that hold a registered object, and the group each is chosen from.
CHOICES: dict[str, str] = {
    "model": "model",
    "data": "data",
    "partition": "partition",
    "quantization": "quantization",
    "pruning": "pruning",
    "read_out": "read_out",
    "codec": "codec",
    "downlink": "codec",
    "aggregator": "aggregator",
    "server_optimizer": "server_optimizer",
    "server_distillation": "server_distillation",
    "guard": "guard",
    "attack": "attack",
    "privacy": "privacy",
    "secure_aggregation": "secure_aggregation",
    "fleet": "fleet",
    "pacing": "pacing",
    "budget": "budget",
    "topology": "topology",
    "engine": "engine",
}
#: Choices that a float baseline is without, beside codecs and quantization.
COMPRESSION = ("pruning", "server_distillation", "read_out")
DEFAULT_CLIENTS = 50
#: What the exact sum of the mean can weigh one update with.
MAX_WEIGHT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A federation, its data and what crosses its wire.

    Attributes:
      name: Label in tables and plots.
      rounds: Rounds of federated training.
      seed: The one seed; every random choice derives from it.
      clients: Clients in the federation; ``None`` is 50, or one per client id of a data set with a
        natural partition.
      clients_per_round: Sampled per round: a count (int) or a fraction of the clients (float).
      local_epochs: Epochs of local training per round.
      batch_size: Examples per local step.
      learning_rate: Local step size of SGD.
      learning_rate_end: Share of the learning rate that the last round has; it falls linearly.
        At a constant rate (1) FedAvg stays away from the optimum, the farther the higher the rate
        (Li et al. 2020, ICLR, "On the convergence of FedAvg on non-IID data", theorem 4).
      momentum: Local momentum, fresh in every round.
      weight_decay: Local L2 penalty.
      proximal_mu: FedProx pull towards the global model (Li et al. 2020); 0 is FedAvg.
      max_grad_norm: Local gradient clipping; 0 is off.
      adversarial_eps: Adversarial training: largest change of an input; 0 is off.
      adversarial_steps: Gradients that the local attacker has per batch.
      trades_beta: Weight of TRADES' divergence (Zhang et al. 2019); 0 is PGD training.
      weighting: How an update counts: by the examples that its client claims, by no more than it
        first claimed (``registered``), or all alike.
      max_examples: A client's claim of examples is clamped to this.
      quorum: Fraction of the sampled clients that must succeed for the round to count.
      round_deadline_s: Seconds after which a round closes with the replies at hand; None waits.
      downlink_history: Rounds for which the server remembers what it sent, so that a client which
        still holds a model gets only the changes; 0 sends the whole model always.
      uplink_context: Whether a client that gets changes alone may code its update beside them;
        ``dtcq`` gains a little by it, codecs without prediction nothing.
      decode_threads: Threads of the server that decode replies; 0 is one per usable core, 4
        at most.
      server_memory_gb: What a deployed server's process may allocate; None is no limit.
      evaluate_every: Rounds between evaluations of the global model; the last is always evaluated.
      baseline: Whether to run the float experiment beside this one.
      run_dir: Where results go; ``None`` is a new directory under ``runs/``.
      resume: Run directory to continue.
      width_by: What decides which of ``quantization.widths`` a client has: its number, or how fast
        its device trains beside the fleet's median.
      sealed: Whether the server signs its requests, and clients sign and encrypt their replies.
      keys: The server's directory of keys (see ``fedq keys``); ``None`` simulates keys, too.
      plugins: Python files of the user's own registered objects; never taken from a peer.
      trackers: Services that get a copy of each round's figures, such as ``tensorboard``.
    """

    name: str
    rounds: int
    seed: int
    clients: int | None
    clients_per_round: int | float
    local_epochs: int
    batch_size: int
    learning_rate: float
    learning_rate_end: float
    momentum: float
    weight_decay: float
    proximal_mu: float
    max_grad_norm: float
    adversarial_eps: float
    adversarial_steps: int
    trades_beta: float
    weighting: typing.Literal["examples", "registered", "uniform"]
    max_examples: int
    quorum: float
    round_deadline_s: float | None
    downlink_history: int
    uplink_context: bool
    decode_threads: int
    server_memory_gb: float | None
    evaluate_every: int
    baseline: bool
    run_dir: str | None
    resume: str | None
    width_by: typing.Literal["number", "speed"]
    sealed: bool
    keys: str | None
    plugins: tuple[str, ...]
    trackers: tuple[str, ...]
    model: Any = field()
    data: Any = field()
    partition: Any = field()
    quantization: Any = field()
    pruning: Any = field()
    read_out: Any = field()
    codec: Any = field()
    downlink: Any = field()
    aggregator: Any = field()
    server_optimizer: Any = field()
    server_distillation: Any = field()
    guard: Any = field()
    attack: Any = field()
    privacy: Any = field()
    secure_aggregation: Any = field()
    fleet: Any = field()
    pacing: Any = field()
    budget: Any = field()
    topology: Any = field()
    engine: Any = field()

    def __post_init__(self) -> None:
        _ = self.training  # checks its own options
        _check(self.run_dir != "", "run_dir must be a path or null", "empty")
        _check(self.keys != "", "keys must be a path or null", "empty")
        for tracker in self.trackers:
            registry.lookup("tracker", tracker)
        _check(self.rounds >= 1, "rounds must be at least 1", self.rounds)
        _check(
            0 < self.learning_rate_end <= 1,
            "learning_rate_end must be a share in (0, 1]",
            self.learning_rate_end,
        )
        _check(self.seed >= 0, "seed must not be negative", self.seed)
        _check(
            self.clients is None or self.clients >= 1, "clients must be at least 1", self.clients
        )
        _check(
            self.clients_per_round > 0
            and (isinstance(self.clients_per_round, int) or self.clients_per_round <= 1),
            "clients_per_round must be a count of at least 1 or a fraction in (0, 1]",
            self.clients_per_round,
        )
        _check(0 < self.quorum <= 1, "quorum must be in (0, 1]", self.quorum)
        _check(
            self.round_deadline_s is None or self.round_deadline_s > 0,
            "round_deadline_s must be positive seconds, or null",
            self.round_deadline_s,
        )
        _check(
            0 <= self.downlink_history <= 1000,
            "downlink_history must be 0 to 1000 rounds",
            self.downlink_history,
        )
        _check(
            1 <= self.max_examples < MAX_WEIGHT,
            f"max_examples must be at least 1 and below {MAX_WEIGHT}",
            self.max_examples,
        )
        _check(
            not isinstance(self.downlink, ErrorFeedback),
            "downlink cannot feed errors back: the server keeps the float model itself;"
            " choose the inner codec",
            self.downlink.name,
        )
        _check(
            0 <= self.decode_threads <= 256,
            "decode_threads must be 0 (all cores) to 256",
            self.decode_threads,
        )
        _check(
            self.server_memory_gb is None or 0 < self.server_memory_gb < 1e6,
            "server_memory_gb must be positive, or null",
            self.server_memory_gb,
        )
        if self.attack.fraction > 0:
            _check(
                not self.uplink_context,
                "attack needs uplink_context=false: it decodes replies on their own",
                self.uplink_context,
            )
            _check(
                not (self.sealed or self.secure_aggregation.integers or self.privacy.integers),
                "attack rewrites a codec's payloads; it needs sealed=false, "
                "secure_aggregation=none and a privacy mechanism that leaves the codec's",
                "sealed, masked or integer updates",
            )
        self.privacy.check(self)
        self._check_fleet()
        self._check_topology()
        _check(
            self.width_by == "number" or len(self.quantization.variants) > 1,
            "width_by=speed chooses among quantization.widths: give two or more",
            list(self.quantization.variants),
        )
        if self.pruning.active:
            self._check_pruning()
        _check(
            self.server_distillation.examples == 0
            or not (
                self.secure_aggregation.integers
                or self.privacy.unit is not None
                or self.pacing.asynchronous
            ),
            f"server_distillation={self.server_distillation.name} asks each client's model of a "
            "round; it needs privacy=none, secure_aggregation=none and a synchronous pacing",
            f"{self.privacy.name}, {self.secure_aggregation.name} and {self.pacing.name}",
        )
        _check(
            len(self.quantization.variants) == 1
            or not (self.sealed or self.secure_aggregation.integers),
            "sealed=true and secure_aggregation need clients of one kind; quantization.widths must "
            "be empty",
            list(self.quantization.variants),
        )
        if self.secure_aggregation.integers:
            self._check_sums()
        if cohort := self._cohort():
            sums = self.secure_aggregation.integers and self.secure_aggregation.groups(cohort, 0)
            self.aggregator.check(len(sums) if sums else self.pacing.expected(cohort))
        _check(self.evaluate_every >= 1, "evaluate_every must be at least 1", self.evaluate_every)

    def _check_fleet(self) -> None:
        """Refuse what needs a clock without one, and what does not go with a fleet."""
        _check(
            self.fleet.timed or not self.pacing.timed,
            f"pacing={self.pacing.name} counts simulated time: choose a fleet, such as "
            "fleet=pi_shelf",
            f"fleet={self.fleet.name}",
        )
        _check(
            self.fleet.availability.slot_s is None or self.privacy.unit is None,
            "privacy accounts for cohorts that it knows ahead; fleet.availability must be always",
            self.fleet.availability.name,
        )
        whole_cohort = not self.pacing.asynchronous and not self.pacing.timed
        _check(
            whole_cohort or not self.secure_aggregation.integers,
            "secure_aggregation needs pacing=synchronous without deadline and over-selection",
            self.pacing.name,
        )
        _check(
            whole_cohort or self.pacing.asynchronous or self.attack.fraction == 0,
            "attack sees a whole cohort or buffer: it needs pacing.deadline_s=null and "
            "pacing.over_selection=1, or pacing=fedbuff",
            registry.describe(self.pacing),
        )
        _check(
            not self.pacing.asynchronous
            or not (self.sealed or self.uplink_context or self.privacy.unit is not None),
            "pacing=fedbuff needs sealed=false, uplink_context=false and privacy=none, which bind "
            "replies to one round",
            self.pacing.name,
        )
        _check(
            self.budget.fixed
            or not (
                self.sealed
                or self.secure_aggregation.integers
                or self.privacy.integers
                or self.attack.fraction
            ),
            f"budget={self.budget.name} names a codec to each client; it needs sealed=false, "
            "secure_aggregation=none, attack=none and a privacy mechanism that leaves the codec's "
            "payloads",
            self.budget.name,
        )
        if not self.budget.fixed:
            bits_of(self.codec)

    def _check_topology(self) -> None:
        """Refuse what needs single updates, or one answer to each, where edges sum them."""
        if self.topology.flat:
            return
        topology = f"topology={self.topology.name}"
        _check(
            self.aggregator.name == "mean",
            f"{topology} sums updates on their way, and the server sees none alone; it needs "
            "aggregator=mean",
            self.aggregator.name,
        )
        _check(
            not (self.sealed or self.secure_aggregation.integers),
            f"{topology} decodes replies before they reach the server's keys; it needs "
            "sealed=false and secure_aggregation=none",
            "sealed or masked updates",
        )
        _check(
            self.privacy.name == "none",
            f"{topology} has no account of noise and clipping on the way; it needs privacy=none",
            self.privacy.name,
        )
        _check(
            not self.pacing.asynchronous,
            f"{topology} forwards once per round; it needs pacing=synchronous",
            self.pacing.name,
        )
        _check(
            not self.pruning.active and self.server_distillation.examples == 0,
            f"{topology} sums whole updates and keeps none; it needs pruning=none and "
            "server_distillation=none",
            f"{self.pruning.name} and {self.server_distillation.name}",
        )

    def _check_pruning(self) -> None:
        """Refuse what does not go with a mask that changes from round to round."""
        pruning = f"pruning={self.pruning.name}"
        _check(
            self.quantization.has_zero,
            f"{pruning} needs weights that can be zero on the device; quantization.weights must be "
            "a scheme with a zero, such as linear or lsq",
            registry.describe(self.quantization),
        )
        _check(
            self.attack.fraction == 0
            and self.privacy.unit is None
            and not self.pacing.asynchronous,
            f"{pruning} sends what is left of a model, by the round's mask: it needs attack=none, "
            "privacy=none and a pacing whose clients train one round's model",
            f"{self.attack.name}, {self.privacy.name} and {self.pacing.name}",
        )

    def _check_sums(self) -> None:
        """Refuse what does not go with sums of integers."""
        mode = f"secure_aggregation={self.secure_aggregation.name}"
        _check(
            not isinstance(self.codec, ErrorFeedback),
            f"{mode} sends integers of a grid in place of the codec's payloads, and feeds no "
            "errors back; choose another codec, or secure_aggregation=none",
            self.codec.name,
        )
        _check(
            not self.uplink_context,
            f"{mode} does not code beside earlier models; uplink_context must be false",
            self.uplink_context,
        )
        self.secure_aggregation.check(
            clients=self._cohort(),
            max_weight=1 if self.weighting == "uniform" else self.max_examples,
            aggregator=self.aggregator.name,
            privacy=self.privacy,
        )

    def _cohort(self) -> int | None:
        """Return how many clients a round asks, None if that follows from the data."""
        cohort = self.clients_per_round
        if isinstance(cohort, int):
            return cohort if self.clients is None else min(cohort, self.clients)
        return None if self.clients is None else max(1, round(cohort * self.clients))

    @property
    def training(self) -> TrainingConfig:
        """How clients train."""
        names = [f.name for f in dataclasses.fields(TrainingConfig)]
        return TrainingConfig(**{name: getattr(self, name) for name in names})

    def training_in(self, round: int) -> TrainingConfig:
        """Return how clients train in a round, counted from 1."""
        if self.learning_rate_end == 1 or self.rounds == 1:
            return self.training
        done = min((round - 1) / (self.rounds - 1), 1.0)
        rate = self.learning_rate * (1 - done * (1 - self.learning_rate_end))
        return dataclasses.replace(self.training, learning_rate=rate)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Experiment:
        """Build from plain data (YAML, JSON); the inverse of :meth:`to_config`.

        Raises:
          ConfigError: On a missing, unknown or ill-typed entry, naming the nearest valid one.
        """
        hints = field_types()
        for key in config:
            if key not in hints:
                raise unknown("option", key, hints)
        values: dict[str, Any] = {}
        for key, hint in hints.items():
            if key not in config:
                raise ConfigError(f"the configuration has no '{key}'")
            if key in CHOICES:
                values[key] = registry.from_config(CHOICES[key], config[key], where=key)
            else:
                values[key] = registry.convert(config[key], hint, key)
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_config` reads."""
        return {
            f.name: registry.to_config(value)
            if f.name in CHOICES
            else list(value)
            if isinstance(value, tuple)
            else value
            for f in dataclasses.fields(self)
            for value in [getattr(self, f.name)]
        }

    def replace(self, **changes: Any) -> Experiment:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@cache
def field_types() -> dict[str, Any]:
    """Return every experiment option with its type."""
    hints = typing.get_type_hints(Experiment)
    return {f.name: hints[f.name] for f in dataclasses.fields(Experiment)}


def _check(condition: bool, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{rule}, not {value}")
