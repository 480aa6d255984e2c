"""Weight quantizers: one file per scheme; see :class:`fedq.quantization.weights.base`."""
