"""What is exported: a run's network with its quantizers, trained with them or calibrated after."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedq import random, registry
from fedq.data.base import Dataset, load
from fedq.errors import ConfigError, FedqError
from fedq.experiment import Experiment
from fedq.models.base import count_parameters, create
from fedq.models.low_rank import factorise
from fedq.models.structure import without_empty_channels
from fedq.quantization.base import Quantization
from fedq.quantization.placement import ACTIVATIONS
from fedq.tasks.base import Task

LOG = logging.getLogger("fedq")
#: Training examples that ranges are taken from, unless another number is asked for.
CALIBRATION = 512
_FEW = 32
_BATCH = 100
_FORWARD = 500  # examples of a forward pass; bounds memory


@dataclass(frozen=True)
class Source:
    """A network to export.

    Attributes:
      network: With fake quantizers and all ranges, in evaluation mode.
      quantization: Whose quantizers they are.
      dataset: The run's.
      calibrated: Training examples that the ranges are of; 0 if they are the federation's.
      energy: What factors keep of each weight's squared norm; None if none was factored.
      whole: The same network before it was factored.
    """

    network: nn.Module
    quantization: Quantization
    dataset: Dataset
    calibrated: int
    energy: float | None = None
    whole: Source | None = None

    @property
    def task(self) -> Task:
        """What its outputs mean."""
        task: Task = registry.from_config("task", self.dataset.task)
        return task

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what the network with fake quantizers gives for (n, *shape) inputs."""
        return outputs(self.network, x)


def outputs(network: nn.Module, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what a network in evaluation mode gives for (n, *shape) inputs, in batches, float32.

    It computes in the precision of its parameters.
    """
    kind = next((p.dtype for p in network.parameters()), torch.float32)
    with torch.no_grad():
        parts = [
            network(torch.from_numpy(x[start : start + _FORWARD]).to(kind)).float().numpy()
            for start in range(0, len(x), _FORWARD)
        ]
    return np.concatenate(parts)


def source(
    experiment: Experiment,
    tensors: Mapping[str, NDArray[np.float32]],
    quantization: Quantization,
    calibrate: int | None = None,
    width: str | None = None,
    energy: float | None = None,
) -> Source:
    """Return a run's network with a quantization's quantizers.

    Args:
      experiment: The run's.
      tensors: Of its ``model.safetensors``.
      quantization: The run's own, or another one for post-training quantization.
      calibrate: Training examples to take activation ranges from; None is as many as are needed:
        none if the run has trained these ranges, else :data:`CALIBRATION`.
      width: Of a run with clients of several widths: whose ranges and statistics, such as ``w4``;
        None is the first.
      energy: Factor layers of the float twin, keeping this share of each weight's squared norm
        (:func:`fedq.models.low_rank.factorise`); ranges are then of training examples.

    Raises:
      ConfigError: If the tensors do not belong to the experiment's model, the run has no such
        width, or no layer becomes smaller.
    """
    if calibrate is not None and calibrate < 1:
        raise ConfigError(f"--calibrate must be at least 1 example, not {calibrate}")
    dataset = load(experiment.data)
    network = create(experiment.model, dataset.input_shape, dataset.outputs)
    width = width or experiment.quantization.variants[0]
    if width not in experiment.quantization.variants:
        trained = ", ".join(filter(None, experiment.quantization.variants)) or "one width"
        raise ConfigError(f"the run has no width {width}; it was trained with {trained}")
    every, tensors = tensors, _of_width(tensors, experiment.quantization.variants, width)
    variant = quantization.variants.index(width) if width in quantization.variants else 0
    own = {name for name, t in network.state_dict().items() if t.is_floating_point()}
    given = set(tensors)
    plain = {name for name in given if not name.startswith(f"{ACTIVATIONS}.")}
    lacking = own - given
    strange = {name for name in plain - own if "weight_quantizer" not in name}
    if lacking or strange:
        name = sorted(lacking or strange)[0]
        raise FedqError(
            f"model.safetensors is not of the model that config.yaml describes"
            f" ({'no ' if lacking else ''}{name}); give the run directory as it was written"
        )
    # Before quantizers come, some of which begin with what they see of the weights.
    _fill(network, {name: tensors[name] for name in own})
    if energy is not None:
        if experiment.pruning.active:
            without_empty_channels(network)
        network = _factored(network, energy)
    network = quantization.prepare(network, variant).eval()
    wanted = {name for name, t in network.state_dict().items() if t.is_floating_point()}
    if calibrate is None and wanted <= given:
        count = 0
    else:
        count = calibrate or CALIBRATION
        given = plain  # ranges anew
    if energy is None:
        _fill(network, {name: tensors[name] for name in wanted & given})
        if experiment.pruning.active:
            without_empty_channels(network)
    if count and hasattr(network, ACTIVATIONS):
        count = _calibrate(network, dataset, count, experiment.seed)
    whole = None
    if energy is not None:
        whole = source(experiment, every, quantization, calibrate, width)
    return Source(network, quantization, dataset, count, energy, whole)


def _factored(network: nn.Module, energy: float) -> nn.Module:
    """Return the network with thin layers that keep this share of each weight's squared norm."""
    before = count_parameters(network)
    factored = factorise(network, energy=energy)
    after = count_parameters(factored)
    if after >= before:
        raise ConfigError(
            f"--factorise {energy:g} makes no layer between the first and the last smaller; give"
            " less than that, or leave it out"
        )
    LOG.info("factored: %d parameters of %d are left", after, before)
    return factored


def _of_width(tensors: Mapping[str, Any], widths: Sequence[str], width: str) -> dict[str, Any]:
    """Return the weights, and the state of one of several widths under the names of a network's."""
    if len(widths) == 1:
        return dict(tensors)
    states = tuple(f"{each}." for each in widths)
    weights = {name: t for name, t in tensors.items() if not name.startswith(states)}
    own = f"{width}."
    return weights | {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}


def _fill(network: nn.Module, tensors: Mapping[str, Any]) -> None:
    try:
        network.load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items()}, strict=False)
    except RuntimeError as error:
        raise FedqError(
            "model.safetensors is not of the model that config.yaml describes"
            f" ({str(error).splitlines()[-1].strip()}); give the run directory as it was written"
        ) from error


def _calibrate(network: nn.Module, dataset: Dataset, count: int, seed: int) -> int:
    """Let the activation quantizers see training examples; nothing else is changed."""
    total = len(dataset.x_train)
    count = min(count, total)
    if count < _FEW:
        LOG.warning(
            "activation ranges of %d example%s: what others exceed is clipped; give --calibrate %d"
            " or more",
            count,
            "s" if count > 1 else "",
            10 * _FEW,
        )
    rows = random.generator(random.derive(seed, "calibration")).choice(total, count, replace=False)
    network.get_submodule(ACTIVATIONS).train()
    with torch.no_grad():
        for start in range(0, count, _BATCH):
            network(torch.from_numpy(dataset.train_inputs(rows[start : start + _BATCH])))
    network.eval()
    return count
