"""Post-training quantization: train in float, look at the ranges, deploy in integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedq.errors import ConfigError
from fedq.quantization.placement import PreparedModel
from fedq.quantization.qat import Qat, _quantizers
from fedq.registry import register


@register("quantization", "ptq")
class Ptq(Qat):
    """The quantizers of ``qat``, which clients' training observes but does not see.

    Activation ranges come from the clients' own batches, so that the server needs no data to
    calibrate; what is deployed, and judged, is the quantized network. Options are those of
    ``qat``; learned scales have nothing to learn from here.

    Example:
      >>> Ptq().variants
      ('',)

    Reference:
      Nagel et al. 2021, "A white paper on neural network quantization", section 3.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {
            "weights": {"name": "linear", "bits": 4, "range": "mse"},
            "activations": {"name": "range", "tracker": "percentile"},
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation:
            raise ConfigError("quantization=ptq trains in float: there is nothing to distil into")
        for scheme in (self.weights, self.activations, self.first_last, self.depthwise):
            if scheme is not None and scheme.learned:
                raise ConfigError(
                    f"{scheme.group} {scheme.name} is learned from the quantized loss, which"
                    " quantization=ptq does not see; use quantization=qat"
                )

    def _finish(self, prepared: PreparedModel, width: int | None) -> None:
        super()._finish(prepared, width)
        for module in _quantizers(prepared):
            module.in_training = False
