"""Laws of every registered quantization, and of the fake quantizers that they place."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fedq
from fedq.codecs import fp8
from fedq.errors import ConfigError
from fedq.layout import Layout
from fedq.models import create
from fedq.quantization import Quantization, float_twin
from fedq.quantization.activations.range import Range, RangeActivation
from fedq.quantization.fake import ActivationQuantizer, WeightQuantizer
from fedq.quantization.fp8 import Fp8Weight
from fedq.quantization.weights.linear import Linear
from fedq.registry import from_config, table, to_config

CASES = [
    (name, options)
    for name, cls in table("quantization").items()
    for options in cls.examples  # type: ignore[attr-defined]
]


class Residual(nn.Module):
    """What users bring: batch norm, a skip, functional calls, nesting, a scale and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.unused = nn.Linear(2, 2)
        self.block = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)])
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.stem(x))
        y = self.block[1](self.block[0](x)) * self.gain
        x = torch.relu(x + y) * torch.tensor([0.5])
        x = nn.functional.max_pool2d(x, 2).mean((2, 3))
        return self.head(x.view(x.size(0), -1))


NETWORKS: dict[str, tuple[int, ...]] = {
    "residual": (1, 8, 8),
    "small_cnn": (2, 8, 8),
    "imu_cnn": (3, 16),
    "mlp": (12,),
}


def _network(name: str) -> nn.Module:
    if name == "residual":
        torch.manual_seed(0)
        return Residual()
    options = {} if name == "mlp" else {"width": 4}
    return create(fedq.build("model", name, **options), NETWORKS[name], 3, seed=0)


def _batch(name: str, n: int = 5) -> Tensor:
    return torch.randn(n, *NETWORKS[name], generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("name", "options"), CASES)
class TestLaws:
    def test_configuration_round_trips(self, name: str, options: dict[str, Any]) -> None:
        quantization = fedq.build("quantization", name, **options)
        assert from_config("quantization", to_config(quantization)) == quantization

    def test_parameters_are_the_float_networks_own(
        self, name: str, options: dict[str, Any], network: str
    ) -> None:
        model = _network(network)
        prepared = fedq.build("quantization", name, **options).prepare(model)
        own = dict(model.named_parameters())
        kept = {n: p for n, p in prepared.named_parameters() if n in own}
        assert list(kept) == list(own)
        assert all(kept[n] is own[n] for n in own)
        assert model.state_dict().keys() <= prepared.state_dict().keys()

    def test_the_float_network_is_not_changed(
        self, name: str, options: dict[str, Any], network: str
    ) -> None:
        model, x = _network(network), _batch(network)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        modules, attributes = [type(m) for m in model.modules()], set(vars(model))
        logits = model.eval()(x)
        prepared = fedq.build("quantization", name, **options).prepare(model)
        prepared(x)
        assert [type(m) for m in model.modules()] == modules
        assert set(vars(model)) == attributes
        assert model.state_dict().keys() == before.keys()
        assert torch.equal(model(x), logits)

    def test_state_is_float32_finite_and_of_fixed_shape(
        self, name: str, options: dict[str, Any], network: str
    ) -> None:
        model = _network(network)
        prepared = fedq.build("quantization", name, **options).prepare(model)
        fresh = {k: v.clone() for k, v in prepared.state_dict().items()}
        assert all(torch.isfinite(v).all() for v in fresh.values())
        assert {v.dtype for k, v in fresh.items() if k not in model.state_dict()} <= {torch.float32}
        prepared.train()(_batch(network)).sum().backward()
        after = prepared.state_dict()
        assert list(after) == list(fresh)
        assert [v.shape for v in after.values()] == [v.shape for v in fresh.values()]
        assert [v.dtype for v in after.values()] == [v.dtype for v in fresh.values()]
        prepared.load_state_dict(fresh, strict=True)

    def test_the_float_twin_is_exact(
        self, name: str, options: dict[str, Any], network: str
    ) -> None:
        model, x = _network(network), _batch(network)
        prepared = fedq.build("quantization", name, **options).prepare(model)
        prepared.train()(x)
        prepared.eval()
        model.eval()
        quantized = prepared(x)
        with float_twin(prepared) as twin:
            assert torch.equal(twin(x), model(x))
        assert torch.equal(prepared(x), quantized)
        assert name == "none" or not torch.equal(quantized, model(x))

    def test_evaluation_changes_no_state(
        self, name: str, options: dict[str, Any], network: str
    ) -> None:
        prepared = fedq.build("quantization", name, **options).prepare(_network(network))
        prepared.train()(_batch(network))
        before = {k: v.clone() for k, v in prepared.state_dict().items()}
        prepared.eval()(100 * _batch(network))
        with float_twin(prepared):
            prepared(100 * _batch(network))
        assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())

    def test_every_used_parameter_gets_a_finite_gradient(
        self, name: str, options: dict[str, Any], network: str
    ) -> None:
        prepared = fedq.build("quantization", name, **options).prepare(_network(network))
        prepared.train()(_batch(network, 32)).square().sum().backward()
        for key, parameter in prepared.named_parameters():
            if not key.startswith("unused"):
                assert parameter.grad is not None, key
                assert torch.isfinite(parameter.grad).all(), key
                # An offset learns from what is clipped, of which a first batch may have nothing.
                assert parameter.grad.any() or key.endswith(".offset"), key

    def test_a_deep_copy_stands_alone(
        self, name: str, options: dict[str, Any], network: str
    ) -> None:
        prepared, x = (
            fedq.build("quantization", name, **options).prepare(_network(network)),
            _batch(network),
        )
        prepared.train()(x)
        twin = copy.deepcopy(prepared).eval()
        logits = twin(x)
        with torch.no_grad():
            for parameter in prepared.parameters():
                parameter.zero_()
        assert torch.equal(twin(x), logits)
        assert not logits.equal(prepared.eval()(x))


