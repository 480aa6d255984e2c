"""Federations that an evaluation runs: the subject's own, going on under other conditions."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq import registry, results, simulation
from fedq.experiment import Experiment
from fedq.guard import GuardState
from fedq.robustness.base import Work
from fedq.robustness.subject import Subject

Parts = Sequence[NDArray[np.int64]]
#: Of a checkpoint, what belongs to the nodes of the run that wrote it.
_OF_NODES: Mapping[str, Any] = {
    "held": {},
    "strangers": [],
    "clients": {},
    "privacy": None,
    "failures": 0,
    "waiting": [],
}


def go_on(
    subject: Subject, work: Work, rounds: int, parts: Parts, **changes: Any
) -> dict[str, Any]:
    """Return the summary of a run that goes on for some rounds with other clients or rules.

    It starts from the run's last checkpoint, with all of ``parts`` in each round. What was run
    before, under the same conditions, is read from ``work.folder``.

    Args:
      subject: The run.
      work: How.
      rounds: After the run's last.
      parts: The training rows of each client.
      **changes: Fields of the experiment.

    Raises:
      FedqError: If the run has no usable checkpoint, or the federation fails.
    """
    checkpoint = results.read_checkpoint(subject.path)
    experiment = subject.experiment.replace(
        rounds=checkpoint.round + rounds,
        evaluate_every=checkpoint.round + rounds,
        seed=work.seed,
        clients=len(parts),
        clients_per_round=len(parts),
        baseline=False,
        run_dir=None,
        resume=None,
        trackers=(),
        engine=registry.build("engine", "local", workers=work.workers),
        **changes,
    )
    kept = work.folder / f"{_name(experiment, checkpoint, parts)}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    folder = kept.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    meta = {**checkpoint.meta, **_OF_NODES, "guard": _medians(checkpoint.meta["guard"])}
    of_nodes = ("broadcast.", "waiting.")
    tensors = {n: t for n, t in checkpoint.tensors.items() if not n.startswith(of_nodes)}
    with results.RunDirectory.create(folder, experiment.to_config()) as directory:
        directory.save_checkpoint(checkpoint.round, tensors, meta)
    summary = simulation.run_experiment(experiment, folder, resume=True, parts=parts).summary
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(kept)
    shutil.rmtree(folder)
    return summary


def _medians(guard: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a guard remembers of sizes, without what it remembers of nodes."""
    return GuardState(medians=GuardState.from_meta(guard).medians).to_meta()


def _name(experiment: Experiment, checkpoint: results.Checkpoint, parts: Parts) -> str:
    config = experiment.replace(engine=registry.build("engine", "local")).to_config()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for array in (*checkpoint.tensors.values(), *parts):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def skew(parts: Parts, y: NDArray[np.int64], classes: int) -> float:
    """Return how far clients' labels are from all clients': mean total variation, in [0, 1].

    >>> halves = [np.array([0, 1]), np.array([2, 3])]
    >>> skew(halves, np.array([0, 0, 1, 1]), 2), skew(halves, np.array([0, 1, 0, 1]), 2)
    (0.5, 0.0)
    """
    counts = np.array([np.bincount(y[part], minlength=classes) for part in parts], np.float64)
    shares = counts / counts.sum(axis=1, keepdims=True)
    whole = counts.sum(axis=0) / counts.sum()
    return float(np.abs(shares - whole).sum(axis=1).mean() / 2)
