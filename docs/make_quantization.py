"""What is made for docs/quantization.md: the table of weight quantizers, and their staircases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _make
import torch
from _make import BLUE, DOCS, GREY
from torch import Tensor

from fedq import build, reference, registry

PAGE = DOCS / "quantization.md"
PICTURE = DOCS / "quantization_staircases.svg"
#: Drawn and measured: name in the registry, options.
DRAWN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {"bits": 8}),
    ("linear", {"bits": 4}),
    ("linear", {"bits": 4, "range": "mse"}),
    ("linear", {"bits": 4, "symmetric": False}),
    ("linear", {"bits": 2, "range": "mse"}),
    ("lsq", {"bits": 4}),
    ("lsq", {"bits": 2}),
    ("power_of_two", {"bits": 4}),
    ("additive_power_of_two", {"bits": 4}),
    ("codebook", {"bits": 4}),
    ("codebook", {"bits": 2}),
    ("ternary", {}),
    ("binary", {}),
)


def weights() -> Tensor:
    """Return normal weights: 64 channels of 576, as of a 3x3 convolution over 64 channels."""
    return torch.randn(64, 576, generator=torch.Generator().manual_seed(0))


def error(name: str, options: dict[str, Any]) -> float:
    """Return the mean square error over the mean square of normal weights."""
    weight = weights()
    module = build("weight_quantizer", name, **options).quantizer(weight).eval()
    with torch.no_grad():
        return float((module(weight) - weight).square().mean() / weight.square().mean())


def table() -> str:
    """Return the weight quantizers as a Markdown table."""
    rows = []
    for name, options in DRAWN:
        scheme = build("weight_quantizer", name, **options)
        made = f"{error(name, options):.2g}"
        what = reference.title(type(scheme))
        rows.append([f"`{registry.describe(scheme)}`", what, str(scheme.bits), made])
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

    figure, axes = plt.subplots(3, 4, figsize=(9, 6.2), sharex=True, sharey=True)
    weight = weights()[:1]
    order = weight[0].argsort()
    for axis, (name, options) in zip(axes.flat, DRAWN[1:], strict=True):
        scheme = build("weight_quantizer", name, **options)
        values = scheme.quantizer(weight).eval()(weight).detach()
        axis.plot([-3, 3], [-3, 3], color=GREY, linewidth=0.8)
        axis.step(weight[0, order], values[0, order], where="mid", color=BLUE, linewidth=1.4)
        axis.set_title(registry.describe(scheme), fontsize=7)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("weight", fontsize=9)
    figure.supylabel("on the device", fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
