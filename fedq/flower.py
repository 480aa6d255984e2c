"""Compressed updates in any Flower app: a mod on its clients, a strategy around its own.

The app keeps its model, its training and its strategy. On the client one line, on the server one::

    app = ClientApp(mods=[compression_mod])
    strategy = CompressedStrategy(FedAvg(...), codec=fedq.build("codec", "dtcq", bits=0.5))

The mod sends what training changed, encoded, in place of the trained arrays; the strategy decodes
it and hands its inner strategy the arrays that it would have got. Floating-point arrays are encoded
as one vector, in float32; others (counters) go as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq import records, registry, wire
from fedq.codecs.base import Codec, decode_frame
from fedq.codecs.error_feedback import ErrorFeedback
from fedq.errors import ConfigError, DecodeError
from fedq.feedback import compensate
from fedq.layout import Layout, Vector
from fedq.random import derive, round_seed

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

LOG = logging.getLogger("fedq")
RESIDUAL = "fedq.residual"
#: Coordinates of the largest model that a message may name: 1 GiB in float32.
MAX_SIZE = 2**28


def compression_mod(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Train as the app does, and send the change of its arrays, encoded as the server asks.

    A message of a server without :class:`CompressedStrategy` passes through. With error feedback
    the residual is kept in the node's ``context.state``.

    Raises:
      DecodeError: If what the server sent cannot be decoded.
      ConfigError: If the app's reply has other arrays than its request.
    """
    if records.KEY not in message.content:
        return call_next(message, context)
    request = wire.unseal(records.unpack(message.content))
    key, codec, seed = _task(request)
    content = RecordDict({k: v for k, v in message.content.items() if k != records.KEY})
    if request.parts:
        content[key] = _model(request, content.array_records.get(key, ArrayRecord()))
    start = content.array_records.get(key)
    if start is None:
        raise DecodeError(f"the message has no arrays '{key}'")
    layout = _layout(start)
    base = layout.flatten(_floats(start))
    message.content = content
    reply = call_next(message, context)
    if message.metadata.message_type != MessageType.TRAIN or reply.has_error():
        return reply

    key, trained = _only_arrays(reply.content, "the reply of the app")
    if _layout(trained) != layout:
        raise ConfigError("the app's reply has other arrays than the message it answers")
    delta = layout.flatten(_floats(trained)) - base
    seed = codec.client_seed(seed, message.metadata.dst_node_id)
    if isinstance(codec, ErrorFeedback):
        kept = context.state.array_records.get(RESIDUAL)
        residual = None if kept is None else kept["residual"].numpy()
        if residual is not None and residual.shape != delta.shape:
            residual = None
        payload, residual = compensate(codec, delta, residual, layout, seed)
        context.state[RESIDUAL] = ArrayRecord({"residual": Array(residual)})
    else:
        payload = codec.encode(delta, layout, seed)
    reply.content = _packed(reply.content, key, wire.Envelope({"arrays": key}, [payload]))
    return reply


@dataclass(frozen=True)
class Traffic:
    """What one round of training sent.

    Attributes:
      updates: Replies that were decoded.
      rejected: Replies that were not.
      uplink_bytes: Of the updates' payloads and their other arrays.
      downlink_bytes: Of the models', to all clients.
      float32_bytes: Of the same models and updates as float32.
    """

    updates: int
    rejected: int
    uplink_bytes: int
    downlink_bytes: int
    float32_bytes: int


