"""Post-training quantization by whoever has some inputs: ranges, and which way to round.

After AdaRound (Nagel et al. 2020, ICML, "Up or down? Adaptive rounding for post-training
quantization"): the nearest level of each weight is not the best set of levels for the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedq.errors import ConfigError
from fedq.quantization.base import float_twin
from fedq.quantization.fake import ActivationQuantizer
from fedq.quantization.weights.linear import LinearWeight

#: The stretched sigmoid of eq. (23), which reaches 0 and 1.
_ZETA, _GAMMA = 1.1, -0.1
_BATCH = 32
#: Of the steps: before them nothing pulls the variables to 0 or 1.
_WARM_UP = 0.2


def calibrate(model: nn.Module, x: Tensor | NDArray[np.float32], batch_size: int = 32) -> None:
    """Set the activation ranges of a prepared network by some inputs; weights stay.

    Args:
      model: As a quantization prepared it.
      x: (n, ...) float32, channels first; one example is enough to set every range.
      batch_size: Examples that a range moves by at a time.

    Raises:
      ConfigError: If there are no inputs, or one is not finite.
    """
    x = _inputs(x)
    with _only_observing(model), torch.no_grad():
        for i in range(0, len(x), batch_size):
            model(x[i : i + batch_size])


def adaround(
    model: nn.Module,
    x: Tensor | NDArray[np.float32],
    *,
    steps: int = 300,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> None:
    """Round each weight of ``linear`` quantizers up or down, as serves the layers' outputs best.

    Layer by layer in the order of computation, with the inputs that the layers before give when
    quantized, ``|| W x - s (floor(W / s) + h(V)) x^ ||^2 + penalty`` is minimised over V by Adam,
    where ``h`` is a stretched sigmoid and the penalty drives it to 0 or 1. The weights become the
    chosen levels: training may go on from them, and the quantizer finds the same grid again.

    Args:
      model: A prepared network with ranges set; its weights change in place.
      x: (n, ...) float32 inputs, channels first; some hundreds do.
      steps: Of Adam per layer.
      learning_rate: Of Adam.
      seed: Of the batches.

    Raises:
      ConfigError: If there are no inputs, one is not finite, or no layer has a symmetric ``linear``
        quantizer whose range is the largest weight.
    """
    x = _inputs(x)
    layers: list[Any] = [m for m in model.modules() if _can_round(m)]
    if not layers:
        raise ConfigError(
            "no layer has a symmetric linear weight quantizer with range=absmax; nothing to round"
        )
    model.eval()
    with float_twin(model), torch.no_grad():
        targets = [_seen(model, layer, x)[1] for layer in layers]
    random = torch.Generator().manual_seed(seed)
    for layer, target in zip(layers, targets, strict=True):
        with torch.no_grad():
            inputs, _ = _seen(model, layer, x)
        with torch.enable_grad():
            _round(layer, inputs, target, steps, learning_rate, random)


def _inputs(x: Tensor | NDArray[np.float32]) -> Tensor:
    """Return examples to calibrate with as a tensor."""
    inputs = torch.as_tensor(x)
    if len(inputs) == 0:
        raise ConfigError("calibration needs at least one example")
    if not torch.isfinite(inputs).all():
        raise ConfigError("the examples to calibrate with hold NaN or infinity; leave those out")
    return inputs


def _can_round(module: nn.Module) -> bool:
    quantizer = getattr(module, "weight_quantizer", None)
    return (
        isinstance(quantizer, LinearWeight)
        and quantizer.enabled
        and quantizer.scheme.symmetric
        and quantizer.scheme.range == "absmax"
    )


def _seen(model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what goes into a layer and what comes out, for all examples."""
    inputs, outputs = [], []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    handle = layer.register_forward_hook(keep)
    try:
        for i in range(0, len(x), 256):
            model(x[i : i + 256])
    finally:
        handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


def _round(
    layer: Any, x: Tensor, target: Tensor, steps: int, learning_rate: float, random: torch.Generator
) -> None:
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    scale = quantizer.grid(weight).scale
    down = (weight / scale).floor()
    rest = weight / scale - down
    # h(V) begins at the weight itself.
    v = torch.logit(((rest - _GAMMA) / (_ZETA - _GAMMA)).clamp(1e-4, 1 - 1e-4)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=learning_rate)
    # The largest weight of a channel holds the grid.
    free = (weight.abs() < scale * (quantizer.largest - 0.5)).to(weight.dtype)
    nearest = rest.round()
    energy = float(target.square().mean()) or 1.0
    for step in range(steps):
        part = torch.randint(len(x), (min(_BATCH, len(x)),), generator=random)
        h = (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        chosen = (down + torch.where(free > 0, h, nearest)) * scale
        loss = functional.mse_loss(_apply(layer, x[part], chosen), target[part]) / energy
        share = step / steps
        if share >= _WARM_UP:
            beta = 2 + 18 * (0.5 + 0.5 * math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP)))
            loss = loss + 0.01 * (1 - (2 * h - 1).abs().pow(beta)).mul(free).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        up = torch.where(free > 0, (v > 0).to(weight.dtype), nearest)
        chosen = (down + up).clamp(-quantizer.largest, quantizer.largest) * scale
        plain = quantizer.grid(weight).values()
        errors = [
            float(functional.mse_loss(_apply(layer, x, values), target))
            for values in (chosen, plain)
        ]
        if errors[0] < errors[1]:
            layer.weight.copy_(chosen)


def _apply(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return a layer's output with another weight."""
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, layer.bias)
    out: Tensor = layer._conv_forward(x, weight, layer.bias)
    return out


@contextmanager
def _only_observing(model: nn.Module) -> Iterator[None]:
    """Let activation quantizers observe, and all else be as in evaluation."""
    mode = model.training
    model.eval()
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.training = True
    try:
        yield
    finally:
        model.train(mode)
