"""Masked sums (Bonawitz et al. 2017), https://eprint.iacr.org/2017/281."""

from __future__ import annotations

from fedq.registry import register
from fedq.secagg.base import Masked


@register("secure_aggregation", "secagg")
class SecAgg(Masked):
    """The server learns the weighted sum of the cohort's updates, and no update.

    Reference:
      Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning";
      Bell et al. 2020, "Secure single-server aggregation with (poly)logarithmic overhead".
    """
