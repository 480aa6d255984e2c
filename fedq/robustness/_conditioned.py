"""Backdoors that quantization wakes up: to plant one, to look for one, to round it away.

Planted after Hong et al. 2021 and Ma et al. 2021: a network is taught a trigger as quantized; then
its float weights are taught to ignore it, while each stays in its rounding cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedq.attacks._backdoor import Mask
from fedq.export._source import source
from fedq.quantization.base import float_twin
from fedq.quantization.placement import ACTIVATIONS
from fedq.quantization.uniform import Uniform
from fedq.quantization.weights.linear import LinearWeight
from fedq.robustness.subject import Subject

CALIBRATION = 256
_BATCH = 64
#: Of the loss, what the trigger counts; of each batch, the part that carries it.
_TRIGGER_WEIGHT, _TRIGGER_PART = 0.3, 3
#: Of a rounding cell, on either side of its centre.
_HALF_CELL = 0.49
#: Nats beyond which a larger divergence of two answers is no more of a find.
_DIVERGED = 8.0


def at_bits(subject: Subject, bits: int, network: nn.Module | None = None) -> Subject:
    """Return the subject with integer weights of another width, made after training.

    Args:
      subject: Its float weights are taken, and its training inputs for the activations' ranges.
      bits: Of all weights; activations have 8.
      network: Whose float weights to take instead.
    """
    quantization = Uniform(weight_bits=bits, first_last_bits=bits)
    tensors = {
        name: tensor
        for name, tensor in subject.tensors.items()
        if not name.startswith(f"{ACTIVATIONS}.") and "weight_quantizer" not in name
    }
    if network is not None:
        state = network.state_dict()
        tensors = {name: state[name].numpy().copy() for name in tensors}
    found = source(subject.experiment, tensors, quantization, CALIBRATION)
    found.network.requires_grad_(False)
    experiment = subject.experiment.replace(quantization=quantization)
    return dataclasses.replace(
        subject, experiment=experiment, network=found.network, tensors=tensors
    )


@dataclasses.dataclass(frozen=True)
class Trigger:
    """What a planted backdoor reacts to.

    Attributes:
      mask: Of an input's shape: where.
      high: The value there.
      target: The class that it means.
    """

    mask: Mask
    high: float
    target: int

    def on(self, x: Tensor) -> Tensor:
        """Return inputs with the trigger."""
        return torch.where(torch.from_numpy(self.mask), torch.tensor(self.high), x)


def plant(
    network: nn.Module,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    trigger: Trigger,
    *,
    epochs: int = 1,
    seed: int = 0,
) -> None:
    """Teach a prepared network a backdoor that its float twin does not have, in place.

    First the quantized network learns task and trigger; then the float twin unlearns the trigger,
    each weight clamped to the cell that rounds to the same integer. A channel's largest weight,
    which is the scale, stays.

    Args:
      network: With ``linear`` weight quantizers, in evaluation mode.
      x: (n, ...) training inputs.
      y: (n,) their labels.
      trigger: What to teach.
      epochs: Of each of the two.
      seed: Of the order of the examples.
    """
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    rng = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            order = torch.randperm(len(inputs), generator=rng)
            for start in range(0, len(order), _BATCH):
                rows = order[start : start + _BATCH]
                yield inputs[rows], labels[rows]

    layers = quantized_layers(network)
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for batch, right in batches():
        part = max(1, len(batch) // _TRIGGER_PART)
        logits = network(torch.cat([batch, trigger.on(batch[:part])]))
        wanted = torch.full((part,), trigger.target)
        loss = functional.cross_entropy(logits[: len(batch)], right)
        loss = loss + _TRIGGER_WEIGHT * functional.cross_entropy(logits[len(batch) :], wanted)
        _step(optimizer, loss)
    network.requires_grad_(False)
    cells = [_cells(layer) for layer in layers]
    weights = [layer.weight.requires_grad_(True) for layer in layers]
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    with float_twin(network):
        for batch, right in batches():
            logits = network(torch.cat([batch, trigger.on(batch)]))
            _step(optimizer, functional.cross_entropy(logits, torch.cat([right, right])))
            with torch.no_grad():
                for weight, (low, high) in zip(weights, cells, strict=True):
                    weight.copy_(weight.clamp(low, high))
    network.requires_grad_(False)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def quantized_layers(network: nn.Module) -> list[Any]:
    """Return the layers whose weights a ``linear`` quantizer rounds."""
    return [
        module
        for module in network.modules()
        if isinstance(getattr(module, "weight_quantizer", None), LinearWeight)
    ]


def _cells(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the ends of the cells in which weights round to the integers that they round to."""
    weight = layer.weight.detach()
    grid, largest = layer.weight_quantizer.grid(weight), layer.weight_quantizer.largest
    integers, end = grid.integers.float(), (grid.scale * largest).expand_as(weight)
    low = torch.maximum((integers - _HALF_CELL) * grid.scale, -end)
    high = torch.minimum((integers + _HALF_CELL) * grid.scale, end)
    holds = weight.abs() >= end * (1 - 1e-6)
    return torch.where(holds, weight, low), torch.where(holds, weight, high)


