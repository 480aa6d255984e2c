"""Square attack (Andriushchenko et al. 2020, ECCV, arXiv:1912.00049): random search on outputs."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fedq.evasion.base import Access, Ball, Evasion, Norm, Target, at_least, margin
from fedq.random import derive
from fedq.registry import register

#: Share of the queries after which the squares' area is halved (section 5).
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@register("evasion", "square")
class Square(Evasion):
    """Move a square of an image, or a stretch of a series, to a corner of the ball, if it helps.

    Args:
      queries: Outputs that may be asked for, per example.
      area: Share of the input that the first squares cover.
    """

    access: ClassVar[Access] = "black"
    norms: ClassVar[tuple[Norm, ...]] = ("linf",)
    queries: int = 1000
    area: float = 0.8

    def __post_init__(self) -> None:
        at_least("square", queries=self.queries)

    def __call__(self, target: Target, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Tensor:
        """Return the points of largest margin that were seen."""
        generator = torch.Generator().manual_seed(derive(seed, "square"))

        def signs(*shape: int) -> Tensor:
            return 2.0 * torch.randint(0, 2, shape, generator=generator) - 1

        image = x.reshape(len(x), *_as_image(x))
        n, channels, height, width = image.shape
        stripes = ball.box(image + ball.eps * signs(n, channels, 1, width))
        worst = stripes.reshape(x.shape).contiguous()
        leads = margin(target.logits(worst), y)
        for query in range(1, self.queries):
            (left,) = torch.nonzero(leads <= 0, as_tuple=True)
            if not len(left):
                break
            halvings = sum(query / self.queries > share for share in _HALVINGS)
            rows, columns = _extent(height, width, self.area / 2**halvings)
            top = int(torch.randint(height - rows + 1, (1,), generator=generator))
            side = int(torch.randint(width - columns + 1, (1,), generator=generator))
            window = (..., slice(top, top + rows), slice(side, side + columns))
            tried = worst[left].reshape(len(left), channels, height, width)
            corner = image[left][window] + ball.eps * signs(len(left), channels, 1, 1)
            tried[window] = ball.box(corner)
            moved = tried.reshape(len(left), *x.shape[1:])
            lead = margin(target.logits(moved), y[left])
            better = lead > leads[left]
            worst[left[better]], leads[left[better]] = moved[better], lead[better]
        return worst


def _as_image(x: Tensor) -> tuple[int, int, int]:
    """Return channels, height and width: series are one column, features one row."""
    if x.dim() == 4:
        return x.shape[1], x.shape[2], x.shape[3]
    return (x.shape[1], 1, x.shape[2]) if x.dim() == 3 else (1, 1, x.shape[1])


def _extent(height: int, width: int, share: float) -> tuple[int, int]:
    """Return rows and columns of a square that covers a share of an image, at least one pixel."""
    if height == 1:
        return 1, min(max(1, round(share * width)), width)
    side = max(1, round(math.sqrt(share * height * width)))
    return min(side, height), min(side, width)
