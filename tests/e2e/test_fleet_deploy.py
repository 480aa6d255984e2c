"""From a run to the devices that run its model: exported, signed, fetched, checked, swapped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedq import config, simulation
from fedq.export import runner
from fedq.fleet import control, demo, identity, releases
from fedq.fleet.artefacts import MANIFEST, SIGNATURE, SIGNED
from fedq.fleet.files import Device, Fleet, lock_holder, replace_file
from tests.e2e.test_fleet import fedq, until

pytest.importorskip("ai_edge_litert")
pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=1)]  # a crowded machine's timeouts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs; that of a fleet has the same files."""
    found = []
    for seed in range(2):
        run = tmp_path_factory.mktemp("runs") / f"run-{seed}"
        options = ["data=digits", "clients=2", "rounds=1", "baseline=false", f"seed={seed}"]
        simulation.run_experiment(config.load(options), run)
        found.append(run)
    return found


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, list[Device]]]:
    root = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        fleet = demo.make_fleet(root / "server", 2)
        stack.enter_context(demo.up(fleet))
        devices = [
            demo.make_device(fleet, name, root, number, fleet.port)
            for number, name in enumerate(fleet.devices)
        ]
        yield fleet, devices


def deploy(fleet: Fleet, *arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    done = fedq("fleet", "deploy", "--json", "--fleet", fleet.root, *arguments)
    return done.returncode, json.loads(done.stdout or "{}").get("devices", {}), done.stderr


def model_of(device: Device) -> Path:
    return device.root / "artefacts" / "current" / "model.tflite"


def test_a_model_is_deployed_checked_taken_back_and_caught_up_with(
    shelf: tuple[Fleet, list[Device]], runs: list[Path], tmp_path: Path
) -> None:
    fleet, devices = shelf
    with demo.process(devices[0]):
        demo.wait_for(fleet, ["device-0"])
        # One device is off line: it is not waited for beyond the time that was given.
        code, found, error = deploy(fleet, runs[0], "--wait", "5")
        assert code == 1, error
        first = found["device-0"]["wanted"]
        assert found["device-0"] == {"wanted": first, "runs": first, "said": "ok"}
        assert found["device-1"]["said"] == "not yet: it will when it is on line"

        exported = runs[0] / "export" / "litert"
        assert model_of(devices[0]).read_bytes() == (exported / "model.tflite").read_bytes()
        data = tmp_path / "own.npz"
        shutil.copy(model_of(devices[0]).parent / "probe.npz", data)
        assert len(runner.classify(model_of(devices[0]), data)["classes"]) == releases.PROBES

        with demo.process(devices[1]):  # comes later, and catches up without hands
            until(lambda: model_of(devices[1]).exists(), "device-1 catches up")
            code, found, error = deploy(fleet, runs[1])
            assert code == 0, (found, error)
            second = found["device-0"]["runs"]
            assert second == found["device-1"]["runs"] != first

        code, found, error = deploy(fleet, "--rollback", "device-0")
        assert code == 0, (found, error)
        assert found == {"device-0": {"wanted": first, "runs": first, "said": "ok"}}
        assert model_of(devices[0]).read_bytes() == (exported / "model.tflite").read_bytes()
        told = fedq("fleet", "status", "--fleet", fleet.root)
        assert first[:8] in told.stdout
        assert second[:8] in told.stdout  # what the other one ran last

        # The server's disk is not what a device trusts: its files are changed behind its back.
        place = fleet.path("releases") / ("ab" * 32)
        shutil.copytree(fleet.path("releases") / first, place)
        releases.want(fleet, ["device-0"], place.name)
        control.announce(fleet)
        log = devices[0].root / "device.log"
        until(lambda: "is refused: its manifest is another one" in log.read_text(), "refused")

        # Another model, signed, whose classes are not those that it had on the server.
        manifest = json.loads((place / MANIFEST).read_bytes())
        manifest["probe"] = [9 - one for one in manifest["probe"]]
        text = json.dumps(manifest).encode()
        wrong = hashlib.sha256(text).hexdigest()
        shutil.copytree(fleet.path("releases") / first, place.with_name(wrong))
        replace_file(place.with_name(wrong) / MANIFEST, text)
        signature = identity.sign(fleet.ca, SIGNED + text)
        replace_file(place.with_name(wrong) / SIGNATURE, signature)
        releases.want(fleet, ["device-0"], wrong)
        control.announce(fleet)
        until(lambda: "classes differ from the server's" in log.read_text(), "parity")
        assert f"{first[:12]} goes on" in log.read_text()
        assert model_of(devices[0]).read_bytes() == (exported / "model.tflite").read_bytes()
        pid = lock_holder(devices[0].root / "device.lock")
        assert pid is not None
        told = json.loads(fedq("fleet", "status", "--fleet", fleet.root, "--json").stdout)
        assert told["devices"][0]["report"]["artefact"] == first
        assert "refused" in told["devices"][0]["report"]["artefact_state"]


def test_a_deployment_says_what_is_missing(
    shelf: tuple[Fleet, list[Device]], runs: list[Path], tmp_path: Path
) -> None:
    fleet, _ = shelf
    for arguments, words in (
        ((), "name the run"),
        ((tmp_path,), "no finished run"),
        ((runs[0], "device-9"), "no device 'device-9'"),
        ((runs[0], "--to", "nothing"), "nothing"),
        (("--rollback", "device-9"), "no device 'device-9'"),
    ):
        code, _, error = deploy(fleet, *arguments)
        assert code == 2, (arguments, error)
        assert words in error
        assert error.count("\n") == 1
