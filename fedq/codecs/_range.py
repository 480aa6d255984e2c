"""Context-mixing binary range coder for signed integers, in integer arithmetic throughout.

An integer is a short string of binary decisions: is it zero, which sign, is the magnitude above 1,
2, ... (unary), and from 12 on an Exp-Golomb code. Each decision has five contexts drawn from what
both ends know already: running magnitudes of the column above and of the row to the left, nearest
neighbours, the tensor, the caller's side information, and a prediction. The prediction is rank one,
as gradients of a few samples are nearly (row ~ slope x running column factor). Each context keeps
an adaptive probability; a small online logistic mixer joins the five (Mahoney 2005, "Adaptive
weighing of context models for lossless data compression"). The result drives a carry-propagating
32-bit range coder (Martin 1979; the byte-wise form of LZMA). One function codes both ways, so that
encoder and decoder cannot drift apart, and no floating-point number is involved, so that every
machine writes the same bytes.

Rows and columns start anew with each tensor; probabilities are learned over the whole model, so
that a small tensor costs nothing extra.

Every sequence of integers has exactly one code: the last interval is named by its roundest number,
trailing zero bytes are dropped, and the decoder checks both. Reads past the end give zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq.errors import DecodeError
from fedq.jit import jit

Integers = NDArray[np.int32]

#: Largest magnitude that can be coded.
MAX_MAGNITUDE = 1 << 24
#: Side information of an integer: ``bin + SIDE_FLIP`` if the sign is to be mirrored, bin < 16.
SIDE_BINS, SIDE_FLIP = 16, 16
#: ``+ ODD_BELOW`` (``+ ODD_ABOVE``) if a value <= 0 (> 0) takes the other branch of the trellis.
ODD_BELOW, ODD_ABOVE = 32, 64
#: The integer is zero and costs nothing: both ends know.
SKIP = 128

_UNARY = 12  # magnitudes from here on are escaped
_MAX_PREFIX = 24
_CLASSES = 16  # of a running magnitude
_TENSORS = 64  # told apart by the model; later ones share
# Decisions, as rows of the weight table.
_ZERO, _SIGN, _ABOVE = 0, 1, 1  # _ABOVE + k: is the magnitude above k, k = 1 ... _UNARY - 1
_PREFIX = _ABOVE + _UNARY
_MANTISSA = _PREFIX + _MAX_PREFIX + 1
_DECISIONS = _MANTISSA + _MAX_PREFIX + 1
_SLOTS = 4096  # of each context; every kind of decision has its own range among them
_INPUTS = 5

# State of the range coder, an int64 array.
_LOW, _RANGE, _CODE, _AT, _CACHE, _PENDING = range(6)
_TOP, _MASK = 1 << 24, (1 << 32) - 1

_PROBABILITY_BITS = 16
_HALF = 1 << 15
_LIMIT = 127  # of a slot's count: adaptation slows to 1 / (_LIMIT + 1.5)
_RATE = 10  # of the mixer
_ROUND = 1 << 17
_CAP = 63  # on magnitudes that predict signs
_PRIOR = 1 << 18  # shrinks predictions while a row is short
_MEMORY = 3
_DOMAIN = 2047  # logits are clipped to +-_DOMAIN / 256


@cache
def _tables() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return squash, stretch and reciprocals, computed with integers only.

    ``squash[x + 2048] = 2**16 / (1 + exp(-x / 256))``; ``stretch[p >> 4]`` is its inverse;
    ``reciprocal[n] = 2**16 / (n + 1.5)``.
    """
    one = 1 << 128
    root, term = 0, one  # exp(1 / 256) by its series
    for k in range(1, 24):
        root += term
        term //= 256 * k
    power, upper = one, []
    for _ in range(2048):
        upper.append((power << _PROBABILITY_BITS) // (power + one))
        power = power * root >> 128
    whole = 1 << _PROBABILITY_BITS
    squash = [whole - upper[min(-x, 2047)] if x < 0 else upper[x] for x in range(-2048, 2048)]
    stretch, x = [], 0
    for p in range(4096):
        while x < 4095 and squash[x] < p * 16 + 8:
            x += 1
        stretch.append(min(max(x - 2048, -_DOMAIN), _DOMAIN))
    reciprocal = [2 * whole // (2 * n + 3) for n in range(_LIMIT + 1)]
    return tuple(np.array(t, np.int64) for t in (squash, stretch, reciprocal))  # type: ignore[return-value]


@jit
def _shift(state, buffer):  # type: ignore[no-untyped-def]
    """Move the top byte of ``low`` out, after any carry; bytes beyond the buffer only count."""
    low = state[_LOW]
    if low < 0xFF000000 or low > _MASK:
        carry = low >> 32
        byte = state[_CACHE] + carry
        while state[_PENDING] > 0:
            if 0 <= state[_AT] < buffer.size:
                buffer[state[_AT]] = byte & 255
            state[_AT] += 1
            state[_PENDING] -= 1
            byte = 255 + carry
        state[_CACHE] = (low >> 24) & 255
    state[_PENDING] += 1
    state[_LOW] = (low & 0x00FFFFFF) << 8


@jit
def _narrow(bit, bound, state, buffer, decoding):  # type: ignore[no-untyped-def]
    """Code one decision whose interval for 1 is the lower ``bound`` of the range."""
    if decoding:
        bit = 1 if state[_CODE] < bound else 0
    if bit:
        state[_RANGE] = bound
    else:
        state[_LOW] += bound
        state[_RANGE] -= bound
        state[_CODE] -= bound
    while state[_RANGE] < _TOP:
        state[_RANGE] <<= 8
        if decoding:
            at = state[_AT]
            byte = np.int64(buffer[at]) if at < buffer.size else 0
            state[_CODE] = (state[_CODE] << 8) | byte
            state[_AT] = at + 1
            state[_LOW] = (state[_LOW] << 8) & _MASK
        else:
            _shift(state, buffer)
    return bit


@jit
def _decide(bit, row, a, b, c, d, e, coder):  # type: ignore[no-untyped-def]
    """Code one decision in contexts a to e, and learn from it."""
    probability, count, weight, squash, stretch, reciprocal, state, buffer, decoding = coder
    xa = stretch[probability[0, a] >> 4]
    xb = stretch[probability[1, b] >> 4]
    xc = stretch[probability[2, c] >> 4]
    xd = stretch[probability[3, d] >> 4]
    xe = stretch[probability[4, e] >> 4]
    w = weight[row]
    logit = (w[0] * xa + w[1] * xb + w[2] * xc + w[3] * xd + w[4] * xe) >> 16
    logit = min(max(logit, -_DOMAIN), _DOMAIN)
    p = squash[logit + 2048]
    bit = _narrow(bit, (state[_RANGE] >> 16) * p, state, buffer, decoding)
    target = bit << 16
    error = (target - p) * _RATE
    w[0] += (xa * error + _ROUND) >> 18
    w[1] += (xb * error + _ROUND) >> 18
    w[2] += (xc * error + _ROUND) >> 18
    w[3] += (xd * error + _ROUND) >> 18
    w[4] += (xe * error + _ROUND) >> 18
    for i, slot in ((0, a), (1, b), (2, c), (3, d), (4, e)):
        n = count[i, slot]
        old = probability[i, slot]
        probability[i, slot] = old + (((target - old) * reciprocal[n]) >> 16)
        if n < _LIMIT:
            count[i, slot] = n + 1
    return bit


@jit
def _class(magnitude):  # type: ignore[no-untyped-def]
    """Quantise a running magnitude (8 fractional bits) to 0 ... _CLASSES - 1."""
    for i, bound in enumerate(
        (3, 10, 24, 48, 88, 150, 240, 400, 700, 1400, 3000, 6000, 12000, 24000, 48000)
    ):
        if magnitude <= bound:
            return i
    return _CLASSES - 1


@jit
def _strength(magnitude):  # type: ignore[no-untyped-def]
    """Quantise a predicted magnitude (8 fractional bits) to 0 ... 7."""
    for i, bound in enumerate((2, 8, 20, 48, 100, 200, 400)):
        if magnitude <= bound:
            return i
    return 7


@jit
def _escape(rest, c1, c2, cm, strength, coder):  # type: ignore[no-untyped-def]
    """Code ``rest >= 1`` in Exp-Golomb form; return it, or 0 for a form no encoder writes."""
    prefix = 0
    while _decide(
        1 if rest >> (prefix + 1) else 0,
        _PREFIX + prefix,
        1024 + prefix * _CLASSES + c1,
        1024 + prefix * _CLASSES + c2,
        2048 + prefix * _CLASSES + cm,
        1920 + prefix,
        1024 + prefix * 8 + strength,
        coder,
    ):
        prefix += 1
        if prefix > _MAX_PREFIX:
            return 0
    number = 1
    for place in range(prefix - 1, -1, -1):
        bit = (rest >> place) & 1
        if place == prefix - 1:
            bit = _decide(
                bit,
                _MANTISSA + prefix,
                2048 + prefix * _CLASSES + c1,
                2048 + prefix * _CLASSES + c2,
                3072 + prefix * _CLASSES + cm,
                2048 + prefix,
                2048 + prefix * 8 + strength,
                coder,
            )
        else:
            state, buffer, decoding = coder[-3:]
            bit = _narrow(bit, state[_RANGE] >> 1, state, buffer, decoding)
        number = (number << 1) | bit
    return number


@jit
def _align(values, side, table, factor, start, inner):  # type: ignore[no-untyped-def]
    """Move the column factor towards a finished row, mirrored if that row opposes it."""
    align = -1 if inner < 0 else 1
    for column in range(factor.size):
        if side.size and table[0, side[start + column]] & SKIP:
            continue
        aligned = min(max(values[start + column], -_CAP), _CAP) * align << 8
        factor[column] += (aligned - factor[column]) >> _MEMORY


@jit
def _run(values, side, table, trellis, sizes, columns, coder):  # type: ignore[no-untyped-def]
    """Code all tensors; return 0, or 1 for an escape that no encoder writes."""
    decoding = coder[-1]
    n = 0
    state = 0
    fast, slow = 0, 0  # running magnitudes to the left; all have 8 fractional bits
    for t in range(sizes.size):
        width = columns[t]
        above = np.zeros(width, np.int64)  # running magnitudes of the columns
        factor = np.zeros(width, np.int64)  # running signed columns, rows aligned
        inner, norm = 0, 0  # <row, factor>, |factor|^2 so far in this row
        tensor = min(t, _TENSORS - 1)
        for i in range(sizes[t]):
            j = i % width
            c2 = _class((fast + slow) >> 1)
            c1 = _class(above[j]) if i >= width else c2
            cm = (c1 + c2 + 1) >> 1
            known = np.int64(table[state & 1, side[n]]) if side.size else 0
            if known & SKIP:
                if decoding:
                    values[n] = 0
                n += 1
                if j == width - 1:
                    _align(values, side, table, factor, n - width, inner)
                    inner, norm = 0, 0
                continue
            bin_ = known & (SIDE_BINS - 1)
            f = -1 if known & SIDE_FLIP else 1
            left = values[n - 1] if j > 0 else 0
            left2 = values[n - 2] if j > 1 else 0
            up = values[n - width] if i >= width else 0
            upleft = values[n - width - 1] if i >= width and j > 0 else 0
            near = (min(abs(left), 3) * 4 + min(abs(up), 3)) * 4 + min(abs(left2), 3)
            slope = min(max((inner << 16) // (norm + _PRIOR), -(1 << 14)), 1 << 14)
            guess = ((slope * factor[j]) >> 8) * f
            strength = _strength(abs(guess))
            lean = strength * 2 + (1 if guess > 0 else 0)

            v: int = 0 if decoding else values[n]
            m: int = abs(v)
            if _decide(
                1 if m == 0 else 0,
                _ZERO,
                c1 * _CLASSES + c2,
                cm * SIDE_BINS + bin_,
                near * 4 + (bin_ >> 2),
                tensor * SIDE_BINS + bin_,
                lean * SIDE_BINS + bin_,
                coder,
            ):
                m = 0
            else:
                signs = ((np.sign(left) * f + 1) * 3 + np.sign(up) * f + 1) * 3
                signs += np.sign(upleft) * f + 1
                opposite = _decide(
                    1 if v * f < 0 else 0,
                    _SIGN,
                    256 + bin_,
                    256 + cm * SIDE_BINS + bin_,
                    256 + signs * 4 + (bin_ >> 2),
                    1024 + tensor,
                    256 + lean * SIDE_BINS + bin_,
                    coder,
                )
                agree = strength * 2 + (1 if (guess > 0) != (opposite == 1) else 0)
                k = 1
                while k < _UNARY and _decide(
                    1 if m > k else 0,
                    _ABOVE + k,
                    512 + k * _CLASSES + c1,
                    512 + k * _CLASSES + c2,
                    512 + (k * _CLASSES + cm) * 4 + (bin_ >> 2),
                    1088 + tensor * _UNARY + k,
                    512 + k * 16 + agree,
                    coder,
                ):
                    k += 1
                if k == _UNARY:
                    rest = _escape(m - _UNARY + 1, c1, c2, cm, strength, coder)
                    if rest == 0:
                        return 1
                    k = rest + _UNARY - 1
                m = k
                v = -m * f if opposite else m * f
                if decoding:
                    values[n] = v

            odd = (known >> 6) & 1 if v > 0 else (known >> 5) & 1
            state = trellis[state, (v + odd) & 1]
            size = min(m, 1 << 12) << 8
            if i >= width:
                above[j] += (size - above[j]) >> 3
            else:
                above[j] = (size + fast + slow) // 3
            fast += (size - fast) >> 2
            slow += (size - slow) >> 5
            inner += min(max(v, -_CAP), _CAP) * factor[j]
            norm += factor[j] * factor[j]
            n += 1
            if j == width - 1:
                _align(values, side, table, factor, n - width, inner)
                inner, norm = 0, 0
    return 0


def _model() -> tuple[NDArray[Any], ...]:
    probability = np.full((_INPUTS, _SLOTS), _HALF, np.int64)
    count = np.zeros((_INPUTS, _SLOTS), np.int64)
    weight = np.full((_DECISIONS, _INPUTS), 16000, np.int64)
    return (probability, count, weight, *_tables())


def _roundest(low: int, width: int) -> int:
    """Return the number in [low, low + width) with the most trailing zero bits."""
    for bits in range(32, 0, -1):
        number = -(-low >> bits) << bits
        if number < low + width:
            return number
    return low


def _geometry(tensors: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sizes = np.array([size for size, _ in tensors], np.int64)
    columns = np.array([max(width, 1) for _, width in tensors], np.int64)
    return sizes, columns


_NO_SIDE = np.zeros(0, np.uint8)
_IDENTITY = np.arange(256, dtype=np.uint8)[None]
_STILL = np.zeros((1, 2), np.int64)


def encode(
    values: Integers,
    tensors: Sequence[tuple[int, int]],
    limit: int,
    side: NDArray[np.uint8] | None = None,
    table: NDArray[np.uint8] | None = None,
    trellis: NDArray[np.int64] | None = None,
) -> bytes | None:
    """Code integers, or return None if that takes more than ``limit`` bytes.

    Args:
      values: (n,) int32, magnitudes up to :data:`MAX_MAGNITUDE`.
      tensors: Size and columns of each tensor in turn; the sizes add up to n.
      limit: Bytes at most.
      side: (n,) what both ends know: a bin below :data:`SIDE_BINS`, plus :data:`SIDE_FLIP` where
        signs are to be mirrored; or a column of the ``table``.
      table: (2, 256) side information by parity of the trellis state, and by ``side``; with
        :data:`ODD_BELOW`, :data:`ODD_ABOVE` and :data:`SKIP`.
      trellis: (states, 2) next state by state, and by the parity of value plus offset.

    Example:
      >>> len(encode(np.zeros(10_000, np.int32), [(10_000, 100)], limit=100))
      0
    """
    sizes, columns = _geometry(tensors)
    state = np.array([0, _MASK, 0, -1, 0, 1], np.int64)
    buffer = np.zeros(limit + 8, np.uint8)
    side = _NO_SIDE if side is None else side
    table = _IDENTITY if table is None else table
    trellis = _STILL if trellis is None else trellis
    _run(values, side, table, trellis, sizes, columns, (*_model(), state, buffer, False))
    state[_LOW] = _roundest(int(state[_LOW]), int(state[_RANGE]))
    for _ in range(5):
        _shift(state, buffer)
    if state[_AT] > buffer.size:
        return None
    body = buffer[: state[_AT]].tobytes().rstrip(b"\0")
    return body if len(body) <= limit else None


def decode(
    body: bytes | memoryview,
    tensors: Sequence[tuple[int, int]],
    side: NDArray[np.uint8] | None = None,
    table: NDArray[np.uint8] | None = None,
    trellis: NDArray[np.int64] | None = None,
) -> Integers:
    """Decode the integers of :func:`encode`, (n,) int32.

    Raises:
      DecodeError: If the body is not the one code of its integers: too short, too long, altered.
    """
    sizes, columns = _geometry(tensors)
    buffer = np.array(np.frombuffer(body, np.uint8))
    start = int.from_bytes(bytes(body[:4]).ljust(4, b"\0"), "big")
    state = np.array([0, _MASK, start, 4, 0, 0], np.int64)
    values = np.zeros(int(sizes.sum()), np.int32)
    side = _NO_SIDE if side is None else side
    table = _IDENTITY if table is None else table
    trellis = _STILL if trellis is None else trellis
    if _run(values, side, table, trellis, sizes, columns, (*_model(), state, buffer, True)):
        raise DecodeError("an escape code is too long")
    low = int(state[_LOW])
    if int(state[_CODE]) != _roundest(low, int(state[_RANGE])) - low:
        raise DecodeError("range code is corrupt: it does not end as an encoder ends it")
    if buffer.size > state[_AT] or (buffer.size and buffer[-1] == 0):
        raise DecodeError(f"range code of {buffer.size} bytes is too long")
    return values
