"""A device of your own, measured by ``fedq fleet bench``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedq.errors import ConfigError
from fedq.physics.devices.base import Device
from fedq.registry import register

_KEY = "training_macs_s"


@register("device", "measured")
class Measured(Device):
    """What ``fedq fleet bench --json > FILE`` measured on a board; watts from your own meter.

    Args:
      path: The file; not read if ``training_macs_s`` is given.
      training_macs_s: 0 takes it from the file. A run's configuration keeps the figure, so that
        a changed file changes no run that resumes.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"training_macs_s": 1e9},)

    path: str = ""
    training_macs_s: float = 0.0
    idle_watts: float = 2.7
    active_watts: float = 6.4

    def __post_init__(self) -> None:
        if not self.training_macs_s:
            object.__setattr__(self, _KEY, _read(self.path))
        super().__post_init__()


def _read(path: str) -> float:
    if not path:
        raise ConfigError("device=measured needs path, a file of 'fedq fleet bench --json'")
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))[_KEY]
    except OSError as error:
        raise ConfigError(f"cannot read the profile {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        found = None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ConfigError(f"{path} has no number {_KEY}; make it by 'fedq fleet bench --json'")
    return float(found)
