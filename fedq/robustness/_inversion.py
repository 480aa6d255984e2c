"""Examples from updates: the first dense layer's closed form, and search for inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from fedq.layout import Layout
from fedq.quantization.base import float_twin
from fedq.robustness._cells import Cells

Matrix = NDArray[np.float64]
Loss = Literal["cosine", "cells"]

_REFINEMENTS, _POWER = 200, 30
#: Units averaged on either side; least error of a unit that tells anything, of the largest.
_WINDOWS, _TELLING = (1, 2, 4, 8, 16, 32), 0.02
#: Weight of nearness within flat cells, and the finest cell in units of the largest value.
_FLAT, _FINEST = 0.02, 1e-6


def least_squares(weight: Matrix, bias: Matrix) -> Matrix:
    """Return the input of a dense layer from one example's update, (in,).

    The gradient of the weight is that of the bias times the input, so that
    ``x = sum_i b_i W_i / sum_i b_i**2``.

    Args:
      weight: (out, in), what the update does to the weight.
      bias: (out,), to the bias.

    Reference:
      Geiping et al. 2020, "Inverting gradients: how easy is it to break privacy in federated
      learning?", NeurIPS, proposition 3.1; Phong et al. 2018, IEEE TIFS 13.
    """
    size = float(bias @ bias)
    return bias @ weight / size if size else np.zeros(weight.shape[1])


def rank_one(weight: Matrix, bias: Matrix) -> Matrix:
    """Return the same from the weight's leading singular vectors: errors average over all units."""
    left = bias / max(float(np.linalg.norm(bias)), 1e-30)
    if not left.any():
        left = np.full(len(bias), 1 / math.sqrt(len(bias)))
    right = np.zeros(weight.shape[1])
    for _ in range(_POWER):
        right = left @ weight
        right /= max(float(np.linalg.norm(right)), 1e-30)
        left = weight @ right
        left /= max(float(np.linalg.norm(left)), 1e-30)
    along = float(left @ bias)
    return right * float(left @ weight @ right) / along if along else right


def from_signs(weight: Matrix, bias: Matrix, typical: tuple[float, float]) -> Matrix:
    """Return a dense layer's input from the signs of its update alone, (in,).

    The update of a weight has the sign of its unit's error times that of the input. A code without
    a zero sends one sign for inputs that are zero, the commonest one; units whose error has the
    other tell them from positive inputs.

    Args:
      weight: (out, in), of which the signs count.
      bias: (out,), likewise.
      typical: Mean of inputs that are not positive, and of those that are.
    """
    other = -1 if (weight > 0).mean() >= 0.5 else 1
    telling = np.sign(bias) == other
    if not telling.any():
        return np.full(weight.shape[1], typical[0])
    positive = (np.sign(weight[telling]) == other).mean(axis=0) > 0.5
    return np.where(positive, typical[1], typical[0])


def within_cells(cells: Cells, layout: Layout, start: Matrix, span: tuple[float, float]) -> Matrix:
    """Return the input whose rank-one update breaks the bounds of a dense layer the least.

    Distances are in units of each tensor's own bounds. Within them, nearness to what was decoded
    decides: much where small errors are likelier, a little where all are alike.

    Args:
      cells: Bounds of the whole update; its first two tensors are the layer's weight and bias.
      layout: Of the update.
      start: (in,) where to begin.
      span: Smallest and largest value of an input.
    """
    weight, bias = layout.tensors[:2]

    def table(values: NDArray[np.float32]) -> Matrix:
        """Return (out, in + 1): the bias is the weight of a constant input."""
        wide = values.astype(np.float64)
        return np.column_stack([wide[weight.slice].reshape(weight.shape), wide[bias.slice]])

    low, high, values = table(cells.low), table(cells.high), table(cells.values)
    size = float(np.abs(values).max(initial=0.0)) or 1.0
    unit = np.maximum(high - low, _FINEST * size)
    near = _FLAT if cells.flat else 1.0
    inputs = weight.shape[1]

    def objective(z: Matrix) -> tuple[float, Matrix]:
        x, errors = np.append(z[:inputs], 1.0), z[inputs:] * size
        product = np.outer(errors, x)
        broken = (np.maximum(product - high, 0) - np.maximum(low - product, 0)) / unit
        distance = (product - values) / unit
        total = float((broken**2).sum() + near * (distance**2).sum())
        slope = 2 * (broken + near * distance) / unit
        return total, np.concatenate([(errors @ slope)[:inputs], (slope @ x) * size])

    begin = np.clip(start, *span)
    wide = np.append(begin, 1.0)
    found = minimize(
        objective,
        np.concatenate([begin, values @ wide / (wide @ wide) / size]),
        jac=True,
        method="L-BFGS-B",
        bounds=[span] * inputs + [(None, None)] * len(values),
        options={"maxiter": _REFINEMENTS},
    )
    return np.asarray(found.x[:inputs], np.float64)


