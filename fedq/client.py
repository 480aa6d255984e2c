"""The client: ``Message -> Message``, the same on a laptop, in Ray and on a device.

:class:`Task` is the protocol alone, for any Flower app with a model of its own. :class:`Client` is
the whole client of this project: it builds the model the server names, trains it on local data and
replies with an encoded delta.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedq import records, registry, sealing, secure_client, wire
from fedq.capacity import variant_of
from fedq.codecs.base import Codec, decode
from fedq.codecs.error_feedback import ErrorFeedback
from fedq.codecs.identity import Identity
from fedq.downlink import INITIAL
from fedq.envelope import seal
from fedq.errors import ConfigError, DecodeError, FedqError
from fedq.feedback import compensate
from fedq.keys import Credentials, SimulatedRoster, simulated
from fedq.layout import Layout, Vector
from fedq.privacy.base import Privacy, Round
from fedq.privacy.example_gaussian import ExampleGaussian
from fedq.privacy.none import NoPrivacy
from fedq.pruning.base import Structure, Support
from fedq.pruning.none import NoPruning
from fedq.random import SEED_BITS, derive, round_seed
from fedq.state import StateStore
from fedq.training_config import TrainingConfig

# isort: split
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from fedq.training import Trained, Trainer

LOG = logging.getLogger("fedq")
EMPTY = Layout((), ())
#: What of a request's metadata decides the model, and what it says only if it is no classification.
MODEL_KEYS = ("model", "quantization", "input_shape", "classes")
TASK_KEY = "task"
#: A node's own choice among the federation's weight widths, in bits; 0 is float.
WIDTH_KEY = "weight-bits"


class NoBaseError(FedqError):
    """A request is the changes to a model that this client does not hold."""

    def __init__(self, base: int, server_round: int) -> None:
        super().__init__(f"the model of round {base} is not here")
        self.server_round = server_round


@dataclass(frozen=True)
class Task:
    """One opened request of the server: the global model and what to do with it.

    A Flower client with its own training loop needs three lines::

        task = Task.open(message, layout)
        delta = train(task.weights)                      # (d,) float32
        return task.reply(delta, examples=n, client=context.node_config["partition-id"])

    Attributes:
      message: The request.
      metadata: What the server said: ``round``, ``seed``, ``codec`` and the task's own entries.
      layout: Names and shapes of the weights.
      state_layout: Names and shapes of what is averaged but not trained.
      weights: (d,) float32, the global model as this round's downlink encodes it.
      state: (s,) float32.
      codec: How to encode the delta.
      kept: Whether the weights are in the store, for the next request to build on.
      moved: (d,) float32, the weights minus those of the base; an update may be coded beside it.
      privacy: What :meth:`reply` does to the delta before it is encoded.
      variant: Which kind of client this is; the state is that kind's.
      support: What of the weights is trained and sent, all others being zero; None is everything.
    """

    message: Message
    metadata: Mapping[str, Any]
    layout: Layout
    state_layout: Layout
    weights: Vector
    state: Vector
    codec: Codec
    kept: bool = False
    moved: Vector | None = None
    privacy: Privacy = field(default_factory=NoPrivacy)
    variant: int = 0
    support: Support | None = None

    @classmethod
    def open(
        cls,
        message: Message,
        layout: Layout,
        state_layout: Layout = EMPTY,
        store: StateStore | None = None,
    ) -> Task:
        """Open a request.

        With a ``store``, the model is kept there, and the next request may be the changes alone.

        Raises:
          DecodeError: If it is not a request for this layout.
          NoBaseError: If it is the changes to a model that the store has not.
        """
        envelope = wire.unseal(records.unpack(message.content))
        return cls._of(message, envelope, layout, state_layout, store)

    @classmethod
    def _of(
        cls,
        message: Message,
        envelope: wire.Envelope,
        layout: Layout,
        state_layout: Layout,
        store: StateStore | None,
        initial: Callable[[], Vector] | None = None,
        variants: Sequence[str] = ("",),
        variant: int = 0,
    ) -> Task:
        metadata = envelope.metadata
        if len(envelope.parts) != 2:
            raise DecodeError(f"a request has 2 parts, not {len(envelope.parts)}")
        base, reference = metadata.get("base"), None
        if base == INITIAL and initial is not None:
            reference = initial()
        elif base is not None and store is not None:
            reference = store.model(int(base), layout)
        try:
            if base is not None and reference is None:
                raise DecodeError("there is no reference")
            weights = decode(envelope.parts[0], layout, reference=reference)
        except DecodeError as error:
            if base is None:
                raise
            # Not the one that the server means, such as weights that another torch initialised.
            raise NoBaseError(int(base), int(metadata["round"])) from error
        kept = metadata.get("keep") is True and _keep(store, int(metadata["round"]), weights)
        moved = None
        if reference is not None and metadata.get("context") is True:
            moved = weights - reference
        states = Identity().decode(envelope.parts[1], state_layout.copies(variants))
        return cls(
            message,
            metadata,
            layout,
            state_layout,
            weights,
            np.split(states, len(variants))[variant],
            registry.from_config("codec", metadata.get("codec")),
            kept,
            moved,
            registry.from_config("privacy", metadata.get("privacy", NoPrivacy.name)),
            variant,
        )

    @property
    def round(self) -> int:
        """The round, from 1."""
        return int(self.metadata["round"])

    def pruned(self, structure: Callable[[], Structure]) -> Task:
        """Return the task with the mask that the request's pruning makes of its model."""
        pruning = registry.from_config("pruning", self.metadata.get("pruning", NoPruning.name))
        if not pruning.active:
            return self
        support = pruning.support(self.layout, structure(), self.weights, self.round)
        return dataclasses.replace(self, support=support)

    def seed(self, client: int, purpose: str) -> int:
        """Return this client's seed in this round for a named purpose."""
        return derive(int(self.metadata["seed"]), self.round, client, purpose)

    @property
    def about(self) -> Round:
        """What a privacy mechanism has to know of the round."""
        cohort = registry.convert(self.metadata.get("cohort", 1), int, "cohort")
        seed = int(self.metadata["seed"])
        return self.privacy.about(self.round, seed, cohort, self.layout.size, self.metadata)

    def reply(
        self,
        delta: Vector,
        *,
        examples: int,
        client: int,
        loss: float | None = None,
        state: Vector | None = None,
        store: StateStore | None = None,
    ) -> Message:
        """Protect a delta, encode it and answer; beside how the model moved, where that is shorter.

        Under a privacy mechanism the answer says no loss, state or number of examples: they have no
        noise.

        Args:
          delta: (d,) float32, local minus global weights.
          examples: Local training examples, the update's weight in the mean.
          client: A number of this client's own, from 0 and below 2**64, in all rounds the same: it
            decides the randomness of its code, and the server holds the client to it.
          loss: Mean training loss, reported to the server.
          state: (s,) float32; what was received if not given.
          store: Where error feedback keeps its residual; needed if the codec has one.
        """
        if not 0 <= client < 2**SEED_BITS:
            raise ConfigError(f"client must be a number from 0 and below 2**64, not {client}")
        client = int(client)  # of NumPy, too
        protected = self.privacy.protect(
            delta, self.about, self.privacy.entropy(self.about, client)
        )
        delta, layout = protected.delta, self.layout
        support = self.support
        if support is not None:
            delta, layout = support.gather(delta), support.layout
        seed = self.codec.client_seed(round_seed(int(self.metadata["seed"]), self.round), client)
        references: list[Vector | None] = [None]
        if self.moved is not None and self.codec.predictive:
            references.append(self.moved if support is None else support.gather(self.moved))
        if protected.codes is not None:
            payloads = [protected.codes]
        elif isinstance(self.codec, ErrorFeedback):
            if store is None:
                raise ConfigError("error feedback needs a store for the residual")
            residual = store.residual(client, self.round, self.layout)
            if support is not None:
                residual = support.gather(residual)
            coded = [
                compensate(self.codec, delta, residual, layout, seed, reference=reference)
                for reference in references
            ]
            payloads = [payload for payload, _ in coded]
            left = coded[0][1]  # all decode to the same
            store.keep_residual(
                client, self.round, left if support is None else support.scatter(left)
            )
        else:
            payloads = [
                self.codec.encode(delta, layout, seed, reference=reference)
                for reference in references
            ]
        if self.privacy.unit:
            state, loss = None, None
        if self.privacy.uniform:
            examples = 1
        record = Identity().encode(self.state if state is None else state, self.state_layout)
        metadata: dict[str, Any] = {"round": self.round, "client": client, "examples": examples}
        if protected.within is not None:
            metadata["within"] = protected.within
        if loss is not None:
            metadata["loss"] = float(f"{loss:.6g}")
        if self.kept:
            metadata["kept"] = True
        if self.variant:
            metadata["variant"] = self.variant
        answers = [wire.Envelope(metadata, [payloads[0], record])]
        for payload in payloads[1:]:
            beside = {**metadata, "context": self.metadata["base"]}
            answers.append(wire.Envelope(beside, [payload, record]))
        return _answer(self.message, *answers)

    @staticmethod
    def refuse(message: Message, error: NoBaseError) -> Message:
        """Answer a request that cannot be opened; the server sends the whole model next time."""
        return _dropped(message, error.server_round, str(error), kept=False)

    def drop(self, reason: str) -> Message:
        """Answer without an update, and say why."""
        more = {"kept": True} if self.kept else {}
        return _dropped(self.message, self.round, reason, **more)


