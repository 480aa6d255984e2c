"""MLflow, at ``MLFLOW_TRACKING_URI``."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedq.registry import register
from fedq.trackers.base import Sink, Tracker

_RUN = "mlflow_run"
_LONGEST = 500  # characters of a parameter that MLflow takes


@register("tracker", "mlflow")
class MLflow(Tracker):
    """Runs of the experiment ``MLFLOW_EXPERIMENT_NAME`` (``fedq`` if there is none).

    Without ``MLFLOW_TRACKING_URI`` they go to ``mlflow.db`` beside the run directory.

    Reference:
      MLflow's tracking API.
    """

    extra: ClassVar[str] = "track-mlflow"
    module: ClassVar[str] = "mlflow"

    def open(self, path: Path, name: str, config: Mapping[str, Any]) -> Sink:
        """Return a run; a resumed one goes on with the run that it began."""
        return _Sink(path, name, config)


class _Sink(Sink):
    def __init__(self, path: Path, name: str, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path.parent / 'mlflow.db'}"
        self._client: Any = MlflowClient(where)
        note = path / _RUN
        if note.exists():
            self._run = note.read_text()
            self._client.update_run(self._run, status="RUNNING")
            return
        label = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedq")
        found = self._client.get_experiment_by_name(label)
        experiment = found.experiment_id if found else self._client.create_experiment(label)
        self._run = self._client.create_run(experiment, run_name=name).info.run_id
        for key, value in config.items():
            self._client.log_param(self._run, key, str(value)[:_LONGEST])
        note.write_text(self._run)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        at = int(1000 * time.time())
        metrics = [Metric(key, value, at, step) for key, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._client.log_metric(self._run, f"final/{key}", value)
        self._client.set_terminated(self._run, "FINISHED" if figures else "KILLED")
