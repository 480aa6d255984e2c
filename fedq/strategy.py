"""The one Flower strategy: quantized model down, quantized deltas up.

Codec, aggregator and server optimiser are values. A round encodes the global model once, samples
clients by seed, streams their replies into the aggregator as they arrive, and steps the optimiser.
Whatever one client sends can only cost that client its own update.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from logging import INFO, WARNING
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedq import records, registry, wire
from fedq.aggregators.base import Aggregator, Stream
from fedq.aggregators.mean import Mean
from fedq.asynchronous import Steps
from fedq.budgets.base import Budget, bits_of
from fedq.budgets.fixed import Fixed
from fedq.capacity import Capacities
from fedq.codecs.base import Codec
from fedq.codecs.identity import Identity
from fedq.cohort import Nodes, choose
from fedq.distillation import Member
from fedq.downlink import Downlink
from fedq.engines.timed import TimedGrid
from fedq.errors import ConfigError, FedqError
from fedq.guard import Guard, RejectedError
from fedq.layout import Layout, Vector
from fedq.merging import Merger
from fedq.optimizers.base import ServerOptimizer
from fedq.optimizers.sgd import SGD
from fedq.pacing.base import Pacing
from fedq.pacing.synchronous import Synchronous
from fedq.physics.clock import Clock
from fedq.privacy.base import Contribution, Privacy, Round
from fedq.privacy.none import NoPrivacy
from fedq.pruning.base import Pruning, Structure, Support
from fedq.pruning.none import NoPruning
from fedq.random import derive, generator
from fedq.replies import Replies
from fedq.requests import Requests
from fedq.rounds import Claims, Context, RoundReport, ServerRound, ServerState, Update
from fedq.sealing import Sealing, of_request
from fedq.threads import in_threads
from fedq.topologies.base import Topology
from fedq.topologies.star import Star

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

NO_DEVICES = (
    "budget=link_aware and width_by=speed look at devices: simulate some with fleet=, such as "
    "fleet=pi_shelf, or have real ones with fedq fleet"
)
#: A round without a quorum changes nothing; after this many in a row the run stops.
PATIENCE = 3


class Refine(Protocol):
    """What is done to a round's result with the clients' own models."""

    def __call__(
        self, members: Sequence[Member], weights: Vector, state: Vector, current: ServerRound
    ) -> tuple[Vector, Vector]:
        """Return the weights, and the states of all variants."""


class Sums(Protocol):
    """How a round runs in which clients send sums of integers in place of payloads."""

    @property
    def masked(self) -> bool:
        """Whether the server sees sums only."""

    def collect(self, strategy: FedQ, grid: Grid, current: ServerRound) -> ServerState:
        """Run the round's phases and return the state after it."""


