"""Laws of every registered weight and activation quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fedq
from fedq import wire
from fedq.codecs.identity import Identity
from fedq.errors import ConfigError
from fedq.layout import Layout
from fedq.merging import RULES, Merger
from fedq.quantization.activations.base import ActivationScheme
from fedq.quantization.activations.range import Range, RangeActivation
from fedq.quantization.fake import ActivationQuantizer, WeightQuantizer
from fedq.quantization.learned import LearnedActivation, learned_clip
from fedq.quantization.weights.base import WeightScheme
from fedq.registry import from_config, table, to_config
from fedq.training import _merge_rules


def _cases(group: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, options) for name, cls in table(group).items() for options in cls.examples]  # type: ignore[attr-defined]


WEIGHTS = _cases("weight_quantizer")
ACTIVATIONS = _cases("activation_quantizer")
#: Whose grid follows the weight in a way that rounding changes.
NOT_IDEMPOTENT = {"percentile"}


def _weight(seed: int = 0, shape: tuple[int, ...] = (6, 5, 3, 3)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _scheme(name: str, options: dict[str, Any]) -> WeightScheme:
    scheme = fedq.build("weight_quantizer", name, **options)
    assert isinstance(scheme, WeightScheme)
    return scheme


def _module(name: str, options: dict[str, Any], weight: Tensor) -> WeightQuantizer:
    return _scheme(name, options).quantizer(weight).eval()


@pytest.mark.parametrize(("name", "options"), WEIGHTS)
class TestWeights:
    def test_configuration_round_trips(self, name: str, options: dict[str, Any]) -> None:
        scheme = _scheme(name, options)
        assert from_config("weight_quantizer", to_config(scheme)) == scheme

    def test_the_grid_is_what_is_computed_with(self, name: str, options: dict[str, Any]) -> None:
        for shape in [(6, 5, 3, 3), (4, 2, 7), (3, 9), (1, 1)]:
            weight = _weight(1, shape)
            module = _module(name, options, weight)
            grid = module.grid(weight)
            assert grid.integers.dtype == torch.int8
            assert grid.integers.shape == weight.shape
            assert (grid.scale > 0).all()
            assert torch.equal(grid.values(), module(weight))

    def test_levels_fit_the_width(self, name: str, options: dict[str, Any]) -> None:
        weight = _weight(2, (3, 2000))
        module = _module(name, options, weight)
        levels = module.grid(weight).integers.unique()
        assert len(levels) <= 2**module.bits
        assert int(levels.min()) >= -128

    def test_zero_is_a_level(self, name: str, options: dict[str, Any]) -> None:
        scheme, weight = _scheme(name, options), _weight(3)
        weight[:, 0] = 0
        out = scheme.quantizer(weight).eval()(weight)
        if scheme.has_zero:
            assert (out[:, 0] == 0).all()

    def test_values_stay_near(self, name: str, options: dict[str, Any]) -> None:
        weight = _weight(4)
        module = _module(name, options, weight)
        error = (module(weight) - weight).square().mean()
        # No scheme is as bad as sending zeros; 4 bits and more are far better.
        fine = module.bits >= 4 and name != "pruned"
        assert error < weight.square().mean() / (20 if fine else 1.5)
        assert module(weight).abs().amax() <= 1.5 * weight.abs().amax()

    def test_order_is_kept_within_a_channel(self, name: str, options: dict[str, Any]) -> None:
        weight = _weight(5).flatten(1).sort(1).values
        out = _module(name, options, weight)(weight)
        assert (out.diff(dim=1) >= 0).all()

    def test_twice_is_once(self, name: str, options: dict[str, Any]) -> None:
        if options.get("range") in NOT_IDEMPOTENT:
            pytest.skip("a percentile of rounded weights is another one")
        weight = _weight(6)
        module = _module(name, options, weight)
        once = module(weight)
        torch.testing.assert_close(module(once), once, rtol=1e-5, atol=1e-6)

    def test_a_channel_of_zeros_stays_small(self, name: str, options: dict[str, Any]) -> None:
        weight = _weight(7)
        weight[2] = 0
        module = _module(name, options, weight)
        out = module(weight)
        assert torch.isfinite(out).all()
        if _scheme(name, options).has_zero:
            assert (out[2] == 0).all()
        assert torch.isfinite(module(torch.zeros_like(weight))).all()

    def test_nan_does_not_hide(self, name: str, options: dict[str, Any]) -> None:
        weight = _weight(8)
        module = _scheme(name, options).quantizer(weight).train()
        weight[1, 1] = torch.nan
        assert module(weight).isnan().any()
        assert module.eval()(weight).isnan().any()

    def test_state_is_known_from_the_start(self, name: str, options: dict[str, Any]) -> None:
        weight = _weight(9).requires_grad_()
        module = _scheme(name, options).quantizer(weight).train()
        before = {k: (v.shape, v.dtype) for k, v in module.state_dict().items()}
        for _ in range(3):
            module(weight).square().sum().backward()
        after = {k: (v.shape, v.dtype) for k, v in module.state_dict().items()}
        assert after == before
        assert {dtype for _, dtype in before.values()} <= {torch.float32}
        rules = _merge_rules(module)
        assert set(rules) == set(before)
        assert set(rules.values()) <= set(RULES)

    def test_state_crosses_the_wire(self, name: str, options: dict[str, Any]) -> None:
        weight = _weight(10)
        module = _module(name, options, weight)
        arrays = {k: v.numpy() for k, v in module.state_dict().items()}
        layout = Layout.of(arrays)
        blob = wire.seal(wire.Envelope({}, [Identity().encode(layout.flatten(arrays), layout)]))
        came = layout.unflatten(Identity().decode(wire.unseal(blob).parts[0], layout))
        other = _module(name, options, _weight(11))
        other.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in came.items()})
        assert torch.equal(other(weight), module(weight))

    def test_the_merge_of_equal_states_is_that_state(
        self, name: str, options: dict[str, Any]
    ) -> None:
        module = _module(name, options, _weight(12))
        arrays = {k: v.numpy() for k, v in module.state_dict().items()}
        layout = Layout.of(arrays)
        rules = _merge_rules(module)
        merger = Merger(layout, [rules[k] for k in arrays])
        state = layout.flatten(arrays)
        np.testing.assert_allclose(merger.merged(merger.summand(state)), state, rtol=1e-5)

    def test_every_width_it_knows_and_no_other(self, name: str, options: dict[str, Any]) -> None:
        scheme = _scheme(name, options)
        for bits in scheme.supported:
            assert scheme.at(bits).quantizer(_weight()).bits == bits
        wrong = next(b for b in range(1, 10) if b not in scheme.supported)
        with pytest.raises(ConfigError, match=f"widths of {scheme.supported[0]}.*not {wrong}"):
            scheme.at(wrong)

    def test_the_gradient_is_that_of_the_surrogate(
        self, name: str, options: dict[str, Any]
    ) -> None:
        """Straight through: the identity's; clipped and learned: the clamp's."""
        scheme, weight = _scheme(name, options), _weight(13).requires_grad_()
        module = scheme.quantizer(weight).train()
        upstream = _weight(14)
        module(weight).backward(upstream)
        assert weight.grad is not None
        passed = weight.grad == upstream
        assert (passed | (weight.grad == 0)).all()
        if not scheme.learned and options.get("gradient", "straight") == "straight":
            assert passed.all()
        else:
            scale, largest = module.grid(weight).scale, 2 ** (module.bits - 1) - 1
            beyond = weight.abs() > (largest + 0.5) * scale
            within = weight.abs() < largest * scale
            assert (weight.grad[beyond] == 0).all()
            assert passed[within].all()


@pytest.mark.parametrize("shape", [(4, 1, 1), ()])
def test_the_learned_scales_gradient_is_that_of_the_surrogate(shape: tuple[int, ...]) -> None:
    """f(s) = s clamp(w / s) + s r, with the rounding error r held."""
    weight = _weight(0, (4, 3, 5))
    scale = torch.full(shape, 0.4).requires_grad_()
    learned_clip(weight, scale, -3, 3, 1.0).mul(_weight(1, (4, 3, 5))).sum().backward()
    steps = (weight.double() / 0.4).clamp(-3, 3)
    error = steps.round() - steps

    def surrogate(s: float) -> Tensor:
        out = s * (weight.double() / s).clamp(-3, 3) + s * error
        products = out * _weight(1, (4, 3, 5))
        return products.flatten(1).sum(1).reshape(shape) if shape else products.sum()

    slope = (surrogate(0.4 + 1e-6) - surrogate(0.4 - 1e-6)) / 2e-6
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad.double(), slope, rtol=1e-4, atol=1e-4)


def test_the_learned_scale_counts_its_sharing_group_and_its_sign() -> None:
    weight = _weight(0, (4, 3, 5))
    for per_channel, sharing in ((True, 15), (False, 60)):
        module: Any = fedq.build(
            "weight_quantizer", "lsq", bits=3, per_channel=per_channel
        ).quantizer(weight)
        assert module.gain == pytest.approx(1 / np.sqrt(sharing * 3))
        module(weight).square().sum().backward()
        forward, gradient = module(weight), module.scale.grad.clone()
        with torch.no_grad():
            module.scale.neg_()
        module.scale.grad = None
        assert torch.equal(module(weight), forward)
        module(weight).square().sum().backward()
        torch.testing.assert_close(module.scale.grad, -gradient)


@pytest.mark.parametrize("unit", ["weight", "channel"])
def test_pruning_zeroes_the_smallest_share(unit: str) -> None:
    weight = _weight(0, (8, 4, 5))
    scheme = _scheme("pruned", {"sparsity": 0.5, "unit": unit})
    integers = scheme.quantizer(weight).grid(weight).integers
    sizes = weight.abs().flatten() if unit == "weight" else weight.square().sum((1, 2))
    zero = integers.flatten() == 0 if unit == "weight" else (integers == 0).all(1).all(1)
    assert zero.sum() == sizes.numel() // 2
    assert sizes[zero].max() < sizes[~zero].min()
    with pytest.raises(ConfigError, match="binary cannot represent"):
        _scheme("pruned", {"inner": "binary"})


def test_stochastic_rounding_is_right_on_average() -> None:
    module = _scheme("linear", {"bits": 2, "rounding": "stochastic"}).quantizer(torch.zeros(1, 1))
    weight = torch.cat([torch.tensor([[1.0]]), torch.full((1, 20000), 0.3)], 1)
    torch.manual_seed(0)
    mean = module.train()(weight)[0, 1:].mean().item()
    # Five standard deviations of the mean of 20000 draws of 0 or 1 with probability 0.3.
    assert abs(mean - 0.3) < 5 * np.sqrt(0.21 / 20000)
    assert module.eval()(weight)[0, 1:].abs().amax() == 0


def test_least_square_clips_are_no_worse_than_the_largest_weight() -> None:
    weight = _weight(0, (8, 200))
    for name, widths in (("linear", (2, 3, 4)), ("power_of_two", (3, 4))):
        for bits in widths:
            absmax = _module(name, {"bits": bits, "range": "absmax"}, weight)(weight)
            mse = _module(name, {"bits": bits, "range": "mse"}, weight)(weight)
            before = (absmax - weight).square().sum(1)
            assert ((mse - weight).square().sum(1) <= before).all()


def test_lloyd_steps_do_not_raise_the_error() -> None:
    weight = _weight(0, (8, 200))
    module: Any = fedq.build("weight_quantizer", "codebook", bits=2).quantizer(weight)
    with torch.no_grad():
        module.centroids.copy_(torch.tensor([-2.0, -1.9, 0.0, 0.1]))
    errors = []
    for _ in range(5):
        centroids = module.centroids
        nearest = (weight.flatten()[:, None] - centroids).abs().argmin(1)
        errors.append((weight.flatten() - centroids[nearest]).square().sum().item())
        module._lloyd(weight.flatten())
    assert errors == sorted(errors, reverse=True)


# --- activations --------------------------------------------------------------------------------


def _activation(name: str, options: dict[str, Any], rectified: bool) -> ActivationQuantizer:
    scheme = fedq.build("activation_quantizer", name, **options)
    assert isinstance(scheme, ActivationScheme)
    return scheme.quantizer(rectified)


def _values(rectified: bool, seed: int = 0, shape: tuple[int, ...] = (8, 4, 5, 5)) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.relu() if rectified else x


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize(("name", "options"), ACTIVATIONS)
class TestActivations:
    def test_unset_is_the_identity_and_the_first_batch_sets(
        self, name: str, options: dict[str, Any], rectified: bool
    ) -> None:
        module, x = _activation(name, options, rectified), _values(rectified)
        assert module.qparams() is None
        assert torch.equal(module.eval()(x), x)
        assert not torch.equal(module.train()(x), x)
        assert module.qparams() is not None

    def test_values_are_multiples_with_zero_among_them(
        self, name: str, options: dict[str, Any], rectified: bool
    ) -> None:
        module, x = _activation(name, options, rectified), _values(rectified)
        module.train()(x)
        qparams = module.eval().qparams()
        assert qparams is not None
        scale, zero_point = qparams
        assert module.smallest <= zero_point <= module.largest
        out = module(3 * x)
        codes = out / scale
        torch.testing.assert_close(codes, codes.round(), rtol=1e-4, atol=1e-3)
        assert module.smallest <= round(codes.amin().item()) + zero_point
        assert round(codes.amax().item()) + zero_point <= module.largest
        assert len(out.unique()) <= 2**module.bits
        assert (module(torch.zeros(3)) == 0).all()

    def test_twice_is_once_and_order_is_kept(
        self, name: str, options: dict[str, Any], rectified: bool
    ) -> None:
        module, x = _activation(name, options, rectified), _values(rectified)
        module.train()(x)
        module.eval()
        torch.testing.assert_close(module(module(x)), module(x), rtol=1e-5, atol=1e-6)
        assert (module(x.flatten().sort().values).diff() >= 0).all()

    def test_a_constant_does_no_harm(
        self, name: str, options: dict[str, Any], rectified: bool
    ) -> None:
        for value in (0.0, 2.5):
            module = _activation(name, options, rectified)
            x = torch.full((4, 3), value, requires_grad=True)
            out = module.train()(x)
            out.sum().backward()
            assert torch.isfinite(out).all()
            assert x.grad is not None
            assert torch.isfinite(x.grad).all()

    def test_nan_does_not_hide(self, name: str, options: dict[str, Any], rectified: bool) -> None:
        module, x = _activation(name, options, rectified), _values(rectified)
        module.train()(x)
        x[0, 0] = torch.nan
        assert module.eval()(x).isnan().any()
        assert module.train()(x).isnan().any()

    def test_state_is_known_from_the_start(
        self, name: str, options: dict[str, Any], rectified: bool
    ) -> None:
        module = _activation(name, options, rectified)
        before = {k: (v.shape, v.dtype) for k, v in module.state_dict().items()}
        module.train()(_values(rectified).requires_grad_()).square().sum().backward()
        assert {k: (v.shape, v.dtype) for k, v in module.state_dict().items()} == before
        assert {dtype for _, dtype in before.values()} == {torch.float32}
        assert set(before) <= set(module.merge)

    def test_rectifying_is_a_relu_before(
        self, name: str, options: dict[str, Any], rectified: bool
    ) -> None:
        if not rectified:
            pytest.skip("only after a ReLU")
        fused, plain = (_activation(name, options, True) for _ in range(2))
        if isinstance(fused, RangeActivation) and name == "pact":
            pytest.skip("tracked")
        fused.rectifies = True
        for seed in range(3):
            x = _values(False, seed).requires_grad_()
            y = x.detach().clone().requires_grad_()
            a, b = fused.train()(x), plain.train()(y.relu())
            assert torch.equal(a, b)
            upstream = _values(False, 9)
            a.backward(upstream)
            b.backward(upstream)
            assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
            for p, q in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
                assert torch.equal(p, q)
        fused.enabled = plain.enabled = False
        assert torch.equal(fused(x), plain(x.relu()))

    def test_every_width_it_knows_and_no_other(
        self, name: str, options: dict[str, Any], rectified: bool
    ) -> None:
        scheme = fedq.build("activation_quantizer", name, **options)
        for bits in scheme.supported:
            assert scheme.at(bits).quantizer(rectified).bits == bits
        with pytest.raises(ConfigError, match="widths of 4, 5, 6, 7, 8 bits, not 3"):
            scheme.at(3)


def test_symmetric_ranges_have_zero_point_zero() -> None:
    module = Range(symmetric=True).quantizer(rectified=False).train()
    module(_values(False) + 1)
    assert module.qparams() is not None
    assert module.qparams()[1] == 0  # type: ignore[index]
    assert (module.smallest, module.largest) == (-127, 127)


def test_the_learned_activations_gradients_are_those_of_the_surrogate() -> None:
    """f(s, b) = s clamp((x - b) / s) + s r + b, with the rounding error r held; b = 2 s."""
    x, weight = _values(False, 0, (50,)), _values(False, 1, (50,)).double()
    low, high, shift, s0 = -4, 3, 2, 0.3
    scale, offset = torch.tensor(s0).requires_grad_(), torch.tensor(s0 * shift).requires_grad_()
    out = LearnedActivation.apply(x, scale, offset, s0, (low + shift, high + shift), shift, 1.0)
    (out * weight).sum().backward()
    steps = ((x.double() - s0 * shift) / s0).clamp(low, high)
    error = steps.round() - steps

    def surrogate(s: float, b: float) -> float:
        values = s * ((x.double() - b) / s).clamp(low, high) + s * error + b
        return float((values * weight).sum())

    h, b0 = 1e-6, s0 * shift
    by_scale = (surrogate(s0 + h, b0) - surrogate(s0 - h, b0)) / (2 * h)
    by_offset = (surrogate(s0, b0 + h) - surrogate(s0, b0 - h)) / (2 * h)
    assert scale.grad is not None
    assert offset.grad is not None
    # With b = s z the code is round(x / s): the scale's gradient inside is the same.
    assert scale.grad.item() == pytest.approx(by_scale, rel=1e-3)
    assert offset.grad.item() == pytest.approx(by_offset, rel=1e-3)


def test_pact_learns_from_what_it_clips_and_decays() -> None:
    module: Any = fedq.build("activation_quantizer", "pact", bits=4, decay=0.5).quantizer(True)
    module.train()(torch.tensor([[2.0, 0.5]]))
    module.alpha.grad = None
    x = torch.tensor([[3.0, 2.5, 1.0, -1.0]], requires_grad=True)
    module(x).sum().backward()
    assert module.alpha.grad.item() == pytest.approx(2 + 0.5 * 2.0)
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 1, 0]]


@settings(max_examples=30)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=64),
    scale=st.floats(2.0**-10, 2.0),
    low=st.integers(-128, 0),
    last=st.booleans(),
)
def test_the_kernel_is_torchs_four_operators(
    values: list[float], scale: float, low: int, last: bool
) -> None:
    from fedq.quantization._kernels import clip_to_grid

    scale = float(np.float32(scale))
    x = torch.tensor(values)
    if last:  # channels-last memory
        x = x.repeat(6).reshape(1, 2, 3, -1).to(memory_format=torch.channels_last)
    expected = x.div(scale).round().clamp(low, 127).mul(scale)
    out = clip_to_grid(x, scale, low, 127)
    assert torch.equal(out, expected)
    assert out.stride() == x.stride()
    gaps = x[..., ::2]
    assert torch.equal(clip_to_grid(gaps, scale, low, 127), expected[..., ::2])


def test_learned_state_is_trained_but_is_no_weight() -> None:
    from fedq.training import Trainer
    from fedq.training_config import TrainingConfig

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    layout = Trainer(network).layout
    lsq = fedq.build("quantization", "qat", weights="lsq", activations="lsq", first_last=None)
    trainer = Trainer(lsq.prepare(network))
    assert trainer.layout == layout
    assert set(trainer.merge_rules) == {"log_mean"}
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    weights, state = trainer.weights(), trainer.state()
    still = TrainingConfig(learning_rate=0.0, weight_decay=0.1)
    trainer.train(x, y, still, seed=0)
    begun = trainer.state()  # activation scales are set by data, the others did not move
    assert np.array_equal(begun[state > 0], state[state > 0])
    trained = trainer.train(x, y, TrainingConfig(learning_rate=0.1), seed=0)
    assert (trained.state != begun).mean() > 0.5
    trainer.load(weights, begun)
    decayed = TrainingConfig(learning_rate=0.1, weight_decay=0.5, max_grad_norm=1e-6)
    moved = trainer.train(x, y, decayed, seed=0)
    assert (moved.state != begun).mean() > 0.5  # no clipping of the scales' gradients


def test_distillation_pulls_towards_the_float_twin() -> None:
    """With labels of noise and most of the loss from the twin, outputs stay nearer to its."""
    from fedq.models import create
    from fedq.training import Trainer
    from fedq.training_config import TrainingConfig

    random = np.random.default_rng(0)
    x = random.normal(size=(64, 6)).astype(np.float32)
    y = random.integers(0, 3, 64)
    distances = []
    for share in (0.0, 0.9):
        weights = {"name": "linear", "bits": 2}
        qat = fedq.build(
            "quantization", "qat", weights=weights, first_last=None, distillation=share
        )
        trainer = Trainer(qat.prepare(create(fedq.build("model", "mlp"), (6,), 3)))
        before = trainer.outputs(x, float_twin=True)
        config = TrainingConfig(local_epochs=10, learning_rate=0.05)
        trainer.train(x, y, config, seed=0)
        distances.append(np.square(trainer.outputs(x) - before).mean())
    assert distances[1] < 0.5 * distances[0]
