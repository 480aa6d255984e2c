"""From ``fedq fleet init`` to a device's directory, and what a bundle may not do."""

from __future__ import annotations

import io
import json
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fedq.cli import main
from fedq.errors import ConfigError, FedqError
from fedq.fleet import identity
from fedq.fleet.bundle import enrol, join
from fedq.fleet.files import Device, Fleet, lock_holder, locked


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet.create(tmp_path / "fleet", name="shelf", server="pi.example", port=9443)


def modes(root: Path) -> dict[str, int]:
    return {
        path.relative_to(root).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in root.rglob("*")
        if path.is_file()
    }


def test_init_gives_each_device_a_bundle_and_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "fleet"
    arguments = ["fleet", "init", "--fleet", str(root), "--server", "pi.example", "--json"]
    assert main([*arguments, "pi-1", "pi-2"]) == 0
    told = json.loads(capsys.readouterr().out)
    fleet = Fleet.open(root)
    assert fleet.devices == ("pi-1", "pi-2")
    assert fleet.device_address == "pi.example:9443"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    private = {"ca.key", "server.key", "bundles/pi-1.tar", "bundles/pi-2.tar"}
    assert {name for name, mode in modes(root).items() if mode == 0o600} >= private
    for name in fleet.devices:  # the server has no device's private key, and no code
        found = [path for path in root.rglob("*") if path.is_file()]
        assert not any(told["codes"][name].encode() in path.read_bytes() for path in found)
        device = join(Path(told["bundles"][name]), told["codes"][name], tmp_path / name, {})
        key = identity.load_openssh(device.key)
        assert identity.public_line(key) == fleet.public_key(name).read_bytes()
        assert device.ca.read_bytes() == fleet.path("ca.crt").read_bytes()
        assert modes(device.root)["key"] == 0o600
        assert Device.open(device.root) == device
    assert main([*arguments, "pi-1"]) == 2
    assert "is a fleet already" in capsys.readouterr().err


def test_another_devices_code_opens_nothing(fleet: Fleet, tmp_path: Path) -> None:
    fleet, _ = enrol(fleet, "pi-1")
    fleet, code = enrol(fleet, "pi-2")
    with pytest.raises(ConfigError, match="does not open"):
        join(fleet.bundle("pi-1"), code, tmp_path / "pi-1", {})
    assert not (tmp_path / "pi-1").exists()


