"""Laws of local training: equal to torch's own loop, a function of its arguments, and it learns."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import fedq
from fedq import training
from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.models import create
from fedq.models.base import Model
from fedq.quantization import float_twin
from fedq.random import derive, generator
from fedq.training import Diverged, Trainer, trainer_for
from fedq.training_config import TrainingConfig

Data = tuple[NDArray[np.float32], NDArray[np.int64]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class BatchNormed(nn.Module):
    """A plug-in model with running statistics, counters, a frozen parameter and dropout."""

    def __init__(self, momentum: float | None = 0.1, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(4, momentum=momentum)
        self.offset = nn.Parameter(torch.full((4, 1, 1), 0.5), requires_grad=False)
        self.dropout = nn.Dropout(0.25)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.conv(x)) + self.offset)
        return self.fc(self.dropout(x.mean((2, 3))))


def _images(n: int = 37, channels: int = 1, classes: int = 3) -> Data:
    random = np.random.default_rng(0)
    x = random.standard_normal((n, channels, 9, 8), dtype=np.float32)
    return x, random.integers(0, classes, n)


def _model(name: str = "small_cnn", channels: int = 1) -> nn.Module:
    if name == "batch_normed":
        torch.manual_seed(0)
        return BatchNormed(channels=channels)
    options = {} if name == "mlp" else {"width": 4}
    return create(fedq.build("model", name, **options), (channels, 9, 8), 3, seed=0)


def _prepared(name: str = "small_cnn", **options: Any) -> nn.Module:
    prepared = fedq.build("quantization", "uniform", **options).prepare(_model(name))
    assert isinstance(prepared, nn.Module)
    return prepared


def _flat(model: nn.Module) -> Vector:
    parts = [p.detach().numpy().reshape(-1) for p in model.parameters() if p.requires_grad]
    return np.concatenate(parts)


# --- equal to the textbook loop ---------------------------------------------------------------

CONFIGS = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"max_grad_norm": 0.5},
    {"proximal_mu": 1.0},
    {"momentum": 0.5, "weight_decay": 0.01, "max_grad_norm": 1.0, "proximal_mu": 0.1},
]


def _textbook(model: nn.Module, data: Data, config: TrainingConfig, seed: int) -> Vector:
    """FedProx by torch's own optimiser, named gradients and the objective as it is written."""
    x, y = torch.from_numpy(data[0]), torch.from_numpy(data[1])
    start, anchor = _flat(model), [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    model.train()
    for epoch in range(config.local_epochs):
        order = generator(derive(seed, epoch, "order")).permutation(len(x))
        for batch in torch.from_numpy(order).split(config.batch_size):
            optimizer.zero_grad()
            objective = functional.cross_entropy(model(x[batch]), y[batch])
            for parameter, old in zip(model.parameters(), anchor, strict=True):
                objective = objective + config.proximal_mu / 2 * (parameter - old).square().sum()
            objective.backward()
            if config.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
    return _flat(model) - start


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: "+".join(options) or "sgd")
def test_equals_the_textbook_loop(options: dict[str, float], channels: int) -> None:
    config = TrainingConfig.from_config(
        {"local_epochs": 2, "batch_size": 8, "learning_rate": 0.1} | options
    )
    data = _images(channels=channels)
    trained = Trainer(_model(channels=channels)).train(*data, config, seed=5)
    expected = _textbook(_model(channels=channels), data, config, seed=5)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(trained.delta, expected, rtol=0, atol=1e-6)
    assert trained.steps == 2 * math.ceil(37 / 8)
    assert trained.examples == 37


def test_proximal_term_has_its_closed_form_on_a_flat_loss() -> None:
    """With inputs of zero the bias alone learns; a strong proximal term holds it back."""
    x, y = np.zeros((8, 3), np.float32), np.zeros(8, np.int64)
    deltas = []
    for mu in (0.0, 4.0):
        trainer = Trainer(nn.Linear(3, 2))
        trainer.load(np.zeros(8, np.float32))
        config = TrainingConfig(batch_size=4, learning_rate=0.1, proximal_mu=mu)
        deltas.append(trainer.train(x, y, config, seed=0).delta)
    first = 0.1 * 0.5  # softmax of zeros is one half; the proximal gradient is zero at the start
    second = 0.1 / (1 + math.exp(2 * first))
    assert deltas[0][6] == pytest.approx(first + second, rel=1e-5)
    assert deltas[1][6] == pytest.approx(first + second - 0.1 * 4.0 * first, rel=1e-5)


