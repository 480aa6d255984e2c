"""Codecs on torch tensors, where they live: the same bytes as the codecs themselves.

On a graphics card, quantisation, packing and rotation run there, and only the payload crosses to
the host. This holds for ``uniform`` with ``entropy="packed"``, ``eden`` and ``drive``; for all
other codecs, and for devices without float64, the vector crosses and the codec does the work.

Bytes are equal because each operation is IEEE-exact on its own (no fused multiply-add: one kernel
per operation), maxima have no order, and sums are of integers. Random words are drawn on the host,
from :mod:`fedq.random`, and moved: four bytes per coordinate, an eighth of a byte for rotations.

Tested on tensors of the CPU; no graphics card was at hand, so there is no figure of speed.

Example:
  >>> import fedq, torch
  >>> layout, codec = fedq.Layout.flat(1000), fedq.build("codec", "eden", bits=2.0)
  >>> x = torch.linspace(-1, 1, 1000)
  >>> payload = encode(codec, x, layout, seed=1)
  >>> payload == codec.encode(x.numpy(), layout, seed=1)
  True
  >>> decode(payload, layout, "cpu").shape
  torch.Size([1000])
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedq import codecs, random, wire
from fedq.codecs import Codec
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import floats_bytes, group_sizes, means, read_floats, read_scales
from fedq.codecs._hadamard import Rotation, integer_factor
from fedq.codecs.drive import Drive
from fedq.codecs.eden import Eden, levels, scale, thresholds, values
from fedq.codecs.uniform import Uniform
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout

_TOP = float(np.finfo(np.float32).max)


def encode(codec: Codec, x: Tensor, layout: Layout, seed: int = 0) -> bytes:
    """Encode a tensor on its device; equal to ``codec.encode`` of the same numbers.

    Args:
      codec: Any registered codec.
      x: (d,) finite float32, on any device.
      layout: Names and shapes of the d coordinates.
      seed: See :meth:`fedq.codecs.Codec.encode`.

    Raises:
      ConfigError: If ``x`` is not a finite float32 vector of the layout's size.
    """
    x = x.detach()
    inner = _on_device(codec, x.device)
    if inner is None:
        return codec.encode(x.cpu().numpy(), layout, seed)
    if x.dtype != torch.float32 or x.shape != (layout.size,):
        raise ConfigError(
            f"expected a float32 tensor of shape ({layout.size},), "
            f"not {x.dtype} of shape {tuple(x.shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise ConfigError("cannot use a vector with NaN or infinity")
    seed = int(seed) % 2**random.SEED_BITS
    if isinstance(inner, Uniform):
        body = _encode_uniform(inner, x, layout, seed)
    else:
        body = _encode_eden(inner, x, seed)
    return wire.seal_frame(codec, layout, seed, body)


def decode(payload: bytes | memoryview, layout: Layout, device: str | torch.device) -> Tensor:
    """Decode on a device, (d,) float32; equal to :func:`fedq.codecs.decode`.

    Raises:
      DecodeError: On anything malformed.
    """
    device = torch.device(device)
    frame = wire.open_frame(payload, layout)
    inner = _on_device(frame.codec, device)
    if inner is None:
        return torch.from_numpy(codecs.decode(payload, layout)).to(device)
    if len(frame.body) > frame.codec.max_body_bytes(layout):
        raise DecodeError(f"payload is too long for {layout.size} coordinates")
    if isinstance(inner, Uniform):
        y = _decode_uniform(inner, frame.body, layout, frame.seed, device)
    else:
        y = _decode_eden(inner, frame.body, layout, frame.seed, device)
    if not bool(torch.isfinite(y).all()):
        raise DecodeError("payload decodes to NaN or infinity")
    return y


def _on_device(codec: Codec, device: torch.device) -> Uniform | Eden | None:
    """Return the codec whose work is done here, or None for the host."""
    if device.type == "mps":  # has no float64
        return None
    if isinstance(codec, Drive):
        return codec.one_bit
    if isinstance(codec, Eden) or (isinstance(codec, Uniform) and codec.entropy == "packed"):
        return codec
    return None


def _moved(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)


# --- packed codes -------------------------------------------------------------------------------


def _pack(codes: Tensor, bits: int) -> bytes:
    """Return what :func:`fedq.codecs._bits.pack` returns."""
    places = torch.arange(bits, dtype=torch.int32, device=codes.device)
    loose = (codes.to(torch.int32)[:, None] >> places & 1).to(torch.uint8).reshape(-1)
    loose = torch.nn.functional.pad(loose, (0, -loose.numel() % 8)).reshape(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (loose * weights).sum(1, dtype=torch.uint8).cpu().numpy().tobytes()


def _unpack(body: memoryview, count: int, bits: int, device: torch.device) -> Tensor:
    """Return what :func:`fedq.codecs._bits.unpack` returns, int32."""
    if len(body) != packed_bytes(count, bits):
        raise DecodeError(f"{len(body)} bytes for {count} codes of {bits} bits")
    octets = _moved(np.frombuffer(body, np.uint8), device)
    loose = (octets[:, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1).reshape(-1)
    if bool(loose[count * bits :].any()):
        raise DecodeError("padding bits of packed codes are set")
    codes = torch.zeros(count, dtype=torch.int32, device=device)
    for place, column in enumerate(loose[: count * bits].reshape(count, bits).unbind(1)):
        codes |= column.to(torch.int32) << place
    return codes


# --- uniform ------------------------------------------------------------------------------------


class _Grid:
    """Step, offset and dither of every coordinate, (d,) float64, as in the codec."""

    def __init__(self, codec: Uniform, low: Tensor, high: Tensor, group: Tensor, seed: int) -> None:
        half = (1 << codec.bits - 1) - 1
        if codec.symmetric and half:
            self.zero, self.top = half, 2 * half
            self.step = high.double()[group] / half
            self.offset = torch.zeros_like(self.step)
        else:
            self.zero, self.top = 0, (1 << codec.bits) - 1
            self.offset = low.double()[group]
            self.step = (high.double()[group] - self.offset) / self.top
        self.u: Tensor | None = None
        if codec.rounding != "nearest":
            words = random.words(seed, group.numel(), codec.rounding).view(np.int32)
            unsigned = _moved(words, group.device).to(torch.int64) & 0xFFFFFFFF
            self.u = (unsigned.double() + 0.5) * 2.0**-32


def _groups(codec: Uniform, layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the size of each group, and the group of each coordinate."""
    sizes = _moved(group_sizes(layout, codec.scale, codec.bucket), device)
    numbers = torch.arange(sizes.numel(), device=device)
    return sizes, torch.repeat_interleave(numbers, sizes, output_size=layout.size)


