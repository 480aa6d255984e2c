"""A run on a fleet: the process of ``fedq fleet run`` is Flower's ServerApp.

Flower would start it as a child of the SuperLink, out of an archive of the app. Here it is the
command itself, with installed code: its progress is on the terminal, it reads ``resume=RUN`` and
the test data where the user stands, and it outlives a SuperLink that dies and comes back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

import fedq
from fedq import config, server, simulation
from fedq.data.base import load
from fedq.errors import ConfigError, FedqError
from fedq.experiment import Experiment
from fedq.fleet import control, flower
from fedq.fleet.device import VERSION_KEY
from fedq.fleet.files import Fleet, locked, write_json
from fedq.fleet.grid import FleetGrid
from fedq.fleet.link import Retrying
from fedq.fleet.sampling import FittingGrid
from fedq.node import RUN_KEY
from fedq.results import default_run_path, read_config

LOG = logging.getLogger("fedq")
Say = Callable[[str], None]
#: In a run directory: how devices know the run.
DEVICES_KNOW, LEAST = "fleet.json", "min_memory_mb"
HEARTBEAT_S, TASK_TRIES = 20.0, 100

_APP = {
    "pyproject.toml": """\
[project]
name = "fedq-fleet"
version = "{version}"
description = "fedq, installed on every device"
dependencies = []
[tool.flwr.app]
publisher = "fedq"
[tool.flwr.app.components]
serverapp = "fedq_fleet_app.server:app"
clientapp = "fedq_fleet_app.client:app"
[tool.flwr.app.config]
hydra = ""
{run_key} = ""
{version_key} = ""
""",
    "fedq_fleet_app/__init__.py": "",
    # For Flower's own nodes; devices of a fleet run their installed code.
    "fedq_fleet_app/client.py": """\
from flwr.clientapp import ClientApp

from fedq.node import client_of

app = ClientApp()


@app.train()
def train(message, context):
    return client_of(context).train(message, context)
""",
    "fedq_fleet_app/server.py": """\
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    raise RuntimeError("start runs with fedq fleet run")
""",
}


def experiment_of(overrides: Sequence[str], clients: int) -> tuple[Experiment, bool]:
    """Return the experiment of a command line over so many devices, and whether it resumes."""
    overrides = list(overrides)
    resume = config.option(overrides, "resume")
    if resume is not None:
        saved = read_config(Path(str(resume)))
        return config.load_resumed(saved, overrides).replace(run_dir=str(resume)), True
    if config.option(overrides, "clients") not in (None, clients):
        raise ConfigError(f"this fleet has {clients} devices; leave clients= out")
    experiment = config.load(overrides)
    path = experiment.run_dir or str(default_run_path())
    return simulation.anchored(experiment.replace(clients=clients, run_dir=path)), False


def run(
    fleet: Fleet,
    overrides: Sequence[str],
    *,
    wait_s: float,
    min_memory_mb: int | None = None,
    watch: simulation.Watch = simulation.no_watch,
    say: Say = LOG.info,
) -> Path:
    """Run an experiment on the devices and return its run directory.

    Args:
      fleet: Whose server is up.
      overrides: As for ``fedq simulate``.
      wait_s: How long to wait for devices. After that a run starts if the quorum is on line.
      min_memory_mb: Devices with less are not asked; None is no limit, or the resumed run's.
      watch: Shows progress.
      say: Shows what is waited for.

    Raises:
      FedqError: If there is no quorum, or the run fails.
    """
    flower.require_known()
    if not fleet.devices:
        raise ConfigError("this fleet has no devices; add some with fedq fleet add NAME")
    experiment, resumed = experiment_of(overrides, len(fleet.devices))
    path = Path(str(experiment.run_dir)).expanduser().resolve()
    dataset = load(experiment.data)
    with locked(fleet.path("run.lock"), "a run is going on in this fleet"):
        with control.connected(fleet) as client:
            control.sync(client, fleet)
        _wait_for_devices(fleet, experiment.quorum, wait_s, say)
        with (
            simulation.run_directory(experiment, path, resumed, overrides) as directory,
            watch(experiment) as observer,
        ):
            known, least = _devices_know(path, overrides, min_memory_mb)
            write_json(fleet.path("run.json"), {"path": str(path), "rounds": experiment.rounds})
            with _grid(fleet, known) as grid:
                fitting = FittingGrid(grid, fleet, least)
                server.run(
                    fitting,
                    experiment,
                    dataset,
                    directory,
                    capacities=fitting.capacities,
                    observer=observer,
                )
    return path


def _devices_know(
    path: Path, overrides: Sequence[str], min_memory_mb: int | None
) -> tuple[dict[str, str], int]:
    """Return the run's configuration for devices, and their least memory.

    A resumed run's are those of its beginning.
    """
    file = path / DEVICES_KNOW
    if not file.exists():
        own = ("run_dir=", "resume=", "plugins=", "engine")
        text = shlex.join(item for item in overrides if not item.startswith(own))
        write_json(file, {"hydra": text, RUN_KEY: secrets.token_hex(8), LEAST: min_memory_mb or 0})
    try:
        known = json.loads(file.read_text())
        least = int(known[LEAST]) if min_memory_mb is None else min_memory_mb
        return {
            "hydra": str(known["hydra"]),
            RUN_KEY: str(known[RUN_KEY]),
            VERSION_KEY: fedq.__version__,
        }, least
    except (ValueError, KeyError, TypeError):
        raise FedqError(f"{file} is damaged; start a new run") from None


def _wait_for_devices(fleet: Fleet, quorum: float, wait_s: float, say: Say) -> None:
    deadline, said = time.monotonic() + wait_s, ""
    while True:
        with control.connected(fleet) as client:
            online = control.online(client, fleet)
        missing = [name for name in fleet.devices if name not in online]
        if not missing:
            return
        names = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        text = f"{len(online)} of {len(fleet.devices)} devices on line; missing: {names}"
        if time.monotonic() >= deadline:
            break
        if text != said:
            say(f"waiting for devices: {text}")
            said = text
        time.sleep(0.5)
    if len(online) < quorum * len(fleet.devices):
        raise FedqError(
            f"{text}; that is below quorum={quorum:g}. Start them, see fedq fleet doctor, "
            "or wait longer with --wait SECONDS"
        )
    say(f"starting without all devices: {text}")


# --- Flower's ServerApp --------------------------------------------------------------------------


@contextmanager
def _grid(fleet: Fleet, run_config: dict[str, str]) -> Iterator[FleetGrid]:
    """Start a run of Flower's and take the place of its ServerApp until the end of the context."""
    certificate = fleet.path("ca.crt").read_bytes()
    with control.connected(fleet) as client:
        run_id = _start_run(client, run_config)
    token = _take(fleet, certificate, run_id)
    grid = FleetGrid(fleet.control_address, certificate, token)
    grid._retry_invoker = Retrying(lambda error: _explain(error, fleet))  # type: ignore[assignment]
    runtime = grid._runtime_client
    ended = threading.Event()
    threading.Thread(target=_heartbeats, args=(runtime, ended), daemon=True).start()
    status, details = flower.SubStatus.FAILED, "interrupted"
    try:
        task = runtime.PullTaskInput(flower.PullTaskInputRequest())
        flower.TaskIdentity.task_id = task.task_id
        flower.TaskIdentity.run_id = task.run.run_id
        flower.TaskIdentity.node_id = flower.context_from_proto(task.context).node_id
        grid.set_run(flower.run_from_proto(task.run))
        yield grid
        status, details = flower.SubStatus.COMPLETED, ""
    except Exception as error:
        details = f"{type(error).__name__}: {error}"[:500]
        raise
    finally:
        ended.set()
        grid._retry_invoker.max_tries = 1
        with contextlib.suppress(Exception):
            runtime.PushTaskOutput(flower.PushTaskOutputRequest(sub_status=status, details=details))
        grid.close()