class FedQ(Strategy):
    """Federated optimisation with encoded updates (FedOpt, Reddi et al. 2021, algorithm 1).

    Per round t, with global weights w and cohort S_t::

        every client in S_t:  w^ = decode(downlink(w));  train from w^ to w_i;  send codec(w_i - w^)
        server:               w <- optimizer(w, aggregator(decoded deltas, weights))

    The server keeps w in float32, so what the downlink rounds away in one round is not lost. A
    client that keeps w^ says so; the next time, a predictive downlink codec sends it only what
    changed since, and the client decodes the same w^ as everybody else.

    Args:
      layout: Names and shapes of the trained tensors.
      state_layout: Names and shapes of what is averaged but not trained, in one variant.
      codec: How clients encode deltas; named to them in each message.
      downlink: How the global model is encoded.
      aggregator: Combines deltas; the mean streams, so that memory does not grow with clients.
      server_optimizer: Applies the aggregate as a pseudo-gradient; SGD with rate 1 is FedAvg.
      clients_per_round: A count (int) or a fraction of the connected nodes (float).
      seed: Decides sampling and everything that clients draw.
      task: JSON-ready metadata for the clients (model, training, ...), sent with the weights.
      schedule: What of the task is different in a round, counted from 1; None is nothing.
      weighting: ``"examples"``, ``"registered"`` (no more than first claimed) or ``"uniform"``.
      max_examples: A client's claim of examples is clamped to this.
      quorum: Fraction of the cohort that must be accepted for the round to count.
      deadline_s: Seconds after which the round closes with the replies at hand.
      history: Rounds for which the server remembers what it sent; 0 sends the whole model always.
      initial: (d,) float32 model that clients can build from the seed, to be sent changes to it.
      threads: Threads that decode replies; each holds one decoded update.
      uplink_context: Whether a client codes its delta beside how the model moved since its base.
      merge_rules: How each tensor of the state is merged; see :mod:`fedq.merging`.
      variants: Kinds of clients, such as widths of weights: all train the same weights, and each
        has a state of its own. A request carries all states, a reply the one of its variant.
      guard: What is refused though it is well-formed, and who is not asked again.
      trusted: Trains on the server's own examples, for an aggregator with ``trusted_examples``:
        from the round's state to a delta, (d,) float32.
      privacy: What protects the updates; a mechanism with a guarantee weighs them all alike.
      sealing: Signs requests and opens sealed replies; None asks for no seals.
      secure: How clients send sums of integers in place of payloads; None is a trusted server.
      clock: Of a simulated fleet; None lets replies count as they come.
      pacing: When rounds close, by the clock.
      budget: How many levels of the codec each client has in each round.
      topology: Who hears the clients' replies.
      capacities: Returns what is known of the nodes' devices now; a clock knows that itself.
      width: Returns the variant for a device's speed and the median's; without it, nodes choose.
      pruning: What of the model is trained.
      structure: What of it may be pruned.
      refine: What is done to a round's weights and states with the clients' own models.

    Example:
      >>> strategy = FedQ(layout=Layout.flat(10), codec=Identity())
      >>> strategy.initial(np.zeros(10, np.float32)).round
      0
    """

    def __init__(
        self,
        *,
        layout: Layout,
        codec: Codec,
        state_layout: Layout | None = None,
        downlink: Codec | None = None,
        aggregator: Aggregator | None = None,
        server_optimizer: ServerOptimizer | None = None,
        clients_per_round: int | float = 1.0,
        seed: int = 0,
        task: Mapping[str, Any] | None = None,
        schedule: Callable[[int], Mapping[str, Any]] | None = None,
        weighting: str = "examples",
        max_examples: int = 10_000,
        quorum: float = 0.5,
        deadline_s: float | None = None,
        history: int = 16,
        initial: Vector | None = None,
        threads: int = 1,
        uplink_context: bool = False,
        merge_rules: Sequence[str] = (),
        variants: Sequence[str] = ("",),
        guard: Guard | None = None,
        trusted: Callable[[ServerState], Vector] | None = None,
        privacy: Privacy | None = None,
        sealing: Sealing | None = None,
        secure: Sums | None = None,
        clock: Clock | None = None,
        pacing: Pacing | None = None,
        budget: Budget | None = None,
        topology: Topology | None = None,
        capacities: Callable[[], Capacities] | None = None,
        width: Callable[[float | None, float | None], int] | None = None,
        pruning: Pruning | None = None,
        structure: Structure | None = None,
        refine: Refine | None = None,
    ) -> None:
        self.layout = layout
        self.state_layout = state_layout or Layout((), ())
        self.states_layout = self.state_layout.copies(variants)
        self.variants = tuple(variants)
        self.merger = Merger(self.state_layout, merge_rules)
        self.codec = codec
        self.aggregator = aggregator or Mean()
        self.server_optimizer = server_optimizer or SGD()
        self.clients_per_round = clients_per_round
        self.seed = seed
        self.task = dict(task or {})
        self.schedule = schedule or (lambda server_round: {})
        self.privacy = privacy or NoPrivacy()
        self.weighting = "uniform" if self.privacy.uniform else weighting
        self.max_examples = max_examples
        self.quorum = quorum
        self.deadline_s = deadline_s
        self.threads = threads
        self.uplink_context = uplink_context and codec.predictive
        self.guard = guard or Guard()
        self.trusted = trusted
        self.sealing, self.secure = sealing, secure
        self.clock, self.pacing = clock, pacing or Synchronous()
        self.topology = topology or Star()
        self.budget, self.width = budget or Fixed(), width
        self.capacities: Callable[[], Capacities] = Capacities
        if self.budget.links or width:
            if clock is not None:
                self.capacities = lambda: clock.capacities
            elif capacities is not None:
                self.capacities = capacities
            else:
                raise ConfigError(NO_DEVICES)
        self.pruning, self.structure = pruning or NoPruning(), structure or Structure()
        self.refine = refine
        if not self.budget.fixed:
            bits_of(codec)  # refuses codecs that have none
        self.downlink = Downlink(downlink or Identity(), layout, history, initial)
        self._nodes: tuple[Collection[int], Nodes] | None = None
        self._round: ServerRound | None = None
        self._state: ServerState | None = None

    # --- one round ---------------------------------------------------------------------------

    def initial(self, weights: Vector, state: Vector | None = None) -> ServerState:
        """Return the state before the first round."""
        if state is None:
            state = np.zeros(self.states_layout.size, np.float32)
        optimizer = self.server_optimizer.init(self.layout.size)
        return ServerState(0, weights, state, optimizer, privacy=self.privacy.initial())

    def run_round(self, grid: Grid, before: ServerState) -> tuple[ServerState, RoundReport]:
        """Run the next round; a pure function of the state, the seed and the replies.

        Raises:
          ConfigError: If the grid has no nodes.
          FedqError: If several rounds in a row found no quorum, or the model diverged.
        """
        current = self._begin(grid, before)
        if self.clock is not None:
            grid = current.timing = self._timed(grid, current)
        if self.secure is not None:
            return self.secure.collect(self, grid, current), current.report
        if self.pacing.asynchronous:
            assert current.timing is not None
            current.steps = Steps(self, current.timing, current)
            return self._finish(current, current.steps.replies()), current.report
        replies = grid.send_and_receive(current.messages, timeout=self.deadline_s)
        return self._finish(current, replies), current.report

    def _begin(self, grid: Grid, before: ServerState) -> ServerRound:
        start = time.perf_counter()
        report = RoundReport(before.round + 1)
        watch = self.guard.watch(before.guard, report.round, before.weights)
        opened_s, there = self._opening(grid, before)
        nodes: list[int] = []
        if not self.pacing.asynchronous:  # which asks one by one, as replies arrive
            nodes = self.sample(grid, report.round, watch.barred, there)
        report.quarantined = len(watch.barred)
        about = self._about(report.round, len(nodes))
        privacy = self.privacy.at(before.privacy)
        asked = privacy.request(about)
        seed = derive(self.seed, report.round, "downlink")
        weights = self.downlink.settled(before.weights, before.broadcasts)
        whole = self.downlink.whole(weights, seed)
        context = Context(self.downlink, before.broadcasts, whole)
        request, openers = {**self.request(before), **asked}, None
        support = self._support(context, report)
        if self.sealing is not None:
            request = self.sealing.announced(request, len(nodes), context.model, before.state)
            openers = dict.fromkeys(nodes, self.sealing.opener(of_request(request)))
        current = ServerRound(
            before=before,
            report=report,
            waiting={node: slot for slot, node in enumerate(nodes)},
            held=dict(before.broadcasts.held),
            strangers=set(before.broadcasts.strangers),
            claims=self._claims(grid, before),
            whole=whole,
            context=context,
            watch=watch,
            privacy=privacy,
            about=about,
            request=request,
            openers=openers,
            weights=weights,
            opened_s=opened_s,
            expected=self.pacing.expected(len(nodes)),
            places=self.nodes(grid),
            capacities=self.capacities(),
            start=start,
            support=support,
        )
        current.requests = Requests(self, current)
        current.messages = current.requests.to(nodes)
        places, states = current.places, [self.state_layout.size] * len(self.variants)
        sent = (
            (places[m.metadata.dst_node_id], records.unpack(m.content)) for m in current.messages
        )
        current.hop = self.topology.hop(
            self.layout, states, self.seed, report.round, sent, len(places)
        )
        return current

    def _support(self, context: Context, report: RoundReport) -> Support | None:
        """Return what of the model is trained: a function of the model as clients decode it."""
        if not self.pruning.active:
            return None
        support = self.pruning.support(self.layout, self.structure, context.model, report.round)
        report.sparsity = 0.0 if support is None else support.sparsity
        return support

    def _opening(
        self, grid: Grid, before: ServerState
    ) -> tuple[float, Callable[[int], bool] | None]:
        """Return when a round begins, and which places it can ask: it waits for the first."""
        clock = self.clock
        if clock is None or clock.always or self.pacing.asynchronous:
            return before.now_s, None
        places = range(len(self.nodes(grid)))

        def anybody(now_s: float) -> bool:
            return any(clock.available(place, now_s) for place in places)

        opened_s = clock.opens(before.now_s, anybody)
        return opened_s, lambda place: clock.available(place, opened_s)

    def _timed(self, grid: Grid, current: ServerRound) -> TimedGrid:
        assert self.clock is not None
        return TimedGrid(
            grid,
            self.clock,
            current.places,
            current.report.round,
            current.opened_s,
            deadline_s=self.pacing.deadline_s,
            first=self.pacing.first(self.cohort(len(current.places)), len(current.messages)),
        )

    def _about(self, server_round: int, sampled: int) -> Round:
        return self.privacy.about(server_round, self.seed, sampled, self.layout.size, self.task)

    def _claims(self, grid: Grid, before: ServerState) -> Claims:
        """Return who is which client; a node that left frees its number."""
        connected = self.nodes(grid)
        return Claims({n: c for n, c in before.clients.items() if n in connected})

    def needed(self, sampled: int) -> int:
        """Return how many of so many updates a round must have to count."""
        return max(1, int(np.ceil(self.quorum * sampled)))

    def sample(
        self,
        grid: Grid,
        server_round: int,
        barred: Collection[int] = frozenset(),
        there: Callable[[int], bool] | None = None,
    ) -> list[int]:
        """Return the nodes of a round's cohort: seeded, without replacement, none that is barred.

        Nodes are ordered by the time they registered, so that a simulated node's place is its
        partition whatever identifiers the grid gives out. Nodes that are not ``there``, by place,
        cannot be asked, but count where the cohort is a fraction.
        """
        nodes = self.nodes(grid)
        free = len(nodes) - sum(node in nodes for node in barred)
        if not free:
            raise FedqError("all connected clients are in quarantine; see rounds.jsonl for why")
        count = self.pacing.asked(self.cohort(free), of=free)
        rng = generator(derive(self.seed, server_round, "sample"))
        return choose(nodes, count, rng, barred, there)

    def nodes(self, grid: Grid) -> Nodes:
        """Return the connected nodes and their places, in the order in which they registered."""
        ids = grid.get_node_ids()
        if not isinstance(ids, range):
            ids = frozenset(ids)
        if self._nodes is None or self._nodes[0] != ids:
            self._nodes = ids, Nodes.of(grid)
        if not self._nodes[1]:
            raise ConfigError("no client is connected; start clients before the server runs")
        return self._nodes[1]

    def cohort(self, clients: int) -> int:
        """Return how many of so many clients a round wants."""
        wanted = self.clients_per_round
        return min(wanted, clients) if isinstance(wanted, int) else max(1, round(wanted * clients))

    @cached_property
    def float32(self) -> bytes:
        """The payload of an uncompressed vector of weights: the yardstick, a real one too."""
        return Identity().encode(np.zeros(self.layout.size, np.float32), self.layout)

    @cached_property
    def float32_reply_bytes(self) -> int:
        """Bytes of a reply with an uncompressed update."""
        state = Identity().encode(np.zeros(self.state_layout.size, np.float32), self.state_layout)
        metadata = {"round": 10, "client": 10, "examples": 100, "loss": 0.123456}
        return len(wire.seal(wire.Envelope(metadata, [self.float32, state])))

    def request(self, before: ServerState) -> dict[str, Any]:
        """Return what every client of a round is told beside the model."""
        pruning = {"pruning": registry.to_config(self.pruning)} if self.pruning.active else {}
        return {
            **self.task,
            **pruning,
            **self.schedule(before.round + 1),
            "round": before.round + 1,
            "seed": self.seed,
            "codec": registry.to_config(self.codec),
        }

    def _finish(self, current: ServerRound, replies: Iterable[Message]) -> ServerState:
        report, privacy = current.report, current.privacy
        deltas, states = self.streams(current, current.expected)
        opened = Replies(self, current)
        losses: list[tuple[float, float]] = []
        accepted: list[Contribution] = []
        lock = Lock()

        def add(update: Update) -> tuple[Update, RejectedError | None]:
            try:
                delta, state = opened.decode(update)
                if not privacy.uniform:  # a limit that others move would undo a client's bound
                    delta = current.watch.admit(delta, state)
                if update.discount != 1:
                    delta = delta * np.float32(update.discount)
            except RejectedError as error:
                return update, error
            with lock:  # an addition is short beside a decoding
                deltas.add(delta, update.weight, update.slot)
                if self.refine is not None:
                    current.members[update.slot] = (update.variant, delta, state)
                state = self.merger.summand(state)
                weight = update.weight * update.discount
                states[update.variant].add(state, weight, update.slot)
            return update, None

        for update, error in in_threads(add, opened.updates(replies), self.threads):
            current.watch.note(update.node, None if error is None else error.kind)
            if error is not None:
                report.reject(error.kind, str(error))
                continue
            report.replies += 1
            accepted.append(update.source)
            current.examples[update.node] = update.source.examples
            report.float32_uplink_bytes += self.float32_reply_bytes
            if update.loss is not None:
                losses.append((update.loss, update.weight))
        if current.waiting:
            report.rejected["no reply"] += len(current.waiting)
        return self.conclude(current, deltas, states, losses, accepted)

    def streams(self, current: ServerRound, capacity: int) -> tuple[Stream, list[Stream]]:
        """Return where up to ``capacity`` updates go: deltas, and states of each variant."""
        if current.hop is not None:
            return current.hop.delta, list(current.hop.states)
        reference = None
        if self.aggregator.trusted_examples and self.trusted is not None:
            reference = self.trusted(current.before)
        return (
            current.privacy.stream(self.aggregator, current.about, capacity, reference),
            [
                self.aggregator.for_state.stream(self.state_layout.size, capacity)
                for _ in self.variants
            ],
        )

    def conclude(
        self,
        current: ServerRound,
        deltas: Stream,
        states: Sequence[Stream],
        losses: list[tuple[float, float]],
        accepted: Sequence[Contribution] = (),
    ) -> ServerState:
        """Step with what was aggregated, and note who holds which model."""
        before, report = current.before, current.report
        if losses:  # fsum is exact: the order of replies does not matter
            total = math.fsum(weight for _, weight in losses)
            report.train_loss = math.fsum(loss * weight for loss, weight in losses) / total
        if current.hop is not None:
            current.hop.forward()
            report.edge_downlink_bytes = current.hop.downlink_bytes
            report.edge_uplink_bytes = current.hop.uplink_bytes
            report.edge_nmse = current.hop.nmse
        after = self._step(current, deltas, states, accepted)
        after = dataclasses.replace(
            after, clients=current.claims.clients, guard=current.watch.after()
        )
        history = self.budget.after(before.history, report.train_loss, current.examples)
        after = dataclasses.replace(after, history=history)
        if current.steps is not None:
            after = dataclasses.replace(after, waiting=current.steps.left())
        if current.timing is not None:
            energy = current.timing.energy
            after = dataclasses.replace(after, now_s=current.timing.closed_s)
            report.simulated_seconds = after.now_s - before.now_s
            report.joules = energy.joules
            report.joules_by_use = dataclasses.asdict(energy)
            report.wire_uplink_bytes = current.timing.wire_uplink_bytes
            report.wire_downlink_bytes = current.timing.wire_downlink_bytes
        if self.downlink.codec.predictive:
            sent = before.broadcasts.after(
                report.round,
                current.whole,
                current.held,
                frozenset(current.strangers),
                self.downlink.history,
                under_way={waiting.asked.round for waiting in after.waiting},
            )
            after = dataclasses.replace(after, broadcasts=sent)
        report.seconds = time.perf_counter() - current.start
        if after.failures >= PATIENCE:
            why = report.reasons[0] if report.reasons else "no reply before the deadline"
            needed = self.needed(current.expected)
            raise FedqError(
                f"{PATIENCE} rounds in a row had fewer than {needed} usable updates of "
                f"{current.expected}; in the last one: {why}"
            )
        return after

    def _step(
        self,
        current: ServerRound,
        deltas: Stream,
        states: Sequence[Stream],
        accepted: Sequence[Contribution],
    ) -> ServerState:
        before, report = current.before, current.report
        same = dataclasses.replace(before, round=report.round, failures=before.failures + 1)
        if report.replies < self.needed(current.expected):
            report.skipped = True
            report.privacy = self.privacy.report(before.privacy)
            return same
        privacy, about = current.privacy, current.about
        entropy = privacy.entropy(about)
        try:
            delta, state = deltas.result(), self._merged(before.state, states)
        except ConfigError as error:  # e.g. too few updates for a robust rule
            report.skipped = True
            report.reject("aggregator", str(error))
            return same
        delta = privacy.release(delta, report.replies, about, entropy)
        state = before.state if privacy.unit else state  # it has no noise: it stays on the device
        private = privacy.after(before.privacy, accepted, about, entropy)
        report.privacy = privacy.report(private)
        try:
            weights, optimizer = self.server_optimizer.step(
                before.weights, delta, dict(before.optimizer)
            )
        except ConfigError as error:
            raise FedqError(
                f"round {report.round} cannot be applied ({error}); "
                "lower learning_rate or the server optimiser's rate"
            ) from error
        if current.support is not None:
            weights = current.support.masked(weights)
        if self.refine is not None:
            weights, state = self.refine(current.ensemble(), weights, state, current)
        return ServerState(report.round, weights, state, optimizer, privacy=private)

    def _merged(self, before: Vector, states: Sequence[Stream]) -> Vector:
        """Return the states after a round; that of a variant that nobody sent stays."""
        if len(states) == 1:
            return self.merger.merged(states[0].result())
        merged = []
        for old, stream in zip(np.split(before, len(states)), states, strict=True):
            try:
                merged.append(self.merger.merged(stream.result()))
            except ConfigError:  # too few of this variant
                merged.append(old)
        return np.concatenate(merged)

    # --- a privacy budget --------------------------------------------------------------------

    def calibrated(self, grid: Grid, state: ServerState, rounds: int) -> ServerState:
        """Return the first state with the least noise that keeps ``rounds`` within the budget."""
        if state.privacy is None:
            return state
        asked = Counter(node for r in range(1, rounds + 1) for node in self.sample(grid, r))
        cohort = len(self.sample(grid, 1))
        private = self.privacy.calibrated(
            state.privacy, max(asked.values()), self.needed(cohort), self._about(1, cohort)
        )
        return dataclasses.replace(state, privacy=private)

    def exhausted(self, grid: Grid, state: ServerState) -> bool:
        """Whether the next round could exceed the privacy budget; without one, never."""
        if state.privacy is None:
            return False
        nodes = self.sample(grid, state.round + 1, state.guard.barred_in(state.round + 1))
        return self.privacy.at(state.privacy).exhausted(
            state.privacy,
            [state.clients.get(node) for node in nodes],
            self.needed(len(nodes)),
            self._about(state.round + 1, len(nodes)),
        )

    def statement(self, state: ServerState) -> dict[str, Any]:
        """Return what a summary says of privacy: nothing unless something is guaranteed."""
        clients = len(self._nodes[1]) if self._nodes else 1
        masked = self.secure is not None and self.secure.masked
        said = self.privacy.statement(state.privacy, clients, masked=masked)
        return {"privacy": said} if said else {}

    # --- Flower's interface ------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return a round's messages (Flower's hook; :meth:`run_round` is the whole round)."""
        if self.secure is not None:
            raise ConfigError("secure aggregation takes several messages a round; use start()")
        weights = self.layout.flatten(_numpy(arrays))
        before = self._state or self.initial(weights)
        self.task.update(config)
        self._round = self._begin(
            grid, dataclasses.replace(before, round=server_round - 1, weights=weights)
        )
        return self._round.messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate a round's replies (Flower's hook); no arrays without a quorum."""
        if self._round is None:
            raise ConfigError("aggregate_train follows configure_train")
        self._state = self._finish(self._round, replies)
        report = self._round.report
        return None if report.skipped else self._arrays(self._state), _metrics(report)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return nothing: clients report their loss with their update, in one message."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing: see :meth:`configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Log what crosses the wire."""
        log(INFO, "\t├──> uplink %s, downlink %s", self.codec, self.downlink.codec)
        log(INFO, "\t└──> %s, %s", self.aggregator, self.server_optimizer)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run rounds as Flower's own strategies do, for use in any ServerApp.

        ``timeout`` is the round deadline unless the strategy has its own; ``train_config`` goes to
        the clients as metadata.
        """
        self.summary()
        self.deadline_s = self.deadline_s or timeout
        self.task.update(train_config or {})
        state = self.initial(self.layout.flatten(_numpy(initial_arrays)))
        state = self.calibrated(grid, state, num_rounds)
        result = Result()
        while state.round < num_rounds and not self.exhausted(grid, state):
            state, report = self.run_round(grid, state)
            if report.rejected:
                log(WARNING, "round %d: %s", report.round, "; ".join(report.reasons))
            result.arrays = self._arrays(state)
            result.train_metrics_clientapp[report.round] = _metrics(report)
            if evaluate_fn is not None:
                metrics = evaluate_fn(report.round, result.arrays)
                if metrics is not None:
                    result.evaluate_metrics_serverapp[report.round] = metrics
        return result

    def _arrays(self, state: ServerState) -> ArrayRecord:
        named = self.layout.unflatten(state.weights)
        return ArrayRecord({name: Array(array) for name, array in named.items()})


def _numpy(arrays: ArrayRecord) -> dict[str, NDArray[Any]]:
    return {name: array.numpy() for name, array in arrays.items()}


def _metrics(report: RoundReport) -> MetricRecord:
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "uplink-bytes": report.uplink_bytes,
        "downlink-bytes": report.downlink_bytes,
        "replies": report.replies,
        "rejected": report.rejected.total(),
    }
    if report.train_loss is not None:
        metrics["train-loss"] = report.train_loss
    return MetricRecord(metrics)