# --- uniform: placement -----------------------------------------------------------------------


def _placed(prepared: nn.Module) -> list[str]:
    return [n for n, m in prepared.named_modules() if isinstance(m, ActivationQuantizer)]


def test_activations_are_quantized_once_per_fused_chain() -> None:
    uniform = fedq.build("quantization", "uniform")
    assert _placed(uniform.prepare(_network("small_cnn"))) == [
        f"activation_quantizers.{n}" for n in ("input", "pool1", "pool2", "relu3", "fc2")
    ]
    assert _placed(uniform.prepare(_network("residual"))) == [
        f"activation_quantizers.{n}"
        for n in ("input", "relu", "block_1", "mul", "relu_1", "max_pool2d", "mean", "head")
    ]


def test_float_activations_place_no_quantizer_and_no_state() -> None:
    model = _network("small_cnn")
    prepared = fedq.build("quantization", "uniform", activation_bits=0).prepare(model)
    assert _placed(prepared) == []
    assert list(prepared.state_dict()) == list(model.state_dict())


def test_first_and_last_layers_keep_their_own_bits() -> None:
    model = create(fedq.build("model", "mlp", hidden=(8, 8)), (4,), 3)
    prepared = fedq.build(
        "quantization", "uniform", weight_bits=3, activation_bits=5, first_last_bits=7
    ).prepare(model)
    weights = [m.bits for m in prepared.modules() if isinstance(m, WeightQuantizer)]
    activations = [m.bits for m in prepared.modules() if isinstance(m, ActivationQuantizer)]
    assert weights == [7, 3, 7]
    assert activations == [8, 5, 5, 8]


def test_depthwise_layers_keep_their_own_bits() -> None:
    model = create(fedq.build("model", "ds_cnn", width=8, blocks=2), (1, 49, 10), 3)
    short = fedq.build("quantization", "uniform", weight_bits=2, depthwise_bits=5)
    long = fedq.build("quantization", "qat", weights={"name": "lsq", "bits": 2})

    def bits(quantization: Quantization) -> list[int]:
        prepared = quantization.prepare(model)
        return [m.bits for m in prepared.modules() if isinstance(m, WeightQuantizer)]

    assert bits(short) == [8, 5, 2, 5, 2, 8]
    assert bits(long) == [8, 8, 2, 8, 2, 8]
    assert bits(long.replace(depthwise=None)) == [8, 2, 2, 2, 2, 8]
    assert bits(long.replace(layer_bits=(8, 4, 3, 2, 2, 8))) == [8, 4, 3, 2, 2, 8]


def test_quantizing_after_max_pooling_equals_quantizing_before() -> None:
    model, x = _network("small_cnn"), _batch("small_cnn")
    prepared = fedq.build("quantization", "uniform", activation_bits=4).prepare(model)
    prepared.train()(x)
    prepared.eval()
    get = prepared.get_submodule
    quantizer = {n: get(f"activation_quantizers.{n}") for n in ("input", "pool1", "pool2")}
    h = quantizer["input"](x)
    for conv, pool in (("conv1", "pool1"), ("conv2", "pool2")):
        h = nn.functional.max_pool2d(quantizer[pool](get(conv)(h).relu()), 2)
    h = get("activation_quantizers.relu3")(get("fc1")(h.flatten(1)).relu())
    assert torch.equal(get("activation_quantizers.fc2")(get("fc2")(h)), prepared(x))


