"""Update codecs: one file per method; see :class:`fedq.codecs.base.Codec`."""

from fedq.codecs._mean import mean
from fedq.codecs.base import Codec, decode

__all__ = ["Codec", "decode", "mean"]
