"""A quantized model as a file that a device's runtime executes; one file per runtime.

This package imports no torch by itself: :mod:`fedq.export.runner` runs on devices.
"""