def test_join_says_that_the_data_is_not_there(
    fleet: Fleet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fleet, code = enrol(fleet, "pi-1")
    monkeypatch.chdir(tmp_path)
    into = ["fleet", "join", str(fleet.bundle("pi-1")), "--into", "pi-1", "--code", code]
    assert main([*into, "--node", "data=npz", "--node", "data-path=own.npz"]) == 0
    said = capsys.readouterr().out
    assert f"data: {tmp_path}/own.npz does not exist; put the data there" in said
    assert f'"data-path" under "node" in {tmp_path}/pi-1/device.json' in said
    assert Device.open(Path("pi-1")).node["data-path"] == f"{tmp_path}/own.npz"


def test_a_new_key_keeps_what_the_device_is(fleet: Fleet, tmp_path: Path) -> None:
    fleet, code = enrol(fleet, "pi-1")
    root = tmp_path / "pi-1"
    first = join(fleet.bundle("pi-1"), code, root, {"partition-id": 3})
    key = first.key.read_bytes()
    first.state.mkdir()
    (first.state / "node").write_text("7")
    again, code = enrol(fleet, "pi-1")
    assert again.devices == fleet.devices
    second = join(fleet.bundle("pi-1"), code, root, {})
    assert second == first
    assert second.key.read_bytes() != key
    assert (second.state / "node").read_text() == "7"


def bundle(path: Path, members: dict[str, bytes], **changes: Any) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_hostile_bundle_writes_nothing(fleet: Fleet, tmp_path: Path) -> None:
    code, root = identity.enrolment_code(), tmp_path / "device"
    good = {
        "device.json": json.dumps({"name": "pi-1", "server": "h:1"}).encode(),
        "ca.crt": fleet.ca.certificate,
        "key.pem": identity.sealed(identity.device_key(), code),
    }
    bad: list[Path] = [
        bundle(tmp_path / "1", {**good, "device.json": b"[]"}),
        bundle(tmp_path / "2", {**good, "device.json": b'{"name": "../x", "server": "h:1"}'}),
        bundle(tmp_path / "3", {**good, "device.json": b'{"name": "x", "server": "a b:1"}'}),
        bundle(tmp_path / "4", {"ca.crt": b""}),
        bundle(tmp_path / "5", good, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        bundle(tmp_path / "6", {**good, "key.pem": b"no key"}),
        bundle(tmp_path / "7", {**good, "key.pem": bytes(2 << 20)}),
    ]
    (tmp_path / "8").write_bytes(b"no archive")
    for path in [*bad, tmp_path / "8", tmp_path / "absent"]:
        with pytest.raises(ConfigError):
            join(path, code, root, {})
        assert not root.exists()
    extra = bundle(tmp_path / "9", {"../../escaped": b"x", **good})
    join(extra, code, root, {})
    assert not list(tmp_path.rglob("escaped"))
    assert {path.name for path in root.iterdir()} == {
        "device.json", "ca.crt", "key", "fedq-node.service",
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", "--server", "a b"],
        ["init", "--server", "host", "Bad_Name"],
        ["init", "--server", "host", "--port", "0"],
        ["init", "--server", "host", "--port", "70000"],
        ["init", "--server", "host", "--port", "5", "--control-port", "5"],
        ["init", "--server", "host", "--nmae", "x"],
        ["add", "pi-1"],
        ["remove", "pi-1"],
        ["up"],
        ["down"],
        ["status"],
        ["run"],
        ["doctor"],
        ["demo", "--nodes", "0"],
        ["demo", "data=digist"],
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fleet", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedq: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "fleet").exists()


def test_who_takes_part_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--fleet", str(tmp_path / "fleet")]
    assert main(["fleet", "init", *at, "--server", "h", "a", "b"]) == 0
    assert main(["fleet", "add", *at, "c"]) == 0
    assert main(["fleet", "add", *at, "c"]) == 2
    assert "rotate c" in capsys.readouterr().err
    before = Fleet.open(tmp_path / "fleet")
    keys, certificate = before.nodes(), before.path("server.crt").read_bytes()
    assert main(["fleet", "rotate", *at, "server", "b"]) == 0
    after = Fleet.open(tmp_path / "fleet")
    assert [name for name in keys if after.nodes()[name] != keys[name]] == ["b"]
    assert after.path("server.crt").read_bytes() != certificate
    assert identity.signed_by(after.path("server.crt").read_bytes(), after.ca.certificate)
    assert main(["fleet", "remove", *at, "a"]) == 0
    assert main(["fleet", "remove", *at, "a"]) == 2
    left = Fleet.open(tmp_path / "fleet")
    assert left.devices == ("b", "c")
    assert not left.bundle("a").exists()
    assert not left.public_key("a").exists()


def test_every_command_can_answer_as_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "fleet"
    at = ["--fleet", str(root), "--json"]
    for arguments in (
        ["init", *at, "--server", "h", "a", "b"],
        ["add", *at, "c"],
        ["rotate", *at, "server", "b"],
        ["remove", *at, "a"],
        ["status", *at],
        ["status", *at, "--watch"],
        ["down", *at],
        ["logs", *at],
    ):
        (root / "superlink.log").parent.mkdir(exist_ok=True)
        (root / "superlink.log").write_text("up\n")
        assert main(["fleet", *arguments]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict), arguments
    assert main(["fleet", "doctor", *at]) == 0  # findings, and none that fails
    assert json.loads(capsys.readouterr().out)


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    with locked(path, "taken"):
        assert lock_holder(path) is not None
        with pytest.raises(FedqError, match=r"taken \(process \d+\)"), locked(path, "taken"):
            pass
    assert lock_holder(path) is None