def test_shape_arithmetic_is_not_quantized() -> None:
    class Reshapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.reshape(x.shape[0] * 2, x.shape[1] // 2)).reshape(x.size(0), -1)

    prepared = fedq.build("quantization", "uniform").prepare(Reshapes())
    assert _placed(prepared) == ["activation_quantizers.input", "activation_quantizers.fc"]
    assert prepared(torch.rand(3, 8)).shape == (3, 4)


def test_the_graph_is_there_for_exporters() -> None:
    prepared = fedq.build("quantization", "uniform").prepare(_network("residual"))
    x = _batch("residual")
    prepared.train()(x)
    prepared.eval()
    assert torch.equal(fx.GraphModule(prepared, prepared.graph)(x), prepared(x))  # type: ignore[arg-type]


class DependsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


class DependsOnMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.fc(x), training=self.training)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        (DependsOnValues(), "cannot trace"),
        (DependsOnMode(), "self.training"),
        (Functional(), "torch's linear"),
        (nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4)), "layer 1 .GRU."),
        (nn.Sequential(nn.ConvTranspose2d(1, 1, 2)), "ConvTranspose2d"),
        (nn.Sequential(nn.ReLU()), "no Conv1d"),
        (nn.Linear(2, 2), "nn.Sequential"),
        (fedq.build("quantization", "uniform").prepare(_network("mlp")), "already prepared"),
    ],
)
def test_networks_that_cannot_be_quantized_are_refused(model: nn.Module, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        fedq.build("quantization", "uniform").prepare(model)
    assert fedq.build("quantization", "none").prepare(model) is model


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(self.fc(x))


def test_an_unknown_operator_is_named_with_its_module() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Unknown()))
    with pytest.raises(ConfigError, match=r"'special_i0' in module '1\.0'"):
        fedq.build("quantization", "uniform").prepare(network)


def test_uniform_is_the_short_form_of_qat() -> None:
    x = _batch("small_cnn")
    uniform = fedq.build("quantization", "uniform", weight_bits=4, activation_bits=5)
    for quantization in (uniform, uniform.as_qat()):
        prepared = quantization.prepare(_network("small_cnn"))
        prepared.train()(x).square().sum().backward()
        gradients = [p.grad for p in prepared.parameters()]
        outcome = [prepared.eval()(x), *prepared.buffers(), *gradients]
        if quantization is uniform:
            expected = outcome
    assert all(torch.equal(a, b) for a, b in zip(outcome, expected, strict=True))


def test_the_relu_left_to_a_quantizer_changes_nothing(network: str) -> None:
    """The clean graph, ReLUs and all, gives the same values and gradients."""
    x = _batch(network, 16)
    outcomes = []
    for fused in (True, False):
        prepared = fedq.build("quantization", "uniform").prepare(_network(network))
        rectifying = [m for m in prepared.modules() if getattr(m, "rectifies", False)]
        assert rectifying
        if not fused:
            for module in rectifying:
                module.rectifies = False  # type: ignore[assignment]
            prepared._run = type(fx.GraphModule(prepared, prepared.graph)).forward  # type: ignore[arg-type]
        prepared.train()
        for _ in range(2):
            prepared.zero_grad()
            prepared(x).square().sum().backward()
        gradients = [p.grad for p in prepared.parameters() if p.grad is not None]
        outcomes.append([prepared.eval()(x), *prepared.buffers(), *gradients])
    assert len(outcomes[0]) == len(outcomes[1])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_layer_bits_are_those_of_the_layers() -> None:
    network = create(fedq.build("model", "mlp", hidden=(8, 8)), (4,), 3)
    qat = fedq.build("quantization", "qat", layer_bits=[4, 2, 8])
    prepared = qat.prepare(network)
    assert [m.bits for m in prepared.modules() if isinstance(m, WeightQuantizer)] == [4, 2, 8]
    with pytest.raises(ConfigError, match="names 2 layers, but the model has 3"):
        fedq.build("quantization", "qat", layer_bits=[4, 2]).prepare(network)


