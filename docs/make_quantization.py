"""What is made for docs/quantization.md: the table of weight quantizers, and their staircases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import _make
import torch
from _make import BLUE, DOCS, GREY
from torch import Tensor

from fedq import build, reference, registry
from fedq.quantization.weights.base import WeightScheme

PAGE = DOCS / "quantization.md"
PICTURE = DOCS / "quantization_staircases.svg"
WIDTHS = (8, 4, 2)
COLUMNS = 4


def weights() -> Tensor:
    """Return normal weights: 64 channels of 576, as of a 3x3 convolution over 64 channels."""
    return torch.randn(64, 576, generator=torch.Generator().manual_seed(0))


def schemes() -> list[WeightScheme]:
    """Return every registered scheme at the usual widths that it knows, then its own examples.

    What shows in training alone (random rounding, the gradient) makes no row of its own.
    """
    found: dict[str, WeightScheme] = {}
    for name, cls in registry.table("weight_quantizer").items():
        default = build("weight_quantizer", name)
        every = [default.at(bits) for bits in WIDTHS if bits in default.supported]
        every += [build("weight_quantizer", name, **options) for options in cls.examples]  # type: ignore[attr-defined]
        for scheme in every or [default]:
            if hasattr(scheme, "rounding"):
                scheme = dataclasses.replace(scheme, rounding="nearest", gradient="straight")
            found[registry.describe(scheme)] = scheme
    return list(found.values())


def error(scheme: WeightScheme) -> float:
    """Return the mean square error over the mean square of normal weights."""
    weight = weights()
    module = scheme.quantizer(weight).eval()
    with torch.no_grad():
        return float((module(weight) - weight).square().mean() / weight.square().mean())


def table() -> str:
    """Return the weight quantizers as a Markdown table."""
    rows, said = [], ""
    for scheme in schemes():
        what = reference.title(type(scheme))
        made = f"{error(scheme):.2g}"
        shown = "" if what == said else what
        rows.append([f"`{registry.describe(scheme)}`", shown, str(scheme.bits), made])
        said = what
    return _make.table(["weights", "what, and whose", "bits in storage", "error"], rows, right=2)


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the page with the table of this version."""
    yield PAGE, _make.with_made(PAGE.read_text(), "table", table())


def draw() -> None:
    """Draw what each quantizer makes of the weights of one layer."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fedq"
    import matplotlib.pyplot as plt

    weight = weights()[:1]
    order = weight[0].argsort()
    drawn = [  # more bits look like none, and one channel has one scale
        s for s in schemes() if s.bits <= 4 and getattr(s, "per_channel", True)
    ]
    rows = -(-len(drawn) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(9, 1.9 * rows), sharex=True, sharey=True)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, scheme in zip(axes.flat, drawn, strict=False):
        values = scheme.quantizer(weight).eval()(weight).detach()
        axis.plot([-3, 3], [-3, 3], color=GREY, linewidth=0.8)
        axis.step(weight[0, order], values[0, order], where="mid", color=BLUE, linewidth=1.4)
        axis.set_title(registry.describe(scheme).replace(", ", ",\n", 1), fontsize=7)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("weight", fontsize=9)
    figure.supylabel("on the device", fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
