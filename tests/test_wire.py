"""Frames and messages: what is written is read, and nothing else is."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedq import DecodeError, Layout, build, codecs, wire
from fedq.errors import ConfigError

LAYOUT = Layout.flat(12)
X = np.linspace(-1, 1, 12, dtype=np.float32)


def framed(spec: bytes, body: bytes = b"", layout: Layout = LAYOUT) -> bytes:
    """Seal a frame with a hand-made codec specification."""
    return wire._seal(wire.FRAME_MAGIC, layout.fingerprint + spec + wire.varint(0) + body)


def sealed(content: bytes) -> bytes:
    return wire._seal(wire.MESSAGE_MAGIC, content)


def spec(name: bytes, *entries: bytes) -> bytes:
    return bytes([len(name)]) + name + bytes([len(entries)]) + b"".join(entries)


# --- varint and reader ------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1))
def test_varint_round_trip(value):
    reader = wire.Reader(wire.varint(value))
    assert reader.varint() == value
    reader.end()


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"\x80\x00", b"\xff" * 9, b"\xff" * 9 + b"\x02", b"\xff" * 11, b"\x81\x00"],
)
def test_varint_refuses_other_forms(data):
    with pytest.raises(DecodeError):
        wire.Reader(data).varint()


def test_reader_never_passes_the_end():
    reader = wire.Reader(b"abc")
    assert bytes(reader.take(2)) == b"ab"
    for count in (2, 2**62, -1):
        with pytest.raises(DecodeError, match="truncated"):
            reader.take(count)
    with pytest.raises(DecodeError, match="too many"):
        reader.end()
    assert bytes(reader.rest()) == b"c"
    reader.end()


# --- frame ------------------------------------------------------------------------------------


def test_every_changed_byte_of_a_frame_is_detected():
    payload = build("codec", "uniform", bits=4, rounding="dithered").encode(X, LAYOUT, seed=77)
    for at in range(len(payload)):
        for mask in range(1, 256):
            bad = bytearray(payload)
            bad[at] ^= mask
            with pytest.raises(DecodeError):
                codecs.decode(bytes(bad), LAYOUT)


def test_every_truncation_of_a_frame_is_detected():
    payload = build("codec", "identity").encode(X, LAYOUT)
    for cut in range(len(payload)):
        with pytest.raises(DecodeError):
            codecs.decode(payload[:cut], LAYOUT)
    with pytest.raises(DecodeError, match="checksum"):
        codecs.decode(payload + b"\0", LAYOUT)


def test_frame_says_what_is_wrong():
    payload = build("codec", "identity").encode(X, LAYOUT)
    with pytest.raises(DecodeError, match="another model"):
        codecs.decode(payload, Layout.flat(13))
    with pytest.raises(DecodeError, match="another model"):
        codecs.decode(payload, Layout(("y",), ((12,),)))
    with pytest.raises(DecodeError, match="not a fedq payload"):
        codecs.decode(b"PK" + payload[2:], LAYOUT)
    with pytest.raises(DecodeError, match="version 9"):
        codecs.decode(payload[:2] + b"\x09" + payload[3:], LAYOUT)
    with pytest.raises(DecodeError, match="not a fedq message"):
        wire.unseal(payload)


@given(st.integers(-(2**80), 2**80))
def test_any_integer_is_a_seed(seed):
    codec = build("codec", "uniform", rounding="dithered")
    payload = codec.encode(X, LAYOUT, seed)
    assert wire.open_frame(payload, LAYOUT).seed == seed % 2**64


def test_header_is_small():
    assert len(build("codec", "identity").encode(X, LAYOUT)) - 4 * X.size == 22


@pytest.mark.parametrize(
    "bad",
    [
        spec(b"nonsense"),
        spec(b""),
        spec(b"\xff\xfe"),
        spec(b"os.system"),
        spec(b"__class__"),
        spec(b"identity", b"\0"),  # no such field
        spec(b"uniform", b"\x63\x08"),
        spec(b"uniform", b"\0\x08", b"\0\x08"),  # twice
        spec(b"uniform", b"\0\x22"),  # 17 bits
        spec(b"uniform", b"\0\x01"),  # -1 bit
        spec(b"uniform", b"\x02\x09"),  # rounding number 9
        spec(b"uniform", b"\0" + b"\xff" * 9 + b"\x01"),  # a 64-bit number of bits
        spec(b"top_k", b"\0" + struct.pack("<d", float("nan"))),
        spec(b"top_k", b"\0" + struct.pack("<d", -1.0)),
        spec(b"top_k", b"\0\0"),  # truncated float
        spec(b"error_feedback"),  # no inner
        spec(b"error_feedback", b"\0" + spec(b"nonsense")),
        b"\xff" + b"a" * 20,
    ],
)
def test_unusable_codec_specifications(bad):
    with pytest.raises(DecodeError):
        codecs.decode(framed(bad, bytes(48)), LAYOUT)


@pytest.mark.parametrize("depth", [6, 50, 5000])
def test_nesting_is_limited(depth):
    nested = spec(b"identity")
    for _ in range(depth):
        nested = spec(b"top_k", b"\1" + nested)
    with pytest.raises(DecodeError, match="nested too deeply"):
        codecs.decode(framed(nested), LAYOUT)


def test_moderate_nesting_works():
    codec = build("codec", "top_k", fraction=1.0, inner={"name": "top_k", "fraction": 1.0})
    outer = build("codec", "error_feedback", inner=codec)
    y = outer.decode(outer.encode(X, LAYOUT), LAYOUT)
    assert np.abs(y - X).max() < 1e-3


@given(st.binary(max_size=80))
def test_random_bytes_are_no_frame(data):
    for payload in (data, wire._seal(wire.FRAME_MAGIC, LAYOUT.fingerprint + data)):
        try:
            y = codecs.decode(payload, LAYOUT)
        except DecodeError:
            continue
        assert np.isfinite(y).all()


# --- message ----------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=8), json_values, max_size=4),
    st.lists(st.binary(max_size=50), max_size=wire.MAX_PARTS),
)
def test_message_round_trip(metadata, parts):
    message = wire.unseal(wire.seal(wire.Envelope(metadata, parts)))
    assert message.metadata == metadata
    assert [bytes(part) for part in message.parts] == parts


def test_message_is_canonical():
    a = wire.seal(wire.Envelope({"a": 1, "b": 2}, [b"x"]))
    assert a == wire.seal(wire.Envelope({"b": 2, "a": 1}, [b"x"]))


def test_every_changed_byte_of_a_message_is_detected():
    data = wire.seal(wire.Envelope({"loss": 0.25, "examples": 80}, [b"abc", b"", bytes(9)]))
    for at in range(len(data)):
        for mask in range(1, 256):
            bad = bytearray(data)
            bad[at] ^= mask
            with pytest.raises(DecodeError):
                wire.unseal(bytes(bad))
    for cut in range(len(data)):
        with pytest.raises(DecodeError):
            wire.unseal(data[:cut])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        wire.varint(2) + b"[]" + b"\0",  # not an object
        wire.varint(2) + b"{}" + b"\x09",  # too many parts
        wire.varint(2) + b"{}" + b"\x01\x05abc",  # part longer than the message
        wire.varint(2) + b"{}" + b"\0extra",
        wire.varint(9) + b'{"a":NaN}' + b"\0",
        wire.varint(14) + b'{"a":Infinity}' + b"\0",
        wire.varint(5) + b'{"a":' + b"\0",
        wire.varint(3) + b"\xff\xfe\xfd" + b"\0",
        wire.varint(60_000) + b"[" * 60_000 + b"\0",  # deep
        wire.varint(2**63) + b"{}\0",
        wire.varint(wire.MAX_METADATA_BYTES + 1) + b" " * (wire.MAX_METADATA_BYTES + 1) + b"\0",
    ],
)
def test_malformed_messages_are_refused(content):
    with pytest.raises(DecodeError):
        wire.unseal(sealed(content))


def test_a_message_too_large_cannot_be_sealed():
    with pytest.raises(ConfigError):
        wire.seal(wire.Envelope({"a": "x" * wire.MAX_METADATA_BYTES}, []))
    with pytest.raises(ConfigError):
        wire.seal(wire.Envelope({}, [b""] * (wire.MAX_PARTS + 1)))


def test_metadata_must_be_finite():
    with pytest.raises(ValueError, match="JSON"):
        wire.seal(wire.Envelope({"loss": float("nan")}, []))


@given(st.binary(max_size=60))
def test_random_bytes_are_no_message(data):
    for content in (data, sealed(data)):
        try:
            message = wire.unseal(content)
        except DecodeError:
            continue
        assert isinstance(message.metadata, dict)


def test_a_request_of_secure_aggregation_is_told_apart():
    message = wire.Envelope({"phase": "mask"}, [b"abc"])
    ordinary, secure = wire.seal(message), wire.seal(message, wire.SECURE_MAGIC)
    assert ordinary[2:3] == secure[2:3]
    assert wire.unseal(secure, wire.SECURE_MAGIC).metadata == message.metadata
    for blob, magic in ((ordinary, wire.SECURE_MAGIC), (secure, wire.MESSAGE_MAGIC)):
        with pytest.raises(DecodeError, match="not a fedq message"):
            wire.unseal(blob, magic)
        assert bytes(wire.peek(blob).parts[0]) == b"abc"


@given(st.binary(max_size=200))
def test_to_peek_at_random_bytes_is_safe(data):
    with contextlib.suppress(DecodeError):
        wire.peek(data)
