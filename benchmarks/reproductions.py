"""The field's reference methods at equal work: bytes to 99 % of the float accuracy.

Every method of `conf/method` on every task, IID and Dirichlet(0.3), by seeds: one
`fedq simulate -m experiment=reproductions`, then the report's figures. The sweep is resumable:
the same command goes on where it was stopped, and a larger grid keeps what is there.

Keywords come from a folder of wav files named CLASS_SPEAKER_INDEX.wav, such as the Free Spoken
Digit Dataset's: `--keywords FOLDER` makes log-mel spectrograms of them (index below 5: test).

    python benchmarks/reproductions.py --work runs/reproductions --keywords FOLDER      # all
    python benchmarks/reproductions.py --tasks images --partitions dirichlet03 --rounds 25 --seeds 2
"""

from __future__ import annotations

import os
import subprocess
import sys
import wave
from pathlib import Path

import _common
import numpy as np
from numpy.typing import NDArray

from fedq import config
from fedq.report import Study, study_tables
from fedq.report.runs import survey
from fedq.report.study import remarks
from fedq.report.tables import size

WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedq" / "reproductions"
QUICK = ("data=digits", "clients=6", "clients_per_round=3", "local_epochs=1", "engine.workers=1")
RATE, WINDOW, HOP, BINS, FRAMES = 8000, 256, 128, 40, 61  # one second at 8 kHz
TEST_INDICES = 5


def spectrogram(sound: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return log energies of a second of sound, (FRAMES, BINS), on the mel scale."""
    sound = np.pad(sound[:RATE], (0, max(0, RATE - len(sound))))
    starts = HOP * np.arange(FRAMES)
    frames = np.stack([sound[s : s + WINDOW] for s in starts]) * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(WINDOW, 1 / RATE) / 700)
    centres = np.linspace(mel[1], mel[-1], BINS + 2)
    width = centres[1] - centres[0]
    weights = np.maximum(0, 1 - np.abs(mel[:, None] - centres[None, 1:-1]) / width)
    return np.asarray(np.log(power @ weights + 1e-6), np.float32)


def make_keywords(folder: Path, path: Path) -> None:
    """Write the spectrograms of all wav files of a folder as an npz file of a data set."""
    columns: dict[str, list[object]] = {name: [] for name in ("x", "y", "client", "test")}
    for file in sorted(folder.rglob("*.wav")):
        label, speaker, index = file.stem.split("_")
        with wave.open(str(file)) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 2**15
        columns["x"].append(spectrogram(samples))
        columns["y"].append(label)
        columns["client"].append(speaker)
        columns["test"].append(int(index) < TEST_INDICES)
    x, y, client, test = (np.array(column) for column in columns.values())
    np.savez(
        path, x_train=x[~test], y_train=y[~test], x_test=x[test], y_test=y[test],
        client_train=client[~test],
    )  # fmt: skip


def main() -> int:
    options = _common.parser(__doc__)
    options.add_argument("--work", type=Path, default=WORK, help="directory of the runs")
    options.add_argument("--keywords", type=Path, help="folder of CLASS_SPEAKER_INDEX.wav")
    options.add_argument("--tasks", default="images,keywords,activity")
    options.add_argument("--partitions", default="iid,dirichlet03")
    options.add_argument("--methods", default="glob(*)")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--jobs", type=int, help="runs at a time (default: as cores allow)")
    options.add_argument("--tables", action="store_true", help="only tables, of runs that ended")
    chosen = options.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    tasks = chosen.tasks.split(",")
    extra: tuple[str, ...] = ()
    if chosen.quick:
        tasks, extra = ["images"], QUICK
        chosen.partitions, chosen.methods, chosen.seeds, chosen.rounds = "iid", "fedavg,fedq", 2, 2
        chosen.work = chosen.out / "runs"
    elif "keywords" in tasks and chosen.keywords is None:
        tasks.remove("keywords")
        print("no --keywords FOLDER: that task is left out", file=sys.stderr)
    for task in () if chosen.tables else tasks:
        more = extra
        if task == "keywords":
            path = (chosen.work / "keywords.npz").resolve()
            if not path.exists():
                make_keywords(chosen.keywords, path)
            more = (f"data.path={path}",)
        command = [
            *(sys.executable, "-m", "fedq.cli", "simulate", "-m", "experiment=reproductions"),
            *(f"task={task}", f"partition={chosen.partitions}", f"method={chosen.methods}"),
            *(f"seed=range({chosen.seed},{chosen.seed + chosen.seeds})",),
            *(f"rounds={chosen.rounds}", f"run_dir={chosen.work}", *more),
            *((f"--jobs={chosen.jobs}",) if chosen.jobs else ()),
        ]
        status = subprocess.run(command, check=False).returncode
        if status == 130:
            return status
    found = survey([chosen.work])
    study = Study.of(found.runs)
    plain = config.load([])
    rounds = sorted({run.planned for run in found.runs})
    parts = [run.config["partition"] for run in found.runs]
    skews = sorted({f"{part['name']} {part.get('alpha', '')}".strip() for part in parts})
    doubts = [f"left out: {reason}" for reason in found.left_out.values()] + remarks(found.runs)
    _common.write(
        chosen.out,
        "reproductions",
        "Reference methods at equal work",
        [
            f"Partition: {', '.join(skews)}. {', '.join(map(str, rounds))} rounds of "
            f"{plain.clients_per_round} clients, "
            f"{plain.local_epochs} local epochs, learning rate {plain.learning_rate:g} for all; "
            "nothing was tuned for any method. The float run of the same task and seed sets the "
            "level. Methods of this project are judged by their deployed int8 model, the others by "
            "their float one. Most reference methods leave the downlink in float32, as published: "
            "`uplink to there` compares the uplink alone. An FP8 "
            "federation is not among them: there is no FP8 quantizer here.",
            "Bytes of both directions until 99 % of the float accuracy, and how many times fewer "
            "than float there (mean over seeds; `2 of 3`: so many seeds got there):",
            headline(study),
            "All figures:",
            study_tables.to_markdown(study),
            *doubts,
        ],
        {
            "rounds": rounds,
            "seeds": sorted({run.seed for run in found.runs if run.seed is not None}),
            "methods": [study_tables.record(study, method) for method in study.methods],
        },
    )
    return 0


def headline(study: Study) -> str:
    """Return a table of methods by tasks, those that need the fewest bytes first."""
    rows: dict[str, dict[str, str]] = {}
    needed: dict[str, float] = {}
    for method in study.methods:
        reached = study.to_reach(method)
        text = f"{reached.reached} of {reached.of}"
        if reached.ratio is not None and reached.spent is not None:
            text = f"{size(reached.spent.mean)}, {reached.ratio:.3g}x"
        rows.setdefault(method.label, {"method": method.label})[method.task] = text
        cost = 1 / reached.ratio if reached.ratio else 1e9 - reached.reached
        needed[method.label] = needed.get(method.label, 0.0) + cost
    ordered = sorted(rows, key=lambda label: needed[label])
    columns = {"method": "method"} | {task: task for task in study.tasks}
    return _common.table(columns, [rows[label] for label in ordered])


if __name__ == "__main__":
    sys.exit(main())