def _extremes(x: Tensor, sizes: Tensor, group: Tensor, reduce: str) -> Tensor:
    return x.new_zeros(sizes.numel()).scatter_reduce_(0, group, x, reduce, include_self=False)


def _means(x: Tensor, sizes: Tensor, group: Tensor) -> Tensor:
    """Return the mean magnitude of each group as the host rounds it.

    A sum depends on its order, but little: only where that could change the float32 is the host
    asked.
    """
    size = x.abs().double()
    mean = size.new_zeros(sizes.numel()).scatter_add_(0, group, size) / sizes
    slack = mean * sizes * 2.0**-51
    if torch.equal((mean - slack).float(), (mean + slack).float()):
        return mean.float()
    return _moved(means(x.cpu().numpy(), sizes.cpu().numpy()), x.device)


def _encode_uniform(codec: Uniform, x: Tensor, layout: Layout, seed: int) -> bytes:
    sizes, group = _groups(codec, layout, x.device)
    if not codec.symmetric:
        low, high = (_extremes(x, sizes, group, reduce) + 0.0 for reduce in ("amin", "amax"))
        head = [low, high]
    else:
        if codec.bits == 1 and codec.rounding == "nearest":
            high = _means(x, sizes, group)
        else:
            high = _extremes(x.abs(), sizes, group, "amax")
        low, head = -high, [high]
    grid = _Grid(codec, low, high, group, seed)
    divisor = torch.where(grid.step > 0, grid.step, 1.0)
    t = (x - grid.offset) / divisor + grid.zero
    code = torch.round(t) if grid.u is None else torch.floor(t + grid.u)
    codes = code.clamp(0, grid.top).to(torch.int32)
    scales = b"".join(floats_bytes(part.cpu().numpy()) for part in head)
    return scales + _pack(codes, codec.bits)


def _decode_uniform(
    codec: Uniform, body: memoryview, layout: Layout, seed: int, device: torch.device
) -> Tensor:
    sizes, group = _groups(codec, layout, device)
    if codec.symmetric:
        upper, body = read_scales(body, sizes.numel())
        lower = -upper
    else:
        lower, body = read_floats(body, sizes.numel())
        upper, body = read_floats(body, sizes.numel())
        if (lower > upper).any():
            raise DecodeError("the minimum of a group exceeds its maximum")
    codes = _unpack(body, layout.size, codec.bits, device)
    grid = _Grid(codec, _moved(lower, device), _moved(upper, device), group, seed)
    if bool(((codes > grid.top) | ((grid.step == 0) & (codes != grid.zero))).any()):
        raise DecodeError("a code is out of range")
    level = codes.double() - float(grid.zero)
    if grid.u is not None and codec.rounding == "dithered":
        level += 0.5 - grid.u
    return (level * grid.step + grid.offset).clamp(-_TOP, _TOP).float()


# --- eden and drive -----------------------------------------------------------------------------


def _transform(z: Tensor) -> Tensor:
    """Multiply each row by the Hadamard matrix, stage by stage as the host does."""
    rows, size = z.shape
    h = 1
    while h < size:
        a, b = z.reshape(rows, -1, 2, h).unbind(2)
        z = torch.stack([a + b, a - b], dim=2).reshape(rows, size)
        h *= 2
    return z


