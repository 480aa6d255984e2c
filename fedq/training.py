"""Local training and evaluation of one client at a time, on one flat vector of weights.

A process makes one :class:`Trainer` and trains all its clients in it: nothing is built, copied by
name or imported per client. Parameters and gradients are views of two flat vectors, so that loading
weights is one copy, a step of SGD a few vector operations, and the update one subtraction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedq import registry
from fedq.adversarial import Adversary
from fedq.errors import ConfigError, FedqError
from fedq.layout import Layout, Vector
from fedq.models.base import Model, create
from fedq.models.norms import FROZEN
from fedq.models.structure import structure
from fedq.pruning.base import Structure, Support
from fedq.quantization.base import float_twin as computing_in_float
from fedq.quantization.calibration import calibrate
from fedq.quantization.fake import FakeQuantizer
from fedq.random import derive, generator
from fedq.tasks.base import Task
from fedq.tasks.classification import Classification
from fedq.training_config import TrainingConfig

#: Parameters and buffers of the largest network that a configuration may ask for: 1 GiB in float32.
MAX_PARAMETERS = 2**28


class Diverged(FedqError):  # noqa: N818 - reads as what happened
    """Local training left the finite numbers; the client has no update to send."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a client's training gives.

    Attributes:
      delta: (d,) float32, trained weights minus those at the start.
      state: (s,) float32, what quantizers learned and float buffers after training.
      examples: Number of training examples.
      loss: Mean loss over the examples of the last epoch, each before the step that it is part of.
      steps: Number of gradient steps.
    """

    delta: Vector
    state: Vector
    examples: int
    loss: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean loss over some examples, and the task's metric."""

    loss: float
    score: float
    examples: int

    @property
    def accuracy(self) -> float:
        """The score of a classification: the share of correct answers."""
        return self.score


