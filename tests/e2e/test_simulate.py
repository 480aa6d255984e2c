"""``fedq simulate`` as a user runs it: real processes, real kills, the same result every time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fedq import ConfigError, build, config, simulation
from fedq.data.base import load
from fedq.results import RunDirectory, read_model
from fedq.training import trainer_for
from tests.command import Command, run, run_new

RUN_S = 300
SMALL = (
    "data=digits",
    "clients=12",
    "clients_per_round=4",
    "local_epochs=1",
    "rounds=4",
    "baseline=false",
)
CONTRACT = (
    "accuracy float_accuracy rounds clients parameters uplink_bytes downlink_bytes "
    "uplink_bits_per_parameter downlink_bits_per_parameter float32_uplink_bytes seconds seed "
    "model_sha256 versions"
)
EXPERIMENTS = sorted(path.stem for path in (config.conf_directory() / "experiment").glob("*.yaml"))


def fedq(
    *arguments: object, cwd: Path, check: bool = True, new: bool = False
) -> subprocess.CompletedProcess[str]:
    done = (run_new if new else run)(*arguments, cwd=cwd, timeout=RUN_S)
    if check:
        assert done.returncode == 0, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


def simulate(cwd: Path, name: str, *overrides: object, new: bool = False) -> dict[str, object]:
    fedq("simulate", *SMALL, f"run_dir={name}", *overrides, cwd=cwd, new=new)
    return summary(cwd / name)


def summary(run: Path) -> dict[str, object]:
    return json.loads((run / "summary.json").read_text())  # type: ignore[no-any-return]


def rounds(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reference")
    simulate(directory, "run", "engine.workers=2", new=True)
    return directory / "run"


def test_the_run_directory_holds_the_contract(reference: Path) -> None:
    found = summary(reference)
    for key in CONTRACT.split():
        assert key in found, key
    names = {path.name for path in reference.iterdir()}
    assert names >= {
        "config.yaml",
        "rounds.jsonl",
        "summary.json",
        "model.safetensors",
        "checkpoint",
        "accuracy_vs_bytes.png",
    }
    digest = hashlib.sha256((reference / "model.safetensors").read_bytes()).hexdigest()
    assert found["model_sha256"] == digest
    assert [record["round"] for record in rounds(reference)] == [0, 1, 2, 3, 4]
    for direction in ("uplink_bytes", "downlink_bytes"):
        assert found[direction] == sum(record[direction] for record in rounds(reference))  # type: ignore[misc]


@pytest.mark.parametrize("workers", [1, 2])
def test_same_seed_same_model_for_any_number_of_workers(
    reference: Path, tmp_path: Path, workers: int
) -> None:
    again = simulate(tmp_path, "run", f"engine.workers={workers}")
    assert again["model_sha256"] == summary(reference)["model_sha256"]


def test_another_seed_is_another_model(reference: Path, tmp_path: Path) -> None:
    other = simulate(tmp_path, "run", "seed=1")
    assert other["model_sha256"] != summary(reference)["model_sha256"]


RAY_NODES = """
import sys
from ray.cluster_utils import Cluster

small = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=small)
try:
    cluster.add_node(**small)
    print(cluster.address, flush=True)
    sys.stdin.read()
finally:
    cluster.shutdown()
