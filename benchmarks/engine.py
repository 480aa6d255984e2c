"""CPU time of one client update, everything of the engine included, beside other engines.

The work: 100 clients of 40 MNIST images, one local epoch of SGD in batches of 32, FedAvg, in float
and uncompressed; the networks have 55,338 (small_cnn) and 25,450 (mlp, 784-32-10) parameters.
Every engine is one process tree that runs rounds when told to. They take turns, so that all see the
same noise, and what is reported is CPU time of the whole tree: least and median over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _common
import numpy as np

from fedq import config, simulation
from fedq.data.base import load
from fedq.experiment import Experiment
from fedq.random import derive, generator
from fedq.training import trainer_for

HERE = Path(__file__).parent / "contestants"
CLIENTS, EXAMPLES = 100, 40
# After so many rounds of ten clients, every engine that does the work is beyond this accuracy.
PROOF_ROUNDS, PROOF_ACCURACY = 80, 0.5
# One thread each, and freed memory is kept: else malloc gives activations back to the kernel after
# every step or does not, by chance, which is a third of the plain loop's CPU time.
PROCESS = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
COMMON = (
    f"clients={CLIENTS}",
    "partition=iid",
    "local_epochs=1",
    "batch_size=32",
    "learning_rate=0.1",
)
FLOAT = ("quantization=none", "codec=identity", "downlink=identity")
MODELS = {
    "small_cnn": ("model=small_cnn",),
    "mlp": ("model=mlp", "model.hidden=[32]"),
}
FLOOR, ONE, TWO = "plain loop", "fedq, 1 worker", "fedq, 2 workers"
DEFAULT, PFL = "fedq, 1 worker, int8 QAT and codecs", "pfl"
TEMPLATE, RAY = "Flower on Ray, its template's client", "Flower on Ray, the plain loop's client"


def _with_path(folder: Path) -> str:
    """Return PYTHONPATH with one more folder at its front."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass
class Contestant:
    """One engine's process tree at the other end of a line."""

    name: str
    process: subprocess.Popen[bytes]
    line: socket.socket
    cohort: int
    log: Path
    startup_s: float = 0.0
    startup_cpu_s: float = 0.0
    rounds: int = 1
    done: int = 0
    turns: list[dict[str, float]] = field(default_factory=list)
    accuracy: float = 0.0

    @classmethod
    def start(
        cls, name: str, python: str, script: str, work: Mapping[str, Any], log: Path
    ) -> Contestant:
        """Start the process and wait until its first round is done."""
        here, there = socket.socketpair()
        begin = time.perf_counter()
        with log.open("wb") as file:
            process = subprocess.Popen(
                [python, str(HERE / script), str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **PROCESS, "PYTHONPATH": _with_path(HERE)},
            )
        there.close()
        contestant = cls(name, process, here, int(work["cohort"]), log)
        contestant._send(work)
        contestant.order(1)
        contestant.startup_s = time.perf_counter() - begin
        contestant.startup_cpu_s = sum(_common.tree_cpu_seconds(process.pid).values())
        return contestant

    def _send(self, order: Mapping[str, Any]) -> None:
        self.line.sendall(json.dumps(order).encode() + b"\n")

    def order(self, rounds: int) -> float:
        """Run rounds and return their wall seconds."""
        self._send({"rounds": rounds})
        self.done += rounds
        answer = bytearray()
        while not answer.endswith(b"\n"):
            part = self.line.recv(1 << 16)
            if not part:
                self.process.wait()
                tail = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.name} ended:\n{tail}")
            answer += part
        return float(json.loads(answer)["seconds"])

    def measure(self, rounds: int) -> dict[str, float]:
        """Run rounds; return milliseconds per update: CPU, wall, and CPU of the busiest process."""
        before = _common.tree_cpu_seconds(self.process.pid)
        wall = self.order(rounds)
        after = _common.tree_cpu_seconds(self.process.pid)
        spent = [cpu - before.get(process, 0.0) for process, cpu in after.items()]
        scale = 1e3 / (rounds * self.cohort)
        return {"cpu": sum(spent) * scale, "wall": wall * scale, "busiest": max(spent) * scale}

    def warm_up(self, turn_s: float) -> None:
        """Choose the rounds of a turn so that it takes about ``turn_s``."""
        self.order(1)
        wall = self.order(2) / 2
        self.rounds = max(1, round(turn_s / wall))

    def close(self) -> None:
        """End the process tree."""
        self.line.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            for process in reversed(_common.process_tree(self.process.pid)):
                os.kill(process, 9)
            self.process.wait()


