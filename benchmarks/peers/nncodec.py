"""NNCodec 2.1.3 (ISO/IEC 15938-17): one bitstream for all tensors of an update."""

from __future__ import annotations

import math
import sys
from typing import Any
from unittest.mock import MagicMock

import _protocol
import numpy as np

# Its package imports data sets, metrics and a second framework to code a tensor; none is used.
for name in (
    *("cv2", "h5py", "pandas", "ptflops", "torchmetrics", "torchvision"),
    *("torchvision.datasets", "torchvision.models", "torchvision.transforms"),
):
    sys.modules.setdefault(name, MagicMock(name=name))
sys.path.remove(sys.path[0])  # this file has the package's name

from nncodec import nnc  # noqa: E402


def encode(arrays: _protocol.Arrays, settings: dict[str, Any], seed: int) -> bytearray:
    """Return the bitstream, with the options that `nncodec.tensor.encode` has by default.

    Vectors are biases to NNCodec, which it codes at nearly full precision: a lone one goes in as
    a square matrix, as near as that is.
    """
    if len(arrays) == 1:
        arrays = {name: _square(array) for name, array in arrays.items()}
    # A qp is an absolute step, four to the octave: the settings' are for unit power.
    power = sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays.values())
    scale = math.sqrt(power / sum(a.size for a in arrays.values())) or 1.0
    qp = settings["qp"] + round(4 * math.log2(scale))
    return nnc.compress(dict(arrays), qp=qp, use_dq=True, row_skipping=True, return_bitstream=True)


def _square(array: Any) -> Any:
    if array.ndim > 1:
        return array
    rows = next(n for n in range(math.isqrt(array.size), 0, -1) if array.size % n == 0)
    return array.reshape(rows, -1)


def decode(bitstream: bytearray, settings: dict[str, Any]) -> _protocol.Arrays:
    """Return the arrays; the protocol flattens them."""
    return nnc.decompress(bitstream)


_protocol.serve(encode, decode)