"""


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_model(reference: Path, tmp_path: Path) -> None:
    """Two Ray nodes of one CPU each; tests/e2e/test_secure.py has Ray on one machine."""
    pytest.importorskip("ray")
    with subprocess.Popen(
        [sys.executable, "-c", RAY_NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            address = next(line for line in cluster.stdout if ":" in line).strip()
            again = simulate(tmp_path, "run", "engine=ray", f"engine.address={address}", new=True)
        finally:
            cluster.stdin.close()
    assert again["model_sha256"] == summary(reference)["model_sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"address": "127.0.0.1:1"}, "does not answer"),
        ({"address": "head"}, "HOST:PORT"),
        ({"address": "head:6379", "workers": 2}, "workers must be 0 with engine.address"),
    ],
)
def test_a_ray_cluster_that_is_not_there_is_named(options: dict[str, object], message: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=message):
        build("engine", "ray", **options).run(lambda grid: None, lambda: None, 3)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def run(codec: str) -> Path:
        directory = tmp_path_factory.mktemp(codec)
        simulate(directory, "whole", f"codec={codec}", *LONG)
        return directory / "whole"

    return run


#: More rounds than the server remembers what it sent, and an optimiser with a state.
LONG = ("rounds=24", "downlink_history=2", "server_optimizer=adam", "uplink_context=true")


@pytest.mark.parametrize(
    ("codec", "how"),
    [
        ("dithered", signal.SIGKILL),
        ("top_k_feedback", signal.SIGINT),
        ("dtcq", signal.SIGKILL),
    ],
)
def test_killed_and_resumed_is_equal_to_uninterrupted(
    tmp_path: Path, codec: str, how: signal.Signals, uninterrupted: Callable[[str], Path]
) -> None:
    options = (f"codec={codec}", *LONG)
    whole = summary(uninterrupted(codec))
    process = Command("simulate", *SMALL, *options, "run_dir=cut", cwd=tmp_path, own_session=True)
    lines = tmp_path / "cut" / "rounds.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (lines.exists() and lines.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal sends it: to the workers, too
    else:
        process.kill()
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert not (tmp_path / "cut" / "summary.json").exists(), "it finished before the kill"
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "resume=cut" in errors
    done = fedq("simulate", "resume=cut", "engine.workers=1", cwd=tmp_path)
    assert "round 24/24" in done.stdout
    assert summary(tmp_path / "cut")["model_sha256"] == whole["model_sha256"]
    assert [record["round"] for record in rounds(tmp_path / "cut")] == list(range(25))
    for key in ("uplink_bytes", "downlink_bytes", "accuracy", "rejected"):
        assert summary(tmp_path / "cut")[key] == whole[key]
    assert whole["rejected"] == {}


def test_a_finished_run_can_be_extended(reference: Path, tmp_path: Path) -> None:
    simulate(tmp_path, "run", "rounds=2")
    fedq("simulate", "resume=run", "rounds=4", cwd=tmp_path)
    assert "rounds: 4" in (tmp_path / "run" / "config.yaml").read_text()
    assert summary(tmp_path / "run")["model_sha256"] == summary(reference)["model_sha256"]


def test_the_baseline_runs_beside(tmp_path: Path) -> None:
    done = fedq("simulate", *SMALL, "baseline=true", "run_dir=run", cwd=tmp_path)
    float_run, quantized = summary(tmp_path / "run" / "baseline"), summary(tmp_path / "run")
    assert float_run["accuracy"] == float_run["float_accuracy"]
    assert quantized["uplink_bytes"] < float_run["uplink_bytes"] / 10  # type: ignore[operator]
    assert quantized["downlink_bytes"] < float_run["downlink_bytes"] / 3  # type: ignore[operator]
    assert "float FedAvg" in done.stdout
    again = fedq("report", "run", cwd=tmp_path)
    assert "float FedAvg" in again.stdout


def recordings(folder: Path) -> Path:
    """Write noises named as recordings of spoken digits are."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for digit, speaker, number in np.ndindex(2, 3, 9):
        with wave.open(str(folder / f"{digit}_speaker{speaker}_{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(rng.integers(-999, 999, 4000).astype("<i2").tobytes())
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_one_round(name: str, tmp_path: Path) -> None:
    short = ["rounds=1", "local_epochs=1", "clients_per_round=3"]  # the fewest of a masked sum
    if name == "keyword_spotting":  # its recordings need a download
        short.append(f"data.path={recordings(tmp_path / 'sounds')}")
    experiment = config.load([f"experiment={name}", *short])
    outcome = simulation.run_experiment(experiment, tmp_path / "run")
    assert outcome.summary["rounds"] == 1
    assert outcome.summary["rejected"] == {}


def test_the_baseline_is_the_experiment_of_its_name(tmp_path: Path) -> None:
    fedq("simulate", *SMALL, "rounds=2", "baseline=true", "run_dir=both", cwd=tmp_path)
    alone = simulate(tmp_path, "alone", "rounds=2", "experiment=float_baseline")
    assert summary(tmp_path / "both" / "baseline")["model_sha256"] == alone["model_sha256"]


def test_the_accuracy_is_that_of_the_saved_model(reference: Path) -> None:
    """What summary.json says of the deployed model, from model.safetensors alone."""
    tensors, task = read_model(reference)
    dataset = load(build("data", "digits"))
    keys = ("model", "quantization", "input_shape", "classes")
    trainer = trainer_for(**{key: task[key] for key in keys})
    trainer.load(
        trainer.layout.flatten({k: tensors[k] for k in trainer.layout.names}),
        trainer.state_layout.flatten({k: tensors[k] for k in trainer.state_layout.names}),
    )
    judged = trainer.evaluate(dataset.test_inputs(), dataset.y_test)
    assert judged.accuracy == summary(reference)["accuracy"]


def test_a_sweep_runs_every_cell_and_reports_failures(tmp_path: Path) -> None:
    done = fedq(
        "simulate", "-m", *SMALL, "rounds=3", "codec=sign,ternary", "learning_rate=0.1,1e30",
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "[4/4]" in done.stdout
    assert len(list(tmp_path.glob("runs/*/*/summary.json"))) == 2
    assert len(list(tmp_path.glob("runs/*/accuracy_vs_bytes.png"))) == 1


def test_a_sweep_with_a_misspelling_runs_nothing(tmp_path: Path) -> None:
    done = fedq("simulate", "-m", *SMALL, "codec=sign,sgin", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "did you mean 'sign'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_codec_that_is_not_used_is_named(tmp_path: Path) -> None:
    options = ("data=digits", "clients=6", "clients_per_round=6", "rounds=1", "baseline=false")
    asked = ("codec=sign", "secure_aggregation=secagg")
    done = fedq("simulate", *options, *asked, "run_dir=run", cwd=tmp_path)
    assert "codec=sign is not used" in done.stdout + done.stderr
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert told["overrides"] == [*options, *asked, "run_dir=run"]


def test_a_run_moves_and_resumes_from_another_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "a folder, with=signs", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    digits = load(build("data", "digits"))
    np.savez(
        here / "my data.npz",
        x_train=digits.x_train,
        y_train=digits.y_train,
        x_test=digits.x_test,
        y_test=digits.y_test,
    )
    options = ("data=npz", "data.path=my data.npz", "clients=5", "rounds=1", "baseline=false")
    done = fedq("simulate", *options, "run_dir=ru n", cwd=here)
    assert "all take part" in done.stdout + done.stderr
    shutil.move(here / "ru n", there / "moved run")
    fedq("simulate", "resume=moved run", "rounds=2", cwd=there)
    assert summary(there / "moved run")["rounds"] == 2
    assert summary(there / "moved run")["clients"] == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_service_manager_may_stop_it(tmp_path: Path, number: signal.Signals) -> None:
    process = Command("simulate", *SMALL, "rounds=500", "run_dir=run", cwd=tmp_path)
    lines = tmp_path / "run" / "rounds.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "resume=run" in errors


# --- bad input ----------------------------------------------------------------------------------


def fails(cwd: Path, status: int, message: str, *overrides: object) -> str:
    done = fedq("simulate", *SMALL, *overrides, cwd=cwd, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fedq: ")
    assert message in last, last
    return done.stdout + done.stderr


def test_wrong_options(tmp_path: Path) -> None:
    fails(tmp_path, 2, "did you mean 'uniform'", "codec=unifrom")
    fails(tmp_path, 2, "unknown flag '--rounds'", "--rounds")
    fails(tmp_path, 2, "missing.npz", "data=npz", "data.path=missing.npz")
    fails(tmp_path, 2, "partition=natural needs a client id", "partition=natural")
    fails(tmp_path, 2, "nowhere", "resume=nowhere")
    np.savez(tmp_path / "odd.npz", x=np.zeros(3))
    fails(tmp_path, 2, "x_train", "data=npz", "data.path=odd.npz")
    (tmp_path / "odd.npz").unlink()
    assert not list(tmp_path.iterdir())


def test_unwritable_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(tmp_path, 2, "file", "run_dir=file/run")


def test_two_runs_into_one_directory(reference: Path, tmp_path: Path) -> None:
    fails(tmp_path, 2, "already holds a run", f"run_dir={reference}")
    with RunDirectory.open(reference):
        done = fedq("simulate", f"resume={reference}", "rounds=9", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "in use by another run" in done.stderr


def test_more_clients_than_examples(tmp_path: Path) -> None:
    done = fedq(
        "simulate", *SMALL, "clients=3000", "clients_per_round=4", "rounds=1", "run_dir=run",
        cwd=tmp_path,
    )  # fmt: skip
    assert "have no data and take no part" in done.stdout + done.stderr


def test_a_diverging_learning_rate(tmp_path: Path) -> None:
    text = fails(tmp_path, 1, "3 rounds in a row", "learning_rate=1e30", "run_dir=run")
    assert "dropped" in text
    assert (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    simulate(tmp_path, "run", "rounds=1")
    path = tmp_path / "run" / "config.yaml"
    (tmp_path / "run" / "summary.json").unlink()
    path.write_text(path.read_text().replace("name: auto", "name: mlp"))
    done = fedq("simulate", "resume=run", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "another model" in done.stderr


FULL_AFTER_ROUND_2 = """
import resource, signal, sys
from contextlib import contextmanager
from collections.abc import Callable
from functools import cache
from pathlib import Path
from fedq import config, simulation
from fedq.errors import FedqError

@contextmanager
def watch(experiment):
    def observe(record):
        if record["round"] == 2:  # from here on, every write beyond 4 kB fails
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    yield observe

try:
    simulation.run_experiment(config.load(sys.argv[1:]), Path("run"), watch=watch)
except FedqError as error:
    sys.exit(f"fedq: {error}")
"""


def test_a_full_disk_loses_no_checkpoint(reference: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_AFTER_ROUND_2, *SMALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fedq: ")
    assert [path.name for path in (tmp_path / "run" / "checkpoint").glob("*.safetensors")] == [
        "round-000002.safetensors"
    ]
    fedq("simulate", "resume=run", cwd=tmp_path)
    assert summary(tmp_path / "run")["model_sha256"] == summary(reference)["model_sha256"]


# --- other people's data ------------------------------------------------------------------------


def _foreign_images(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten classes of 20 x 24 colour images: a bright bar at a class's place and angle."""
    y = rng.integers(0, 10, n)
    x = rng.normal(60, 40, (n, 20, 24, 3))
    rows = np.arange(20)
    for i, label in enumerate(y):
        at = 2 + 2 * (label % 5) + rng.integers(0, 2)
        slope = 0.8 if label >= 5 else 0.0
        columns = np.clip(at * 1.6 + slope * (rows - 10), 0, 23).astype(int)
        x[i, rows, columns] += 150
    return x.clip(0, 255).astype(np.uint8), y


def _foreign_series(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Six classes of two-channel series: a class's frequency at a random phase, and drift."""
    y = rng.integers(0, 6, n)
    t = np.arange(96) / 96
    phase = rng.uniform(0, 2 * np.pi, (n, 1))
    wave = np.sin(2 * np.pi * (2 + 3 * y)[:, None] * t + phase)
    x = np.stack([wave + rng.normal(0, 0.5, wave.shape), rng.normal(0, 1, wave.shape)], -1)
    return (100 * x + 500).astype(np.float32), y


@pytest.mark.slow
@pytest.mark.parametrize("make", [_foreign_images, _foreign_series])
def test_foreign_data_reaches_float_accuracy(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    (x_train, y_train), (x_test, y_test) = make(rng, 1600), make(rng, 500)
    np.savez(tmp_path / "data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    fedq(
        "simulate", "data=npz", "data.path=data.npz", "clients=20", "rounds=15",
        "local_epochs=3", "run_dir=run",
        cwd=tmp_path,
    )  # fmt: skip
    quantized, plain = summary(tmp_path / "run"), summary(tmp_path / "run" / "baseline")
    assert plain["accuracy"] > 0.9  # type: ignore[operator]
    assert quantized["accuracy"] >= plain["accuracy"] - 0.01  # type: ignore[operator]
