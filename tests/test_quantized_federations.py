"""Small federations of every preset, of several widths, and of local batch normalisation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fedq
from fedq import config
from fedq.client import Client
from fedq.config import conf_directory
from fedq.errors import ConfigError
from fedq.layout import Layout
from fedq.models import create
from fedq.models.norms import FROZEN, LOCAL
from fedq.results import read_rounds
from fedq.simulation import run_experiment
from fedq.state import StateStore
from fedq.training import Trainer
from fedq.training_config import TrainingConfig

PRESETS = sorted(path.stem for path in (conf_directory() / "quantization").glob("*.yaml"))
SMALL = (
    *("data=digits", "model=small_cnn", "model.width=8", "clients=3", "clients_per_round=1.0"),
    *("partition=iid", "baseline=false", "engine.workers=1", "batch_size=8", "learning_rate=0.15"),
)


def _run(path: Path, *overrides: str) -> dict[str, Any]:
    experiment = config.load([*SMALL, *overrides])
    return run_experiment(experiment, path / "run").summary


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns(preset: str, tmp_path: Path) -> None:
    """Chance is 10 %; four rounds give 80 to 98 %."""
    summary = _run(tmp_path, f"quantization={preset}", "rounds=4", "evaluate_every=9")
    assert summary["weight_bytes"] < 0.8 * 4 * summary["parameters"]
    assert (summary["zero_weights"] >= 0.2) == (preset in ("pruned8", "ternary", "w2a8", "lsq2"))
    assert summary["rejected"] == {}
    for accuracy in summary.get("accuracy_by_width", {"": summary["accuracy"]}).values():
        assert accuracy > 0.6


def test_widths_take_turns_and_keep_states_of_their_own(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    summary = _run(tmp_path, "quantization=mixed", "quantization.widths=[2,8,0]", "rounds=2")
    assert set(summary["accuracy_by_width"]) == {"w2", "w8", "float"}
    assert summary["accuracy"] == summary["accuracy_by_width"]["w2"]
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    ranges = {v: tensors[f"{v}.activation_quantizers.relu3.hi"] for v in ("w2", "w8", "float")}
    assert ranges["w2"] != ranges["w8"]
    assert ranges["float"] == 0  # a float client observes nothing


def test_slower_devices_train_narrower_weights(tmp_path: Path) -> None:
    mixed = ("quantization=mixed", "quantization.widths=[8,4]", "width_by=speed")
    shelf = ("fleet=pi_shelf", "fleet.devices=[pi_5,pi_zero_2_w]", "fleet.links=[wifi,wifi]")
    _run(tmp_path, *mixed, *shelf, "fleet.shares=[0.75,0.25]", "rounds=2", "clients=4")
    records = read_rounds(tmp_path / "run")
    assert [record.get("widths") for record in records] == [None, *2 * [{"w8": 3, "w4": 1}]]
    with pytest.raises(ConfigError, match="look at devices"):
        _run(tmp_path / "none", *mixed)


def test_a_mixed_federation_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    hashes = {
        _run(
            tmp_path / str(workers),
            *("quantization=mixed", "quantization.weights=lsq", "rounds=2"),
            *("quantization.widths=[4,2]", f"engine.workers={workers}", "clients=6"),
        )["model_sha256"]
        for workers in (1, 2)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("norm", ["batch", "local", "frozen", "group"])
def test_every_normalisation_trains_quantized(norm: str) -> None:
    model = fedq.build("model", "ds_cnn", width=8, blocks=1, norm=norm)
    trainer = Trainer(fedq.build("quantization", "uniform").prepare(create(model, (1, 8, 8), 3)))
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 60)
    patterns = 2 * random.normal(size=(3, 1, 8, 8))
    x = (random.normal(size=(60, 1, 8, 8)) + patterns[y]).astype(np.float32)
    before = {n: v.copy() for n, v in trainer.state_layout.unflatten(trainer.state()).items()}
    trainer.train(x, y, TrainingConfig(local_epochs=20, learning_rate=0.1), seed=0)
    after = trainer.state_layout.unflatten(trainer.state())
    moved = any((after[n] != before[n]).any() for n in before if "running" in n)
    assert moved == (norm in ("batch", "local"))
    assert (trainer.local_layout.size > 0) == (norm == "local")
    assert trainer.evaluate(x, y).accuracy > 0.6
    kinds = LOCAL if norm == "local" else FROZEN
    assert any(isinstance(m, kinds) for m in trainer.model.modules()) == (
        norm in ("local", "frozen")
    )


def test_local_norms_stay_with_their_clients(tmp_path: Path) -> None:
    overrides = ("model=ds_cnn", "model.width=8", "model.blocks=1", "model.norm=local", "rounds=2")
    experiment = config.load([*SMALL[:1], *SMALL[3:], *overrides])
    run_experiment(experiment, tmp_path / "run")
    model = fedq.build("model", "ds_cnn", width=8, blocks=1, norm="local")
    layout = Trainer(create(model, (1, 8, 8), 10)).local_layout
    assert {name.split(".")[1] for name in layout.names} == {"norm"}
    store = StateStore(tmp_path / "run" / "clients")
    kept = [store.local(client, 3, layout) for client in range(3)]
    assert all(values is not None for values in kept)
    assert not np.array_equal(kept[0], kept[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", ["none", "int8", "lsq4"])
def test_local_heads_stay_with_their_clients(tmp_path: Path, quantization: str) -> None:
    overrides = ("model=local_head", f"quantization={quantization}", "rounds=2")
    experiment = config.load([*SMALL[:1], *SMALL[3:], *overrides])
    run_experiment(experiment, tmp_path / "run")
    network = create(experiment.model, (1, 8, 8), 10)
    layout = Trainer(experiment.quantization.prepare(network)).local_layout
    head = {name.rsplit(".", 1)[0] for name in layout.names if name.endswith("bias")}
    assert len(head) == 1
    assert all(name.startswith(head.copy().pop()) for name in layout.names)
    store = StateStore(tmp_path / "run" / "clients")
    kept = [store.local(client, 3, layout) for client in range(3)]
    assert all(values is not None for values in kept)
    assert not np.array_equal(kept[0], kept[1])  # type: ignore[arg-type]


def test_local_values_come_back(tmp_path: Path) -> None:
    model = fedq.build("model", "ds_cnn", width=4, blocks=1, norm="local")
    trainer = Trainer(create(model, (1, 8, 8), 3))
    weights, own = trainer.weights(), trainer.local() + 1
    trainer.load_local(own)
    assert np.array_equal(trainer.local(), own)
    assert (trainer.weights() != weights).sum() == sum(
        t.size for t in trainer.layout if ".norm." in t.name
    )
    store, layout = StateStore(tmp_path), Layout.flat(own.size)
    assert store.local(3, 1, layout) is None
    store.keep_local(3, 1, own)
    assert store.local(3, 1, layout) is None  # a resumed round must not see itself
    assert np.array_equal(store.local(3, 2, layout), own)  # type: ignore[arg-type]


class _Site:
    def identity(self, context: Any) -> int:
        return int(context.node_config["partition-id"])


def test_a_device_may_name_its_width() -> None:
    client, variants = Client(_Site()), ("w8", "w2", "float")  # type: ignore[arg-type]

    def chosen(**config: Any) -> int:
        node = {"partition-id": 4, **{k.replace("_", "-"): v for k, v in config.items()}}
        return client._variant(variants, SimpleNamespace(node_config=node), {})  # type: ignore[arg-type]

    assert chosen() == 4 % 3
    assert [chosen(weight_bits=bits) for bits in (8, "2", 0)] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"weight-bits=4 is none of .*w8, w2, float"):
        chosen(weight_bits=4)