def _keep(store: StateStore | None, server_round: int, weights: Vector) -> bool:
    """Keep a model for the next request to build on; a full disk costs that, not the update."""
    if store is None:
        return False
    try:
        store.keep_model(server_round, weights)
    except FedqError as error:
        LOG.warning("the next model comes whole: %s", error)
        return False
    return True


def _answer(message: Message, *envelopes: wire.Envelope) -> Message:
    """Answer with the shortest; each is sealed once."""
    return Message(records.pack(min(map(wire.seal, envelopes), key=len)), reply_to=message)


def _dropped(message: Message, server_round: int, reason: str, **more: bool) -> Message:
    metadata = {"round": server_round, "dropped": reason[:200], **more}
    return _answer(message, wire.Envelope(metadata))


class Site(Protocol):
    """What only the client's own machine knows: its data and where it may keep state."""

    def identity(self, context: Context) -> int:
        """Return the client's number."""

    def examples(self, context: Context) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return the local training data: (n, ...) inputs, channels first, and their truths."""

    def store(self, context: Context) -> StateStore:
        """Return where this client keeps state between rounds."""

    @property
    def simulated(self) -> bool:
        """Whether the data is no one's: the server may then ask for noise that is no secret."""

    def credentials(self, context: Context) -> Credentials:
        """Return the client's keys and whom it trusts, for secure aggregation and seals."""

    def wants_signatures(self, context: Context) -> bool:
        """Whether the client takes part in rounds only that its server signed."""


