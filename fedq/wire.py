"""Bytes between peers: the frame of a codec payload, and the message around it.

Two little-endian records, both versioned and checksummed (CRC-32 as in zlib, over all other bytes):

A **frame** holds one encoded vector, and all a decoder needs besides its own layout::

    "fq" | version u8 | crc u32 | layout fingerprint 4 B | codec specification | seed varint | body

The codec specification is the registered name (length u8, ASCII) and the fields that differ from
their defaults: count u8, then per field its index u8 and its value.

A **message** is what one side sends in one round::

    "fQ" | version u8 | crc u32 | metadata: varint length, JSON | count u8 | parts: length, bytes

A request of secure aggregation is a message, too, but begins with "fS".

Nothing here allocates by a size that a peer claims: lengths are checked against the bytes at hand.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import typing
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedq import registry
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout

VERSION = 1
FRAME_MAGIC, MESSAGE_MAGIC, SECURE_MAGIC = b"fq", b"fQ", b"fS"
MAX_METADATA_BYTES = 1 << 16
MAX_PARTS = 8
_HEAD = struct.Struct("<2sBI")
_MAX_EXPONENT = 400  # of a decimal that is a float
_PREFIX_BYTES = 3  # magic and version: what the checksum covers before its own field


def varint(value: int) -> bytes:
    """Encode a non-negative integer below 2**64 as LEB128.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """A cursor over a peer's bytes; every read past the end is a :class:`DecodeError`."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at = 0

    def take(self, count: int) -> memoryview:
        """Return the next ``count`` bytes."""
        if count < 0 or count > len(self._data) - self._at:
            raise DecodeError(f"payload is truncated: {count} bytes wanted at {self._at}")
        self._at += count
        return self._data[self._at - count : self._at]

    def byte(self) -> int:
        """Return the next byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """Return the next LEB128 integer, below 2**64."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                if value >= 1 << 64 or (byte == 0 and shift):
                    break
                return value
        raise DecodeError("a varint is not in its shortest 64-bit form")

    def rest(self) -> memoryview:
        """Return all bytes that are left."""
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._data):
            raise DecodeError(f"{len(self._data) - self._at} bytes too many")


def _seal(magic: bytes, *content: bytes | memoryview) -> bytes:
    prefix = magic + bytes([VERSION])
    crc = zlib.crc32(prefix)
    for piece in content:
        crc = zlib.crc32(piece, crc)
    return b"".join([prefix, struct.pack("<I", crc), *content])


def _unseal(magic: bytes, data: bytes | memoryview, what: str) -> Reader:
    try:
        view = memoryview(data).cast("B")
    except TypeError:
        raise DecodeError(f"a {what} is contiguous bytes, not {type(data).__name__}") from None
    if len(view) < _HEAD.size:
        raise DecodeError(f"{what} is truncated: {len(view)} bytes")
    found, version, crc = _HEAD.unpack(view[: _HEAD.size])
    if found != magic:
        raise DecodeError(f"not a fedq {what}: it starts with {found!r}")
    if version != VERSION:
        raise DecodeError(f"{what} of version {version}; this fedq reads version {VERSION}")
    content = view[_HEAD.size :]
    if zlib.crc32(content, zlib.crc32(view[:_PREFIX_BYTES])) != crc:
        raise DecodeError(f"{what} is corrupt: its checksum does not match")
    return Reader(content)


# --- codec specification ---------------------------------------------------------------------


def _same(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


def _write_spec(obj: Any) -> bytes:
    cls = type(obj)
    name: bytes = cls.name.encode("ascii")
    entries = []
    for index, field in enumerate(registry.fields(cls).values()):
        value = getattr(obj, field.name)
        if field.required or not _same(value, field.default):
            entries.append(bytes([index]) + _write_value(value, field.type))
    return bytes([len(name)]) + name + bytes([len(entries)]) + b"".join(entries)


def _write_value(value: Any, hint: Any) -> bytes:
    if registry.is_registered(value):
        return _write_spec(value)
    if typing.get_origin(hint) is Literal:
        return bytes([typing.get_args(hint).index(value)])
    if hint is bool:
        return bytes([value])
    if hint is int:
        return _zigzag(value)
    if hint is float:  # in decimal, as options are short there
        sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        mantissa = int("".join(map(str, digits)))
        return _zigzag(-mantissa if sign else mantissa) + _zigzag(int(exponent))
    raise TypeError(f"a codec field of type {hint} has no wire form")


def _zigzag(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _unzigzag(raw: int) -> int:
    return raw >> 1 if raw & 1 == 0 else -((raw + 1) >> 1)


def _read_spec(reader: Reader, group: str, depth: int = 0) -> Any:
    if depth > 4:
        raise DecodeError("codecs are nested too deeply")
    try:
        name = bytes(reader.take(reader.byte())).decode("ascii")
        cls = registry.lookup(group, name)
        known = list(registry.fields(cls).values())
        options: dict[str, Any] = {}
        for _ in range(reader.byte()):
            index = reader.byte()
            if index >= len(known) or known[index].name in options:
                raise DecodeError(f"codec '{name}' has no field {index}, or it is given twice")
            field = known[index]
            options[field.name] = _read_value(reader, field.type, depth)
        return registry.build(group, name, **options)
    except DecodeError:
        raise
    except (ConfigError, UnicodeDecodeError) as error:
        raise DecodeError(f"payload names an unusable codec: {error}") from None


def _read_value(reader: Reader, hint: Any, depth: int) -> Any:
    group = getattr(hint, "group", None)
    if isinstance(group, str):
        return _read_spec(reader, group, depth + 1)
    if typing.get_origin(hint) is Literal:
        choices, index = typing.get_args(hint), reader.byte()
        if index >= len(choices):
            raise DecodeError(f"choice {index} of {len(choices)}")
        return choices[index]
    if hint is bool:
        return bool(reader.byte())
    if hint is int:
        return _unzigzag(reader.varint())
    if hint is float:
        mantissa, exponent = _unzigzag(reader.varint()), _unzigzag(reader.varint())
        if abs(exponent) > _MAX_EXPONENT or not math.isfinite(
            value := float(f"{mantissa}e{exponent}")
        ):
            raise DecodeError("a codec option is not finite")
        return value
    raise DecodeError(f"a codec field of type {hint} has no wire form")


# --- frame -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One opened codec payload: the codec that wrote it, its seed, and the body."""

    codec: Any
    seed: int
    body: memoryview


