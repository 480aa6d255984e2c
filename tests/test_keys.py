"""Keys: for their owner alone, and counted only if the authority says so."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from fedq import cli
from fedq.errors import ConfigError, FedqError
from fedq.keys import (
    PASSPHRASE,
    Credentials,
    Fleet,
    Identity,
    PublicKeys,
    SignedRoster,
    make_device,
    read_identity,
    simulated,
)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.delenv(PASSPHRASE, raising=False)
    return Fleet.init(tmp_path / "fleet")


def device(fleet: Fleet, directory: Path, client: int) -> Path:
    """Make a device and hand the public files to it."""
    fleet.add(client, make_device(directory))
    update(fleet, directory)
    return directory


def update(fleet: Fleet, directory: Path) -> None:
    for path in (fleet.directory / "public").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())


def test_a_fleet_from_init_to_revocation(fleet: Fleet, tmp_path: Path) -> None:
    first, second = (device(fleet, tmp_path / str(i), i) for i in (1, 2))
    update(fleet, first)
    server = Credentials.load(fleet.directory / "server")
    for directory, client in ((first, 1), (second, 2)):
        own = Credentials.load(directory)
        assert own.roster.server == server.identity.public
        assert server.roster.device(client) == own.identity.public
    assert server.roster.device(3) is None
    fleet.revoke(1)
    assert fleet.roster.device(1) is None
    assert fleet.roster.device(2) is not None
    fleet.add(1, Identity.generate().public)
    assert fleet.roster.device(1) is not None
    before = fleet.roster
    fleet.rotate_server()
    assert fleet.roster.server != before.server
    assert fleet.roster.version == before.version + 1
    assert read_identity(fleet.directory / "server").public == fleet.roster.server


def test_secret_keys_are_their_owner_s(fleet: Fleet, tmp_path: Path) -> None:
    directory = device(fleet, tmp_path / "device", 1)
    secret = [*directory.glob("*.pem"), *fleet.directory.rglob("*.pem")]
    assert len(secret) == 6
    for path in secret:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (directory / "identity.pem").chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        Credentials.load(directory)


def test_a_passphrase(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    make_device(tmp_path / "device")
    assert b"ENCRYPTED" in (tmp_path / "device" / "identity.pem").read_bytes()
    read_identity(tmp_path / "device")
    for wrong in ("battery staple", ""):
        monkeypatch.setenv(PASSPHRASE, wrong)
        with pytest.raises(ConfigError, match=PASSPHRASE) as caught:
            read_identity(tmp_path / "device")
        assert "staple" not in str(caught.value)


def test_nothing_is_overwritten(fleet: Fleet, tmp_path: Path) -> None:
    make_device(tmp_path / "device")
    with pytest.raises(ConfigError, match="exists"):
        make_device(tmp_path / "device")
    with pytest.raises(ConfigError, match="exists"):
        Fleet.init(fleet.directory)


def test_a_roster_of_another_authority_or_changed_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    directory = device(fleet, tmp_path / "device", 1)
    path = directory / "roster.json"
    good = json.loads(path.read_bytes())
    other = Fleet.init(tmp_path / "other").directory / "public" / "roster.json"
    for bad in (
        other.read_bytes(),
        b"",
        b"[]",
        b'{"roster": 5, "signature": ""}',
        json.dumps({**good, "roster": good["roster"].replace('"revoked": []', '"revoked": [1]')}),
        json.dumps({**good, "signature": "00" * 64}),
    ):
        path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
        with pytest.raises(FedqError, match=r"roster\.json is damaged, or not signed"):
            Credentials.load(directory)


@pytest.mark.parametrize("name", ["identity.pem", "agreement.pem", "authority.pub", "roster.json"])
def test_a_missing_or_damaged_file_is_one_line(fleet: Fleet, tmp_path: Path, name: str) -> None:
    directory = device(fleet, tmp_path / "device", 1)
    (directory / name).write_bytes(b"x")
    with pytest.raises(FedqError):
        Credentials.load(directory)
    (directory / name).unlink()
    with pytest.raises(ConfigError, match=f"cannot read .*{name}"):
        Credentials.load(directory)


def test_one_key_is_one_device() -> None:
    keys = simulated(0, 1).public
    roster = SignedRoster(1, simulated(0).public).with_device(1, keys)
    with pytest.raises(ConfigError, match="another client"):
        roster.with_device(2, keys)
    with pytest.raises(ConfigError, match="not on the roster"):
        roster.without_device(2)
    for text in ("", "00", "zz" * 64, "00" * 63):
        with pytest.raises(ConfigError, match="128 hexadecimal"):
            PublicKeys.parse(text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(tmp_path / "fleet")

    def run(*arguments: str) -> str:
        assert cli.main(["keys", *arguments]) == 0
        return capsys.readouterr().out

    assert "offline" in run("init", directory)
    public = run("device", str(tmp_path / "device")).strip()
    assert len(public) == 128
    assert public[:16] in run("add", directory, "7", public)
    assert "revoked" not in run("list", directory)
    assert "revoked" in run("revoke", directory, "7")
    assert "roster 4" in run("rotate", directory)
    for wrong in (["add", directory, "x", public], ["revoke", directory, "8"], ["list", "none"]):
        assert cli.main(["keys", *wrong]) == 2
        assert capsys.readouterr().err.startswith("fedq: ")