def main() -> None:
    options = _options()
    figures: dict[str, Any] = {
        "seed": options.seed,
        "turn_seconds": options.turn,
        "turns": options.turns,
        "groups": [],
    }
    text = [
        f"{__doc__.strip()}",
        "`accuracy` is that of the global model after `rounds`, which differ: it only proves that "
        "an engine does the work, and one that does not ends the benchmark. "
        "All processes have one torch thread and keep freed memory (`MALLOC_TRIM_THRESHOLD_`), "
        "without which the plain loop is a third slower. "
        "`overhead` is CPU ms per update beyond the plain loop. `start-up` is from the start of "
        "Python to the end of round 1, and the CPU time of that. `2 workers` beside `1 worker` is "
        "in wall time as seen, and as it would be on two free cores: `cpu(1) / max(busiest "
        "process(2), cpu(2) / 2)`.",
    ]
    with tempfile.TemporaryDirectory() as folder:
        pfl = None
        if not options.only or PFL in options.only:
            pfl = _pfl_python(options.pfl_python, Path(folder), text)
        for model in options.models:
            for cohort in options.cohorts:
                group = _group(options, model, cohort, pfl, Path(folder))
                figures["groups"].append(group)
                text += [f"## {model}, {cohort} clients per round", _table(group), _ratios(group)]
    _common.write(options.out, "engine", "CPU time of a client update", text, figures)


def _options() -> argparse.Namespace:
    parser = _common.parser(__doc__)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of one turn")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--pfl-python", help="a Python that has pfl 0.6; default: make one")
    parser.add_argument("--only", nargs="*", help="names of contestants")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cohorts", nargs="*", type=int, default=[10, 100])
    options = parser.parse_args()
    if options.quick:
        options.turn, options.turns, options.cohorts = 0.05, 2, [10]
        options.models = ["mlp"]
        options.only = options.only or [FLOOR, ONE, TWO]
    return options


def _group(
    options: argparse.Namespace, model: str, cohort: int, pfl: str | None, folder: Path
) -> dict[str, Any]:
    """Measure all contestants on one model and cohort."""
    overrides = [*COMMON, *MODELS[model], f"clients_per_round={cohort}", f"seed={options.seed}"]
    experiment = config.load([*overrides, *FLOAT])
    arrays, trainer = folder / f"{model}.npz", _shared_arrays(experiment, folder / f"{model}.npz")
    python = sys.executable
    work = {
        "arrays": str(arrays),
        "model": model,
        "cohort": cohort,
        "seed": options.seed,
        "options": [*overrides, *FLOAT],
        "weights_to": None,
        "workers": 1,
    }
    _check_same_work(experiment, work, folder)
    entries: dict[str, tuple[str, str, dict[str, Any]]] = {
        FLOOR: (python, "plain.py", work),
        ONE: (python, "fedq_local.py", work),
        TWO: (python, "fedq_local.py", {**work, "workers": 2}),
        DEFAULT: (python, "fedq_local.py", {**work, "options": overrides}),
        TEMPLATE: (python, "flower.py", {**work, "workers": 2, "template": True}),
        RAY: (python, "flower.py", {**work, "workers": 2, "template": False}),
    }
    if pfl:
        entries[PFL] = (pfl, "pfl_simulated.py", work)
    load_before = os.getloadavg()
    with ExitStack() as stack:
        contestants = []
        for name, (interpreter, script, job) in entries.items():
            if options.only and name not in options.only:
                continue
            log, weights = (folder / f"{len(contestants)}.{kind}" for kind in ("log", "npy"))
            job = {**job, "weights_to": str(weights)}
            contestant = Contestant.start(name, interpreter, script, job, log)
            stack.callback(contestant.close)
            contestants.append(contestant)
        for contestant in contestants:
            contestant.warm_up(options.turn)
        for turn in range(options.turns):
            for contestant in _rotated(contestants, turn):
                contestant.turns.append(contestant.measure(contestant.rounds))
        for number, contestant in enumerate(contestants):
            if cohort <= 10 and contestant.done < PROOF_ROUNDS:
                contestant.order(PROOF_ROUNDS - contestant.done)
            contestant.accuracy = _accuracy(experiment, folder / f"{number}.npy")
            if contestant.done >= PROOF_ROUNDS and contestant.accuracy < PROOF_ACCURACY:
                raise RuntimeError(
                    f"{contestant.name} does not do the work: accuracy {contestant.accuracy} "
                    f"after {contestant.done} rounds"
                )
    return {
        "model": model,
        "clients_per_round": cohort,
        "parameters": trainer,
        "load_average": [load_before, os.getloadavg()],
        "contestants": [_summary(contestant, contestants[0]) for contestant in contestants],
    }


