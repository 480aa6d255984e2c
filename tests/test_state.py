"""What a device keeps: found again by client and round, however many clients there are."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedq import Layout
from fedq.errors import FedqError
from fedq.state import KEPT, StateStore

LAYOUT = Layout.flat(6)


def filled(value: float) -> np.ndarray:
    return np.full(6, value, np.float32)


@settings(max_examples=60, deadline=None)
@given(
    kept=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=12, unique=True),
    before=st.integers(1, 14),
)
def test_a_residual_is_the_newest_below_the_round(
    tmp_path_factory: pytest.TempPathFactory, kept: list[tuple[int, int]], before: int
) -> None:
    store = StateStore(tmp_path_factory.mktemp("state"))
    kept = sorted(kept, key=lambda item: item[1])
    for client, server_round in kept:
        store.keep_residual(client, server_round, filled(100 * client + server_round))
    for client in range(4):
        mine = [r for c, r in kept if c == client][-KEPT:]
        found = store.residual(client, before, LAYOUT)
        expected = max((r for r in mine if r < before), default=None)
        wanted = 0 if expected is None else 100 * client + expected
        assert found.dtype == np.float32
        assert (found == wanted).all()


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"torn",
        filled(9).tobytes()[:-4],
        filled(9).tobytes() + b"\0",
        filled(9).tobytes() * 2,
        filled(np.nan).tobytes(),
        filled(np.inf).tobytes(),
    ],
)
def test_a_damaged_residual_gives_way_to_the_one_before(
    tmp_path: Path, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = StateStore(tmp_path)
    store.keep_residual(4, 1, filled(1))
    store.keep_residual(4, 2, filled(2))
    (newest,) = tmp_path.rglob("*2.f32")
    newest.write_bytes(junk)
    with caplog.at_level(logging.WARNING, logger="fedq"):
        assert (store.residual(4, 3, LAYOUT) == 1).all()
        assert str(newest) in caplog.text
        assert (store.residual(4, 2, LAYOUT) == 1).all()
        assert (store.residual(4, 1, LAYOUT) == 0).all()
    assert len(caplog.records) == 1


def test_a_damaged_model_is_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = StateStore(tmp_path)
    assert store.model(3, LAYOUT) is None
    store.keep_model(3, filled(3))
    assert not caplog.records
    (path,) = tmp_path.rglob("*.f32")
    path.write_bytes(filled(3).tobytes() + b"\0")
    assert store.model(3, LAYOUT) is None
    assert str(path) in caplog.text


def test_models_are_shared_and_the_newest_stay(tmp_path: Path) -> None:
    store = StateStore(tmp_path, models=3)
    for server_round in range(1, 8):
        store.keep_model(server_round, filled(server_round))
        store.keep_model(server_round, filled(-1))  # the same for every client: not written again
    assert [store.model(r, LAYOUT) is None for r in range(1, 8)] == [True] * 4 + [False] * 3
    assert (store.model(7, LAYOUT) == 7).all()


def test_a_client_s_files_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is listed for one client does not grow with the number of clients."""
    store = StateStore(tmp_path)
    for client in range(50):
        store.keep_residual(client, 1, filled(client))
    (tmp_path / "residual" / "7" / "notes.f32").write_text("not a round")
    listed, glob = [], Path.glob

    def counted(self: Path, pattern: str) -> list[Path]:
        found = list(glob(self, pattern))
        listed.extend(found)
        return found

    monkeypatch.setattr(Path, "glob", counted)
    assert (store.residual(7, 2, LAYOUT) == 7).all()
    assert len(listed) == 2
    for server_round in (2, 3):
        store.keep_residual(7, server_round, filled(server_round))
    assert sum(path.stem.isdecimal() for path in (tmp_path / "residual" / "7").iterdir()) == KEPT
    assert not list(tmp_path.rglob("*.tmp"))


def test_unusable_folders_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = StateStore(tmp_path / "file")
    for keep in (store.keep_model, lambda r, x: store.keep_residual(0, r, x)):
        with pytest.raises(FedqError, match="cannot keep client state") as error:
            keep(1, filled(0))
        assert "\n" not in str(error.value)
    store = StateStore(tmp_path)
    (tmp_path / "residual" / "0" / "000001.f32").mkdir(parents=True)
    with pytest.raises(FedqError, match="cannot read the client state"):
        store.residual(0, 2, LAYOUT)


def test_secrets_are_replaced_whole_and_for_their_owner_alone(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state")
    assert store.secrets(3) is None
    for data in (b"first", b"the second is longer", b"3"):
        store.keep_secrets(3, data)
        assert store.secrets(3) == data
    assert store.secrets(4) is None
    folder = tmp_path / "state" / "secret"
    assert [path.name for path in folder.iterdir()] == ["3"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "3").stat().st_mode) == 0o600
    (tmp_path / "file").write_text("")
    with pytest.raises(FedqError, match="cannot keep client state"):
        StateStore(tmp_path / "file").keep_secrets(0, b"")
    (folder / "5").mkdir()
    with pytest.raises(FedqError, match="cannot read the client state"):
        store.secrets(5)
