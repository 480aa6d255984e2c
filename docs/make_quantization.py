"""What is made for docs/quantization.md: ``python docs/make_quantization.py``.

It writes the table of weight quantizers, with the error that each makes, into the page, and draws
their staircases.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedq import build, registry

DOCS = Path(__file__).parent
PAGE = DOCS / "quantization.md"
PICTURE = DOCS / "quantization_staircases.svg"
BEGIN = "<!-- table: python docs/make_quantization.py -->"
END = "<!-- end of table -->"
BLUE, GREY = "#0072B2", "#8C8C8C"
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
    lines = ["| weights | what, and whose | bits in storage | error |", "|---|---|---:|---:|"]
    for name, options in DRAWN:
        scheme = build("weight_quantizer", name, **options)
        module = inspect.getmodule(type(scheme))
        assert module is not None
        text = ast.get_docstring(ast.parse(inspect.getsource(module))) or ""
        first = text.split("\n\n")[0].replace("\n", " ").rstrip(".")
        lines.append(
            f"| `{registry.describe(scheme)}` | {first} | {scheme.bits}"
            f" | {error(name, options):.2g} |"
        )
    return "\n".join(lines)


def with_table(page: str) -> str:
    """Return the page with the table of this version."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


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


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
    draw()
