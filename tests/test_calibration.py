"""Post-training quantization with some inputs at hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedq
from fedq.data.base import load
from fedq.errors import ConfigError
from fedq.models import create
from fedq.quantization.base import float_twin
from fedq.quantization.calibration import adaround, calibrate
from fedq.quantization.fake import ActivationQuantizer
from fedq.training import Trainer
from fedq.training_config import TrainingConfig


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Tensor], Tensor, np.ndarray[Any, Any]]:
    """A small network that knows digits, test inputs and labels."""
    data = load(fedq.build("data", "digits"))
    trainer = Trainer(_network())
    rows = np.arange(len(data.y_train))
    config = TrainingConfig(local_epochs=6, learning_rate=0.1)
    trainer.train(data.train_inputs(rows), data.y_train, config, seed=0)
    state = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    return state, torch.from_numpy(data.test_inputs()), data.y_test


def _network() -> nn.Module:
    return create(fedq.build("model", "small_cnn", width=8), (1, 8, 8), 10)


def _prepared(state: dict[str, Tensor], bits: int) -> nn.Module:
    network = _network()
    network.load_state_dict(state)
    weights = {"name": "linear", "bits": bits}
    return fedq.build("quantization", "ptq", weights=weights, first_last=weights).prepare(network)  # type: ignore[no-any-return]


def test_one_example_sets_every_range_and_nothing_else(trained: Any) -> None:
    state, x, _ = trained
    prepared = _prepared(state, 8).train()
    calibrate(prepared, x[:1])
    assert prepared.training
    quantizers = [m for m in prepared.modules() if isinstance(m, ActivationQuantizer)]
    assert all(m.qparams() is not None and m.training for m in quantizers)
    assert all(torch.equal(prepared.state_dict()[k], v) for k, v in state.items())
    with pytest.raises(ConfigError, match="at least one example"):
        calibrate(prepared, x[:0])
    with pytest.raises(ConfigError, match="hold NaN or infinity"):
        calibrate(prepared, (x[:2] * math.inf).numpy())


def test_chosen_rounding_serves_better_than_the_nearest(trained: Any) -> None:
    state, x, y = trained
    labels = torch.from_numpy(y)
    outcomes = []
    for rounds in (False, True):
        prepared = _prepared(state, 3)
        calibrate(prepared, x[:256])
        with float_twin(prepared), torch.no_grad():
            logits = prepared.eval()(x)
        grids = [m.weight_quantizer.grid(m.weight) for m in _layers(prepared)]
        if rounds:
            adaround(prepared, x[:256], steps=150)
            for layer, grid in zip(_layers(prepared), grids, strict=True):
                now = layer.weight_quantizer.grid(layer.weight)
                torch.testing.assert_close(now.scale, grid.scale)
                assert int((now.integers - grid.integers).abs().max()) <= 1
        with torch.no_grad():
            quantized = prepared.eval()(x[256:])
        error = (quantized - logits[256:]).square().mean().item()
        accuracy = (quantized.argmax(1) == labels[256:]).float().mean().item()
        outcomes.append((error, accuracy))
    assert outcomes[1][0] < 0.8 * outcomes[0][0]
    assert outcomes[1][1] >= outcomes[0][1] - 0.01


def test_training_goes_on_from_chosen_levels(trained: Any) -> None:
    state, x, y = trained
    prepared = _prepared(state, 3)
    calibrate(prepared, x[:64])
    adaround(prepared, x[:64], steps=20)
    weights = {"name": "linear", "bits": 3}
    qat = fedq.build("quantization", "qat", weights=weights, first_last=weights)
    network = _network()
    network.load_state_dict({k: prepared.state_dict()[k] for k in network.state_dict()})
    trainer = Trainer(qat.prepare(network))
    before = trainer.evaluate(x.numpy(), y).accuracy
    trainer.train(x.numpy(), y, TrainingConfig(local_epochs=3, learning_rate=0.05), seed=0)
    assert trainer.evaluate(x.numpy(), y).accuracy > before


def test_what_cannot_be_rounded_is_refused(trained: Any) -> None:
    state, x, _ = trained
    network = _network()
    prepared = fedq.build("quantization", "qat", weights="ternary", first_last=None).prepare(
        network
    )
    with pytest.raises(ConfigError, match="nothing to round"):
        adaround(prepared, x)
    with pytest.raises(ConfigError, match="at least one example"):
        adaround(_prepared(state, 3), x[:0])


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "weight_quantizer")]