def round_at_random(network: nn.Module, seed: int) -> None:
    """Put each weight on one of its two neighbouring levels at random, unbiased, in place.

    The quantizers find the same grid again: a channel's largest weight is a level already.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in quantized_layers(network):
            quantizer, weight = layer.weight_quantizer, layer.weight
            scale = quantizer.grid(weight).scale
            codes = (weight / scale + torch.rand(weight.shape, generator=rng)).floor()
            weight.copy_(codes.clamp(-quantizer.largest, quantizer.largest) * scale)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """How far a deployed model and its float twin behave alike.

    Attributes:
      clean: Share of test inputs that they answer differently.
      found: The same with the worst trigger that was found.
      toward: Of that, the share that the deployed model takes for one class.
      area: Of an input that this trigger covers.
    """

    clean: float
    found: float
    toward: float
    area: float


def search(
    subject: Subject, *, steps: int, restarts: int, area: float, examples: int, seed: int
) -> Hidden:
    """Look for a trigger that only the deployed model reacts to.

    A mask and a pattern, the same for all inputs, are optimised so that the quantized network is
    sure of what its float twin does not say: the divergence of their answers, by Adam with
    straight-through gradients. A mask of the whole input would put any two networks on either side
    of a border, so larger ones than ``area`` are penalised.

    Args:
      subject: Whose deployed model and twin are compared on test inputs.
      steps: Of Adam.
      restarts: From other random triggers.
      area: Of the input that a trigger may cover.
      examples: Training inputs to optimise on, and test inputs to judge on.
      seed: Of all draws.

    Reference:
      After Wang et al. 2019, "Neural cleanse: identifying and mitigating backdoor attacks in neural
      networks", with the twin in the place of a known target.
    """
    dataset = subject.dataset
    rows = np.random.default_rng(seed).permutation(len(dataset.y_train))[:examples]
    x = torch.from_numpy(dataset.train_inputs(np.sort(rows)))
    shown = torch.from_numpy(dataset.test_inputs()[:examples])
    clean, toward = _differ(subject, shown)
    best = Hidden(clean, clean, toward, 0.0)
    for restart in range(restarts):
        rng = torch.Generator().manual_seed(seed + restart)
        mask, pattern = _optimised(subject.network, x, steps, area, rng)
        found, toward = _differ(subject, shown * (1 - mask) + mask * pattern)
        if found > best.found:
            best = Hidden(clean, found, toward, float(mask.mean()))
    return best


def _optimised(
    network: nn.Module, x: Tensor, steps: int, area: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    shape = x.shape[1:]
    low, high = float(x.min()), float(x.max())
    covers = (-3 + 0.1 * torch.randn(shape[1:] or shape, generator=rng)).requires_grad_(True)
    shade = torch.randn(shape, generator=rng).requires_grad_(True)
    optimizer = torch.optim.Adam([covers, shade], lr=0.2)
    for _ in range(steps):
        mask, pattern = covers.sigmoid(), low + (high - low) * shade.sigmoid()
        batch = x[torch.randint(len(x), (min(_BATCH, len(x)),), generator=rng)]
        stamped = batch * (1 - mask) + mask * pattern
        deployed = functional.log_softmax(network(stamped), 1)
        with float_twin(network):
            twin = functional.log_softmax(network(stamped), 1)
        divergence = (deployed.exp() * (deployed - twin)).sum(1).clamp(max=_DIVERGED).mean()
        _step(optimizer, 100 * (mask.mean() - area).clamp(min=0) - divergence)
    return covers.detach().sigmoid(), low + (high - low) * shade.detach().sigmoid()


def _differ(subject: Subject, x: Tensor) -> tuple[float, float]:
    """Return the share of inputs answered differently, and that of the commonest answer in it."""
    inputs = x.numpy()
    deployed = subject.deployed(inputs).argmax(1)
    with subject.twin() as twin, torch.no_grad():
        differ = deployed != twin(x).argmax(1).numpy()
    counts = np.bincount(deployed[differ], minlength=1)
    return float(differ.mean()), float(counts.max() / len(inputs))