def _start_run(client: flower.ControlHttpClient, run_config: dict[str, str]) -> int:
    from flwr.cli.build import build_fab_from_files

    words = {"version": fedq.__version__, "run_key": RUN_KEY, "version_key": VERSION_KEY}
    files: dict[str, bytes | Path] = {
        name: (text.format(**words) if name.endswith(".toml") else text).encode()
        for name, text in _APP.items()
    }
    fab, _ = build_fab_from_files(files)
    response = client.StartRun(
        flower.StartRunRequest(
            fab=flower.fab_to_proto(flower.Fab("", fab, {})),
            override_config=flower.user_config_to_proto(dict(run_config)),
        )
    )
    if not response.HasField("run_id"):
        raise FedqError("Flower did not start the run; see superlink.log")
    return int(response.run_id)


def _take(fleet: Fleet, certificate: bytes, run_id: int) -> str:
    """Return the token of a run's ServerApp; runs that nobody serves any more are ended."""
    client = flower.RuntimeHttpClient.from_server_address(
        fleet.control_address,
        False,
        certificate,
        [flower.RuntimeVersionHttpInterceptor(component_name="SuperExec")],
    )
    request = flower.AcquireTaskRequest(supported_task_types=[flower.TaskType.SERVER_APP])
    try:
        for _ in range(TASK_TRIES):
            found = client.AcquireTask(request)
            if not found.token:
                time.sleep(0.1)
            elif found.task.run_id == run_id:
                return str(found.token)
        raise FedqError("Flower does not hand out the run; restart the server: fedq fleet down, up")
    except httpx.HTTPError as error:
        raise FedqError(control.unreachable(fleet, error)) from None
    finally:
        client.close()


def _heartbeats(runtime: Any, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        with contextlib.suppress(Exception):  # requests of the run itself say what is wrong
            runtime.SendTaskHeartbeat(flower.SendTaskHeartbeatRequest())


def _explain(error: Exception, fleet: Fleet) -> Exception:
    if isinstance(error, httpx.HTTPStatusError):
        code = error.response.status_code
        if code not in (502, 503, 504):
            found = flower.FlowerError.from_json(error.response.text)
            words = found.message if found is not None else f"HTTP status {code}"
            raise FedqError(f"the fleet's server ended the run: {words}")
    return FedqError(control.unreachable(fleet, error))