def test_reported_loss_is_the_mean_before_each_step() -> None:
    x, y = _images()
    trainer = Trainer(_model())
    config = TrainingConfig(learning_rate=0.0, batch_size=5)
    trained = trainer.train(x, y, config, seed=0)
    assert trained.loss == pytest.approx(trainer.evaluate(x, y).loss, rel=1e-5)
    assert not trained.delta.any()


# --- a function of its arguments --------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_cnn", "mlp", "batch_normed"])
@pytest.mark.parametrize("quantized", [False, True])
def test_same_arguments_same_update(name: str, quantized: bool) -> None:
    data = _images()
    config = TrainingConfig(local_epochs=2, batch_size=8, momentum=0.9)
    trainer = Trainer(_prepared(name) if quantized else _model(name))
    weights, state = trainer.weights(), trainer.state()
    first = trainer.train(*data, config, seed=1)
    np.testing.assert_array_equal(trainer.weights() - weights, first.delta)
    np.testing.assert_array_equal(trainer.state(), first.state)

    other = trainer.train(*data, config, seed=2)  # leaves traces, if any can be left
    trainer.evaluate(*data)
    torch.manual_seed(99)
    trainer.load(weights, state)
    again = trainer.train(*data, config, seed=1)
    np.testing.assert_array_equal(again.delta, first.delta)
    np.testing.assert_array_equal(again.state, first.state)
    assert again.loss == first.loss
    assert not np.array_equal(other.delta, first.delta)

    fresh = Trainer(_prepared(name) if quantized else _model(name))
    np.testing.assert_array_equal(fresh.train(*data, config, seed=1).delta, first.delta)