@dataclass(frozen=True)
class SimulatedSite:
    """One partition of a data set per node: the site of every simulation.

    Args:
      data: The registered data set.
      parts: Row indices of each partition, by ``partition-id``.
      state_directory: Where clients keep state between rounds.
      models: Received models to keep there; one directory serves all simulated clients.
      seed: Of the run; simulated keys follow from it.
    """

    data: Any
    parts: Sequence[NDArray[np.int64]] | Mapping[int, NDArray[np.int64]]
    state_directory: Path
    models: int = 2
    simulated: ClassVar[bool] = True
    seed: int = 0

    def identity(self, context: Context) -> int:
        """Return the node's partition."""
        return int(context.node_config["partition-id"])

    def examples(self, context: Context) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return the partition's rows."""
        from fedq.data.base import load

        dataset, rows = load(self.data), self.parts[self.identity(context)]
        return dataset.train_inputs(rows), dataset.y_train[rows]

    def store(self, context: Context) -> StateStore:
        """Return the directory that simulated clients share."""
        return StateStore(self.state_directory, self.models)

    def credentials(self, context: Context) -> Credentials:
        """Return keys that follow from the run's seed."""
        identity = simulated(self.seed, self.identity(context))
        return Credentials(identity, SimulatedRoster(self.seed))

    def wants_signatures(self, context: Context) -> bool:
        """Return False: a simulation signs only if it is asked to."""
        return False


@dataclass(frozen=True)
class _Request:
    """What one request of the server says: the same for many simulated clients."""

    blob: bytes
    variants: Sequence[str]
    task: Task
    trainer: Trainer
    training: TrainingConfig


