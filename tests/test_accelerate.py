"""Tensors give the bytes of the codecs; what holds on the CPU's tensors holds on a card's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedq import DecodeError, Layout, accelerate, build, codecs, wire
from fedq.errors import ConfigError
from fedq.registry import from_config
from tests.golden import FOLDER

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
every_device = pytest.mark.parametrize("device", DEVICES)

PACKED = [
    {"rounding": rounding, "symmetric": symmetric, "bits": bits, "scale": scale, "bucket": 30}
    for rounding in ("nearest", "stochastic", "dithered")
    for symmetric in (True, False)
    for bits, scale in ((1, "tensor"), (4, "model"), (3, "channel"), (8, "bucket"), (16, "tensor"))
    if not (rounding == "dithered" and symmetric and bits == 1)
]
CODECS = [build("codec", "uniform", entropy="packed", **options) for options in PACKED] + [
    build("codec", name, **options)
    for name, options in (
        ("drive", {}),
        ("drive", {"rounds": 1}),
        ("eden", {"bits": 0.3}),
        ("eden", {"bits": 1.0, "rounds": 1}),
        ("eden", {"bits": 2.0}),
        ("eden", {"bits": 2.7}),
        ("eden", {"bits": 8.0}),
    )
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
LAYOUT = Layout(("w", "b", "none", "s"), ((5, 3, 7), (5,), (0, 4), ()))


def vectors(layout: Layout) -> dict[str, np.ndarray]:
    normal = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)
    sparse = np.where(np.arange(layout.size) % 7, 0, normal).astype(np.float32)
    ramp = np.linspace(-1, 2, layout.size).astype(np.float32)
    return {
        "normal": normal,
        "sparse": sparse,
        "huge": ramp * np.float32(1.7e38),
        "tiny": ramp * np.float32(1e-44),
        "zero": np.zeros_like(normal),
        "negative zero": -np.zeros_like(normal),
    }


def agree(codec, x: np.ndarray, layout: Layout, seed: int, device: str) -> None:
    """The same payload from the tensor, and the same numbers back."""
    payload = codec.encode(x, layout, seed)
    assert accelerate.encode(codec, torch.tensor(x, device=device), layout, seed) == payload
    y = accelerate.decode(payload, layout, device)
    assert y.device.type == device
    assert y.dtype == torch.float32
    assert np.array_equal(y.cpu().numpy(), codecs.decode(payload, layout))


@every_device
@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*/*.json")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_golden(path, device):
    case = json.loads(path.read_text())
    layout = Layout.of({name: np.empty(shape) for name, shape in case["layout"]})
    x = torch.tensor(np.frombuffer(bytes.fromhex(case["x"]), "<f4").astype(np.float32))
    codec, payload = from_config("codec", case["codec"]), bytes.fromhex(case["payload"])
    assert accelerate.encode(codec, x.to(device), layout, case["seed"]) == payload
    y = accelerate.decode(payload, layout, device).cpu().numpy()
    assert np.array_equal(y, np.frombuffer(bytes.fromhex(case["y"]), "<f4"))


@every_device
@every_codec
@pytest.mark.parametrize("layout", [LAYOUT, Layout.flat(0), Layout.flat(1), Layout.flat(300)])
def test_same_bytes(codec, layout, device):
    for x in vectors(layout).values():
        agree(codec, x, layout, 5, device)


@every_device
@pytest.mark.parametrize("name", ["uniform", "eden"])
def test_same_bytes_of_many_pieces(name, device):
    options = {"uniform": {"entropy": "packed", "bits": 1}, "eden": {"bits": 1.5}}
    layout = Layout.flat(200_001)
    agree(build("codec", name, **options[name]), vectors(layout)["normal"], layout, 1, device)


@every_codec
@settings(max_examples=5)
@given(data=st.data())
def test_same_bytes_of_any_vector(codec, data):
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    x = data.draw(hnp.arrays(np.float32, LAYOUT.size, elements=values))
    agree(codec, x, LAYOUT, data.draw(st.integers(-(2**70), 2**70)), "cpu")


@every_codec
def test_the_same_payloads_are_refused(codec):
    """A tensor is decoded from a mutated payload exactly if the vector is, and to the same."""
    rng = np.random.default_rng(0)
    payload = codec.encode(vectors(LAYOUT)["normal"], LAYOUT, 1)
    body = bytes(wire.open_frame(payload, LAYOUT).body)
    for trial in range(40):
        mutant = bytearray(body)
        for place in rng.integers(len(body), size=3):
            mutant[place] = rng.integers(256)
        if trial % 5 == 0:
            mutant[-1] |= 128
        if trial % 4 == 0:
            del mutant[rng.integers(len(body)) :]
        sealed = wire.seal_frame(codec, LAYOUT, 1, bytes(mutant))
        try:
            expected = codecs.decode(sealed, LAYOUT)
        except DecodeError:
            with pytest.raises(DecodeError):
                accelerate.decode(sealed, LAYOUT, "cpu")
        else:
            assert np.array_equal(accelerate.decode(sealed, LAYOUT, "cpu").numpy(), expected)


def test_no_code_stands_where_the_scale_is_zero():
    codec, layout = build("codec", "eden"), Layout.flat(64)
    with pytest.raises(DecodeError, match="not zero"):
        accelerate.decode(wire.seal_frame(codec, layout, 0, bytes(11) + b"\1"), layout, "cpu")


def test_the_tensor_is_not_changed_and_needs_no_gradient():
    x = torch.randn(LAYOUT.size, requires_grad=True)
    before = x.detach().clone()
    for codec in CODECS:
        accelerate.encode(codec, x, LAYOUT, 1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["drive", "sign"])
def test_wrong_tensors_are_refused(name):
    codec, layout = build("codec", name), Layout.flat(8)
    for bad, message in ((torch.zeros(7), "shape"), (torch.full((8,), torch.nan), "NaN")):
        with pytest.raises(ConfigError, match=message):
            accelerate.encode(codec, bad, layout)
    with pytest.raises(ConfigError, match="float32"):
        accelerate.encode(build("codec", "drive"), torch.zeros(8, dtype=torch.float64), layout)