class Trainer:
    """A network, its weights in one flat vector, and the loops over data.

    What quantizers learn (scales, offsets, clips) is trained, but is state and no weight: it goes
    unrounded, weight decay and the proximal term do not act on it, and its gradient counts in no
    norm. Parameters that do not require gradients and integer buffers are no part of the vectors:
    the former stay as built, the latter restart with every :meth:`load`. With one torch thread
    every result is a function of the arguments and the loaded vectors.

    Args:
      model: A network as built by :func:`fedq.models.create`, perhaps prepared by a quantization.
        It is taken over: its parameters and buffers become views of the trainer's vectors.
      task: What its outputs mean.

    Attributes:
      model: The network.
      layout: Names and shapes of the d trainable parameters, in the network's order.
      state_layout: Names and shapes of the state, s numbers: what quantizers learn, and persistent
        float buffers: activation ranges, running statistics of batch normalisation.
      merge_rules: How each tensor of the state is merged over clients; see :mod:`fedq.merging`.
      local_layout: Names and shapes of what a client keeps for itself, weights and state: all in
        modules with a true ``local``, such as local batch normalisations and local heads.

    Raises:
      ConfigError: If a trainable parameter or float buffer is not float32.

    Example:
      >>> trainer = Trainer(nn.Linear(2, 3))
      >>> trainer.load(np.zeros(9, np.float32))
      >>> x, y = np.eye(2, dtype=np.float32), np.array([0, 2])
      >>> trained = trainer.train(x, y, TrainingConfig(learning_rate=1.0), seed=0)
      >>> trained.delta.shape, trained.steps, round(trained.loss, 4)
      ((9,), 1, 1.0986)
      >>> trainer.evaluate(x, y).accuracy
      1.0
    """

    def __init__(self, model: nn.Module, task: Task = Classification()) -> None:  # noqa: B008
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        merge_rules = _merge_rules(model)
        learned = {n: trainable.pop(n) for n in merge_rules if n in trainable}
        parameters = trainable
        persistent = model.state_dict().keys()
        buffers = {n: b for n, b in model.named_buffers() if n in persistent}
        floats = {n: b for n, b in buffers.items() if b.is_floating_point()}
        floats = {**learned, **floats}
        for name, tensor in {**parameters, **floats}.items():
            if tensor.dtype != torch.float32:
                raise ConfigError(f"{name} is {tensor.dtype}; train models in float32")
        self.model, self.task = model, task
        self.layout = Layout.of(parameters)
        self.state_layout = Layout.of(floats)
        self.merge_rules = tuple(merge_rules.get(name, "mean") for name in floats)
        self._parameters = list(parameters.values())
        self._weights, views = _flat_views(self.layout, parameters)
        for parameter, view in zip(self._parameters, views, strict=True):
            parameter.data = view
        self._gradient, self._gradients = _flat_views(self.layout, {})
        self._state, views = _flat_views(self.state_layout, floats)
        for buffer, view in zip(floats.values(), views, strict=True):
            buffer.data = view
        learned_layout = Layout.of(learned)  # the state begins with them
        self._learned = list(learned.values())
        self._learned_values = self._state[: learned_layout.size]
        self._learned_gradient, self._learned_gradients = _flat_views(learned_layout, {})
        self._counters = [
            (b, b.clone()) for n, b in model.named_buffers() if not b.is_floating_point()
        ]
        inside = tuple(f"{n}." for n, m in model.named_modules() if getattr(m, "local", False))
        every = {**parameters, **floats}
        self._local = [t for n, t in every.items() if inside and n.startswith(inside)]
        self.local_layout = Layout.of(
            {n: t for n, t in every.items() if inside and n.startswith(inside)}
        )
        # NumPy's views of the same memory: copies and differences without torch's overhead.
        self._weights_array: Vector = self._weights.numpy()
        self._state_array: Vector = self._state.numpy()
        self._fresh_state = self.state()
        # Batch normalisation cannot train on one example alone.
        normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        self._smallest_batch = 2 if normalised else 1
        self._distillation = float(getattr(model, "distillation", 0.0))
        self._kept: Tensor | None = None

    @cached_property
    def structure(self) -> Structure:
        """What of the network may be pruned."""
        return structure(self.model)

    def load(self, weights: Vector, state: Vector | None = None) -> None:
        """Set the weights, shape (d,), and the state, shape (s,), by default that of a new network.

        Raises:
          ConfigError: If a vector has another shape than its layout.
        """
        if state is None:
            state = self._fresh_state
        for name, vector, own in (
            ("weights", weights, self._weights_array),
            ("state", state, self._state_array),
        ):
            if vector.shape != own.shape:
                raise ConfigError(f"{name} must have shape {own.shape}, not {vector.shape}")
        np.copyto(self._weights_array, weights)
        np.copyto(self._state_array, state)
        self._kept = None
        for counter, start in self._counters:
            counter.copy_(start)

    def prune(self, support: Support) -> None:
        """Set all other weights to zero, and let them stay zero until others are loaded."""
        self._kept = torch.from_numpy(support.kept.astype(np.float32))
        self._weights.mul_(self._kept)

    def local(self) -> Vector:
        """Return a copy of what the client keeps for itself, in the order of its layout."""
        parts = [tensor.detach().flatten() for tensor in self._local]
        values: Vector = torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)
        return values

    def load_local(self, values: Vector) -> None:
        """Set what the client kept for itself, over what was loaded."""
        with torch.no_grad():
            for place, tensor in zip(self.local_layout, self._local, strict=True):
                tensor.copy_(torch.from_numpy(values[place.slice].reshape(place.shape)))

    def weights(self) -> Vector:
        """Return a copy of the weights, (d,) float32."""
        return self._weights_array.copy()

    def state(self) -> Vector:
        """Return a copy of the float buffers, (s,) float32."""
        return self._state_array.copy()

    def train(
        self, x: NDArray[np.float32], y: NDArray[Any], config: TrainingConfig, seed: int
    ) -> Trained:
        """Train from the loaded weights and state, which move to the trained ones.

        A network with batch normalisation skips a last batch of one example, which has no
        statistics: each epoch leaves out another example, as the order is drawn anew.

        Args:
          x: (n, ...) examples, channels first.
          y: (n, ...) truths of the task: (n,) labels, for a classification.
          config: Epochs, batches and steps.
          seed: Decides the order of the examples, and the network's own randomness (dropout).

        Raises:
          ConfigError: If there are no examples, not one truth for each, or one example in a batch
            for a network with batch normalisation.
          Diverged: If the loss, an update or a range is not finite.
        """
        teacher = None
        if self._distillation and len(x):
            teacher = torch.from_numpy(self.outputs(x, float_twin=True))
        return self._fit(x, self.task.truths(x, y), config, seed, self.task.loss, teacher)

    def distil(
        self, x: NDArray[np.float32], taught: NDArray[np.float32], config: TrainingConfig, seed: int
    ) -> Trained:
        """Train towards a teacher's outputs in place of truths; in one torch thread.

        Args:
          x: (n, ...) examples, channels first.
          taught: (n, k) outputs.
          config: As for :meth:`train`, without an attacker.
          seed: As for :meth:`train`.
        """

        def divergence(outputs: Tensor, inputs: Tensor, taught: Tensor) -> Tensor:
            return self.task.divergence(outputs, taught)

        with _one_thread():
            return self._fit(x, taught, config, seed, divergence)

    def calibrate(self, x: NDArray[np.float32]) -> None:
        """Take activation ranges and batch statistics anew from the loaded weights.

        Args:
          x: (n, ...) examples, channels first.
        """
        norms = [
            m
            for m in self.model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, FROZEN)
        ]
        momenta = [m.momentum for m in norms]
        with _one_thread(), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches
            self.model.eval()
            for norm in norms:
                norm.train()
            for i in range(0, len(x), 100):
                self.model(_channels_last(x[i : i + 100]))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            calibrate(self.model, _channels_last(x))

    def outputs(self, x: NDArray[np.float32], *, float_twin: bool = False) -> NDArray[np.float32]:
        """Return what the network says about examples in evaluation mode, (n, k).

        Args:
          x: (n, ...) examples, channels first.
          float_twin: Compute without the quantizers of a prepared network.
        """
        self.model.eval()
        computing = computing_in_float(self.model) if float_twin else nullcontext()
        with computing, torch.no_grad(), _one_thread():
            parts = [self.model(_channels_last(x[i : i + 500])) for i in range(0, len(x), 500)]
        out: NDArray[np.float32] = torch.cat(parts).numpy()
        return out

    def divergence(self, x: NDArray[np.float32], taught: NDArray[np.float32]) -> float:
        """Return how far the network's outputs are from a teacher's, mean over examples."""
        outputs = torch.from_numpy(self.outputs(x))
        return float(self.task.divergence(outputs, torch.from_numpy(taught)))

    def _fit(
        self,
        x: NDArray[np.float32],
        y: NDArray[Any],
        config: TrainingConfig,
        seed: int,
        objective: Callable[[Tensor, Tensor, Tensor], Tensor],
        teacher: Tensor | None = None,
    ) -> Trained:
        least = self._smallest_batch
        if min(len(x), config.batch_size) < least:
            which = "batch_size is 1" if config.batch_size < least else "there is 1 example"
            raise ConfigError(
                f"{which}, but batch normalisation needs {least} in a batch; leave such clients "
                "out, raise batch_size or use a model without it"
            )
        start = self.weights()
        adversary = None
        if config.adversarial_eps:
            if self.task.name != "classification":
                raise ConfigError("adversarial_eps is for classes; this task has none")
            adversary = Adversary.of(config, x, seed)
        steps_of = [_Sgd(config, self._weights, self._gradient)]
        if self._learned:
            plain = dataclasses.replace(config, weight_decay=0, proximal_mu=0, max_grad_norm=0)
            steps_of.append(_Sgd(plain, self._learned_values, self._learned_gradient))
        if not self.model.training:
            self.model.train()
        for parameter, view in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = view
        for parameter, view in zip(self._learned, self._learned_gradients, strict=True):
            parameter.grad = view
        loss, steps = math.nan, 0
        with _seeded(derive(seed, "model")):
            for epoch in range(config.local_epochs):
                order = generator(derive(seed, epoch, "order")).permutation(len(x))
                if len(x) % config.batch_size < least:
                    order = order[: len(x) - len(x) % config.batch_size]
                total, done = 0.0, 0
                for inputs, truths in _batches(x, y, order, config.batch_size):
                    self._gradient.zero_()
                    self._learned_gradient.zero_()
                    if adversary is None:
                        outputs = self.model(inputs)
                        batch_loss = objective(outputs, inputs, truths)
                    else:
                        outputs, batch_loss = adversary.loss(self.model, inputs, truths)
                    if teacher is not None:
                        taught = teacher[order[done : done + len(truths)]]
                        divergence = self.task.divergence(outputs, taught)
                        batch_loss = batch_loss.lerp(divergence, self._distillation)
                        done += len(truths)
                    batch_loss.backward()  # type: ignore[no-untyped-call]
                    if self._kept is not None:
                        self._gradient.mul_(self._kept)
                    for step in steps_of:
                        step()
                    total += batch_loss.item() * len(truths)
                    steps += 1
                loss = total / len(order)
                if not math.isfinite(loss):
                    raise Diverged(
                        f"training diverged in epoch {epoch + 1} of {config.local_epochs}: the loss"
                        f" is {loss}; lower learning_rate or set max_grad_norm"
                    )
        delta, state = self._weights_array - start, self.state()
        if not (np.isfinite(delta).all() and np.isfinite(state).all()):
            raise Diverged(
                f"training diverged in epoch {config.local_epochs} of {config.local_epochs}: loss"
                f" {loss:.3g}, weights or ranges not finite; lower learning_rate or set"
                " max_grad_norm"
            )
        return Trained(delta, state, len(x), loss, steps)

    def evaluate(
        self,
        x: NDArray[np.float32],
        y: NDArray[Any],
        batch_size: int = 500,
        *,
        float_twin: bool = False,
    ) -> Evaluation:
        """Return loss and the task's metric with the present weights; nothing is changed.

        Args:
          x: (n, ...) examples, channels first.
          y: (n, ...) truths of the task.
          batch_size: Examples per forward pass; bounds memory.
          float_twin: Compute without the quantizers of a prepared network.

        Raises:
          ConfigError: If there are no examples, or not one truth for each.
        """
        y = self.task.truths(x, y)
        loss, judged = 0.0, []
        self.model.eval()
        with computing_in_float(self.model) if float_twin else nullcontext(), torch.no_grad():
            for inputs, truths in _batches(x, y, np.arange(len(x)), batch_size):
                outputs = self.model(inputs)
                loss += self.task.loss(outputs, inputs, truths, "sum").item()
                judged.append(self.task.judge(outputs, inputs, truths))
        return Evaluation(loss / len(x), self.task.score(torch.cat(judged).numpy(), y), len(x))


