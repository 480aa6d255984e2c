"""The same app in Flower's own processes: ``flwr run``, and a device's node configuration."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedq import build, node
from fedq.data.base import load
from fedq.errors import ConfigError
from tests.command import run_new

# isort: split
from flwr.app import Context, RecordDict

REPOSITORY = Path(__file__).parents[2]
BUNDLED = ("fedq", "clients", "server", "conf", "pyproject.toml")
OPTIONS = ("data=digits", "codec=top_k_feedback", "clients_per_round=3", "baseline=false")
START_S, RUN_S = 90, 900


def flower(name: str) -> str:
    """The command beside this interpreter, whatever PATH says."""
    return str(Path(sys.executable).with_name(name))


def processes_with(variable: str) -> list[int]:
    """Processes whose environment holds ``variable``: all that descends from this test, Ray too."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and variable.encode() in (
                (entry / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A local SuperLink of these tests' own, as ``flwr run`` would start it; its environment."""
    tmp_path = tmp_path_factory.mktemp("superlink")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    home = tmp_path / "flwr"
    home.mkdir()
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [flower("flower-superlink"), "--insecure", "--simulation", "--port", port]
    log = (tmp_path / "superlink.log").open("wb")
    # flwr gives its own SuperLink 15 s to start, too few for a busy machine.
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        end = time.monotonic() + START_S
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            time.sleep(0.2)
        else:
            pytest.fail("no SuperLink: " + (tmp_path / "superlink.log").read_text())
        yield environment
    finally:
        mine = f"FLWR_HOME={home}"
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        while left := processes_with(mine):
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            time.sleep(0.1)
        process.wait()
        log.close()


def flwr_run(app: Path, environment: dict[str, str], *overrides: str) -> str:
    return run_app(app, environment, f'hydra="{" ".join(overrides)}"')


def run_app(app: Path, environment: dict[str, str], run_config: str) -> str:
    done = subprocess.run(
        [
            flower("flwr"), "run", ".", "--stream",
            "--federation-config",
            "num-supernodes=6 client-resources-num-cpus=1 init-args-num-cpus=2",
            "--run-config", run_config,
        ],
        cwd=app,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_S,
    )  # fmt: skip
    return done.stdout + done.stderr


def fedq_simulate(app: Path, *overrides: str) -> None:
    """Run ``fedq simulate`` with the app's own code: -m puts the working directory first."""
    run_new("simulate", *overrides, cwd=app, timeout=RUN_S).check_returncode()


def summary(run: Path) -> dict[str, object]:
    return json.loads((run / "summary.json").read_text())  # type: ignore[no-any-return]


def bundle(tmp_path: Path) -> Path:
    """Copy the app; flwr refuses directories whose name is not a package's."""
    app = tmp_path / "app"
    for name in BUNDLED:
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, app / name)
    return app