def _rotated(contestants: Sequence[Contestant], turn: int) -> Iterator[Contestant]:
    """Yield all, beginning with another one in each turn."""
    start = turn % len(contestants)
    yield from (*contestants[start:], *contestants[:start])


def _shared_arrays(experiment: Experiment, path: Path) -> int:
    """Write every client's examples and the initial weights; return the number of weights."""
    dataset = load(experiment.data)
    parts = simulation.partition(experiment, dataset)
    weights = trainer_for(
        _config(experiment.model),
        _config(experiment.quantization),
        dataset.input_shape,
        dataset.classes,
        seed=experiment.seed,
    ).weights()
    np.savez(
        path,
        x=np.stack([dataset.train_inputs(rows[:EXAMPLES]) for rows in parts]),
        y=np.stack([dataset.y_train[rows[:EXAMPLES]] for rows in parts]),
        weights=weights,
    )
    return int(weights.size)


def _config(value: Any) -> Any:
    from fedq import registry

    return registry.to_config(value)


def _check_same_work(experiment: Experiment, work: Mapping[str, Any], folder: Path) -> None:
    """Two rounds over the same clients and batches must give the plain loop's and fedq's weights.

    Elsewhere each draws its own.
    """
    script = []
    for number in (1, 2):
        draw = generator(derive(experiment.seed, number, "sample"))
        chosen = draw.choice(CLIENTS, size=work["cohort"], replace=False, shuffle=False)
        cohort = sorted(int(client) for client in chosen)
        seeds = [derive(experiment.seed, number, client, "train") for client in cohort]
        orders = [generator(derive(seed, 0, "order")).permutation(EXAMPLES) for seed in seeds]
        script.append([cohort, [order.tolist() for order in orders]])
    found = []
    for name in ("plain.py", "fedq_local.py"):
        job = {**work, "weights_to": str(folder / "weights.npy"), "script": script}
        contestant = Contestant.start(name, sys.executable, name, job, folder / "check.log")
        contestant.order(1)
        contestant.close()
        found.append(np.load(folder / "weights.npy"))
    with np.load(work["arrays"]) as arrays:
        moved = np.abs(found[0] - arrays["weights"]).max()
    apart = np.abs(found[0] - found[1]).max()
    if not apart < 1e-3 * moved:
        raise RuntimeError(f"fedq and the plain loop differ by {apart} after moving {moved}")


def _accuracy(experiment: Experiment, path: Path) -> float:
    """Return the test accuracy of the weights that a contestant left."""
    dataset = load(experiment.data)
    trainer = trainer_for(
        _config(experiment.model),
        _config(experiment.quantization),
        dataset.input_shape,
        dataset.classes,
    )
    trainer.load(np.load(path))
    return trainer.evaluate(dataset.test_inputs(), dataset.y_test).accuracy


