"""Weights & Biases, offline unless ``WANDB_MODE`` says otherwise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedq.registry import register
from fedq.trackers.base import Sink, Tracker


@register("tracker", "wandb")
class WandB(Tracker):
    """Runs of the project ``WANDB_PROJECT`` (``fedq`` if there is none), in ``RUN/wandb``.

    Nothing leaves the machine until ``wandb sync``, or with ``WANDB_MODE=online``.

    Reference:
      wandb's run API.
    """

    extra: ClassVar[str] = "track-wandb"
    module: ClassVar[str] = "wandb"

    def open(self, path: Path, name: str, config: Mapping[str, Any]) -> Sink:
        """Return a run, whose identity follows from its directory."""
        return _Sink(path, name, config)


class _Sink(Sink):
    def __init__(self, path: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedq"),
            name=name,
            id=hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16],
            dir=str(path),
            config=dict(config),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, figures: Mapping[str, float]) -> None:
        self._run.summary.update({f"final/{key}": value for key, value in figures.items()})
        self._run.finish(exit_code=0 if figures else 1)