def test_variants_share_weights_and_layout_of_state() -> None:
    network = _network("small_cnn")
    qat = fedq.build("quantization", "qat", weights="lsq", widths=[8, 2, 0])
    assert qat.variants == ("w8", "w2", "float")
    prepared = [qat.prepare(network, variant) for variant in range(3)]
    shapes = [{k: v.shape for k, v in p.state_dict().items()} for p in prepared]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(p.get_parameter("conv1.weight") is network.conv1.weight for p in prepared)
    x = _batch("small_cnn")
    assert torch.equal(prepared[2].train()(x), network(x))
    assert not torch.equal(prepared[1].eval()(x), network(x))


def test_ptq_trains_in_float_and_deploys_in_integers() -> None:
    network, x = _network("residual").train(), _batch("residual")
    twin = copy.deepcopy(network)
    prepared = fedq.build("quantization", "ptq", weights={"bits": 3, "name": "linear"})
    prepared = prepared.prepare(network).train()
    assert torch.equal(prepared(x), twin(x))
    assert all(m.qparams() for m in prepared.modules() if isinstance(m, ActivationQuantizer))
    assert not torch.equal(prepared.eval()(x), twin.eval()(x))
    with pytest.raises(ConfigError, match="weight_quantizer lsq is learned"):
        fedq.build("quantization", "ptq", weights="lsq")


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"widths": [8, 9]}, "not 9"),
        ({"widths": [8, 8]}, "differ"),
        ({"weights": "ternary", "widths": [8, 2]}, "widths of 2 bits, not 8"),
        ({"weights": "codebook", "widths": [2, 4]}, "another shape"),
        ({"distillation": 1.0}, "distillation must be"),
        ({"layer_bits": [1]}, "not 1"),
        ({"layer_bits": [4], "widths": [4, 8]}, "exclude"),
        ({"weights": "linearr"}, "linear"),
        ({"activations": {"name": "range", "bits": 3}}, "not 3"),
    ],
)
def test_wrong_compositions_are_refused(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        fedq.build("quantization", "qat", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 1},
        {"weight_bits": 9},
        {"first_last_bits": 1},
        {"depthwise_bits": 1},
        {"activation_bits": 3},
        {"activation_bits": 9},
        {"range_momentum": 0.0},
        {"range_momentum": 1.5},
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        fedq.build("quantization", "uniform", **options)


# --- fp8 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_fp8_rounds_as_its_codec_and_is_a_grid(form: Any) -> None:
    levels = fp8.table(form)
    between = (levels[1:] + levels[:-1]) / 2  # ties, too
    values = np.concatenate([levels, between, 1.01 * between]).clip(levels[0], levels[-1])
    x = torch.tensor(values, dtype=torch.float32).reshape(1, -1)
    layout = Layout.flat(x.numel())
    codec = fedq.build("codec", "fp8", format=form, rounding="nearest")
    decoded = codec.decode(codec.encode(x.flatten().numpy(), layout), layout)
    ours = Fp8Weight(form).eval()(x).flatten().numpy()
    assert np.array_equal(ours, decoded)
    assert len(np.unique(ours)) <= levels.size
    assert torch.equal(Fp8Weight(form).grid(x).values(), Fp8Weight(form)(x))


# --- uniform: weights -------------------------------------------------------------------------

EXTREMES = [0.0, -0.0, 1e-45, -1e-38, 1.0, -3.0, 1e30, -3e38]


@pytest.mark.parametrize("per_channel", [True, False])
@given(
    values=st.lists(
        st.one_of(st.sampled_from(EXTREMES), st.floats(-10, 10, width=32)), min_size=6, max_size=6
    ),
    bits=st.integers(2, 8),
)
def test_weights_are_integers_times_scale(
    per_channel: bool, values: list[float], bits: int
) -> None:
    weight = torch.tensor(values).reshape(2, 3, 1)
    quantizer = Linear(bits=bits, per_channel=per_channel).quantizer(weight)
    grid, out = quantizer.grid(weight), quantizer(weight)
    integers, scale = grid.integers, grid.scale
    assert scale.shape == ((2, 1, 1) if per_channel else ())
    assert (scale > 0).all()
    assert int(integers.abs().max()) <= 2 ** (bits - 1) - 1
    assert torch.equal(integers * scale, out)
    # Half a step in exact arithmetic; division and product round in float32.
    bound = scale.double() * (0.5 + 2.0**-16)
    assert ((out.double() - weight.double()).abs() <= bound).all()


def test_the_largest_weight_of_each_channel_is_kept() -> None:
    weight = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    largest = Linear().quantizer(weight).grid(weight).integers.flatten(1).abs().amax(1)
    assert (largest == 127).all()


def test_folding_batch_norm_keeps_the_integers_up_to_sign() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 8, 3, 3, generator=random)
    gain = torch.randn(64, 1, 1, 1, generator=random)
    grid = Linear().quantizer(weight).grid
    folded = grid(weight * gain).integers * gain.sign()
    # Products round in float32: a weight within 1e-5 of a tie may fall to either side of it.
    steps = weight / grid(weight).scale
    tie = ((steps - steps.floor() - 0.5).abs() < 1e-4).expand_as(folded)
    assert torch.equal(folded[~tie], grid(weight).integers[~tie].float())
    assert tie.float().mean() < 1e-3


