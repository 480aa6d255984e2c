"""Activation quantizers: one file per scheme; see :mod:`fedq.quantization.activations.base`."""