class FeaturesNormed(nn.Module):
    """Batch normalisation over examples alone: one example has no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(72, 3)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x.flatten(1)))


@pytest.mark.parametrize("n", [8, 9, 10, 17])
@pytest.mark.parametrize("quantize", [False, True])
def test_batch_norm_skips_a_last_batch_of_one(n: int, quantize: bool) -> None:
    torch.manual_seed(0)
    network: nn.Module = FeaturesNormed()
    if quantize:
        network = fedq.build("quantization", "uniform").prepare(network)
    x, y = _images(n)
    config = TrainingConfig(local_epochs=2, batch_size=8, learning_rate=0.0)
    trained = Trainer(network).train(x, y, config, seed=3)
    assert trained.steps == 2 * (n // 8 + (n % 8 > 1))
    assert trained.examples == n
    torch.manual_seed(0)
    plain = FeaturesNormed()
    order = generator(derive(3, 1, "order")).permutation(n)
    if n % 8 == 1:
        order = order[:-1]
    total = 0.0
    for batch in np.split(order, range(8, len(order), 8)):
        logits = plain(torch.from_numpy(x[batch]))
        total += functional.cross_entropy(logits, torch.from_numpy(y[batch])).item() * len(batch)
    if not quantize:
        assert trained.loss == pytest.approx(total / len(order), rel=1e-6)


def test_other_networks_train_on_a_last_batch_of_one() -> None:
    trained = Trainer(_model()).train(*_images(9), TrainingConfig(batch_size=8), seed=0)
    assert trained.steps == 2
    assert Trainer(_model()).train(*_images(1), TrainingConfig(), seed=0).steps == 1


def test_batch_norm_needs_two_examples() -> None:
    trainer = Trainer(_model("batch_normed"))
    before = trainer.weights()
    with pytest.raises(ConfigError, match="there is 1 example, but batch normalisation needs 2"):
        trainer.train(*_images(1), TrainingConfig(), seed=0)
    with pytest.raises(ConfigError, match="batch_size is 1"):
        trainer.train(*_images(9), TrainingConfig(batch_size=1), seed=0)
    np.testing.assert_array_equal(trainer.weights(), before)


def test_cumulative_batch_norm_restarts_with_load() -> None:
    trainer = Trainer(BatchNormed(momentum=None))
    weights, state = trainer.weights(), trainer.state()
    results = []
    for _ in range(2):
        trainer.load(weights, state)
        results.append(trainer.train(*_images(), TrainingConfig(), seed=0).state)
    np.testing.assert_array_equal(*results)


def test_torchs_global_generator_is_left_alone() -> None:
    trainer = Trainer(_model("batch_normed"))
    before = torch.get_rng_state()
    trainer.train(*_images(), TrainingConfig(), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_data_may_be_read_only_strided_or_narrow() -> None:
    x, y = _images(channels=2)
    expected = Trainer(_model(channels=2)).train(x, y, TrainingConfig(), seed=0).delta
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    last.flags.writeable = y.flags.writeable = False
    trainer = Trainer(_model(channels=2))
    trained = trainer.train(last, y.astype(np.uint8), TrainingConfig(), seed=0)  # type: ignore[arg-type]
    np.testing.assert_array_equal(trained.delta, expected)
    assert trainer.evaluate(last, y) == trainer.evaluate(x, y)


# --- vectors ----------------------------------------------------------------------------------


def test_vectors_follow_the_networks_order() -> None:
    model = _model("batch_normed")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    trainer = Trainer(model)
    assert list(trainer.layout.names) == names
    assert "offset" not in names
    assert trainer.state_layout.names == ("bn.running_mean", "bn.running_var")
    tensors = trainer.layout.unflatten(np.arange(trainer.layout.size, dtype=np.float32))
    trainer.load(trainer.layout.flatten(tensors), np.arange(8, dtype=np.float32))
    for name, value in tensors.items():
        np.testing.assert_array_equal(model.get_parameter(name).detach().numpy(), value)
    np.testing.assert_array_equal(model.get_buffer("bn.running_var").numpy(), [4, 5, 6, 7])


def test_batch_norm_statistics_are_trained_state() -> None:
    trainer = Trainer(_model("batch_normed"))
    start = trainer.state()
    trained = trainer.train(*_images(), TrainingConfig(), seed=0)
    statistics = trainer.state_layout.unflatten(trained.state)
    assert (trained.state != start).all()
    np.testing.assert_array_equal(
        statistics["bn.running_mean"], trainer.model.get_buffer("bn.running_mean").numpy()
    )


def test_loading_weights_alone_makes_the_state_new() -> None:
    trainer = Trainer(_prepared("batch_normed"))
    weights, state = trainer.weights(), trainer.state()
    trainer.train(*_images(), TrainingConfig(), seed=0)
    assert not np.array_equal(trainer.state(), state)
    trainer.load(weights)
    np.testing.assert_array_equal(trainer.state(), state)


def test_quantizer_ranges_are_trained_state() -> None:
    trainer = Trainer(_prepared())
    assert trainer.layout == Trainer(_model()).layout
    assert all(n.endswith((".lo", ".hi")) for n in trainer.state_layout.names)
    assert trainer.state_layout.size == 10
    assert not trainer.state().any()
    ranges = trainer.state_layout.unflatten(
        trainer.train(*_images(), TrainingConfig(), seed=0).state
    )
    for name in trainer.state_layout.names[::2]:
        assert ranges[name] < ranges[name.removesuffix("lo") + "hi"]


def test_a_prepared_network_shares_its_weights_with_the_float_one() -> None:
    model = _model()
    trainer = Trainer(fedq.build("quantization", "uniform").prepare(model))
    trainer.train(*_images(), TrainingConfig(), seed=0)
    np.testing.assert_array_equal(_flat(model), trainer.weights())


@pytest.mark.parametrize(
    ("weights", "state"), [((3,), (0,)), ((9,), (1,)), ((3, 3), (0,))], ids=str
)
def test_vectors_of_another_shape_are_refused(
    weights: tuple[int, ...], state: tuple[int, ...]
) -> None:
    trainer = Trainer(nn.Linear(2, 3))
    with pytest.raises(ConfigError, match="must have shape"):
        trainer.load(np.zeros(weights, np.float32), np.zeros(state, np.float32))


def test_other_types_than_float32_are_refused() -> None:
    with pytest.raises(ConfigError, match="float32"):
        Trainer(nn.Linear(2, 3).double())


# --- evaluation -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 10, 500])
def test_evaluation_is_the_mean_over_examples(batch_size: int) -> None:
    x, y = _images()
    model = _model()
    logits = model(torch.from_numpy(x))
    evaluation = Trainer(model).evaluate(x, y, batch_size)
    expected = functional.cross_entropy(logits, torch.from_numpy(y)).item()
    assert evaluation.loss == pytest.approx(expected, rel=1e-5)
    assert evaluation.accuracy == (logits.argmax(1).numpy() == y).mean()
    assert evaluation.examples == 37


@pytest.mark.parametrize("name", ["small_cnn", "batch_normed"])
def test_evaluation_changes_nothing_and_has_a_float_twin(name: str) -> None:
    x, y = _images()
    trainer = Trainer(_prepared(name, weight_bits=2, first_last_bits=2))
    trainer.train(x, y, TrainingConfig(local_epochs=2), seed=0)
    weights, state = trainer.weights(), trainer.state()
    twin = Trainer(_model(name))
    twin.load(weights, state[: twin.state_layout.size])
    if name == "batch_normed":
        assert trainer.state_layout.names[:2] == twin.state_layout.names

    quantized = trainer.evaluate(x, y)
    assert trainer.evaluate(x, y, float_twin=True) == twin.evaluate(x, y)
    assert trainer.evaluate(x, y) == quantized != twin.evaluate(x, y)
    np.testing.assert_array_equal(trainer.weights(), weights)
    np.testing.assert_array_equal(trainer.state(), state)


# --- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_divergence_names_epoch_and_loss(quantized: bool) -> None:
    x, y = _images()
    trainer = Trainer(_prepared() if quantized else _model())
    with pytest.raises(Diverged, match=r"in epoch \d of 3: the loss is (nan|inf)"):
        trainer.train(x * 1e18, y, TrainingConfig(local_epochs=3, learning_rate=1e10), seed=0)


def test_a_last_step_to_infinity_is_found() -> None:
    x, y = np.full((2, 3), 1e30, np.float32), np.array([0, 1])
    trainer = Trainer(nn.Linear(3, 2))
    trainer.load(np.zeros(8, np.float32))
    with pytest.raises(Diverged, match=r"in epoch 1 of 1: loss 0\.693"):
        trainer.train(x, np.zeros_like(y), TrainingConfig(learning_rate=1e30), seed=0)


@pytest.mark.parametrize(("n", "labels"), [(0, 0), (3, 2), (3, 4)])
def test_examples_without_labels_are_refused(n: int, labels: int) -> None:
    trainer = Trainer(nn.Linear(2, 3))
    x, y = np.zeros((n, 2), np.float32), np.zeros(labels, np.int64)
    with pytest.raises(ConfigError, match="one label"):
        trainer.train(x, y, TrainingConfig(), seed=0)
    with pytest.raises(ConfigError, match="one label"):
        trainer.evaluate(x, y)


# --- configuration ----------------------------------------------------------------------------


def test_configuration_round_trips_and_is_strict() -> None:
    config = TrainingConfig(momentum=0.9, local_epochs=3)
    assert TrainingConfig.from_config(config.to_config()) == config
    attacked = dataclasses.replace(config, adversarial_eps=0.1)
    assert set(attacked.to_config()) == {f.name for f in dataclasses.fields(config)}
    assert TrainingConfig.from_config({"momentum": 0}).momentum == 0.0


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"momentun": 0.9}, "did you mean 'momentum'"),
        ({"batch_size": 8.0}, "batch_size must be int"),
        ({"batch_size": "8"}, "batch_size must be int"),
        ({"local_epochs": True}, "local_epochs must be int"),
        ({"learning_rate": "0.1"}, "learning_rate must be float"),
        ({"local_epochs": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"learning_rate": -0.1}, "not negative"),
        ({"learning_rate": math.nan}, "finite"),
        ({"proximal_mu": math.inf}, "finite"),
        ({"weight_decay": -1}, "not negative"),
        ({"max_grad_norm": -1}, "not negative"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
    ],
)
def test_wrong_options_are_refused(config: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        TrainingConfig.from_config(config)


# --- it learns --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Data, Data]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.data / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = generator(0).permutation(len(x))
    x, y = x[order], bunch.target[order].astype(np.int64)
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


@pytest.mark.parametrize(
    ("model", "quantization"),
    [
        ("small_cnn", {"name": "none"}),
        ("small_cnn", {"name": "uniform"}),
        ("small_cnn", {"name": "uniform", "weight_bits": 4, "activation_bits": 4}),
        ("mlp", {"name": "uniform"}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_learns_digits(digits: tuple[Data, Data], model: str, quantization: dict[str, Any]) -> None:
    train, test = digits
    network = create(fedq.build("model", model), (1, 8, 8), 10, seed=0)
    trainer = Trainer(fedq.registry.from_config("quantization", quantization).prepare(network))
    config = TrainingConfig(local_epochs=5, learning_rate=0.1, momentum=0.5)
    before = trainer.evaluate(*test)
    trained = trainer.train(*train, config, seed=0)
    after = trainer.evaluate(*test)
    assert before.accuracy < 0.4
    assert after.accuracy > 0.85
    assert trained.loss < after.loss + 0.5 < before.loss
    twin = trainer.evaluate(*test, float_twin=True)
    assert abs(twin.accuracy - after.accuracy) < 0.05


def test_a_deployed_copy_scores_as_the_trainer_does(digits: tuple[Data, Data]) -> None:
    """What is reported is what a fresh process gets from the two vectors."""
    train, test = digits
    uniform = fedq.build("quantization", "uniform", weight_bits=4)
    trainer = Trainer(uniform.prepare(create(fedq.build("model", "mlp"), (1, 8, 8), 10, seed=0)))
    trainer.train(*train, TrainingConfig(learning_rate=0.1), seed=0)
    device = Trainer(uniform.prepare(create(fedq.build("model", "mlp"), (1, 8, 8), 10, seed=7)))
    device.load(trainer.weights(), trainer.state())
    assert device.evaluate(*test) == trainer.evaluate(*test)
    duplicate = copy.deepcopy(device.model).eval()
    x = torch.from_numpy(test[0])
    with float_twin(duplicate), torch.no_grad():
        assert not torch.equal(duplicate(x), device.model(x))


# --- what a peer may ask for ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "input_shape", "classes"),
    [
        ({"name": "mlp", "hidden": [10**9]}, (28, 28), 10),
        ({"name": "mlp", "hidden": [2**40, 2**40]}, (4,), 10),
        ({"name": "mlp", "hidden": [10**30]}, (4,), 10),
        ({"name": "mlp"}, (2**31, 2**31), 10),
        ({"name": "mlp"}, (4,), 2**40),
        ({"name": "small_cnn", "width": 2**20}, (1, 28, 28), 10),
    ],
)
def test_networks_that_are_too_large_are_refused_before_memory_is_spent(
    model: dict[str, Any], input_shape: tuple[int, ...], classes: int
) -> None:
    with pytest.raises(ConfigError, match="268,435,456") as error:
        trainer_for(model, "uniform", input_shape, classes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("input_shape", "classes"),
    [("28", 10), ((28, "28"), 10), ((28.0,), 10), (28, 10), ((4,), "10"), ((4,), None), ((), 10)],
)
def test_shapes_of_other_types_are_refused(input_shape: Any, classes: Any) -> None:
    with pytest.raises(ConfigError):
        trainer_for("mlp", "none", input_shape, classes)


def test_the_limit_on_size_counts_parameters_and_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MAX_PARAMETERS", 15)
    spec = ({"name": "mlp", "hidden": []}, "none", (4,))
    before = torch.get_rng_state()
    assert trainer_for(*spec, 3).layout.size == 15
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="would have 20 parameters"):
        trainer_for(*spec, 4)


def test_a_plug_in_that_computes_while_it_builds_is_built() -> None:
    class Computing(Model):
        name = "computing"

        def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
            layer = nn.Linear(input_shape[0], classes)
            layer.weight.data /= layer.weight.abs().max().item()  # not known without memory
            return layer

    training._check_size(Computing(), (4,), 3)