def test_the_weight_gradient_is_passed_straight_through() -> None:
    weight = torch.randn(4, 5, requires_grad=True)
    upstream = torch.randn(4, 5)
    Linear(bits=3).quantizer(weight)(weight).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


# --- uniform: activations ---------------------------------------------------------------------


def _quantizer(lo: float, hi: float, bits: int = 8) -> RangeActivation:
    quantizer = RangeActivation(Range(bits=bits, momentum=0.1)).eval()
    quantizer.lo.fill_(lo)
    quantizer.hi.fill_(hi)
    return quantizer


@given(
    lo=st.floats(-1e6, 1e6, width=32),
    width=st.floats(2.0**-20, 1e6, width=32),
    bits=st.integers(4, 8),
)
def test_activations_lie_on_a_grid_that_includes_zero(lo: float, width: float, bits: int) -> None:
    quantizer = _quantizer(lo, lo + width, bits)
    qparams = quantizer.qparams()
    if qparams is None:
        assert quantizer.lo == quantizer.hi
        return
    scale, zero_point = qparams
    assert scale == float(np.float32(scale)) > 0
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert low <= zero_point <= high
    span = max(lo + width, 0.0) - min(lo, 0.0)
    x = torch.linspace(lo - width, lo + 2 * width, 97)
    integers = torch.div(quantizer(x), np.float32(scale)).round() + zero_point
    assert low <= integers.min()
    assert integers.max() <= high
    assert torch.equal((integers - zero_point) * np.float32(scale), quantizer(x))
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))
    inside = x.clamp(lo, lo + width)
    assert (quantizer(inside) - inside).abs().max() <= 1.001 * span / (high - low)


def test_ties_round_to_even() -> None:
    quantizer = _quantizer(-128.0, 127.0)
    assert quantizer.qparams() == (1.0, 0)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantizer(x).tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize(("lo", "hi", "bits"), [(-1.0, 2.0, 8), (0.0, 6.0, 4), (-3.0, 0.5, 5)])
def test_the_activation_gradient_is_one_inside_the_range_and_zero_outside(
    lo: float, hi: float, bits: int
) -> None:
    quantizer = _quantizer(lo, hi, bits)
    qparams = quantizer.qparams()
    assert qparams is not None
    scale, zero_point = qparams
    x = torch.linspace(2 * lo - 1, 2 * hi + 1, 1001).reshape(7, 11, 13).requires_grad_()
    upstream = torch.randn(7, 11, 13)
    quantizer(x).backward(upstream)
    steps = (x / scale).detach() + zero_point
    unclipped = (steps.round() >= -(2 ** (bits - 1))) & (steps.round() <= 2 ** (bits - 1) - 1)
    assert 0.1 < unclipped.float().mean() < 0.9
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(unclipped, upstream, 0.0))


def test_ranges_grow_at_once_and_shrink_slowly() -> None:
    quantizer = RangeActivation(Range(bits=8, momentum=0.25)).train()
    quantizer(torch.tensor([-1.0, 3.0]))
    assert (quantizer.lo.item(), quantizer.hi.item()) == (-1.0, 3.0)
    quantizer(torch.tensor([-3.0, 1.0]))
    assert (quantizer.lo.item(), quantizer.hi.item()) == (-3.0, 2.5)


def test_an_unset_range_is_the_identity() -> None:
    quantizer, x = RangeActivation(Range(bits=4, momentum=0.1)), torch.randn(9)
    assert quantizer.eval()(x) is x
    quantizer.train()(torch.zeros(9))
    assert quantizer.eval()(x) is x


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_range_stays_visible(value: float) -> None:
    quantizer = RangeActivation(Range(bits=8, momentum=0.1)).train()
    quantizer(torch.tensor([0.0, 1.0]))
    quantizer(torch.tensor([0.0, value]))
    assert not torch.isfinite(quantizer.hi)
    assert quantizer.qparams() is None