def _summary(contestant: Contestant, floor: Contestant) -> dict[str, Any]:
    cpu = [turn["cpu"] for turn in contestant.turns]
    ratios = [a["cpu"] / b["cpu"] for a, b in zip(contestant.turns, floor.turns, strict=True)]
    return {
        "name": contestant.name,
        "cpu_ms_min": min(cpu),
        "cpu_ms_median": statistics.median(cpu),
        "busiest_cpu_ms_median": statistics.median(t["busiest"] for t in contestant.turns),
        "wall_ms_min": min(turn["wall"] for turn in contestant.turns),
        "wall_ms_median": statistics.median(turn["wall"] for turn in contestant.turns),
        "ratio_min": min(cpu) / min(turn["cpu"] for turn in floor.turns),
        "ratio_median": statistics.median(ratios),
        "overhead_ms_min": min(cpu) - min(turn["cpu"] for turn in floor.turns),
        "accuracy": contestant.accuracy,
        "rounds": contestant.done,
        "startup_s": contestant.startup_s,
        "startup_cpu_s": contestant.startup_cpu_s,
        "updates_per_turn": contestant.rounds * contestant.cohort,
        "turns": contestant.turns,
    }


def _table(group: Mapping[str, Any]) -> str:
    columns = {
        "name": "engine",
        "cpu_ms_min": "CPU ms/update, least",
        "cpu_ms_median": "median",
        "ratio_min": "to plain loop, of least",
        "ratio_median": "median of turns",
        "overhead_ms_min": "overhead, ms",
        "wall_ms_min": "wall ms/update, least",
        "wall_ms_median": "median wall",
        "startup_s": "start-up, s",
        "startup_cpu_s": "start-up, CPU s",
        "rounds": "rounds",
        "accuracy": "accuracy",
    }
    return _common.table(columns, group["contestants"])


def _ratios(group: Mapping[str, Any]) -> str:
    """Say what the group shows in one paragraph."""
    by_name = {entry["name"]: entry for entry in group["contestants"]}
    lines = []
    one, two = by_name.get(ONE), by_name.get(TWO)
    for other in (TEMPLATE, RAY, PFL):
        if one and other in by_name:
            ratio = by_name[other]["cpu_ms_min"] / one["cpu_ms_min"]
            median = by_name[other]["cpu_ms_median"] / one["cpu_ms_median"]
            lines.append(f"{other}: {ratio:.2f} (median {median:.2f}) times fedq's CPU time.")
    if one and two:
        wall = one["wall_ms_min"] / two["wall_ms_min"]
        median = one["wall_ms_median"] / two["wall_ms_median"]
        bound = max(two["busiest_cpu_ms_median"], two["cpu_ms_median"] / 2)
        lines.append(
            f"Two workers have {wall:.2f} (median {median:.2f}) times the throughput of one in "
            f"wall time, {one['cpu_ms_median'] / bound:.2f} times on two free cores; load average "
            f"at the start {group['load_average'][0][0]:.2f}, "
            f"at the end {group['load_average'][1][0]:.2f}."
        )
    return " ".join(lines)


def _pfl_python(given: str | None, folder: Path, text: list[str]) -> str | None:
    """Return a Python with pfl: the one given, or a fresh environment over this one's packages."""
    if given:
        return given
    environment = folder / "pfl"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    own = [path for path in sys.path if path.endswith("site-packages")]
    packages = next(environment.glob("lib/python*/site-packages"))
    # The same torch for all: what is installed here is visible there, after what pfl brings.
    (packages / "host.pth").write_text("\n".join(own) + "\n")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "pfl==0.6.*"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return str(python)
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    text.append(f"pfl is left out: it could not be installed here ({reason}).")
    return None


if __name__ == "__main__":
    main()
