"""What every exporter is: a frozen configuration that writes one graph as one runtime's file."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError, FedqError
from fedq.export import runner
from fedq.export._graph import Graph


@dataclass(frozen=True)
class Operators:
    """What a runtime computes in integers, and what it falls back to float for; by kind."""

    integer: Mapping[str, int]
    fallback: Mapping[str, int] = field(default_factory=dict)


class Exporter(abc.ABC):
    """A writer of one runtime's files, and what the parity gate needs to know of that runtime.

    Subclasses are registered frozen dataclasses in a file of their own. Runtimes are imported when
    they are used, never with this package.
    """

    group: ClassVar[str] = "exporter"
    name: ClassVar[str]
    #: The released model, and whatever else belongs to it.
    file: ClassVar[str]
    companions: ClassVar[tuple[str, ...]] = ()
    #: What to install, what it makes importable, and which of it executes the file.
    extra: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    runtime: ClassVar[str]
    #: The class of device that the file is meant for.
    device: ClassVar[str]
    #: How inputs lie in memory; data sets store them channels last.
    layout: ClassVar[str] = "channels_first"

    def check(self) -> None:
        """Raise :class:`ConfigError`, naming the extra, unless all that is needed is installed."""
        for module in self.modules:
            require(module, self)

    def adapt(self, graph: Graph) -> Graph:
        """Return the graph as the runtime computes it; the same one unless grids must change."""
        return graph

    @abc.abstractmethod
    def write(self, graph: Graph, path: Path, *, integer: bool) -> None:
        """Write the quantized network, or its float twin, for the same runtime.

        Raises:
          ConfigError: If the runtime has no kernel for an operator, which is named.
        """

    def stored(self, graph: Graph) -> list[NDArray[np.int8]] | None:
        """Return each layer's weights as the file holds them, None if it does not hold them so."""
        return None

    @abc.abstractmethod
    def operators(self, path: Path) -> Operators:
        """Return what the runtime makes of a written file."""

    def size(self, path: Path) -> int:
        """Return the bytes that a device stores."""
        return sum(path.with_name(file).stat().st_size for file in (path.name, *self.companions))

    def load(self, path: Path) -> runner.Network:
        """Return the file ready to run by its runtime, in one thread."""
        try:
            return runner.load(path)
        except runner.RunnerError as error:
            raise FedqError(str(error)) from error


def require(module: str, exporter: Exporter) -> Any:
    """Import a module of a runtime.

    Raises:
      ConfigError: If it is not installed; the error names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"exporter={exporter.name} needs {module.split('.')[0]}, which is not installed"
            f" ({error}); pip install 'fedq[{exporter.extra}]'"
        ) from error
