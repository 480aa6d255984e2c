"""What every quantization is: a frozen configuration that prepares a float network."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from torch import nn

from fedq.quantization.fake import FakeQuantizer


class Quantization(abc.ABC):
    """A map from a float network to the one that is trained, averaged and deployed.

    Laws of :meth:`prepare`, which make the result safe for federated averaging:

    * the parameters are the float network's own, by name, order and identity, besides those that
      quantizers learn, which belong to modules of
      :class:`~fedq.quantization.fake.FakeQuantizer` and are state, not weights;
    * every parameter and persistent buffer is float32 (batch normalisation's counters aside) with a
      shape that is fixed from the start, and finite;
    * :func:`float_twin` gives back the float network's outputs to the bit.
    """

    group: ClassVar[str] = "quantization"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the kinds of clients, one for most: they share weights, each has a state."""
        return ("",)

    @property
    def has_zero(self) -> bool:
        """Whether a weight that is zero is zero on the device, whichever layer it is of."""
        return True

    @abc.abstractmethod
    def prepare(self, model: nn.Module, variant: int = 0) -> nn.Module:
        """Return the network that trains with the errors of quantization.

        Args:
          model: A float network; it is not changed, and shares its parameters with the result.
          variant: Which of :attr:`variants`; all have the same parameters and state by name and
            shape.

        Raises:
          ConfigError: If the network cannot be traced, or has layers that cannot be quantized.
        """

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some options changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@contextmanager
def float_twin(model: nn.Module) -> Iterator[nn.Module]:
    """Let a prepared network compute in float with the same weights inside a ``with`` block.

    A network that was not prepared is its own float twin.

    Example:
      >>> import fedq, torch
      >>> network = nn.Sequential(nn.Linear(4, 2)).eval()
      >>> prepared = fedq.build("quantization", "uniform", weight_bits=2).prepare(network)
      >>> x = torch.ones(1, 4)
      >>> bool((prepared(x) == network(x)).all())
      False
      >>> with float_twin(prepared):
      ...     bool((prepared(x) == network(x)).all())
      True
    """
    switched = [m for m in model.modules() if isinstance(m, FakeQuantizer) and m.enabled]
    for module in switched:
        module.enabled = False
    try:
        yield model
    finally:
        for module in switched:
            module.enabled = True
