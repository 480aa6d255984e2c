"""A client's answers to the phases of secure aggregation, over Flower messages.

A worker of a simulation serves any client, and a device starts a process per message: what a client
must remember between phases is in its :class:`fedq.state.StateStore`, readable for its owner alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedq import records, registry, wire
from fedq.errors import DecodeError, FedqError
from fedq.keys import Credentials
from fedq.random import derive
from fedq.secagg import PHASES, Announcement, Grid, IntegerNoise, Party, binding, clear
from fedq.secagg._messages import digest
from fedq.secagg._party import RefusedError

# isort: split
from flwr.app import Message

if TYPE_CHECKING:
    from fedq.client import Task
    from fedq.state import StateStore
    from fedq.training import Trained


#: Opens a request to train and trains; or the reply that there is no update.
Train = Callable[[bytes], "tuple[Task, Trained] | Message"]


def answer(
    message: Message,
    blob: bytes,
    client: int,
    own: Callable[[], Credentials],
    store: StateStore,
    train: Train,
) -> Message:
    """Answer one message of a phase; what the client refuses is a reply that says why."""
    request = wire.unseal(blob, wire.SECURE_MAGIC)
    phase, number = request.metadata.get("phase"), request.metadata.get("round")
    metadata: dict[str, Any] = {"round": number, "client": client}
    try:
        credentials = own()
        if phase == "clear" and len(request.parts) == 2:
            announced = Announcement.opened(bytes(request.parts[0]), None)
            trained = train(bytes(request.parts[1]))
            if isinstance(trained, Message):
                return trained
            text = clear.answer(announced, _integers(announced, *trained, client, credentials))
            metadata |= _kept(trained[0])
        elif phase in PHASES and len(request.parts) == (2 if phase == "mask" else 1):
            party = Party(
                client,
                credentials.identity.signing,
                credentials.roster,
                smallest=credentials.smallest,
                memory=store.secrets(client),
            )
            first = bytes(request.parts[0])
            try:
                if phase == "mask":
                    announced = party.expects(first)
                    trained = train(bytes(request.parts[1]))
                    if isinstance(trained, Message):
                        return trained
                    integers = _integers(announced, *trained, client, credentials)
                    text = party.mask(first, integers)
                    metadata |= _kept(trained[0])
                else:
                    text = getattr(party, phase)(first)
            finally:  # before anything is said, and also if it is refused
                store.keep_secrets(client, party.memory())
        else:
            raise DecodeError(f"phase {phase!r} of secure aggregation with {len(request.parts)}")
    except FedqError as error:
        dropped = {"round": number, "dropped": str(error)[:200]}
        return _reply(message, wire.Envelope(dropped))
    return _reply(message, wire.Envelope(metadata, [text]))


def _reply(message: Message, envelope: wire.Envelope) -> Message:
    return Message(records.pack(wire.seal(envelope)), reply_to=message)


def _kept(task: Task) -> dict[str, bool]:
    return {"kept": True} if task.kept else {}


def _integers(
    announced: Announcement,
    task: Task,
    trained: Trained,
    client: int,
    credentials: Credentials,
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Return what a client adds to the sum: this is where noise comes in, before any mask."""
    if binding(task.metadata, task.weights, task.state) != announced.base:
        raise RefusedError("the model, or what to do with it, is not what the round announced")
    grid = Grid.from_config(announced.coding)
    segments = grid.segments(announced.clients, task.layout.size, task.state_layout.size)
    if segments != announced.segments:
        raise RefusedError("the announced sum has no room for what clients send, or too much")
    return grid.encode(
        trained.delta,
        trained.state - task.state,
        loss=trained.loss,
        weight=trained.examples,
        seed=task.seed(client, "grid"),
        rotation_seed=derive(int(task.metadata["seed"]), task.round, "rotation"),
        noise=_noise(task),
        rng=secret_generator(credentials.identity.signing, announced),
    )


def _noise(task: Task) -> IntegerNoise | None:
    config = task.metadata.get("noise")
    if config is None:
        return None
    mechanism = registry.from_config("privacy", config, where="noise")
    if not isinstance(mechanism, IntegerNoise):
        raise DecodeError(f"privacy={mechanism.name} adds no noise to integers")
    return mechanism


def secret_generator(identity: Ed25519PrivateKey, announced: Announcement) -> np.random.Generator:
    """Return the generator of a client's noise: nobody else can draw from it.

    Its key is a signature, which is a function of the secret key and of the round: a round that is
    asked for twice gets the same noise twice, and the average of two answers tells nothing new.
    """
    what = f"fedq secagg noise 1 {announced.run}/{announced.round} {announced.base}"
    key = np.frombuffer(digest("noise", identity.sign(what.encode()))[:16], "<u8")
    return np.random.Generator(np.random.Philox(key=key))