class CompressedStrategy(Strategy):
    """Any Flower strategy, with encoded updates, and if asked encoded models.

    One bad reply is logged and left out; the inner strategy does not see it.

    Args:
      strategy: Samples clients and aggregates; one that sends and receives one ``ArrayRecord``.
      codec: Of updates, as a codec or a name.
      downlink: Of models, or None to send them as they are. The server keeps the exact model, so
        what encoding loses in one round is not lost.
      seed: What codecs draw derives from it, the round and the node.

    Attributes:
      traffic: By round, what was sent.

    Example:
      >>> from flwr.serverapp.strategy import FedAvg
      >>> strategy = CompressedStrategy(FedAvg(fraction_train=0.5), codec="sign")
      >>> strategy.codec.name, strategy.traffic
      ('sign', {})

    Raises:
      ConfigError: If a codec's name is unknown, or the downlink feeds errors back.
    """

    def __init__(
        self,
        strategy: Strategy,
        codec: Codec | str,
        downlink: Codec | str | None = None,
        seed: int = 0,
    ) -> None:
        self.strategy = strategy
        self.codec = _codec(codec)
        self.downlink = None if downlink is None else _codec(downlink)
        if isinstance(self.downlink, ErrorFeedback):
            raise ConfigError("downlink feeds no errors back: the server keeps the exact model")
        self.seed = seed
        self.traffic: dict[int, Traffic] = {}
        self._model = ArrayRecord()
        self._sent = 0, 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the inner strategy's messages, with what clients need to encode."""
        self._model = arrays
        messages = self.strategy.configure_train(server_round, arrays, config, grid)
        sent = self._asked(messages, server_round)
        self._sent = len(sent), sum(_bytes(message.content) for message in sent)
        return sent

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the inner strategy's messages, with encoded models if there is a downlink."""
        messages = self.strategy.configure_evaluate(server_round, arrays, config, grid)
        return messages if self.downlink is None else self._asked(messages, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode the replies and let the inner strategy aggregate them.

        Raises:
          ConfigError: If no client at all has the mod.
        """
        layout = _layout(self._model)
        received, good, size, foreign = 0, [], 0, 0
        for reply in replies:
            if reply.has_error():
                good.append(reply)
                continue
            received += 1
            try:
                foreign += records.KEY not in reply.content
                size += self._restore(reply, layout, server_round)
            except (DecodeError, ConfigError, ValueError, TypeError, LookupError) as error:
                node = reply.metadata.src_node_id
                LOG.warning("round %d: node %d: %s", server_round, node, error)
                continue
            good.append(reply)
        if received and foreign == received:
            raise ConfigError(
                "no client encodes its updates; write ClientApp(mods=[compression_mod])"
            )
        clients, down = self._sent
        updates = sum(not reply.has_error() for reply in good)
        whole = 4 * layout.size * (clients + updates)
        self.traffic[server_round] = Traffic(updates, received - updates, size, down, whole)
        LOG.info(
            "round %d: %d updates in %d bytes, %d models in %d bytes; %d bytes as float32",
            *(server_round, updates, size, clients, down, whole),
        )
        arrays, metrics = self.strategy.aggregate_train(server_round, good)
        return None if arrays is None else self._typed(arrays), metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return what the inner strategy makes of the replies."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the codecs, and the inner strategy's summary."""
        downlink = "none" if self.downlink is None else registry.describe(self.downlink)
        LOG.info("codec of updates: %s; of models: %s", registry.describe(self.codec), downlink)
        self.strategy.summary()

    def _typed(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return arrays of the model's types: Flower's means of counters are float64.

        Among the floating-point ones, a counter would set the scale of all others.
        """
        typed = ArrayRecord()
        for name, array in arrays.items():
            own = self._model.get(name)
            value = array.numpy()
            if own is not None and own.dtype != array.dtype:
                value = (value if _is_float(own) else np.rint(value)).astype(own.dtype)
            typed[name] = Array(np.asarray(value))
        return typed

    def _asked(self, messages: Iterable[Message], server_round: int) -> list[Message]:
        contents: dict[int, tuple[RecordDict, RecordDict]] = {}
        result = []
        for message in messages:
            content = message.content
            if id(content) not in contents:  # strategies send one content to all
                contents[id(content)] = content, self._with_task(content, server_round)
            message.content = contents[id(content)][1]
            result.append(message)
        return result

    def _with_task(self, content: RecordDict, server_round: int) -> RecordDict:
        key, arrays = _only_arrays(content, f"a message of {type(self.strategy).__name__}")
        metadata: dict[str, Any] = {
            "arrays": key,
            "codec": registry.to_config(self.codec),
            "seed": round_seed(self.seed, server_round),
        }
        if self.downlink is None:
            return RecordDict({**content, **records.pack(wire.seal(wire.Envelope(metadata)))})
        layout = _layout(arrays)
        seed = derive(self.seed, server_round, "downlink")
        payload = self.downlink.encode(layout.flatten(_floats(arrays)), layout, seed)
        metadata["model"] = [
            [name, array.dtype, list(array.shape)] for name, array in arrays.items()
        ]
        return _packed(content, key, wire.Envelope(metadata, [payload]))

    def _restore(self, reply: Message, layout: Layout, server_round: int) -> int:
        """Put trained arrays in place of an encoded change; return the bytes that it took."""
        if records.KEY not in reply.content:
            raise DecodeError("the update is not encoded; its app needs mods=[compression_mod]")
        size = _bytes(reply.content)
        envelope = wire.unseal(records.unpack(reply.content))
        if len(envelope.parts) != 1:
            raise DecodeError(f"{len(envelope.parts)} parts instead of 1")
        frame = wire.open_frame(envelope.parts[0], layout)
        sent = self.codec.inner if isinstance(self.codec, ErrorFeedback) else self.codec
        if frame.codec not in (sent, self.codec):
            raise DecodeError(f"encoded by {registry.describe(frame.codec)}, as was not asked")
        node = reply.metadata.src_node_id
        if frame.seed != self.codec.client_seed(round_seed(self.seed, server_round), node):
            raise DecodeError("the seed is not that of this node and round")
        key = str(envelope.metadata.get("arrays"))
        others = reply.content.array_records.get(key, ArrayRecord())
        delta = layout.unflatten(decode_frame(frame, layout))
        arrays = ArrayRecord()
        for name, array in self._model.items():
            if name in delta:
                value = _float32(array) + delta[name]
                arrays[name] = Array(np.asarray(value, array.dtype))
            else:
                arrays[name] = _alike(others.get(name), array, name)
        content = RecordDict({k: v for k, v in reply.content.items() if k != records.KEY})
        content[key] = arrays
        reply.content = content
        return size


def _codec(codec: Codec | str) -> Codec:
    chosen: Codec = registry.build("codec", codec) if isinstance(codec, str) else codec
    return chosen


def _task(request: wire.Envelope) -> tuple[str, Codec, int]:
    metadata = request.metadata
    try:
        codec: Codec = registry.from_config("codec", metadata["codec"])
        seed = registry.convert(metadata["seed"], int, "seed")
        return registry.convert(metadata["arrays"], str, "arrays"), codec, seed
    except (ConfigError, KeyError) as error:
        raise DecodeError(f"the server asks for what is not to be had: {error}") from None


def _model(request: wire.Envelope, others: ArrayRecord) -> ArrayRecord:
    """Return the decoded model of a request; sizes are the server's to say, up to a limit."""
    try:
        listed = [
            (str(name), np.dtype(dtype), tuple(int(n) for n in shape))
            for name, dtype, shape in request.metadata["model"]
        ]
        floats = {name: shape for name, dtype, shape in listed if dtype.kind == "f"}
        layout = Layout(tuple(floats), tuple(floats.values()))
        if not 0 <= layout.size <= MAX_SIZE or any(n < 0 for s in floats.values() for n in s):
            raise ConfigError(f"a model of {layout.size} coordinates; at most {MAX_SIZE} are read")
        frame = wire.open_frame(request.parts[0], layout)
        values = layout.unflatten(decode_frame(frame, layout))
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise DecodeError(f"the server's model is malformed: {error}") from None
    arrays = ArrayRecord()
    for name, dtype, _ in listed:
        if name in values:
            arrays[name] = Array(values[name].astype(dtype))
        elif name in others:
            arrays[name] = others[name]
        else:
            raise DecodeError(f"the server's model lacks '{name}'")
    return arrays


def _packed(content: RecordDict, key: str, envelope: wire.Envelope) -> RecordDict:
    """Return the content with an envelope in place of its floating-point arrays."""
    rest = {k: v for k, v in content.items() if k != key}
    others = {n: a for n, a in content.array_records[key].items() if not _is_float(a)}
    if others:
        rest[key] = ArrayRecord(others)
    return RecordDict({**rest, **records.pack(wire.seal(envelope))})


def _only_arrays(content: RecordDict, what: str) -> tuple[str, ArrayRecord]:
    found = {k: v for k, v in content.array_records.items() if k != records.KEY}
    if len(found) != 1:
        raise ConfigError(f"{what} holds {len(found)} ArrayRecords; fedq encodes exactly one")
    return next(iter(found.items()))


def _is_float(array: Array) -> bool:
    return array.dtype in ("float16", "float32", "float64")


def _float32(array: Array) -> NDArray[np.float32]:
    return np.asarray(array.numpy(), np.float32)


def _floats(arrays: ArrayRecord) -> dict[str, Vector]:
    return {name: _float32(array) for name, array in arrays.items() if _is_float(array)}


def _layout(arrays: ArrayRecord) -> Layout:
    shapes = {name: tuple(array.shape) for name, array in arrays.items() if _is_float(array)}
    return Layout(tuple(shapes), tuple(shapes.values()))


def _alike(sent: Array | None, own: Array, name: str) -> Array:
    """Return an array that went as it is, if it is one like the model's."""
    if sent is None or (sent.dtype, tuple(sent.shape)) != (own.dtype, tuple(own.shape)):
        raise DecodeError(f"'{name}' is missing, or of another shape or type than the model's")
    values = sent.numpy()
    if values.shape != tuple(own.shape) or str(values.dtype) != own.dtype:
        raise DecodeError(f"'{name}' is not what it says it is")
    return sent


def _bytes(content: RecordDict) -> int:
    """Return the bytes of an encoded vector, and of the arrays beside it."""
    others = [record for key, record in content.array_records.items() if key != records.KEY]
    arrays = sum(len(array.data) for record in others for array in record.values())
    return len(records.unpack(content)) + arrays