def trainer_for(
    model: object,
    quantization: object,
    input_shape: Sequence[int],
    classes: int,
    task: object = Classification.name,
    *,
    seed: int = 0,
    variant: int = 0,
) -> Trainer:
    """Return the trainer of a model given by its configuration, as it stands in a message.

    Server and clients call this with the same arguments, so that they share the layout; weights are
    drawn from ``seed`` until others are loaded. ``classes`` is the number of outputs, whatever the
    task; ``variant`` is one of the quantization's.

    Raises:
      ConfigError: If a name or option is unknown, the model does not fit the shape, or has more
        than ``MAX_PARAMETERS``; this is seen before memory is spent on it.
    """
    chosen = registry.from_config("model", model)
    quantizer = registry.from_config("quantization", quantization)
    shape = registry.convert(input_shape, tuple[int, ...], "input_shape")
    outputs = registry.convert(classes, int, "classes")
    _check_size(chosen, shape, outputs)
    network = quantizer.prepare(create(chosen, shape, outputs, seed), variant)
    return Trainer(network, registry.from_config("task", task))


def _merge_rules(model: nn.Module) -> dict[str, str]:
    """Return the merge rule of what quantizers learn and keep, by name; what is learned first."""
    rules: dict[str, str] = {}
    for wanted in ("named_parameters", "named_buffers"):
        for prefix, module in model.named_modules():
            if isinstance(module, FakeQuantizer):
                for name, tensor in getattr(module, wanted)(recurse=False):
                    if tensor.is_floating_point():
                        rules[f"{prefix}.{name}".lstrip(".")] = module.merge[name]
    return rules


