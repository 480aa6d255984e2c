"""The server: an experiment over a grid, round by round, into a run directory."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedq import private_training, registry
from fedq.asynchronous import Waiting
from fedq.budgets.base import History
from fedq.capacity import Capacities, width_for
from fedq.client import TASK_KEY
from fedq.data.base import Dataset
from fedq.distillation import Member
from fedq.downlink import Broadcasts
from fedq.engines.adversary import Adversary
from fedq.errors import ConfigError, FedqError
from fedq.experiment import Experiment
from fedq.guard import GuardState
from fedq.keys import Credentials, SimulatedRoster, simulated
from fedq.layout import Vector
from fedq.metrics import metric_of
from fedq.models.cost import training_macs
from fedq.models.structure import without_empty_channels
from fedq.physics.clock import Clock
from fedq.privacy.base import PrivacyState
from fedq.pruning.base import Support
from fedq.quantization.footprint import footprint
from fedq.random import derive, generator
from fedq.results import RunDirectory, versions
from fedq.rounds import RoundReport, ServerRound, ServerState
from fedq.sealing import Sealing
from fedq.secure_server import SecureServer
from fedq.strategy import FedQ
from fedq.threads import usable_cores
from fedq.topologies import Topology
from fedq.trackers import tracking
from fedq.training import Trainer, trainer_for

# isort: split
from flwr.serverapp import Grid

LOG = logging.getLogger("fedq")
#: Called with every record of rounds.jsonl as it is written.
Observer = Callable[[Mapping[str, Any]], None]
#: That decode unless more are asked for: each holds an update, and what it is decoded from.
MOST_THREADS = 4
OPTIMIZER_PREFIX, BROADCAST_PREFIX, WAITING_PREFIX = "optimizer.", "broadcast.", "waiting."
#: Keys of a round's record that it has only where there is something to say.
OPTIONAL = frozenset(
    {
        *("privacy", "simulated_seconds", "joules", "joules_by_use"),
        *("wire_uplink_bytes", "wire_downlink_bytes"),
        *("edge_uplink_bytes", "edge_downlink_bytes", "edge_nmse"),
        *("codecs", "widths", "sparsity"),
    }
)


def run(
    grid: Grid,
    experiment: Experiment,
    dataset: Dataset,
    directory: RunDirectory,
    *,
    examples: ArrayLike | None = None,
    capacities: Callable[[], Capacities] | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Run an experiment over any Flower grid and return its summary.

    The test half of ``dataset`` judges the global model after each round: as deployed (quantized),
    and as its float twin. Every round is written and checkpointed before the next begins.

    Args:
      grid: Where clients are; :class:`fedq.engines.stream.StreamGrid` makes any of them stream.
      experiment: What to run.
      dataset: Gives shapes and the test set; training rows stay with the clients.
      directory: Where results go, locked by the caller; a checkpoint in it is continued.
      examples: Of simulated clients, (clients,) by place; without them there is no simulated fleet.
      capacities: Returns what real devices have measured of themselves, by node.
      observer: Sees each round's record.
    """
    with tracking(experiment.trackers, directory.path, experiment.name, directory.config) as track:

        def observe(record: Mapping[str, Any]) -> None:
            if observer is not None:
                observer(record)
            track(record)

        server = _Server(grid, experiment, dataset, directory, observe, examples, capacities)
        state = server.resumed() if directory.has_checkpoint() else server.started()
        while state.round < experiment.rounds and not server.exhausted(state):
            state = server.next_round(state)
        summary = server.finish(state)
        track(summary)
    return summary


def _secure(experiment: Experiment) -> SecureServer | None:
    """Return the server of the experiment's secure aggregation, None without."""
    mode = experiment.secure_aggregation
    if not mode.integers:
        return None
    return SecureServer(mode, _credentials(experiment))


def _credentials(experiment: Experiment) -> Credentials:
    if experiment.keys is None:
        return Credentials(simulated(experiment.seed), SimulatedRoster(experiment.seed))
    return Credentials.load(Path(experiment.keys).expanduser())


