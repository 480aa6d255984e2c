"""Context-mixing binary range coder for signed integers, in integer arithmetic throughout.

An integer is a short string of binary decisions: is it zero, which sign, is the magnitude above 1,
2, ... (unary), and from 12 on an Exp-Golomb code. Each decision has five contexts drawn from what
both ends know already: running magnitudes of the column above and of the row to the left, nearest
neighbours, the caller's side information, and a prediction; where the caller has hints, they take
the place of the context that tells least. The prediction is rank one, as
gradients of a few samples are nearly (row ~ slope x running column factor). Each context keeps a
bias; the logit of a decision is the sum of its five, and a step of gradient descent on the code
length corrects all five at once (online logistic regression; Mahoney 2005, "Adaptive weighing of
context models for lossless data compression", mixes probabilities by the same rule). The nth step
of a bias has the rate 6 / (n + 12), and 1 / 32 from n = 180 on; in statistics that are said to be
steady it falls on, to 1 / 230.

The result drives a carry-propagating range coder (Martin 1979) with an interval of 48 bits that
moves 16 at a time. One function codes both ways, so that encoder and decoder cannot drift apart,
and no floating-point number is involved, so that every machine writes the same bytes.

Rows and columns start anew with each tensor; biases are learned over the whole model, so that a
small tensor costs nothing extra.

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
from fedq.jit import inline, jit

Integers = NDArray[np.int32]

#: Largest magnitude that can be coded.
MAX_MAGNITUDE = 1 << 24
#: Side information of an integer: ``bin + SIDE_FLIP`` if the sign is to be mirrored, bin < 16.
SIDE_BINS, SIDE_FLIP = 16, 16
#: ``+ ODD_BELOW`` (``+ ODD_ABOVE``) if a value <= 0 (> 0) takes the other branch of the trellis.
ODD_BELOW, ODD_ABOVE = 32, 64
#: What a hint says of an integer: a size below HINT_SIZES, ``+ HINT_POSITIVE`` for its sign.
HINT_SIZES, HINT_POSITIVE = 8, 8
#: The integer is zero and costs nothing: both ends know.
SKIP = 128

_UNARY = 12  # magnitudes from here on are escaped
_MAX_PREFIX = 24
_CLASSES = 16  # of a running level
# Decisions. Zero and sign have five contexts of up to 256 values, the others of up to 64.
_WIDE, _NARROW = 256, 64
_ZERO, _SIGN, _ABOVE = 0, 5 * _WIDE, 10 * _WIDE
_PREFIX = _ABOVE + 5 * _NARROW * _UNARY
_MANTISSA = _PREFIX + 5 * _NARROW * (_MAX_PREFIX + 1)
_SLOTS = _MANTISSA + 5 * _NARROW * (_MAX_PREFIX + 1)

# A slot holds a bias in 2**-24 and, in its low byte, how often it was used: the count is too small
# to matter to the sum.
_COUNT = 255
# A slot that was used _SETTLED times learns at one rate from then on; in statistics that stay, it
# counts every _SLOWER-th use further.
_SETTLED, _SLOWER = 180, 16
_SPAN = 1 << 47  # of the interval at first; it moves by 16 bits when 2**16 times smaller
_DOMAIN = 704  # logits are clipped to +-_DOMAIN / 64
_LEVEL_TOP = (1 << 16) - 1
#: Levels (see _tables) up to which a running level belongs to class 0, 1, ...
_CLASS_BOUNDS = (
    *(100, 320, 770, 1540, 2800, 4800, 7700, 11_000),
    *(15_500, 22_000, 30_000, 38_000, 46_000, 54_000, 62_000),
)
#: Predicted magnitudes, 8 fractional bits, up to which a prediction has strength 0, 1, ...
_STRENGTH_BOUNDS = (2, 8, 20, 48, 100, 200, 400)
_STRONGEST = 511
_CAP = 63  # on magnitudes that predict signs
_PRIOR = 1 << 15  # shrinks predictions while a row is short
_SLOPE = 1 << 14  # at most, 16 fractional bits
# A column's running level and factor are means at first, and then forget at these rates, 2**-16.
_LEVEL_RATE, _FACTOR_RATE = 1024, 2731


@cache
def _tables() -> tuple[NDArray[Any], ...]:
    """Return squash, rates, levels, classes and strengths, computed with integers only.

    ``squash[x + 704] = 2**16 / (1 + exp(-x / 64))``; ``rates[c] = 2**14 * 6 / (n + 12)`` at
    the nth use, which is count c;
    ``levels[m] = 2**13 log2(1 + m)``; ``classes[level >> 4]``; ``strengths[predicted]``.
    """
    one = 1 << 128
    root, term = 0, one  # exp(1 / 64) by its series
    for k in range(1, 30):
        root += term
        term //= 64 * k
    power, upper = one, []
    for _ in range(_DOMAIN + 1):
        upper.append(((power << 17) + power + one) // (2 * (power + one)))
        power = power * root >> 128
    squash = [(1 << 16) - p for p in upper[:0:-1]] + upper
    uses = [*range(_SETTLED), *range(_SETTLED, _SETTLED + 76 * _SLOWER, _SLOWER)]
    rates = [(6 << 14) // (n + 12) for n in uses]
    levels = [min(((1 + m) ** 8192).bit_length() - 1, _LEVEL_TOP) for m in range(256)]
    classes = np.searchsorted(_CLASS_BOUNDS, np.arange(0, _LEVEL_TOP, 16))
    strengths = np.searchsorted(_STRENGTH_BOUNDS, np.arange(_STRONGEST + 1))
    return (
        np.array(squash, np.uint16),
        np.array(rates, np.int16),
        np.array(levels, np.uint16),
        classes.astype(np.uint8),
        strengths.astype(np.uint8),
    )


# Kernels. All are compiled into their caller, and arrays are touched in straight lines, the renewal
# of the interval last: across branches Numba would count references at every decision.


@inline
def _split(bit, bound, state, decoding):  # type: ignore[no-untyped-def]
    """Code one decision whose interval for 1 is the lower ``bound`` of the span.

    The state is (low, span, at). ``low`` is the lower end of the interval; for a decoder, how far
    the code lies above it.
    """
    low, span, at = state
    if decoding:
        bit = 1 if low < bound else 0
    if bit:
        span = bound
    else:
        span -= bound
        low += -bound if decoding else bound
    return bit, (low, span, at)


@inline
def _renew(state, buffer, decoding):  # type: ignore[no-untyped-def]
    """Move 16 bits out or in if the span is small; bits beyond the buffer only count."""
    low, span, at = state
    if span < _SPAN >> 16:
        span <<= 16
        if decoding:
            low <<= 16
            if at < buffer.size:
                low |= int(buffer[at]) << 8 | int(buffer[at + 1])
        else:
            if low >> 48 and at <= buffer.size:
                carry = at - 1
                while buffer[carry] == 255:
                    buffer[carry] = 0
                    carry -= 1
                buffer[carry] += 1
            if at < buffer.size:
                buffer[at] = (low >> 40) & 255
                buffer[at + 1] = (low >> 32) & 255
            low = (low & 0xFFFFFFFF) << 16
        at += 2
    return low, span, at


@inline
def _learned(bias, error, rates):  # type: ignore[no-untyped-def]
    """Return the slot one step against the gradient of the code length later, and count it."""
    count = bias & _COUNT
    step = (error * int(rates[count]) >> 6) & ~_COUNT
    # Low bits of the bias are as good as random, and both ends have them.
    later = count < rates.size - 1 and (bias >> 8) % _SLOWER == 0
    return bias + step + (1 if count < _SETTLED or later else 0)


@inline
def _decide(bit, a, b, c, d, e, state, buffer, model, decoding):  # type: ignore[no-untyped-def]
    """Code one decision in the contexts of slots a to e, and learn from it."""
    slots, squash, rates = model
    bias_a, bias_b, bias_c = int(slots[a]), int(slots[b]), int(slots[c])
    bias_d, bias_e = int(slots[d]), int(slots[e])
    logit = (bias_a + bias_b + bias_c + bias_d + bias_e) >> 18
    p = int(squash[min(max(logit, -_DOMAIN), _DOMAIN) + _DOMAIN])
    bit, state = _split(bit, state[1] * p >> 16, state, decoding)
    error = (bit << 16) - p
    slots[a] = _learned(bias_a, error, rates)
    slots[b] = _learned(bias_b, error, rates)
    slots[c] = _learned(bias_c, error, rates)
    slots[d] = _learned(bias_d, error, rates)
    slots[e] = _learned(bias_e, error, rates)
    return bit, _renew(state, buffer, decoding)


@inline
def _sign(value):  # type: ignore[no-untyped-def]
    """Return -1, 0 or 1."""
    return (1 if value > 0 else 0) - (1 if value < 0 else 0)


@jit
def _escape(rest, c1, c2, strength, near, state, buffer, model, decoding):  # type: ignore[no-untyped-def]
    """Code ``rest >= 1`` in Exp-Golomb form; return it, or 0 for a form no encoder writes."""
    prefix = 0
    while True:
        a = _PREFIX + 5 * _NARROW * prefix
        more, state = _decide(
            1 if rest >> (prefix + 1) else 0,
            a + c1,
            a + _NARROW + c2,
            a + 2 * _NARROW + strength,
            a + 3 * _NARROW,
            a + 4 * _NARROW + near,
            state,
            buffer,
            model,
            decoding,
        )
        if not more:
            break
        prefix += 1
        if prefix > _MAX_PREFIX:
            return 0, state
    number = 1
    if prefix:
        a = _MANTISSA + 5 * _NARROW * prefix
        bit, state = _decide(
            (rest >> (prefix - 1)) & 1,
            a + c1,
            a + _NARROW + c2,
            a + 2 * _NARROW + strength,
            a + 3 * _NARROW,
            a + 4 * _NARROW + near,
            state,
            buffer,
            model,
            decoding,
        )
        number = 2 | bit
    for place in range(prefix - 2, -1, -1):
        bit, state = _split((rest >> place) & 1, state[1] >> 1, state, decoding)
        state = _renew(state, buffer, decoding)
        number = number << 1 | bit
    return number, state


def _coder(decoding: bool) -> Any:
    """Compile the function that codes all tensors, as an encoder or as a decoder.

    It may close over nothing else: Numba does not find a function that closes over another in its
    cache.
    """

    @jit
    def run(values, side, table, hint, trellis, sizes, columns, state, buffer, model, tables):  # type: ignore[no-untyped-def]
        """Code all tensors; return the state at the end and whether all escapes were sound."""
        levels, classes, strengths = tables
        n = 0
        node = 0  # of the trellis
        fast, slow = 0, 0  # running levels to the left
        for t in range(sizes.size):
            width = columns[t]
            above = np.zeros(width, np.uint16)  # running levels of the columns
            factor = np.zeros(width, np.int16)  # running signed columns, rows aligned
            last = np.zeros(width, np.int8)  # the row above, capped
            for row in range((sizes[t] + width - 1) // width):
                start, stop = n, n + min(width, sizes[t] - row * width)
                mean = (1 << 17) // (2 * row + 3)
                level_rate, factor_rate = max(mean, _LEVEL_RATE), max(mean, _FACTOR_RATE)
                inner, norm, slope = 0, 0, 0  # <row, factor>, |factor|^2 so far, their quotient
                left, left2, upleft = 0, 0, 0
                for j in range(stop - start):
                    known = int(table[node & 1, side[n]]) if side.size else 0
                    if known & SKIP:
                        last[j] = 0
                        left, left2, upleft = 0, left, 0
                        n += 1
                        continue
                    bin_ = known & (SIDE_BINS - 1)
                    flip = -1 if known & SIDE_FLIP else 1
                    c3 = int(classes[slow >> 4])
                    c2 = int(classes[(fast + slow) >> 5])
                    c1 = int(classes[above[j] >> 4]) if row else c2
                    cm = (c1 + c2 + 1) >> 1
                    up, weight = int(last[j]), int(factor[j])
                    near = (min(abs(left), 3) * 4 + min(abs(up), 3)) * 4 + min(abs(left2), 3)
                    in_zero, in_sign, in_above = c3, near, c2
                    if hint.size:
                        size = int(hint[n]) & (HINT_SIZES - 1)
                        positive = (int(hint[n]) != size) == (flip > 0)
                        in_zero = size * _CLASSES + cm
                        in_sign = in_zero + (HINT_SIZES * _CLASSES if positive else 0)
                        in_above = in_zero >> 1
                    if j & 3 == 0:
                        slope = min(max((inner << 16) // (norm + _PRIOR), -_SLOPE), _SLOPE)
                    guess = (slope * weight >> 8) * flip
                    strength = int(strengths[min(abs(guess), _STRONGEST)])
                    lean = strength * 2 + (1 if guess > 0 else 0)

                    v = 0 if decoding else int(values[n])
                    m = abs(v)
                    zero, state = _decide(
                        1 if m == 0 else 0,
                        _ZERO + c1 * _CLASSES + c2,
                        _ZERO + _WIDE + cm * SIDE_BINS + bin_,
                        _ZERO + 2 * _WIDE + near,
                        _ZERO + 3 * _WIDE + in_zero,
                        _ZERO + 4 * _WIDE + lean * 4 + (bin_ >> 2),
                        state,
                        buffer,
                        model,
                        decoding,
                    )
                    if not zero:
                        signs = (_sign(left) * 3 + _sign(up)) * 3 + _sign(upleft)
                        opposite, state = _decide(
                            1 if v * flip < 0 else 0,
                            _SIGN + cm * SIDE_BINS + bin_,
                            _SIGN + _WIDE + 13 + signs * flip,
                            _SIGN + 2 * _WIDE + lean,
                            _SIGN + 3 * _WIDE + in_sign,
                            _SIGN + 4 * _WIDE + lean * SIDE_BINS + bin_,
                            state,
                            buffer,
                            model,
                            decoding,
                        )
                        agree = strength * 2 + (1 if (guess > 0) != (opposite == 1) else 0)
                        k = 1
                        while k < _UNARY:
                            a = _ABOVE + 5 * _NARROW * k
                            more, state = _decide(
                                1 if m > k else 0,
                                a + c1,
                                a + _NARROW + in_above,
                                a + 2 * _NARROW + agree,
                                a + 3 * _NARROW + bin_,
                                a + 4 * _NARROW + near,
                                state,
                                buffer,
                                model,
                                decoding,
                            )
                            if not more:
                                break
                            k += 1
                        if k == _UNARY:
                            rest, state = _escape(
                                m - _UNARY + 1,
                                c1,
                                c2,
                                strength,
                                near,
                                state,
                                buffer,
                                model,
                                decoding,
                            )
                            if rest == 0:
                                return state, False
                            k = rest + _UNARY - 1
                        m = k
                        v = -m * flip if opposite else m * flip
                        if decoding:
                            values[n] = v

                    if trellis.size:
                        odd = known & (ODD_ABOVE if v > 0 else ODD_BELOW)
                        node = trellis[node, (v + (1 if odd else 0)) & 1]
                    level = int(levels[min(m, levels.size - 1)])
                    above[j] = int(above[j]) + ((level - int(above[j])) * level_rate >> 16)
                    fast += (level - fast) >> 3
                    slow += (level - slow) >> 6
                    capped = min(max(v, -_CAP), _CAP)
                    inner += capped * weight
                    norm += weight * weight
                    last[j] = capped
                    left, left2, upleft = v, left, up
                    n += 1
                align = -256 if inner < 0 else 256
                for j in range(stop - start):
                    if side.size and table[0, side[start + j]] & SKIP:
                        continue
                    weight = int(factor[j])
                    factor[j] = weight + ((int(last[j]) * align - weight) * factor_rate >> 16)
        return state, True

    return run


_encoder, _decoder = _coder(False), _coder(True)


def _model(steady: bool) -> tuple[NDArray[Any], ...]:
    """Return the slots of a coder that has seen nothing, squash and rates."""
    squash, rates = _tables()[:2]
    return np.zeros(_SLOTS, np.int64), squash, rates if steady else rates[: _SETTLED + 1]


def _roundest(low: int, span: int) -> int:
    """Return the number in [low, low + span) with the most trailing zero bits."""
    for bits in range(48, 0, -1):
        number = -(-low >> bits) << bits
        if number < low + span:
            return number
    return low


def _geometry(tensors: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sizes = np.array([size for size, _ in tensors], np.int64)
    columns = np.array([max(width, 1) for _, width in tensors], np.int64)
    return sizes, columns


_NO_SIDE = np.zeros(0, np.uint8)
_IDENTITY = np.arange(256, dtype=np.uint8)[None]
_NO_TRELLIS = np.zeros((0, 2), np.int64)


def encode(
    values: Integers,
    tensors: Sequence[tuple[int, int]],
    limit: int,
    side: NDArray[np.uint8] | None = None,
    table: NDArray[np.uint8] | None = None,
    trellis: NDArray[np.int64] | None = None,
    hint: NDArray[np.uint8] | None = None,
    *,
    steady: bool = False,
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
      hint: (n,) what both ends suppose: a size below :data:`HINT_SIZES`, plus
        :data:`HINT_POSITIVE` if above zero; only their statistics count, not what they mean.
      steady: Whether statistics stay the same throughout: contexts then learn ever more slowly,
        which saves some 0.03 bits per integer there and costs up to 4 % elsewhere.

    Example:
      >>> len(encode(np.zeros(10_000, np.int32), [(10_000, 100)], limit=100))
      0
    """
    buffer = np.zeros(limit + 2 & ~1, np.uint8)
    side = _NO_SIDE if side is None else side
    table = _IDENTITY if table is None else table
    hint = _NO_SIDE if hint is None else hint
    trellis = _NO_TRELLIS if trellis is None else trellis
    (low, span, at), _ = _encoder(
        values,
        side,
        table,
        hint,
        trellis,
        *_geometry(tensors),
        (0, _SPAN, 0),
        buffer,
        _model(steady),
        _tables()[2:],
    )
    if at > buffer.size:
        return None
    code = (int.from_bytes(buffer[:at].tobytes(), "big") << 48) + _roundest(low, span)
    body = code.to_bytes(at + 6, "big").rstrip(b"\0")
    return body if len(body) <= limit else None