def _outside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the squared distance from a box."""
    return (functional.relu(low - values) + functional.relu(values - high)).square().sum()


def of_units(weight: Matrix, bias: Matrix) -> Matrix:
    """Return candidate inputs from the units of a layer made by :func:`imprint`, (candidates, in).

    Neighbouring units differ by the examples whose means lie between theirs. Where there are more
    units than examples, many differ by the same one, and averages over them have smaller errors:
    several widths are tried.
    """
    found = []
    total = np.column_stack([weight, bias])
    sums = np.concatenate([np.zeros((1, total.shape[1])), np.cumsum(total, axis=0)])
    units = len(total)
    for width in _WINDOWS:
        if 2 * width > units:
            break
        means = (sums[width:] - sums[:-width]) / width
        differences = means[:-width] - means[width:]
        errors = np.abs(differences[:, -1])
        some = errors > _TELLING * float(errors.max(initial=0.0))
        found.append(differences[some, :-1] / differences[some, -1:])
    return np.concatenate(found)


def imprint(
    weights: NDArray[np.float32], layout: Layout, inputs: Matrix, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return weights of a network with one hidden layer that sorts examples by their mean.

    Unit k answers to inputs whose mean exceeds the k-th quantile that the server expects, and all
    units feed the output alike. They answer faintly and are heard loudly: so most of the update is
    in the first layer, where a codec with one step for all spends its bits.

    Args:
      weights: (d,) of an ``mlp`` with one hidden layer; they are not changed.
      layout: Their names and shapes.
      inputs: (n, in) examples like those that are asked for.
      rng: Decides how the output listens.

    Reference:
      Fowl et al. 2022, "Robbing the Fed: directly obtaining private data in federated learning with
      modified models", ICLR, section 3.
    """
    changed = weights.copy()
    first, second, third, last = layout.tensors
    units, size = first.shape
    means = inputs.mean(axis=1)
    quantiles = np.quantile(means, (np.arange(units) + 0.5) / units)
    scale = 1 / (units * max(float(means.std()), 1e-6))
    changed[first.slice] = scale / size
    changed[second.slice] = -scale * quantiles
    changed[third.slice] = np.repeat(rng.standard_normal(third.shape[0]), units)
    changed[last.slice] = 0
    return changed


@dataclass(frozen=True)
class Search:
    """How inputs are searched for.

    Attributes:
      iterations: Of Adam on the sign of the gradient.
      restarts: From other noise; the one with the least loss counts, as an attacker would choose.
      variation: Weight of the total variation.
    """

    iterations: int = 600
    restarts: int = 1
    variation: float = 1e-2