class _Server:
    def __init__(
        self,
        grid: Grid,
        experiment: Experiment,
        dataset: Dataset,
        directory: RunDirectory,
        observer: Observer,
        examples: ArrayLike | None = None,
        capacities: Callable[[], Capacities] | None = None,
    ) -> None:
        self.experiment, self.dataset, self.directory = experiment, dataset, directory
        self.observer = observer
        model = registry.to_config(experiment.model)
        quantization = registry.to_config(experiment.quantization)
        shape, outputs = list(dataset.input_shape), dataset.outputs
        variants = experiment.quantization.variants
        #: One per kind of client; all have the same weights.
        self.trainers: list[Trainer] = [
            trainer_for(
                model,
                quantization,
                shape,
                outputs,
                dataset.task,
                seed=derive(experiment.seed, "model"),
                variant=variant,
            )
            for variant in range(len(variants))
        ]
        self.trainer = self.trainers[0]
        if experiment.privacy.unit is not None:
            private_training.check(self.trainer, experiment.privacy)
        self.x_test, self.y_test = dataset.test_inputs(), dataset.y_test
        #: What shows whether a backdoor works; None without one.
        self.probe: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None
        if experiment.attack.fraction:
            self.probe = experiment.attack.probe(
                self.x_test, self.y_test, dataset.classes, dataset.high
            )
        self.grid = Adversary.around(grid, experiment, self.trainer.layout)
        self.strategy = FedQ(
            layout=self.trainer.layout,
            state_layout=self.trainer.state_layout,
            codec=experiment.codec,
            downlink=experiment.downlink,
            aggregator=experiment.aggregator,
            server_optimizer=experiment.server_optimizer,
            clients_per_round=experiment.clients_per_round,
            seed=experiment.seed,
            task={
                "model": model,
                "quantization": quantization,
                "input_shape": shape,
                "classes": outputs,
                "training": experiment.training.to_config(),
                **({} if dataset.classes else {TASK_KEY: dict(dataset.task)}),
            },
            schedule=lambda r: {"training": experiment.training_in(r).to_config()},
            weighting=experiment.weighting,
            max_examples=experiment.max_examples,
            quorum=experiment.quorum,
            deadline_s=experiment.round_deadline_s,
            history=experiment.downlink_history,
            initial=self.trainer.weights(),
            uplink_context=experiment.uplink_context,
            merge_rules=self.trainer.merge_rules,
            variants=variants,
            guard=experiment.guard,
            trusted=self._trusted,
            sealing=Sealing(_credentials(experiment)) if experiment.sealed else None,
            secure=_secure(experiment),
            threads=experiment.decode_threads or min(usable_cores(), MOST_THREADS),
            privacy=experiment.privacy,
            clock=self._clock(examples),
            pacing=experiment.pacing,
            budget=experiment.budget,
            topology=self._topology(examples),
            capacities=capacities,
            width=self._width(),
            pruning=experiment.pruning,
            structure=self.trainer.structure if experiment.pruning.active else None,
            refine=self._distilled if experiment.server_distillation.examples else None,
        )

    def _clock(self, examples: ArrayLike | None) -> Clock | None:
        """Return the clock of the experiment's fleet, None without a fleet."""
        fleet = self.experiment.fleet
        if not fleet.timed:
            return None
        if examples is None:
            raise ConfigError(f"fleet={fleet.name} is simulated; devices take fleet=none")
        macs = training_macs(self.trainer.model, self.dataset.input_shape)
        epochs = self.experiment.local_epochs
        work = float(macs * epochs) * np.asarray(examples, np.float64)
        return Clock(fleet, self.experiment.seed, work)

    def _topology(self, examples: ArrayLike | None) -> Topology:
        topology: Topology = self.experiment.topology
        if not topology.flat and examples is None:
            raise ConfigError(
                f"topology={topology.name} is simulated; devices take topology=star, and an edge "
                "of a real fleet is a server of its own"
            )
        return topology

    def _width(self) -> Callable[[float | None, float | None], int] | None:
        """Return the rule that names clients' widths, None where they choose."""
        if self.experiment.width_by == "number":
            return None
        return partial(width_for, self.experiment.quantization.widths)

    @cached_property
    def _root(self) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """The server's own examples, for a rule that trusts them."""
        return self._own_examples(self.experiment.aggregator.trusted_examples)

    @cached_property
    def _unlabelled(self) -> NDArray[np.float32]:
        """The server's own inputs, that clients' models are asked about."""
        return self._own_examples(self.experiment.server_distillation.examples)[0]

    def _own_examples(self, count: int) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return a seeded sample of the server's training half."""
        rows = len(self.dataset.y_train)
        rng = generator(derive(self.experiment.seed, "root"))
        chosen = np.sort(rng.choice(rows, min(count, rows), replace=False))
        return self.dataset.train_inputs(chosen), self.dataset.y_train[chosen]

    def _distilled(
        self, members: Sequence[Member], weights: Vector, state: Vector, current: ServerRound
    ) -> tuple[Vector, Vector]:
        """Let the aggregate learn from the clients' models."""
        first, *others = np.split(state, len(self.trainers))
        weights, first = self.experiment.server_distillation.refined(
            self.trainers,
            members,
            weights,
            first,
            self._unlabelled,
            derive(self.experiment.seed, current.report.round, "distillation"),
            current.support,
        )
        return weights, np.concatenate([first, *others])

    def _trusted(self, state: ServerState) -> Vector:
        """Train on the server's own examples as a client would; return the delta, (d,) float32."""
        self.trainer.load(state.weights, state.state[: self.trainer.state_layout.size])
        following = state.round + 1
        seed = derive(self.experiment.seed, following, "root")
        training = self.experiment.training_in(following)
        return self.trainer.train(*self._root, training, seed).delta

    def started(self) -> ServerState:
        """Return the state before round 1, judged and written as round 0."""
        states = np.concatenate([trainer.state() for trainer in self.trainers])
        state = self.strategy.initial(self.trainer.weights(), states)
        state = self.strategy.calibrated(self.grid, state, self.experiment.rounds)
        if self.exhausted(state):
            raise ConfigError(
                "the privacy budget does not allow a single round; raise privacy.epsilon, or leave "
                "out privacy.noise_multiplier so that the noise follows from the budget"
            )
        for caveat in self.strategy.statement(state).get("privacy", {}).get("caveats", ()):
            LOG.warning("privacy: %s", caveat)
        self.directory.truncate_rounds(after=-1)
        self._write(state, RoundReport(0), self._judge(state))
        return state

    def resumed(self) -> ServerState:
        """Return the state of the checkpoint; later lines of rounds.jsonl are dropped."""
        saved = self.directory.load_checkpoint(
            tensors=["weights", "state"],
            meta=[
                *("layout", "failures", "held", "strangers", "clients", "guard"),
                *("now_s", "waiting", "history"),
            ],
        )
        layout, state_layout = self.strategy.layout, self.strategy.states_layout
        fingerprint = layout.fingerprint.hex() + state_layout.fingerprint.hex()
        if saved.meta["layout"] != fingerprint:
            raise FedqError(
                f"the checkpoint in {self.directory.path} is of another model than its "
                "config.yaml; restore config.yaml, or start a new run"
            )
        self.directory.truncate_rounds(after=saved.round)
        optimizer = {
            name.removeprefix(OPTIMIZER_PREFIX): tensor
            for name, tensor in saved.tensors.items()
            if name.startswith(OPTIMIZER_PREFIX)
        }
        for record in self.directory.rounds():
            self.observer({**record, "resumed": True})
        return ServerState(
            saved.round,
            saved.tensors["weights"],
            saved.tensors["state"],
            optimizer,
            int(saved.meta["failures"]),
            Broadcasts(
                {
                    int(name.removeprefix(BROADCAST_PREFIX)): tensor.tobytes()
                    for name, tensor in saved.tensors.items()
                    if name.startswith(BROADCAST_PREFIX)
                },
                {int(node): held for node, held in saved.meta["held"].items()},
                frozenset(saved.meta["strangers"]),
            ),
            {int(node): client for node, client in saved.meta["clients"].items()},
            GuardState.from_meta(saved.meta["guard"]),
            PrivacyState.load(saved.tensors, saved.meta.get("privacy")),
            float(saved.meta["now_s"]),
            tuple(
                Waiting.from_meta(meta, saved.tensors[f"{WAITING_PREFIX}{i}"].tobytes())
                for i, meta in enumerate(saved.meta["waiting"])
            ),
            History.from_meta(saved.meta["history"]),
        )

    def exhausted(self, state: ServerState) -> bool:
        """Whether the next round could exceed the privacy budget."""
        return self.strategy.exhausted(self.grid, state)

    def next_round(self, before: ServerState) -> ServerState:
        """Run, judge and write one round."""
        state, report = self.strategy.run_round(self.grid, before)
        due = state.round % self.experiment.evaluate_every == 0
        last = state.round == self.experiment.rounds or self.exhausted(state)
        judged = self._judge(state) if due or last else {}
        self._write(state, report, judged)
        return state

    def _judge(self, state: ServerState) -> dict[str, Any]:
        start = time.perf_counter()
        states = np.split(state.state, len(self.trainers))
        for trainer, own in zip(self.trainers, states, strict=True):
            trainer.load(state.weights, own)
        deployed = [trainer.evaluate(self.x_test, self.y_test) for trainer in self.trainers]
        twin = self.trainer.evaluate(self.x_test, self.y_test, float_twin=True)
        metric = self.trainer.task.metric
        judged: dict[str, Any] = {
            metric.name: deployed[0].score,
            metric.float_name: twin.score,
            "loss": deployed[0].loss,
            "evaluation_seconds": time.perf_counter() - start,
        }
        if self.probe is not None:
            judged["attack_success"] = self.trainer.evaluate(*self.probe).score
            twin = self.trainer.evaluate(*self.probe, float_twin=True)
            judged["float_attack_success"] = twin.score
        if len(deployed) > 1:
            names = self.strategy.variants
            scores = [evaluation.score for evaluation in deployed]
            judged[f"{metric.name}_by_width"] = dict(zip(names, scores, strict=True))
        return judged

    def _write(self, state: ServerState, report: RoundReport, judged: dict[str, Any]) -> None:
        record = {**dataclasses.asdict(report), "rejected": dict(report.rejected), **judged}
        record["seconds"] += judged.get("evaluation_seconds", 0.0)
        if isinstance(self.grid, Adversary):
            record["attackers"] = self.grid.asked if report.round else 0
        record = {
            key: record[key] for key in record if key not in OPTIONAL or record[key] is not None
        }
        self.directory.append_round(record)
        tensors: dict[str, NDArray[Any]] = {"weights": state.weights, "state": state.state}
        tensors |= {OPTIMIZER_PREFIX + name: array for name, array in state.optimizer.items()}
        tensors |= {
            f"{BROADCAST_PREFIX}{sent}": np.frombuffer(payload, np.uint8)
            for sent, payload in state.broadcasts.sent.items()
        }
        layout, state_layout = self.strategy.layout, self.strategy.states_layout
        meta = {
            "layout": layout.fingerprint.hex() + state_layout.fingerprint.hex(),
            "failures": state.failures,
            "held": {str(node): held for node, held in state.broadcasts.held.items()},
            "strangers": sorted(state.broadcasts.strangers),
            "clients": {str(node): client for node, client in state.clients.items()},
            "guard": state.guard.to_meta(),
            "privacy": None,
            "now_s": state.now_s,
            "waiting": [waiting.to_meta() for waiting in state.waiting],
            "history": state.history.to_meta(),
        }
        tensors |= {
            f"{WAITING_PREFIX}{i}": np.frombuffer(waiting.content, np.uint8)
            for i, waiting in enumerate(state.waiting)
        }
        if state.privacy is not None:
            tensors |= state.privacy.tensors()
            meta["privacy"] = state.privacy.meta()
        self.directory.save_checkpoint(state.round, tensors, meta)
        self.observer(record)

    def finish(self, state: ServerState) -> dict[str, Any]:
        """Write model and summary."""
        tensors = self.trainer.layout.unflatten(state.weights)
        tensors |= self.strategy.states_layout.unflatten(state.state)
        digest = self.directory.save_model(tensors, self.strategy.task)
        summary = summarise(self.experiment, self.trainer.layout.size, self.directory.rounds())
        summary["model_sha256"] = digest
        self.trainer.load(state.weights, state.state[: self.trainer.state_layout.size])
        deployed = self.trainer.model
        if self.experiment.pruning.active:
            deployed = copy.deepcopy(deployed)
            summary["removed_channels"] = sum(without_empty_channels(deployed).values())
        summary |= footprint(deployed)
        summary |= self.strategy.statement(state)
        summary |= self._read_out(state)
        summary |= self.dataset.references
        if state.round < self.experiment.rounds:
            summary["stopped"] = (
                f"after {state.round} of {self.experiment.rounds} rounds: the next could exceed "
                f"the privacy budget of epsilon {self.experiment.privacy.epsilon}"
            )
            LOG.warning("stopped %s", summary["stopped"])
        self.directory.write_summary(summary)
        return summary

    def _read_out(self, state: ServerState) -> dict[str, Any]:
        """Make and write what each kind of client is served; return how good it is."""
        read_out, experiment = self.experiment.read_out, self.experiment
        if not read_out.examples:
            return {}
        x, _ = self._own_examples(read_out.examples)
        states = np.split(state.state, len(self.trainers))
        self.trainer.load(state.weights, states[0])
        taught = self.trainer.outputs(x, float_twin=True)
        variants = self.strategy.variants
        scores: dict[str, float] = {}
        for place, (name, trainer) in enumerate(zip(variants, self.trainers, strict=True)):
            trainer.load(state.weights, states[place])
            if experiment.pruning.active and state.round:
                trainer.prune(Support(trainer.layout, state.weights != 0))
            read_out.read(trainer, taught, x, derive(experiment.seed, place, "read out"))
            score = trainer.evaluate(self.x_test, self.y_test).score
            scores[name or "all"] = score
            quantization = experiment.quantization
            if name:
                quantization = quantization.replace(widths=(quantization.widths[place],))
            self.directory.save_read_out(
                name or "all",
                experiment.replace(quantization=quantization).to_config(),
                trainer.layout.unflatten(trainer.weights())
                | trainer.state_layout.unflatten(trainer.state()),
                self.strategy.task,
            )
        return {f"{self.trainer.task.metric.name}_read_out": scores}