@pytest.mark.slow
def test_flwr_run_and_its_resumption_give_the_model_of_fedq_simulate(
    superlink: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    app = bundle(tmp_path)
    run, local = tmp_path / "flower", tmp_path / "local"
    text = flwr_run(app, superlink, *OPTIONS, "rounds=2", f"run_dir={run}")
    assert (run / "summary.json").exists(), text  # flwr run exits with 0 on failure, too
    assert summary(run)["rounds"] == 2, text
    assert (run / "accuracy_vs_bytes.png").exists()
    text = flwr_run(app, superlink, f"resume={run}", "rounds=3")
    fedq_simulate(app, *OPTIONS, "clients=6", "rounds=3", f"run_dir={local}")
    for key in ("rounds", "clients", "rejected", "uplink_bytes", "accuracy", "model_sha256"):
        assert summary(run)[key] == summary(local)[key], (key, text)


@pytest.mark.slow
def test_masks_and_seals_over_flower_s_own_messages(
    superlink: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    app, run, local = bundle(tmp_path), tmp_path / "flower", tmp_path / "local"
    options = ("data=digits", "clients_per_round=3", "baseline=false", "rounds=2")
    masked = ("secure_aggregation=secagg", "sealed=true")
    text = flwr_run(app, superlink, *options, *masked, f"run_dir={run}")
    assert (run / "summary.json").exists(), text
    clear = ("secure_aggregation=clear", "clients=6", f"run_dir={local}")
    fedq_simulate(app, *options, *clear)
    for key in ("rounds", "updates", "rejected", "accuracy", "model_sha256"):
        assert summary(run)[key] == summary(local)[key], (key, text)


@pytest.mark.slow
def test_a_stock_app_with_fedq_s_codecs(superlink: dict[str, str], tmp_path: Path) -> None:
    app = tmp_path / "quickstart"
    shutil.copytree(REPOSITORY / "examples" / "flower_quickstart", app)
    text = run_app(app, superlink, "num-server-rounds=2")
    assert "times less" in text, text
    assert "Received 3 results and 0 failures" in text, text


# --- what a node reads of the two configurations ------------------------------------------------


def context(node_config: dict[str, object], hydra: str = "") -> Context:
    return Context(
        run_id=7,
        node_id=4711,
        node_config=node_config,  # type: ignore[arg-type]
        state=RecordDict(),
        run_config={"hydra": hydra},
    )


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)).astype(np.float32), np.arange(12) % 3
    path = tmp_path / "own.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    return path


def test_a_device_trains_on_its_own_data_whatever_the_run_says(
    own_data: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    device = {"data": "npz", "data-path": str(own_data), "state-dir": str(state)}
    asked = context({**device, "partition-id": 3}, "data=digits plugins=[missing.py]")
    site = node._site(asked)
    assert isinstance(site, node.DeviceSite)
    x, y = site.examples(asked)
    assert x.shape == (12, 5)
    assert np.array_equal(y, np.arange(12) % 3)
    assert site.identity(asked) == 3
    assert site.identity(context(device)) == 4711
    assert site.store(asked).directory == state / "7"


def test_a_simulated_node_is_a_partition_of_the_runs_data(tmp_path: Path) -> None:
    # The default cohort of 10 is more than these two nodes.
    nodes = [
        context({"partition-id": i, "num-partitions": 2}, f"data=digits run_dir={tmp_path}")
        for i in range(2)
    ]
    site = node._site(nodes[1])
    labels = [site.examples(asked)[1] for asked in nodes]
    assert all(len(y) for y in labels)
    whole = load(build("data", "digits")).y_train
    assert np.array_equal(np.sort(np.concatenate(labels)), np.sort(whole))
    assert site.store(nodes[0]).directory == tmp_path / "clients"


@pytest.mark.parametrize(
    ("node_config", "hydra", "message"),
    [
        ({"num-partitions": 2}, "plugins=[evil.py]", "plugins"),
        ({"num-partitions": 2}, "plugins=[evil.py] plugins=[]", "plugins"),
        ({"num-partitions": 2}, "data=digist", "did you mean 'digits'"),
        ({"num-partitions": 2}, "data=digits attack=alie", "use attack= with fedq simulate"),
        ({"num-partitions": 2}, "data='digits", "cannot read"),
        ({"num-partitions": 2}, "resume=nowhere", "nowhere"),
        ({}, "data=digits", "--node-config"),
        ({"data": "npz"}, "", "data.path"),
        ({"data": "npz", "data-paht": "x"}, "", "did you mean 'path'"),
    ],
)
def test_what_a_node_refuses(
    node_config: dict[str, object],
    hydra: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        node._site(context(node_config, hydra))


def test_a_run_with_plugins_does_not_resume_by_wire(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("plugins: [evil.py]\n")
    with pytest.raises(ConfigError, match="resume it with fedq simulate"):
        node.experiment_of(context({}, f"resume={tmp_path}"))