def search(
    network: nn.Module,
    cells: Cells,
    layout: Layout,
    label: int,
    shape: tuple[int, ...],
    span: tuple[float, float],
    loss: Loss,
    options: Search,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Return the input whose gradient fits an update the best, (1, *shape).

    Args:
      network: Its float twin stands in for the quantized network, which has no second derivatives.
      cells: Bounds of the gradient.
      layout: Of the network's parameters.
      label: Of the example.
      shape: Of an input.
      span: Smallest and largest value of an input.
      loss: ``cosine`` takes what was decoded for the gradient; ``cells`` asks for no more than what
        the codec tells: intervals, and signs where there is no scale.
      options: Budget.
      rng: Starts.

    Reference:
      Geiping et al. 2020, section 4 (cosine, total variation, signed Adam); for known compression,
      Ovi et al. 2023 and Yue et al. 2023, "Gradient obfuscation gives a false sense of security in
      federated learning", USENIX Security.
    """
    bounds = _Bounds(cells, layout)
    parameters = [dict(network.named_parameters())[name] for name in layout.names]
    asked = [parameter.requires_grad for parameter in parameters]
    target = torch.tensor([label])
    best, least = np.zeros((1, *shape), np.float32), math.inf
    network.eval()
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with float_twin(network):
            for _ in range(options.restarts):
                start = rng.uniform(*span, (1, *shape)).astype(np.float32)
                found, value = _descend(
                    network, parameters, bounds, target, start, span, loss, options
                )
                if value < least:
                    best, least = found, value
    finally:
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)
    return best


def _descend(
    network: nn.Module,
    parameters: Sequence[Tensor],
    bounds: _Bounds,
    target: Tensor,
    start: NDArray[np.float32],
    span: tuple[float, float],
    loss: Loss,
    options: Search,
) -> tuple[NDArray[np.float32], float]:
    x = torch.from_numpy(start).requires_grad_()
    optimizer = torch.optim.Adam([x], 0.1 * (span[1] - span[0]))
    n = options.iterations
    decay = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [3 * n // 8, 5 * n // 8, 7 * n // 8], 0.1
    )
    value = math.inf
    for _ in range(n):
        gradient = torch.autograd.grad(
            functional.cross_entropy(network(x), target), parameters, create_graph=True
        )
        flat = torch.cat([part.reshape(-1) for part in gradient])
        misfit = bounds.misfit(flat, loss)
        total = misfit + options.variation * _variation(x) / (span[1] - span[0])
        (x.grad,) = torch.autograd.grad(total, [x])
        x.grad.sign_()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            x.clamp_(*span)
        value = float(total.detach())
    return x.detach().numpy(), value


class _Bounds:
    """Misfit of a gradient to what is known of it."""

    def __init__(self, cells: Cells, layout: Layout) -> None:
        norm = max(float(np.linalg.norm(cells.values)), 1e-30)
        known = np.isfinite(cells.low) & np.isfinite(cells.high)
        self.values = torch.from_numpy(cells.values / np.float32(norm))
        self.norm = norm
        self.known = torch.from_numpy(np.flatnonzero(known))
        self.low = torch.from_numpy(cells.low[known] / np.float32(norm))
        self.high = torch.from_numpy(cells.high[known] / np.float32(norm))
        self.signs = torch.from_numpy(np.flatnonzero(~known))
        self.sign = torch.sign(self.values[self.signs])

    def misfit(self, gradient: Tensor, loss: Loss) -> Tensor:
        if loss == "cosine":
            return 1 - functional.cosine_similarity(gradient, self.values, dim=0)
        total = gradient.new_zeros(())
        if len(self.known):
            total = total + _outside(gradient[self.known] / self.norm, self.low, self.high)
        if len(self.signs):
            part = gradient[self.signs]
            wrong = functional.relu(-self.sign * part).sum()
            total = total + wrong / part.norm().clamp_min(1e-12) / _SIGNS
        return total


#: Weight of wrong signs beside the total variation.
_SIGNS = 10.0


def _variation(x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours, over all axes behind the channels."""
    axes = range(2, x.ndim)
    return sum((x.diff(dim=axis).abs().mean() for axis in axes), x.new_zeros(()))
