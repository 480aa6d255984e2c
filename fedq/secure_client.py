"""A client's answers to the phases of secure aggregation, over Flower messages.

A worker of a simulation serves any client, and a device starts a process per message: what a client
must remember between phases is in its :class:`fedq.state.StateStore`, readable for its owner alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedq import records, wire
from fedq.errors import DecodeError, FedqError
from fedq.keys import Credentials
from fedq.privacy._distributed import Distributed, encoder_of
from fedq.privacy._entropy import Entropy
from fedq.random import derive
from fedq.secagg import PHASES, Announcement, Codes, Grid, Party, binding, clear
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
            text = clear.answer(announced, _integers(announced, *trained, client))
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
                    integers = _integers(announced, *trained, client, party)
                    text = party.mask(first, integers)
                    metadata |= _kept(trained[0])
                else:
                    text = getattr(party, phase)(first)
            finally:  # before anything is said, and also if it is refused
                store.keep_secrets(client, party.memory())
        else:
            raise DecodeError(
                f"phase {phase!r} of secure aggregation in {len(request.parts)} parts"
            )
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
    party: Party | None = None,
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Return what a client adds to the sum: noise, too, is in it before any mask."""
    if binding(task.metadata, task.weights, task.state) != announced.base:
        raise RefusedError("the model, or what to do with it, is not what the round announced")
    privacy = task.privacy
    if privacy.unit is not None and not privacy.integers:
        raise RefusedError(f"privacy={privacy.name} protects no sum of integers")
    coding: Codes | Grid
    if isinstance(privacy, Distributed):
        coding = Codes(encoder_of(privacy, task.about))
    else:
        coding = Grid.from_config(announced.coding)
    segments = coding.segments(announced.clients, task.layout.size, task.state_layout.size)
    if segments != announced.segments:
        raise RefusedError("the announced sum has no room for what clients send, or too much")
    if isinstance(coding, Codes):
        return coding.encode(trained.delta, _entropy(announced, task, trained, client, party))
    return coding.encode(
        trained.delta,
        trained.state - task.state,
        loss=trained.loss,
        weight=trained.examples,
        seed=task.seed(client, "grid"),
        rotation_seed=derive(int(task.metadata["seed"]), task.round, "rotation"),
    )


def _entropy(
    announced: Announcement, task: Task, trained: Trained, client: int, party: Party | None
) -> Entropy:
    """Return the randomness of a client's noise, which nobody else can draw.

    A round that is asked for twice gets the same noise for the same update, so the average of two
    answers tells nothing new; another update gets other noise, so neither does their difference.
    """
    if task.privacy.seeded or party is None:
        return task.privacy.entropy(task.about, client)
    purpose = f"noise {announced.run}/{announced.round} {announced.base}".encode()
    update = hashlib.sha256(trained.delta.tobytes()).digest()
    return Entropy(int.from_bytes(party.secret(purpose + update), "big"))
