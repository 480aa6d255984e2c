"""Pruning: laws of masks and of cutting channels, and federations that agree on a mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fedq
from fedq import config, registry
from fedq.errors import ConfigError
from fedq.layout import Layout
from fedq.models import create
from fedq.models.low_rank import factorise
from fedq.models.structure import structure, without_empty_channels
from fedq.pruning import Group, Structure
from fedq.pruning.magnitude import Magnitude
from fedq.simulation import run_experiment
from fedq.training import Trainer

LAYOUT = Layout(("a.weight", "a.bias", "b.weight", "c.weight"), ((6, 4), (6,), (5, 12), (2, 5)))
GROUP = Group("a", ("a.weight", "a.bias"), (("b.weight", 2),))
STRUCTURE = Structure(("b.weight",), (GROUP,))
ZOO = [
    *(("small_cnn", (1, 12, 12)), ("mnist_cnn", (1, 12, 12)), ("mlp", (20,))),
    *(("ds_cnn", (1, 16, 16)), ("resnet8", (3, 16, 16)), ("mobilenet", (3, 32, 32))),
    *(("imu_cnn", (3, 32)), ("tcn", (2, 16)), ("autoencoder", (30,))),
]


def _vector(seed: int) -> Any:
    return np.random.default_rng(seed).integers(-3, 4, LAYOUT.size).astype(np.float32)


@pytest.mark.parametrize("unit", ["weight", "channel"])
@given(seed=st.integers(0, 2**32), sparsity=st.floats(0, 0.99))
def test_masks_are_fixed_points_with_exact_counts(unit: Any, seed: int, sparsity: float) -> None:
    pruning, x = Magnitude(sparsity=sparsity, unit=unit, end=1), _vector(seed)
    support = pruning.support(LAYOUT, STRUCTURE, x, 1)
    if support is None:
        assert sparsity == 0
        return
    again = pruning.support(LAYOUT, STRUCTURE, support.masked(x), 1)
    assert again is not None
    np.testing.assert_array_equal(support.kept, again.kept)
    parts = {t.name: support.kept[t.slice].reshape(t.shape) for t in LAYOUT}
    if unit == "weight":
        assert (~parts["b.weight"]).sum() == int(sparsity * 60)
        values = np.abs(x[LAYOUT.tensors[2].slice].reshape(5, 12))
        left, gone = values[parts["b.weight"]], values[~parts["b.weight"]]
        assert not gone.size or gone.max() <= left.min()
        assert all(parts[name].all() for name in LAYOUT.names if name != "b.weight")
    else:
        assert (~parts["a.bias"]).sum() == int(sparsity * 6)
        assert (parts["a.weight"] == parts["a.bias"][:, None]).all()
        assert (parts["b.weight"] == np.repeat(parts["a.bias"], 2)).all()
        assert support.layout.shapes[0] == (parts["a.bias"].sum(), 4)  # rows stay rows
    assert support.layout.size == support.kept.sum()
    np.testing.assert_array_equal(support.scatter(support.gather(x)), support.masked(x))


def test_the_share_of_zeros_rises_and_ends_exactly() -> None:
    pruning = Magnitude(sparsity=0.9, begin=3, end=10)
    shares = [pruning.sparsity_at(t) for t in range(15)]
    assert shares == sorted(shares)
    assert shares[3] == 0 < shares[4]
    assert set(shares[10:]) == {0.9}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("name", "shape"), ZOO)
def test_a_network_without_its_empty_channels_computes_the_same(
    name: str, shape: tuple[int, ...], quantized: bool
) -> None:
    network = create(fedq.build("model", name), shape, 4).eval()
    if quantized:
        lsq = {"name": "lsq", "bits": 4}
        network = fedq.build("quantization", "qat", weights=lsq).prepare(network)
    for module in network.modules():  # other than as built: statistics and shifts that are not 0
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.bias)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    network.train()(x)  # ranges
    network.eval()
    trainer = Trainer(network)
    found = structure(network)
    pruning = Magnitude(sparsity=0.5, unit="channel", end=1)
    support = pruning.support(trainer.layout, found, trainer.weights(), 1)
    assert support is not None
    trainer.prune(support)
    with torch.no_grad():
        before = network(x)
        size = sum(p.numel() for p in network.parameters())
        cut = without_empty_channels(network)
        after = network(x)
    assert set(cut) == {g.layer for g in found.groups}
    assert sum(p.numel() for p in network.parameters()) < size
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert without_empty_channels(network) == {}


# --- federations --------------------------------------------------------------------------------

SMALL = (
    *("data=digits", "model=mlp", "model.hidden=[24,16]", "clients=4", "clients_per_round=1.0"),
    *("partition=iid", "baseline=false", "engine.workers=1", "evaluate_every=9"),
    *("pruning=magnitude", "pruning.end=2", "pruning.sparsity=0.75", "rounds=3"),
)


def _run(path: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    experiment = config.load([*SMALL, *overrides])
    return run_experiment(experiment, path / "run", resume=resume).summary


def _model(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(path / "run" / "model.safetensors")


@pytest.mark.parametrize(
    "codec",
    [
        ["codec=dithered"],
        ["codec=top_k_feedback"],
        ["codec=low_rank"],
        ["codec=dtcq", "uplink_context=true", "quantization=none"],
        ["secure_aggregation=secagg", "weighting=uniform"],
    ],
    ids=lambda codec: codec[0],
)
def test_every_codec_sends_what_is_left(codec: list[str], tmp_path: Path) -> None:
    summary = _run(tmp_path, *codec)
    # low_rank may guess badly about so few weights
    assert set(summary["rejected"]) <= {"norm", "peak"}
    weights = _model(tmp_path)["fc2.weight"]
    zeros, wanted = (weights == 0).sum(), int(0.75 * weights.size)
    assert zeros == wanted or (codec[0] == "codec=low_rank" and zeros > wanted)
    rounds = [json.loads(x) for x in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    shares = [r["sparsity"] for r in rounds[1:]]
    assert 0 < shares[0] < shares[1] == shares[2] == summary["sparsity"]
    if codec[0] == "codec=dithered":  # 288 of 3,000 weights and their bytes less
        assert rounds[2]["uplink_bytes"] < rounds[1]["uplink_bytes"]


def test_channels_and_the_result_is_the_same_for_any_workers_and_resumed(tmp_path: Path) -> None:
    more = ("pruning.unit=channel", "rounds=4", "quantization=lsq4", "server_optimizer=momentum")
    one, two = (_run(tmp_path / n, *more, f"engine.workers={n}") for n in "12")
    _run(tmp_path / "half", *more, "rounds=2")
    resumed = _run(tmp_path / "half", *more, resume=True)
    assert one["model_sha256"] == two["model_sha256"] == resumed["model_sha256"]
    assert one["removed_channels"] == 18 + 12
    tensors = _model(tmp_path / "1")
    empty = (tensors["fc1.weight"] == 0).all(1)
    assert empty.sum() == 18
    assert not tensors["fc1.bias"][empty].any()
    assert not tensors["fc2.weight"][:, empty].any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantization=codebook2"], "can be zero on the device"),
        (["privacy=gaussian", "privacy.epsilon=8"], "needs attack=none"),
        (["attack=sign_flip", "attack.fraction=0.2"], "needs attack=none"),
        (["pruning.end=0"], "0 <= begin < end"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load([*SMALL, *overrides])


def test_a_model_without_anything_to_prune_is_named() -> None:
    with pytest.raises(ConfigError, match="finds no channels"):
        Magnitude(unit="channel", end=1).support(LAYOUT, Structure(), _vector(0), 1)


def test_the_float_baseline_is_dense() -> None:
    baseline = config.baseline_of(config.load([*SMALL, "server_distillation=feddf"]))
    assert baseline is not None
    assert not baseline.pruning.active
    assert not baseline.server_distillation.examples


@pytest.mark.parametrize("name", registry.available("pruning"))
def test_every_pruning_has_examples_that_build(name: str) -> None:
    for options in registry.lookup("pruning", name).examples:  # type: ignore[attr-defined]
        pruning = registry.build("pruning", name, **options)
        assert registry.from_config("pruning", registry.to_config(pruning)) == pruning


# --- factors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), ZOO)
def test_every_model_can_be_factored_quantized_and_converted(
    name: str, shape: tuple[int, ...]
) -> None:
    from fedq.export._convert import convert

    network = create(fedq.build("model", name), shape, 4).eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    with torch.no_grad():
        for layer in layers[1:-1]:  # of rank 2, which the factors keep whole
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            layer.weight.copy_((u[:, :2] * s[:2] @ v[:2]).reshape(layer.weight.shape))
        before = network(x)
        size = sum(p.numel() for p in network.parameters())
        factorise(network, energy=1 - 1e-9)
        torch.testing.assert_close(network(x), before, rtol=1e-3, atol=1e-4)
    assert sum(p.numel() for p in network.parameters()) < size or len(layers) < 3
    prepared = fedq.build("quantization", "uniform").prepare(network)
    prepared.train()(x)
    assert len(convert(prepared.eval(), shape).operators) >= len(layers)