@dataclass
class Client:
    """Trains what the server names on the site's data; one model is kept between messages."""

    site: Site
    trained_images: int = 0  #: examples times epochs, since this client was made
    _trainers: dict[tuple[str, int], Trainer] = field(default_factory=dict, repr=False)
    _requests: list[_Request] = field(default_factory=list, repr=False)

    def train(self, message: Message, context: Context) -> Message:
        """Answer one training request, or one phase of secure aggregation."""
        blob = records.unpack(message.content)
        reply = self._answer(message, context, blob)
        about = sealing.requested(blob)
        if about is None:
            return reply
        credentials = self.site.credentials(context)
        sealed = seal(
            records.unpack(reply.content),
            about,
            client=self.site.identity(context),
            identity=credentials.identity,
            server=credentials.roster.server,
        )
        return Message(records.pack(sealed), reply_to=message)

    def _answer(self, message: Message, context: Context, blob: bytes) -> Message:
        train = partial(self._train, message, context)
        if blob.startswith(wire.SECURE_MAGIC):
            site, client = self.site, self.site.identity(context)
            own = partial(site.credentials, context)
            return secure_client.answer(message, blob, client, own, site.store(context), train)
        result = train(blob)
        if isinstance(result, Message):
            return result
        task, trained = result
        try:
            return task.reply(
                trained.delta,
                examples=trained.examples,
                client=self.site.identity(context),
                loss=trained.loss,
                state=trained.state,
                store=self.site.store(context),
            )
        except ConfigError as error:
            return task.drop(str(error))

    def _train(
        self, message: Message, context: Context, blob: bytes
    ) -> tuple[Task, Trained] | Message:
        """Open a request and train as it says; or the reply that there is no update."""
        from fedq.training import Diverged

        store = self.site.store(context)
        try:
            request = self._open(message, context, blob, store)
        except NoBaseError as error:
            return Task.refuse(message, error)
        task, trainer = dataclasses.replace(request.task, message=message), request.trainer
        if task.metadata.get("sealed") or self.site.wants_signatures(context):
            try:
                roster = self.site.credentials(context).roster
                sealing.check(task.metadata, task.weights, task.state, roster)
            except FedqError as error:
                return task.drop(str(error))
        client = self.site.identity(context)
        x, y = self.site.examples(context)
        if len(y) == 0:
            return task.drop(f"client {client} has no training data")
        if task.privacy.seeded and not self.site.simulated:
            return task.drop(
                "seeded noise protects nobody; the server must set privacy.seeded=false"
            )
        if refusal := task.privacy.refusal(len(y), task.about):
            return task.drop(refusal)
        trainer.load(task.weights, task.state)
        own = trainer.local_layout
        if own.size and (kept := store.local(client, task.round, own)) is not None:
            trainer.load_local(kept)
        if task.support is not None:
            trainer.prune(task.support)
        try:
            trained = _train(trainer, x, y, request.training, task, client)
        except (Diverged, ConfigError) as error:
            return task.drop(str(error))
        self.trained_images += len(y) * request.training.local_epochs
        if own.size:
            store.keep_local(client, task.round, trainer.local())
            delta = trainer.weights() - task.weights
            if task.support is not None:
                delta = task.support.masked(delta)
            trained = dataclasses.replace(trained, delta=delta)
        return task, trained

    def _open(self, message: Message, context: Context, blob: bytes, store: StateStore) -> _Request:
        # Simulated clients of a round share requests; a worker decodes each once. There are few,
        # and to compare bytes costs less than to hash them.
        for request in self._requests:
            if request.blob == blob:
                variant = self._variant(request.variants, context, request.task.metadata)
                if variant == request.task.variant:
                    return request
        envelope = wire.unseal(blob)
        chosen = registry.from_config("quantization", envelope.metadata.get("quantization"))
        variants = chosen.variants
        variant = self._variant(variants, context, envelope.metadata)
        trainer = self._trainer_for(envelope.metadata, variant)
        task = Task._of(
            message,
            envelope,
            trainer.layout,
            trainer.state_layout,
            store,
            partial(_initial, envelope.metadata),
            variants,
            variant,
        ).pruned(lambda: trainer.structure)
        training = TrainingConfig.from_config(task.metadata["training"])
        request = _Request(blob, variants, task, trainer, training)
        self._requests = [r for r in self._requests if r.task.round == task.round]
        self._requests.append(request)
        return request

    def _trainer_for(self, metadata: Mapping[str, Any], variant: int) -> Trainer:
        from fedq.training import trainer_for

        try:
            spec = _spec(metadata)
        except KeyError as error:
            raise FedqError(f"the request names no {error}; client and server differ") from None
        key = json.dumps(spec, sort_keys=True)
        if (key, variant) not in self._trainers:
            self._trainers = {of: t for of, t in self._trainers.items() if of[0] == key}
            self._trainers[key, variant] = trainer_for(**spec, seed=0, variant=variant)
        return self._trainers[key, variant]

    def _variant(
        self, variants: Sequence[str], context: Context, metadata: Mapping[str, Any]
    ) -> int:
        """Return which kind of client this is: its device says, or the request, or its number."""
        said, asked = context.node_config.get(WIDTH_KEY), metadata.get("width")
        return variant_of(variants, said, asked, self.site.identity(context))


def _train(
    trainer: Trainer,
    x: NDArray[np.float32],
    y: NDArray[Any],
    training: TrainingConfig,
    task: Task,
    client: int,
) -> Trained:
    if isinstance(task.privacy, ExampleGaussian):
        from fedq.private_training import train_privately

        about = task.about
        entropy = task.privacy.entropy(about, client)
        return train_privately(trainer, x, y, training, task.privacy, about, entropy)
    return trainer.train(x, y, training, task.seed(client, "train"))


def _spec(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a request decides the model and its task."""
    own = {TASK_KEY} & metadata.keys()
    return {key: metadata[key] for key in (*MODEL_KEYS, *own)}


def _initial(metadata: Mapping[str, Any]) -> Vector:
    """Build the model that the server started from."""
    from fedq.training import trainer_for

    return trainer_for(**_spec(metadata), seed=derive(int(metadata["seed"]), "model")).weights()


def client_app(make_site: Callable[[], Site]) -> ClientApp:
    """Return a Flower ClientApp over a site, made at the first message."""
    app = ClientApp()
    client: list[Client] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if not client:
            import torch

            torch.set_num_threads(1)
            client.append(Client(make_site()))
        return client[0].train(message, context)

    return app