def _runs(rotation: Rotation) -> Iterator[tuple[int, int, int]]:
    """Return for pieces of equal size, which lie side by side: start, number of pieces, size."""
    start = 0
    for size in sorted(set(rotation.sizes), reverse=True):
        count = rotation.sizes.count(size)
        yield start, count, size
        start += count * size


def _signs(rotation: Rotation, device: torch.device) -> Tensor:
    """Return (rounds, padded or more) float32 of +-1."""
    words = _moved(rotation.signs.view(np.int32), device)
    places = torch.arange(32, dtype=torch.int32, device=device)
    return 1.0 - 2.0 * (words[:, :, None] >> places & 1).reshape(len(words), -1).float()


def _flip(z: Tensor, signs: Tensor, factors: list[float]) -> Tensor:
    """Multiply rows by factors in float64, saturate, and apply the signs."""
    factor = torch.tensor(factors, dtype=torch.float64, device=z.device)[:, None]
    return (z.double() * factor).clamp(-_TOP, _TOP).float() * signs.reshape(z.shape)


def _encode_eden(codec: Eden, x: Tensor, seed: int) -> bytes:
    x = x[_moved(codec.drawn(x.numel(), seed), x.device)]
    rotation = Rotation(x.numel(), codec.rounds, seed)
    signs = _signs(rotation, x.device)
    padded = torch.nn.functional.pad(x, (0, rotation.padded - x.numel()))
    scales: list[np.float32] = []
    coarse, fine = [padded.new_zeros(0)], [padded.new_zeros(0)]
    for start, count, size in _runs(rotation):
        run = slice(start, start + count * size)
        z = padded[run].reshape(count, size)
        units = [math.ldexp(0.5, math.frexp(top)[1]) for top in z.abs().amax(1).tolist()]
        for turn in range(codec.rounds):
            factors = [1.0] * count if turn else [1.0 / unit for unit in units]
            z = _transform(_flip(z, signs[turn, run], factors))
        integer = [integer_factor(top) for top in z.abs().amax(1).tolist()]
        number = torch.round(z.double() * z.new_tensor(integer, dtype=torch.float64)[:, None])
        number = number.to(torch.int64)
        squares = (number * number).sum(1).tolist()
        rms = [math.sqrt(s / size) / k for s, k in zip(squares, integer, strict=True)]
        border, parts, along = codec.finer(size), [], torch.zeros_like(number[:, 0])
        for part, bits in (
            (slice(border), codec.coarse + 1),
            (slice(border, None), codec.coarse),
        ):
            if z[:, part].numel():
                borders = _moved(np.stack([thresholds(bits, value) for value in rms]), x.device)
                codes = torch.searchsorted(borders, z[:, part].contiguous(), out_int32=True)
                along += (number[:, part] * _moved(levels(bits), x.device)[codes]).sum(1)
                parts.append((bits, codes))
        found = [
            scale(s, a, unit / (k * rotation.gain(size)))
            for s, a, unit, k in zip(squares, along.tolist(), units, integer, strict=True)
        ]
        scales += found
        zero = torch.tensor([value == 0 for value in found], device=x.device)
        for bits, codes in parts:
            codes[zero] = 0
            (coarse if bits == codec.coarse else fine).append(codes.reshape(-1))
    body = floats_bytes(np.array(scales, np.float32))
    return body + _pack(torch.cat(coarse), codec.coarse) + _pack(torch.cat(fine), codec.coarse + 1)


def _decode_eden(
    codec: Eden, body: memoryview, layout: Layout, seed: int, device: torch.device
) -> Tensor:
    drawn = codec.drawn(layout.size, seed)
    rotation = Rotation(int(drawn.sum()), codec.rounds, seed)
    signs = _signs(rotation, device)
    scales, body = read_scales(body, len(rotation.sizes))
    (count, bits), (more, _) = codec.split(rotation.sizes)
    cut = packed_bytes(count, bits)
    coarse = _unpack(body[:cut], count, bits, device)
    fine = _unpack(body[cut:], more, bits + 1, device)
    zero = _moved(np.repeat(scales == 0, rotation.sizes), device)
    is_fine = _moved(codec.is_fine(rotation.sizes), device)
    if bool(coarse[zero[~is_fine]].any()) or bool(fine[zero[is_fine]].any()):
        raise DecodeError("a code is not zero where the scale is")
    padded = torch.empty(rotation.padded, device=device)
    padded[~is_fine] = _moved(values(bits), device)[coarse]
    if more:
        padded[is_fine] = _moved(values(bits + 1), device)[fine]
    factors = (scales.astype(np.float64) / min(codec.bits, 1.0)).tolist()
    for start, count, size in _runs(rotation):
        run = slice(start, start + count * size)
        z = padded[run].reshape(count, size)
        own, factors = factors[:count], factors[count:]
        for turn in reversed(range(codec.rounds)):
            last = [1.0] * count if turn else [value / rotation.gain(size) for value in own]
            z = _flip(_transform(z), signs[turn, run], last)
        padded[run] = z.reshape(-1)
    y = torch.zeros(layout.size, device=device)
    y[_moved(drawn, device)] = padded[: rotation.count]
    return y