def _check_size(model: Model, input_shape: tuple[int, ...], classes: int) -> None:
    """Refuse a network that is too large, from its shapes alone."""
    many = "too many"
    try:
        with torch.device("meta"):
            network = create(model, input_shape, classes)
        size = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
        if size <= MAX_PARAMETERS:
            return
        many = f"{size:,}"
    except ConfigError:
        raise
    except Exception as error:  # torch has no error of its own for sizes beyond 64 bits
        if "overflow" not in str(error).lower():
            return  # a plug-in that computes while it builds: the real network will tell
    raise ConfigError(
        f"model={model.name} would have {many} parameters and buffers; at most {MAX_PARAMETERS:,} "
        "(fedq.training.MAX_PARAMETERS) are built: choose smaller options"
    )


class _Sgd:
    """The steps of one client's SGD on flat vectors; see :class:`TrainingConfig`."""

    def __init__(self, config: TrainingConfig, weights: Tensor, gradient: Tensor) -> None:
        self.config, self.weights, self.gradient = config, weights, gradient
        self.start = weights.clone() if config.proximal_mu else None
        self.velocity: Tensor | None = None

    def __call__(self) -> None:
        config, gradient = self.config, self.gradient
        if self.start is not None:
            gradient.add_(self.weights, alpha=config.proximal_mu)
            gradient.sub_(self.start, alpha=config.proximal_mu)
        if config.max_grad_norm:
            norm = float(torch.linalg.vector_norm(gradient))
            if norm > config.max_grad_norm:
                gradient.mul_(config.max_grad_norm / norm)
        if config.weight_decay:
            gradient.add_(self.weights, alpha=config.weight_decay)
        if config.momentum:
            if self.velocity is None:
                self.velocity = gradient.clone()
            else:
                self.velocity.mul_(config.momentum).add_(gradient)
            gradient = self.velocity
        self.weights.sub_(gradient, alpha=config.learning_rate)