def summarise(
    experiment: Experiment, parameters: int, rounds: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a run's summary from its rounds: sums of bytes that crossed, final accuracies."""
    total = {
        key: int(sum(record[key] for record in rounds))
        for key in (
            "uplink_bytes",
            "downlink_bytes",
            "float32_uplink_bytes",
            "float32_downlink_bytes",
            "received",
            "replies",
            "sampled",
        )
    }
    rejected: dict[str, int] = {}
    for record in rounds:
        for reason, count in record["rejected"].items():
            rejected[reason] = rejected.get(reason, 0) + count
    evaluated = [record for record in rounds if metric_of(record)]
    if not evaluated:
        raise FedqError("rounds.jsonl has no evaluated round; start the run again")
    judged = evaluated[-1]
    metric = metric_of(judged)
    assert metric is not None

    def bits(direction: str, messages: str) -> float:
        return 8 * total[direction] / (parameters * total[messages]) if total[messages] else 0.0

    some = (f"{metric.name}_by_width", "sparsity", "attack_success", "float_attack_success")
    physics = {
        key: math.fsum(record.get(key, 0.0) for record in rounds)
        for key in ("simulated_seconds", "joules", "wire_uplink_bytes", "wire_downlink_bytes")
        if experiment.fleet.timed
    }
    edges = {
        key: sum(record.get(key, 0) for record in rounds)
        for key in ("edge_uplink_bytes", "edge_downlink_bytes")
        if not experiment.topology.flat
    }
    return (
        {key: judged[key] for key in some if key in judged}
        | physics
        | edges
        | {
            "name": experiment.name,
            "metric": metric.name,
            metric.name: judged[metric.name],
            metric.float_name: judged[metric.float_name],
            f"best_{metric.name}": metric.best(record[metric.name] for record in evaluated),
            "loss": judged["loss"],
            "rounds": rounds[-1]["round"],
            "clients": experiment.clients,
            "parameters": parameters,
            "uplink_bytes": total["uplink_bytes"],
            "downlink_bytes": total["downlink_bytes"],
            "uplink_bits_per_parameter": bits("uplink_bytes", "received"),
            "downlink_bits_per_parameter": bits("downlink_bytes", "sampled"),
            "float32_uplink_bytes": total["float32_uplink_bytes"],
            "float32_downlink_bytes": total["float32_downlink_bytes"],
            "updates": total["replies"],
            "rejected": rejected,
            "attackers": sum(record.get("attackers", 0) for record in rounds),
            "seconds": sum(record["seconds"] for record in rounds),
            "seed": experiment.seed,
            "codec": registry.describe(experiment.codec),
            "downlink": registry.describe(experiment.downlink),
            "aggregator": registry.describe(experiment.aggregator),
            "attack": registry.describe(experiment.attack),
            "versions": versions(),
        }
    )