def decode(
    body: bytes | memoryview,
    tensors: Sequence[tuple[int, int]],
    side: NDArray[np.uint8] | None = None,
    table: NDArray[np.uint8] | None = None,
    trellis: NDArray[np.int64] | None = None,
    hint: NDArray[np.uint8] | None = None,
    *,
    steady: bool = False,
) -> Integers:
    """Decode the integers of :func:`encode`, (n,) int32.

    Raises:
      DecodeError: If the body is not the one code of its integers: too short, too long, altered.
    """
    sizes, columns = _geometry(tensors)
    buffer = np.zeros(len(body) + 7 & ~1, np.uint8)  # at least six, and a whole number of pairs
    buffer[: len(body)] = np.frombuffer(body, np.uint8)
    code = int.from_bytes(buffer[:6].tobytes(), "big")
    if code >= _SPAN:
        raise DecodeError("range code is corrupt: it begins as no encoder begins it")
    values = np.zeros(int(sizes.sum()), np.int32)
    side = _NO_SIDE if side is None else side
    table = _IDENTITY if table is None else table
    hint = _NO_SIDE if hint is None else hint
    trellis = _NO_TRELLIS if trellis is None else trellis
    (above, span, at), sound = _decoder(
        values,
        side,
        table,
        hint,
        trellis,
        sizes,
        columns,
        (code, _SPAN, 6),
        buffer,
        _model(steady),
        _tables()[2:],
    )
    if not sound:
        raise DecodeError("an escape code is too long")
    if len(body) > at or (len(body) and body[-1] == 0):
        raise DecodeError(f"range code of {len(body)} bytes is too long")
    last = int.from_bytes(bytes(body[at - 6 : at]).ljust(6, b"\0"), "big")
    low = (last - above) % (1 << 48)
    if above != _roundest(low, span) - low:
        raise DecodeError("range code is corrupt: it does not end as an encoder ends it")
    return values