def _flat_views(layout: Layout, values: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a flat vector and its views by tensor, holding ``values`` or zeros."""
    flat = torch.zeros(layout.size)
    views = [flat[tensor.slice].view(tensor.shape) for tensor in layout]
    for tensor, view in zip(layout, views, strict=True):
        if tensor.name in values:
            view.copy_(values[tensor.name].detach())
    return flat, views


def _batches(
    x: NDArray[np.float32], y: NDArray[Any], order: NDArray[np.int64], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gather examples in an order, ``batch_size`` at a time."""
    for i in range(0, len(order), batch_size):
        chosen = order[i : i + batch_size]
        inputs = x.take(chosen, axis=0).astype(np.float32, copy=False)
        yield _channels_last(inputs), torch.from_numpy(y.take(chosen, axis=0))


def _channels_last(x: NDArray[np.float32]) -> Tensor:
    """Return a tensor over a contiguous batch; images in channels-last order.

    Convolutions and pooling take that order from their input, which saves a quarter of a step on a
    CPU; weights stay in row-major order. One channel needs its strides spelled out, as torch takes
    either order for contiguous there.
    """
    if x.ndim != 4:
        return torch.from_numpy(x)
    n, channels, height, width = x.shape
    if channels == 1:
        pixels = x.reshape(n, height, width, 1)
    else:
        pixels = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute as a client does, so that the result does not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, which dropout draws from, and put it back afterwards."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