def _fingerprint(layout: Layout, reference: NDArray[np.float32] | None) -> bytes:
    if reference is None:
        return layout.fingerprint
    crc = zlib.crc32(reference.astype("<f4").tobytes())
    return bytes(a ^ b for a, b in zip(layout.fingerprint, crc.to_bytes(4, "little"), strict=True))


def seal_frame(
    codec: Any,
    layout: Layout,
    seed: int,
    body: bytes,
    reference: NDArray[np.float32] | None = None,
) -> bytes:
    """Frame an encoded body; the inverse of :func:`open_frame`.

    A body that can only be decoded beside a reference vector carries its layout's fingerprint xor
    the CRC-32 of the reference: no byte more, and a wrong reference is noticed.
    """
    head = _fingerprint(layout, reference) + _write_spec(codec) + varint(seed)
    return _seal(FRAME_MAGIC, head, body)


def open_frame(
    payload: bytes | memoryview, layout: Layout, reference: NDArray[np.float32] | None = None
) -> Frame:
    """Check a payload's frame against the local layout, and the reference if there is one.

    Raises:
      DecodeError: On wrong magic, version, checksum, layout, reference, codec name or option.
    """
    reader = _unseal(FRAME_MAGIC, payload, "payload")
    if reader.take(len(layout.fingerprint)) != _fingerprint(layout, reference):
        beside = "" if reference is None else ", or the references do"
        raise DecodeError(f"payload was made for another model: the layouts differ{beside}")
    codec = _read_spec(reader, "codec")
    seed = reader.varint()
    return Frame(codec, seed, reader.rest())


# --- message -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Envelope:
    """One message: JSON-ready metadata and binary parts."""

    metadata: Mapping[str, Any]
    parts: Sequence[bytes | memoryview] = dataclasses.field(default=())


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def seal(message: Envelope, magic: bytes = MESSAGE_MAGIC) -> bytes:
    """Serialise a message; the inverse of :func:`unseal`.

    >>> unseal(seal(Envelope({"loss": 0.5}, [b"abc"]))).metadata
    {'loss': 0.5}
    """
    meta = json.dumps(
        dict(message.metadata), separators=(",", ":"), allow_nan=False, sort_keys=True
    ).encode()
    if len(meta) > MAX_METADATA_BYTES or len(message.parts) > MAX_PARTS:
        raise ConfigError(
            f"a message holds {MAX_METADATA_BYTES} bytes of metadata, {MAX_PARTS} parts"
        )
    pieces: list[bytes | memoryview] = [varint(len(meta)), meta, bytes([len(message.parts)])]
    for part in message.parts:
        pieces += [varint(len(part)), part]
    return _seal(magic, *pieces)


def unseal(data: bytes | memoryview, magic: bytes = MESSAGE_MAGIC) -> Envelope:
    """Open a message.

    Raises:
      DecodeError: On anything that :func:`seal` did not write.
    """
    return _read_message(_unseal(magic, data, "message"))


def peek(data: bytes | memoryview) -> Envelope:
    """Read a message of either kind that is yet to be opened: its checksum is not looked at."""
    return _read_message(Reader(memoryview(data)[_HEAD.size :]))


def _read_message(reader: Reader) -> Envelope:
    length = reader.varint()
    if length > MAX_METADATA_BYTES:
        raise DecodeError(f"{length} bytes of metadata; at most {MAX_METADATA_BYTES} are read")
    try:
        text = bytes(reader.take(length))
        metadata = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"metadata is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise DecodeError("metadata is not a JSON object")
    count = reader.byte()
    if count > MAX_PARTS:
        raise DecodeError(f"{count} parts; at most {MAX_PARTS} are read")
    parts = [reader.take(reader.varint()) for _ in range(count)]
    reader.end()
    return Envelope(metadata, parts)
