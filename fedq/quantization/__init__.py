"""Quantization-aware training: one file per method; see :class:`fedq.quantization.base`."""

from fedq.quantization.base import Quantization, float_twin

__all__ = ["Quantization", "float_twin"]
