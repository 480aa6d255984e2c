"""``fedq evaluate RUN``: a suite of evaluations on one run, one by one, and its card.

Results are kept under ``RUN/evaluation/SUITE/``, each as soon as it is there: a killed evaluation
goes on where it was, and its card says what is missing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedq import config, registry, results
from fedq.errors import ConfigError, FedqError, unknown
from fedq.random import derive
from fedq.report import card as pages
from fedq.results import write_file
from fedq.robustness.base import Evaluation, Work
from fedq.robustness.card import NAME, Card, Result
from fedq.robustness.outcome import Outcome
from fedq.robustness.subject import Subject

#: Called with (evaluations done, of, what is being done).
Watch = Callable[[int, int, str], None]
#: Options that say where files are on this machine, and nothing about the run.
_LOCAL = {"run_dir", "resume", "keys"}
_SECONDS = 2.0  # between two reports of one evaluation's progress


def evaluate(
    run: str | os.PathLike[str],
    suite: str = "ci",
    *,
    only: Collection[str] = (),
    seed: int = 0,
    workers: int = 0,
    out: str | os.PathLike[str] | None = None,
    watch: Watch = lambda done, of, what: None,
) -> tuple[Card, Path]:
    """Evaluate a run; write ``card.json`` and ``card.html`` after each evaluation.

    What was done before with the same options and seed, on the same model, is not done again.

    Args:
      run: The directory of a run that has ended.
      suite: The name of one in ``conf/suite/``, or a YAML file.
      only: Evaluations of the suite to carry out; the others stay as they are. None is all.
      seed: Of all evaluations; each derives its own.
      workers: Processes that federations may use; 0 is one per core.
      out: Where to write; by default ``evaluation/SUITE`` in the run directory.
      watch: Told of the progress.

    Returns:
      The card and the directory that it lies in.

    Raises:
      ConfigError: If the run has no model, or a name or option is unknown.
      FedqError: If the model is damaged or not finite, or files cannot be written.
    """
    if workers < 0:
        raise ConfigError(f"--workers must be 0 (one per core) or more, not {workers}")
    torch.set_num_threads(1)  # figures are a function of the seed
    subject = Subject.load(run)  # its plug-ins may register evaluations
    label, evaluations = config.suite(suite)
    keyed = _keyed(evaluations)
    names = {evaluation.name for evaluation in evaluations}
    for name in only:
        if name not in names and name not in keyed:
            raise unknown("evaluation of the suite", name, names | keyed.keys())
    folder = Path(out) if out is not None else subject.path / "evaluation" / label
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; give --out") from error
    identity = _identity(subject)
    found = {
        key: _kept(folder / f"{key}.json", _blank(key, evaluation, seed, identity))
        for key, evaluation in keyed.items()
    }

    def card() -> Card:
        return Card(
            run=identity,
            suite=label,
            seed=seed,
            date=_now(),
            versions=results.versions(),
            hardware=_hardware(),
            results=tuple(found.values()),
        )

    todo = [
        (key, evaluation)
        for key, evaluation in keyed.items()
        if found[key].state == "missing" and (not only or {key, evaluation.name} & {*only})
    ]
    for number, (key, evaluation) in enumerate(todo):
        _write(card(), folder)  # a kill leaves a card that says what is missing
        say = partial(watch, number, len(todo))
        say(key)
        step = _throttled(say, key)
        found[key] = _carry_out(evaluation, found[key], subject, folder, workers, step)
        write_file(folder / f"{key}.json", results.to_json(found[key].to_json()).encode())
    _write(card(), folder)
    return card(), folder


def _carry_out(
    evaluation: Evaluation,
    blank: Result,
    subject: Subject,
    folder: Path,
    workers: int,
    step: Callable[[int, int], None],
) -> Result:
    """Return what an evaluation finds; its folder is removed once that is known."""
    scratch = folder / "partial" / f"{blank.key}-{derive(blank.seed, _identifier(blank)):016x}"
    own = Work(derive(blank.seed, "evaluation", blank.key), scratch, workers, step)
    start = _cpu_seconds()
    state, reason = "done", ""
    outcomes: tuple[Outcome, ...] = ()
    try:
        if reason := evaluation.unsuitable(subject):
            state = "skipped"
        else:
            outcomes = tuple(evaluation.run(subject, own))
    except FedqError as error:
        state, reason = "error", str(error)
    shutil.rmtree(scratch, ignore_errors=True)
    return Result(
        **{
            **vars(blank),
            "state": state,
            "reason": reason,
            "outcomes": outcomes,
            "cpu_seconds": round(_cpu_seconds() - start, 2),
            "date": _now(),
        }
    )


def _keyed(evaluations: Collection[Evaluation]) -> dict[str, Evaluation]:
    """Return evaluations by name, those of a name that came before numbered from 2."""
    keyed: dict[str, Evaluation] = {}
    for evaluation in evaluations:
        key, number = evaluation.name, 1
        while key in keyed:
            number += 1
            key = f"{evaluation.name}-{number}"
        keyed[key] = evaluation
    return keyed


def _blank(key: str, evaluation: Evaluation, seed: int, identity: dict[str, Any]) -> Result:
    return Result(
        key=key,
        evaluation=registry.to_config(evaluation),
        family=evaluation.family,
        seed=seed,
        model_sha256=identity["model_sha256"],
    )


def _identifier(result: Result) -> str:
    """Return text that two results share if one may stand for the other."""
    known = result.to_json()
    return json.dumps([known[key] for key in ("key", "evaluation", "seed", "model_sha256")])


def _kept(file: Path, blank: Result) -> Result:
    """Return what was found before with the same options, seed and model, else ``blank``.

    What could not be carried out is tried again.
    """
    try:
        result = Result.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return blank
    same = _identifier(result) == _identifier(blank)
    return result if same and result.state in ("done", "skipped") else blank


def _write(card: Card, folder: Path) -> None:
    write_file(folder / NAME, card.text().encode())
    write_file(folder / pages.PAGE, pages.page(card).encode())


def _identity(subject: Subject) -> dict[str, Any]:
    dataset = subject.dataset
    x, y = dataset.test_inputs(), dataset.y_test
    return {
        "name": subject.experiment.name,
        "directory": subject.path.resolve().name,
        "model_sha256": results.model_digest(subject.path),
        "accuracy": subject.accuracy(x, y),
        "float_accuracy": float((subject.twin_logits(x).argmax(1) == y).mean()),
        "integer": subject.graph is not None,
        "test_examples": len(y),
        "config": {k: v for k, v in subject.experiment.to_config().items() if k not in _LOCAL},
    }


def _throttled(say: Callable[[str], None], key: str) -> Callable[[int, int], None]:
    """Return a step that tells of itself every few seconds."""
    last = time.monotonic()

    def step(done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS:
            last = time.monotonic()
            say(f"{key} {done}/{of}")

    return step


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _hardware() -> dict[str, Any]:
    def first(file: str, pattern: str) -> str | None:
        try:
            found = re.search(pattern, Path(file).read_text(errors="replace"))
        except OSError:  # not Linux
            return None
        return found[1].strip() if found else None

    memory = first("/proc/meminfo", r"MemTotal:\s+(\d+) kB")
    return {
        "cpu": first("/proc/cpuinfo", r"model name\s*: (.*)") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": None if memory is None else round(int(memory) * 1024 / 1e9, 1),
    }
