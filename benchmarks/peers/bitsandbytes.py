"""bitsandbytes' blockwise 8 and 4 bits on the CPU: arrays in memory, no message."""

from __future__ import annotations

import sys
from typing import Any

import _protocol
import torch

sys.path.remove(sys.path[0])  # this file has the package's name

from bitsandbytes import functional

torch.set_num_threads(1)


def encode(arrays: _protocol.Arrays, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return codes and scales of every tensor.

    Tensors go in flat: 0.50.2 decodes 4-bit matrices of fewer columns than a block wrongly.
    """
    kind = settings["kind"]
    coded = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array.reshape(-1))
        if kind == "int8":
            coded[name] = functional.quantize_blockwise(tensor)
        else:
            coded[name] = functional.quantize_4bit(tensor, quant_type=kind)
    return coded


def decode(coded: dict[str, Any], settings: dict[str, Any]) -> _protocol.Arrays:
    """Return the arrays."""
    back = functional.dequantize_blockwise
    if settings["kind"] != "int8":
        back = functional.dequantize_4bit
    return {name: back(codes, state).numpy() for name, (codes, state) in coded.items()}


def size(coded: dict[str, Any]) -> int:
    """Return the bytes of codes and scales; the table of levels is the same for all."""
    return sum(codes.nbytes + state.absmax.nbytes for codes, state in coded.values())


_protocol.serve(encode, decode, size)
