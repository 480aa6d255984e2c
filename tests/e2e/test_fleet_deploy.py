"""From a run to the devices that run its model: exported, signed, fetched, checked, swapped."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedq import config, simulation
from fedq.cli import main
from fedq.export import runner
from fedq.fleet import control, demo, identity, releases
from fedq.fleet.artefacts import MANIFEST, SIGNATURE, SIGNED
from fedq.fleet.files import Device, Fleet, lock_holder, replace_file
from tests.e2e.test_fleet import fedq, until

pytest.importorskip("ai_edge_litert")
pytest.importorskip("onnxruntime")
pytest.importorskip("tflite_micro")
pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=1)]  # a crowded machine's timeouts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run; that of a fleet has the same files."""
    path = tmp_path_factory.mktemp("runs") / "run"
    options = ["data=digits", "clients=2", "rounds=1", "baseline=false"]
    simulation.run_experiment(config.load(options), path)
    return path


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


@pytest.fixture
def deploy(
    shelf: tuple[Fleet, list[Device]], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """The command: its status, what it says of each device, and its error."""

    def call(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        at = ["--json", "--fleet", str(shelf[0].root)]
        code = main(["fleet", "deploy", *at, *map(str, arguments)])
        told = capsys.readouterr()
        return code, json.loads(told.out or "{}").get("devices", {}), told.err

    return call


def current(device: Device, suffix: str) -> Path:
    """The model that a device runs."""
    folder = device.root / "artefacts" / "current"
    found = [path for path in folder.glob("model.*") if suffix in path.suffixes]
    assert len(found) == 1, sorted(folder.iterdir())
    return found[0]


def test_models_are_deployed_checked_taken_back_and_caught_up_with(
    shelf: tuple[Fleet, list[Device]], run: Path, deploy: Callable[..., Any], tmp_path: Path
) -> None:
    fleet, devices = shelf
    with demo.process(devices[0]):
        demo.wait_for(fleet, ["device-0"])
        code, found, error = deploy(run, "device-0")
        assert code == 0, (found, error)
        first = found["device-0"]["wanted"]
        assert found["device-0"] == {"wanted": first, "runs": first, "said": "ok"}
        # One device is off line: it is not waited for beyond the time that was given.
        code, found, error = deploy(run, "--wait", "0.5")
        assert code == 1, error
        assert found["device-1"]["said"] == "not yet: it will when it is on line"
        assert found["device-1"]["wanted"] == first

        model = current(devices[0], ".tflite")
        exported = (run / "export" / "litert" / "model.tflite").read_bytes()
        assert model.read_bytes() == exported
        data = tmp_path / "own.npz"
        shutil.copy(model.parent / "probe.npz", data)
        assert len(runner.classify(model, data)["classes"]) == releases.PROBES

        with demo.process(devices[1]):  # comes later, and catches up without hands
            link = devices[1].artefacts / "current"
            until(link.exists, "device-1 catches up")
            assert link.readlink().name == first
            code, found, error = deploy(run, "--to", "onnx")
            assert code == 0, (found, error)
            second = found["device-0"]["runs"]
            assert found["device-0"] == {"wanted": second, "runs": second, "said": "ok"}
            assert second == found["device-1"]["runs"] != first
            for device in devices:
                onnx = run / "export" / "onnx" / current(device, ".onnx").name
                assert current(device, ".onnx").read_bytes() == onnx.read_bytes()

            code, found, error = deploy(run, "device-1", "--to", "c")
            assert code == 0, (found, error)
            third = found["device-1"]
            assert third["said"] == "not run here: for a microcontroller"
            source = current(devices[1], ".cc")
            assert source.read_bytes() == (run / "export" / "c" / source.name).read_bytes()
            if compiler := shutil.which("c++"):  # what a firmware compiles in
                subprocess.run([compiler, "-std=c++11", "-fsyntax-only", source], check=True)
            code, found, error = deploy("--rollback", "device-1")
            assert code == 0, (found, error)
            assert found["device-1"]["runs"] == second

        code, found, error = deploy("--rollback", "device-0")
        assert code == 0, (found, error)
        assert found == {"device-0": {"wanted": first, "runs": first, "said": "ok"}}
        assert current(devices[0], ".tflite").read_bytes() == exported
        told = fedq("fleet", "status", "--fleet", fleet.root)
        assert first[:8] in told.stdout
        assert second[:8] in told.stdout  # what the other one ran last

        # The server's disk is not what a device trusts: its files are changed behind its back.
        place = fleet.path("releases") / ("ab" * 32)
        shutil.copytree(fleet.path("releases") / first, place)
        releases.want(fleet, {"device-0": place.name})
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
        releases.want(fleet, {"device-0": wrong})
        control.announce(fleet)
        until(lambda: "classes differ from the server's" in log.read_text(), "parity")
        assert f"{first[:12]} goes on" in log.read_text()
        assert current(devices[0], ".tflite").read_bytes() == exported
        pid = lock_holder(devices[0].root / "device.lock")
        assert pid is not None
        told = json.loads(fedq("fleet", "status", "--fleet", fleet.root, "--json").stdout)
        assert told["devices"][0]["report"]["artefact"] == first
        assert "refused" in told["devices"][0]["report"]["artefact_state"]


def test_a_deployment_says_what_is_missing(
    run: Path, deploy: Callable[..., Any], tmp_path: Path
) -> None:
    for arguments, words in (
        ((), "name the run"),
        ((tmp_path,), "no finished run"),
        ((run, "device-9"), "no device 'device-9'"),
        ((run, "--to", "nothing"), "nothing"),
        (("--rollback", "device-9"), "no device 'device-9'"),
    ):
        code, _, error = deploy(*arguments)
        assert code == 2, (arguments, error)
        assert words in error
        assert error.count("\n") == 1
