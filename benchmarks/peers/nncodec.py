"""NNCodec 2.1.3 (ISO/IEC 15938-17): one bitstream for all tensors of an update."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import MagicMock

import _protocol

# Its package imports data sets, metrics and a second framework to code a tensor; none is used.
for name in (
    *("cv2", "h5py", "ptflops", "torchmetrics", "torchvision", "torchvision.datasets"),
    *("torchvision.models", "torchvision.transforms", "torchvision.transforms.functional"),
):
    sys.modules.setdefault(name, MagicMock(name=name))
sys.path.remove(sys.path[0])  # this file has the package's name

from nncodec import nnc  # noqa: E402


def encode(arrays: _protocol.Arrays, settings: dict[str, Any], seed: int) -> bytearray:
    """Return the bitstream; dependent quantization and parameter optimisation as by default."""
    return nnc.compress(
        dict(arrays), qp=settings["qp"], use_dq=True, return_bitstream=True, verbose=False
    )


def decode(bitstream: bytearray, settings: dict[str, Any]) -> _protocol.Arrays:
    """Return the arrays."""
    return nnc.decompress(bitstream)


_protocol.serve(encode, decode)
