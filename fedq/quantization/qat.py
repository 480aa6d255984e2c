"""Quantization-aware training: a weight quantizer, an activation quantizer, and where they go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fedq.errors import ConfigError
from fedq.quantization.activations.base import ActivationScheme
from fedq.quantization.activations.range import Range
from fedq.quantization.base import Quantization
from fedq.quantization.fake import ActivationQuantizer, FakeQuantizer, WeightQuantizer
from fedq.quantization.placement import PreparedModel, Role, place
from fedq.quantization.weights.base import WeightScheme
from fedq.quantization.weights.linear import Linear
from fedq.registry import register

#: Of the input and the logits: sensors and argmax both want their resolution.
EDGE_BITS = 8


@register("quantization", "qat")
class Qat(Quantization):
    """Training that sees the errors of a weight and an activation quantizer.

    Args:
      weights: Of all layers but those below.
      activations: Of all activations; the input's and the logits' have 8 bits. None is float.
      first_last: Weights of the first and the last layer; None is ``weights``.
      depthwise: Weights of depthwise convolutions, few and sensitive: an output is a sum of one
        channel's nine products or so, whose errors do not average out. None is ``weights``.
      layer_bits: Bits of each layer in the order of the graph, as ``fedq allocate`` finds them;
        empty leaves the widths as above, else ``weights`` holds for all layers.
      widths: Weight bits of clients of several kinds in one federation, such as 8, 4 and 2; 0 is
        float. Client k has ``widths[k % len(widths)]``, unless its device says otherwise. All train
        one set of weights; ranges, scales and batch statistics are kept per width.
      distillation: Share of the loss, in [0, 1), that is the divergence from what the float twin of
        the round's first model says about the client's examples (Polino et al. 2018, ICLR): the
        received model teaches its own quantized form, and nothing more is sent. Float clients
        learn from labels alone.

    Example:
      >>> import fedq
      >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
      >>> lsq4 = fedq.build("quantization", "qat", weights={"name": "lsq", "bits": 4})
      >>> [name for name, _ in lsq4.replace(first_last=None).prepare(network).named_parameters()]
      ['0.weight', '0.bias', '0.weight_quantizer.scale', '2.weight', '2.bias', \
'2.weight_quantizer.scale']

    Reference:
      Jacob et al. 2018, "Quantization and training of neural networks for efficient
      integer-arithmetic-only inference", section 3.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {
            "weights": {"name": "lsq", "bits": 4},
            "activations": {"name": "lsq", "bits": 4, "offset": True},
        },
        {"weights": "codebook", "activations": "pact", "first_last": None, "depthwise": None},
        {"weights": "ternary", "activations": None},
        {"weights": {"name": "linear", "bits": 2, "range": "mse"}, "widths": [2, 8, 0]},
    )

    weights: WeightScheme = Linear()
    activations: ActivationScheme | None = Range()
    first_last: WeightScheme | None = Linear()
    depthwise: WeightScheme | None = Linear()
    layer_bits: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    distillation: float = 0.0

    def __post_init__(self) -> None:
        for bits in self.layer_bits:
            self.weights.at(bits)  # checks
        for bits in self.widths:
            if bits:
                self.weights.at(bits)
        if self.widths and not self.weights.any_width:
            raise ConfigError(
                f"quantization.widths cannot mix widths of {self.weights.name}: its state has"
                " another shape at each; choose other weights, such as linear or lsq"
            )
        if not 0 <= self.distillation < 1:
            raise ConfigError(
                f"quantization.distillation must be in [0, 1), not {self.distillation}"
            )
        if self.layer_bits and self.widths:
            raise ConfigError("quantization.layer_bits and .widths exclude each other; use one")
        if len(set(self.widths)) < len(self.widths):
            raise ConfigError(f"quantization.widths must differ, not {list(self.widths)}")

    @property
    def variants(self) -> tuple[str, ...]:
        """The widths, as in reports."""
        return tuple(f"w{bits}" if bits else "float" for bits in self.widths) or ("",)

    @property
    def has_zero(self) -> bool:
        """Whether all weight schemes have."""
        schemes = (self.weights, self.first_last, self.depthwise)
        return all(scheme.has_zero for scheme in schemes if scheme is not None)

    def prepare(self, model: nn.Module, variant: int = 0) -> nn.Module:
        """Return the network with fake quantizers."""
        width = self.widths[variant] if self.widths else None
        count = 0

        def weight(tensor: Tensor, index: int, role: Role) -> WeightQuantizer:
            nonlocal count
            count = index + 1
            return self._weights(index, role, width).quantizer(tensor)

        prepared = place(model, weight, self._activation if self.activations else None)
        if self.layer_bits and count != len(self.layer_bits):
            raise ConfigError(
                f"quantization.layer_bits names {len(self.layer_bits)} layers, but the model has"
                f" {count}"
            )
        self._finish(prepared, width)
        return prepared

    def _finish(self, prepared: PreparedModel, width: int | None) -> None:
        for module in _quantizers(prepared):
            module.enabled = width != 0
        prepared.distillation = self.distillation if width != 0 else 0.0

    def _weights(self, index: int, role: Role, width: int | None) -> WeightScheme:
        if self.layer_bits:
            if index >= len(self.layer_bits):
                return self.weights
            return self.weights.at(self.layer_bits[index])
        own = {"edge": self.first_last, "depthwise": self.depthwise}.get(role)
        if own is not None:
            return own
        return self.weights.at(width) if width else self.weights

    def _activation(self, edge: bool, rectified: bool) -> ActivationQuantizer:
        assert self.activations is not None
        scheme = self.activations.at(EDGE_BITS) if edge else self.activations
        return scheme.quantizer(rectified)


def _quantizers(model: nn.Module) -> list[FakeQuantizer]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizer)]
