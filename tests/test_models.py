"""Laws of every registered model, and the sizes that the documentation promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import fedq
from fedq.errors import ConfigError
from fedq.models import count_parameters, create
from fedq.registry import table, to_config

SHAPES = [(1, 28, 28), (3, 8, 11), (2, 64, 40), (6, 128), (3, 8), (5,)]
CASES = [(name, options) for name, cls in table("model").items() for options in cls.examples]  # type: ignore[attr-defined]


def _networks(name: str, options: dict[str, Any]) -> list[tuple[tuple[int, ...], nn.Module]]:
    model = fedq.build("model", name, **options)
    found = []
    for shape in SHAPES:
        try:
            found.append((shape, create(model, shape, 4, seed=1)))
        except ConfigError:
            continue
    return found


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gives_finite_logits_and_is_traceable(name: str, options: dict[str, Any]) -> None:
    networks = _networks(name, options)
    assert networks
    for shape, network in networks:
        x = torch.rand(3, *shape)
        logits = network(x)
        assert logits.shape == (3, 4)
        assert torch.isfinite(logits).all()
        network.eval()
        assert torch.equal(fx.symbolic_trace(network)(x), network(x))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_holds_float32_parameters_and_no_hidden_state(name: str, options: dict[str, Any]) -> None:
    for _, network in _networks(name, options):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        of_norms = [
            buffer
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers()
        ]
        assert [id(b) for b in network.buffers()] == [id(b) for b in of_norms]
        assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_examples_do_not_see_each_other(name: str, options: dict[str, Any]) -> None:
    for shape, network in _networks(name, options):
        x = torch.rand(4, *shape)
        network.eval()  # batch statistics couple examples in training
        torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_configuration_round_trips(name: str, options: dict[str, Any]) -> None:
    model = fedq.build("model", name, **options)
    config = to_config(model)
    assert fedq.registry.from_config("model", config) == model


def _flat(network: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in network.parameters()])


def test_the_seed_alone_decides_the_weights() -> None:
    model = fedq.build("model", "small_cnn")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = _flat(create(model, (1, 8, 8), 3, seed=0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    np.testing.assert_array_equal(first, _flat(create(model, (1, 8, 8), 3, seed=0)))
    assert not np.array_equal(first, _flat(create(model, (1, 8, 8), 3, seed=1)))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("mnist_cnn", (1, 28, 28), 10, 1_199_882),
        ("small_cnn", (1, 28, 28), 10, 55_338),
        ("ds_cnn", (1, 49, 10), 12, 23_180),
        ("mobilenet", (3, 96, 96), 2, 213_586),
        ("autoencoder", (640,), 640, 267_928),
        ("tcn", (1, 168), 24, 9_128),
        ("mlp", (784,), 10, 50_890),
        ("imu_cnn", (6, 128), 6, 32_230),
        ("auto", (1, 28, 28), 10, 55_338),
        ("auto", (6, 128), 6, 32_230),
        ("auto", (784,), 10, 50_890),
        ("auto", (1, 4, 4), 10, 64 * 17 + 650),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, ...], classes: int, parameters: int) -> None:
    assert count_parameters(create(fedq.build("model", name), shape, classes)) == parameters


@pytest.mark.parametrize("extent", [28, 29, 32, 45, 63, 64, 96, 224])
def test_large_images_are_averaged_to_seven_by_seven(extent: int) -> None:
    network = create(fedq.build("model", "small_cnn", width=2), (1, extent, 28), 3)
    assert network.get_submodule("fc1").in_features == 4 * 7 * 7
    assert network(torch.rand(1, 1, extent, 28)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "shape", "hint"),
    [
        ("small_cnn", (6, 128), "takes images"),
        ("mnist_cnn", (784,), "takes images"),
        ("imu_cnn", (1, 28, 28), "takes series"),
        ("small_cnn", (1, 7, 28), "at least 8"),
        ("mnist_cnn", (1, 28, 7), "at least 8"),
        ("imu_cnn", (6, 7), "at least 8"),
        ("tcn", (6, 1), "at least 2"),
        ("tcn", (6,), "takes series"),
        ("mobilenet", (1, 7, 7), "at least 8"),
        ("mlp", (), "non-empty"),
        ("mlp", (3, 0), "non-empty"),
    ],
)
def test_refuses_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        create(fedq.build("model", name), shape, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("small_cnn", {"width": 0}),
        ("mlp", {"hidden": (4, 0)}),
        ("imu_cnn", {"kernel": 4}),
        ("imu_cnn", {"width": 0}),
        ("tcn", {"kernel": 1}),
        ("tcn", {"width": 0}),
        ("mobilenet", {"multiplier": 0.0}),
        ("autoencoder", {"code": 0}),
        ("mnist_cnn", {"dropout": 1.0}),
    ],
)
def test_refuses_values_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\."):
        fedq.build("model", name, **options)


def test_refuses_a_network_without_outputs() -> None:
    with pytest.raises(ConfigError, match="1 output"):
        create(fedq.build("model", "mlp"), (3,), 0)


def test_a_low_rank_model_of_full_rank_is_the_model() -> None:
    """Where factors save nothing layers stay; at high rank their product is the layer."""
    inner = fedq.build("model", "small_cnn", width=8)
    exact = create(inner, (1, 12, 12), 4, seed=1)
    near = create(fedq.build("model", "low_rank", inner=inner, share=0.85), (1, 12, 12), 4, seed=1)
    far = create(fedq.build("model", "low_rank", inner=inner, share=0.1), (1, 12, 12), 4, seed=1)
    assert count_parameters(far) < count_parameters(near) < count_parameters(exact)
    x = torch.rand(64, 1, 12, 12)
    errors = [(network(x) - exact(x)).square().mean().item() for network in (near, far)]
    assert errors[0] < errors[1] < exact(x).var().item()


def test_low_rank_layers_are_the_best_of_their_rank() -> None:
    inner = fedq.build("model", "mlp", hidden=(16, 12))
    matrix = create(inner, (8,), 3).fc2.weight.detach()
    factored = create(fedq.build("model", "low_rank", inner=inner, share=0.25), (8,), 3).fc2
    product = factored[1].weight @ factored[0].weight
    singular = torch.linalg.svdvals(matrix)
    error = (matrix - product).square().sum()
    torch.testing.assert_close(error, singular[3:].square().sum(), rtol=1e-4, atol=1e-6)
    assert factored[1].bias is not None


@pytest.mark.parametrize(("length", "kernel"), [(16, 2), (24, 3), (168, 3)])
def test_a_tcn_sees_the_whole_series_and_nothing_after_a_step(length: int, kernel: int) -> None:
    network = create(fedq.build("model", "tcn", width=8, kernel=kernel), (1, length), 2, seed=1)
    x = torch.randn(1, 1, length, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None
    assert (x.grad[0, 0] != 0).float().mean() > 0.5  # ReLUs may close some ways
    before = network.get_submodule("blocks")(x)
    changed = x.detach().clone()
    changed[..., length // 2] += 1
    after = network.get_submodule("blocks")(changed)
    assert torch.equal(before[..., : length // 2], after[..., : length // 2])
    assert not torch.equal(before, after)
