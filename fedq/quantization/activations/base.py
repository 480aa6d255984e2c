"""What every activation quantization is: a frozen configuration with one verb."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from fedq.errors import ConfigError
from fedq.quantization.fake import ActivationQuantizer


class ActivationScheme(abc.ABC):
    """A map from a place in a network to the module that fake-quantizes what comes by.

    Laws: values are multiples of a scale, zero among them, at most ``2**bits``; quantizing twice is
    quantizing once; larger values do not become smaller ones; an evaluation changes no state; the
    shapes of state are known from the start; before the first batch the module is the identity.
    """

    group: ClassVar[str] = "activation_quantizer"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: Widths that the scheme knows.
    supported: ClassVar[tuple[int, ...]] = (4, 5, 6, 7, 8)
    #: Whether it is trained by the task's loss.
    learned: ClassVar[bool] = False

    bits: int

    @abc.abstractmethod
    def quantizer(self, rectified: bool) -> ActivationQuantizer:
        """Return a new module.

        Args:
          rectified: Whether the values come out of a ReLU.
        """

    def at(self, bits: int) -> Self:
        """Return the scheme at another width."""
        return dataclasses.replace(self, bits=bits)  # type: ignore[type-var]

    def _check_bits(self) -> None:
        if self.bits not in self.supported:
            widths = ", ".join(map(str, self.supported))
            raise ConfigError(
                f"activation quantizer {self.name} has widths of {widths} bits, not {self.bits}"
            )
