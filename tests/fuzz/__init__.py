"""Arbitrary bytes at every decoder: what an input means, what must hold, and a corpus in git.

An input is one byte and the rest of a frame. The byte chooses a layout, whether the frame lies
beside a reference, and whether the rest is taken raw, magic and checksum included, or is sealed
with the right ones first, so that what is mutated reaches the decoders::

    flags u8 | codec specification | seed varint | body            (or, raw: a whole payload)

``corpus/<codec>/`` holds an input per example and layout, and every input that was ever a finding,
as ``finding-*``. ``python -m tests.fuzz --write`` adds the missing ones; ``python -m tests.fuzz
--run SECONDS`` searches for new ones (:mod:`tests.fuzz.search`); ``tests/test_fuzz.py`` replays
them and mutations of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedq import codecs, random, wire
from fedq.codecs import Codec
from fedq.errors import DecodeError
from fedq.layout import Layout
from fedq.registry import build, table
from fedq.robustness._hostile import changed

CORPUS = Path(__file__).parent / "corpus"
#: Small, so that a search makes many tries; rows, columns, scalars and empty tensors.
LAYOUTS = (
    Layout(("conv", "bias", "gain", "empty", "head"), ((3, 2, 2), (3,), (), (0, 4), (4, 5))),
    Layout.flat(33),
    Layout.flat(1),
    Layout.flat(0),
)
_LAYOUT, BESIDE, RAW = 3, 4, 8  # flags
_SEED = 7


def vector(layout: Layout, purpose: str) -> np.ndarray:
    """Return a heavy-tailed vector with some zeros, from integers."""
    word = random.words(_SEED, layout.size, purpose).astype(np.int64) - 2**31
    x = np.ldexp((word >> 16).astype(np.float64) ** 3, -48)
    x[::5] = 0
    return x.astype(np.float32)


def opened(data: bytes) -> tuple[bytes, Layout, np.ndarray | None]:
    """Return the payload that an input means, its layout, and the reference beside it."""
    flags = data[0] if data else 0
    layout = LAYOUTS[flags & _LAYOUT]
    reference = vector(layout, "reference") if flags & BESIDE else None
    payload = bytes(data[1:])
    if not flags & RAW:
        payload = wire._seal(wire.FRAME_MAGIC, wire._fingerprint(layout, reference) + payload)
    return payload, layout, reference


def check(data: bytes) -> bool:
    """Whether an input decodes; what is neither refused nor a finite vector is a bug."""
    payload, layout, reference = opened(data)
    try:
        y = codecs.decode(payload, layout, reference=reference)
    except DecodeError:
        return False
    assert y.shape == (layout.size,)
    assert y.dtype == np.float32
    assert np.isfinite(y).all()
    return True


def head_bytes(data: bytes) -> int:
    """Return how much of an input is flags, specification and seed; 1 if they cannot be read."""
    if not data or data[0] & RAW:
        return min(len(data), 1)
    reader = wire.Reader(data[1:])
    try:
        wire._read_spec(reader, "codec")
        reader.varint()
    except DecodeError:
        return 1
    return len(data) - len(reader.rest())


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Return an input with a few bytes of its body (sometimes of its head) changed."""
    start = head_bytes(data) if rng.random() < 0.9 else 0
    return data[:start] + changed(data[start:], rng)


# --- corpus --------------------------------------------------------------------------------------


def _input(codec: Codec, place: int, *, beside: bool = False, raw: bool = False) -> bytes:
    layout = LAYOUTS[place]
    reference = vector(layout, "reference") if beside else None
    payload = codec.encode(vector(layout, "x"), layout, _SEED, reference=reference)
    flags = place | BESIDE * beside | RAW * raw
    return bytes([flags]) + (payload if raw else payload[7 + len(layout.fingerprint) :])


def seeds() -> Iterator[tuple[Path, bytes]]:
    """Yield the corpus file and the input of each example, on the layouts with coordinates."""
    for name, cls in table("codec").items():
        examples: tuple[Any, ...] = cls.examples  # type: ignore[attr-defined]
        for number, options in enumerate(examples):
            codec = build("codec", name, **options)
            folder = CORPUS / name
            for place in range(2):
                yield folder / f"{number}-{place}", _input(codec, place)
            if codec.predictive:
                yield folder / f"{number}-beside", _input(codec, 0, beside=True)
        yield CORPUS / name / "raw", _input(build("codec", name, **examples[0]), 0, raw=True)


def write() -> None:
    """Bring the examples' inputs up to date; findings stay."""
    for path, data in seeds():
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print(f"wrote {path}")


def keep(path: Path) -> Path:
    """Add a finding to the corpus, under the codec that it names."""
    data = path.read_bytes()
    try:
        name = wire._read_spec(wire.Reader(data[1:]), "codec").name
    except DecodeError:
        name = "raw"
    kept = CORPUS / name / f"finding-{hashlib.sha256(data).hexdigest()[:8]}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(data)
    return kept
