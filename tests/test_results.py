"""The run directory keeps its promises when processes die, disks fill and files rot."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedq import results
from fedq.errors import ConfigError, FedqError
from fedq.results import RunDirectory

STATE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array(3)}


def child(body: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process with ``path`` as its first argument."""
    head = """
        import os, sys, signal, time
        import numpy as np
        from fedq import results
        from fedq.results import RunDirectory
        path = sys.argv[1]
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=60
    )


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- creating, opening, locking ------------------------------------------------------------------


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = {"seed": 1, "codec": {"name": "trellis", "bits": 0.3}, "plugins": ("a.py",), "é": None}
    with RunDirectory.create(tmp_path / "deep" / "run", config) as run:
        run.save_checkpoint(0, STATE, {})
    plain = config | {"plugins": ["a.py"]}
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == plain
    with RunDirectory.open(run.path) as again:
        assert again.config == plain == run.config


def test_create_refuses_a_run(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, {}).close()
    with pytest.raises(ConfigError, match=r"already holds a run.*resume=") as error:
        RunDirectory.create(tmp_path, {})
    one_line(error)


def test_a_run_that_goes_on_is_unfinished_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunDirectory.create(tmp_path, {"rounds": 2}) as run:
        run.append_round({"round": 1})
        run.save_checkpoint(1, STATE, {})
        run.write_summary({"rounds": 2})
    with RunDirectory.open(tmp_path) as run:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(FedqError, match="No space left"):
                run.go_on({"rounds": 9})
        assert run.config == results.read_config(tmp_path) == {"rounds": 2}
        assert run.summary() == {"rounds": 2}
        run.go_on({"rounds": 5, "run_dir": tmp_path})
        assert run.summary() is None
    with RunDirectory.open(tmp_path) as run:
        assert run.config == {"rounds": 5, "run_dir": str(tmp_path)}
        assert run.load_checkpoint().round == 1
        assert run.rounds() == [{"round": 1}]
        run.go_on({"rounds": 5})  # there may be no summary


def test_create_accepts_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    RunDirectory.create(tmp_path, {}).close()
    RunDirectory.create(tmp_path / "baseline", {}).close()


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/fedq/run"])
def test_create_refuses_unusable_paths(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another run_dir") as error:
        RunDirectory.create(tmp_path / where, {})
    one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_create_refuses_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied; choose another run_dir"):
        RunDirectory.create(tmp_path, {})


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    for path, says in [("nowhere", "there is no run directory"), (".", "has no config.yaml")]:
        with pytest.raises(ConfigError, match=says) as error:
            RunDirectory.open(tmp_path / path)
        one_line(error)
    RunDirectory.create(tmp_path, {}).close()
    for junk in ("[1, 2", "- a list", "\x00"):
        (tmp_path / "config.yaml").write_text(junk)
        with pytest.raises(FedqError, match="damaged") as error:
            RunDirectory.open(tmp_path)
        one_line(error)


def test_lock_excludes_another_object(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        run.save_checkpoint(0, STATE, {})
        for again in (
            lambda: RunDirectory.create(tmp_path, {}),
            lambda: RunDirectory.open(tmp_path),
        ):
            with pytest.raises(ConfigError, match=rf"in use by another run \(pid {os.getpid()}\)"):
                again()
    RunDirectory.open(tmp_path).close()


def test_lock_excludes_another_process_and_dies_with_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom fedq.results import RunDirectory\n"
            "run = RunDirectory.create(sys.argv[1], {})\nrun.save_checkpoint(0, {}, {})\n"
            "print('held', flush=True)\nsys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"pid {holder.pid}") as error:
            RunDirectory.open(tmp_path)
        one_line(error)
        holder.kill()
    RunDirectory.open(tmp_path).close()


def test_orphaned_workers_do_not_keep_the_lock(tmp_path: Path) -> None:
    done = child(
        """
        run = RunDirectory.create(path, {})
        run.save_checkpoint(0, {}, {})
        pid = os.fork()
        if pid == 0:
            for fd in (0, 1, 2):
                os.close(fd)
            time.sleep(30)
            os._exit(0)
        print(pid, flush=True)
        os._exit(9)
        """,
        tmp_path,
    )
    worker = int(done.stdout)
    try:
        RunDirectory.open(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)


# --- rounds --------------------------------------------------------------------------------------


def test_rounds_are_json_without_nan(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        assert run.rounds() == []
        run.append_round({"round": 1, "loss": float("nan"), "rejected": {"norm": np.int64(2)}})
        run.append_round({"round": 2, "loss": np.float32("inf"), "x": np.array([0.5, np.nan])})
    strict = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "rounds.jsonl").read_text().splitlines()
    ]
    assert strict == results.read_rounds(tmp_path)
    assert strict[0] == {"round": 1, "loss": None, "rejected": {"norm": 2}}
    assert strict[1] == {"round": 2, "loss": None, "x": [0.5, None]}


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 200))
def test_any_torn_tail_is_dropped(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("run")
    with RunDirectory.create(path, {}) as run:
        for number in range(5):
            run.append_round({"round": number, "note": "é" * number})
    whole = results.read_rounds(path)
    data = (path / "rounds.jsonl").read_bytes()[:cut]
    (path / "rounds.jsonl").write_bytes(data)
    complete = data.count(b"\n")
    left = results.read_rounds(path)
    assert left == whole[: len(left)]
    assert complete <= len(left) <= complete + 1  # only the newline may be missing
    with RunDirectory.open(path) as run:
        run.append_round({"round": 9})
        assert run.rounds() == [*left, {"round": 9}]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(FedqError, match="damaged at line 2") as error:
        results.read_rounds(tmp_path)
    one_line(error)


def test_truncate_rounds(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        for number in range(6):
            run.append_round({"round": number})
        run.truncate_rounds(after=3)
        with pytest.raises(FedqError, match=r"ends with round 3, .* round 5: put"):
            run.truncate_rounds(after=5)
        assert [record["round"] for record in run.rounds()] == [0, 1, 2, 3]
        run.append_round({"round": 4})
        assert [record["round"] for record in run.rounds()] == [0, 1, 2, 3, 4]


# --- checkpoints ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.int8, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    order=st.sampled_from("CF"),
)
def test_checkpoint_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray[Any, Any], order: Any
) -> None:
    with RunDirectory.create(tmp_path_factory.mktemp("run"), {}) as run:
        run.save_checkpoint(7, {"b": np.asarray(array, order=order), "a": STATE["w"]}, {})
        back = run.load_checkpoint()
    assert back.round == 7
    assert list(back.tensors) == ["a", "b"]
    assert back.tensors["b"].dtype == array.dtype
    assert back.tensors["b"].shape == array.shape
    assert back.tensors["b"].tobytes() == array.tobytes()
    assert back.tensors["b"].flags.writeable


def test_meta_is_exact(tmp_path: Path) -> None:
    meta = {"rng": 2**127 + 1, "loss": 0.1 + 0.2, "layout": "ab", "n": {"3": [1, None, True]}}
    with RunDirectory.create(tmp_path, {}) as run:
        run.save_checkpoint(1, {}, meta | {"nan": float("nan")})
        back = run.load_checkpoint().meta
    assert np.isnan(back.pop("nan"))
    assert back == meta


def test_only_the_newest_checkpoint_stays(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        for number in (1, 2, 3, 3):
            run.save_checkpoint(number, STATE, {})
    assert os.listdir(tmp_path / "checkpoint") == ["round-000003.safetensors"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["truncated", "empty", "value", "header"])
def test_damaged_newest_falls_back(tmp_path: Path, damage: str) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        run.save_checkpoint(1, STATE, {"k": 1})
        old = tmp_path / "checkpoint/round-000001.safetensors"
        data = old.read_bytes()
        run.save_checkpoint(2, STATE, {"k": 2})
        old.write_bytes(data)  # as a kill between rename and removal leaves it
        assert run.load_checkpoint().meta == {"k": 2}
        new = tmp_path / "checkpoint/round-000002.safetensors"
        if damage == "truncated":
            new.write_bytes(new.read_bytes()[:-1])
        elif damage == "empty":
            new.write_bytes(b"")
        else:
            flip(new, -1 if damage == "value" else 9)
        with pytest.warns(UserWarning, match="round-000002.* damaged .* going back .* round 1"):
            assert run.load_checkpoint().meta == {"k": 1}
        flip(old, -1)
        with pytest.raises(FedqError, match="no older checkpoint; start the run again") as error:
            run.load_checkpoint()
        one_line(error)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("what", ["checkpoint", "summary", "model"])
def test_failing_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, what: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(run: RunDirectory, value: int) -> None:
        if what == "checkpoint":
            run.save_checkpoint(value, STATE, {"k": value})
        elif what == "summary":
            run.write_summary({"accuracy": value})
        else:
            run.save_model({"w": np.full(9, value, np.float32)}, {})

    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    with RunDirectory.create(tmp_path, {}) as run:
        write(run, 1)
        before = files()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(
                FedqError, match="No space left on device; free some space"
            ) as error:
                write(run, 2)
            one_line(error)
        assert files() == before
        write(run, 2)
        assert files() != before


def test_full_disk(tmp_path: Path) -> None:
    # A limit on file size fails in the kernel, below every library, as a full disk does.
    done = child(
        """
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = RunDirectory.create(path, {})
        run.save_checkpoint(1, {"x": np.ones(9)}, {})
        run.append_round({"round": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        for write in (
            lambda: run.save_checkpoint(2, {"x": np.ones(1_000_000)}, {}),
            lambda: run.save_model({"x": np.ones(1_000_000, np.float32)}, {}),
            lambda: run.append_round({"round": 2, "note": "x" * 4000}),
            lambda: run.write_summary({"note": "x" * 4000}),
            lambda: RunDirectory.create(path + "/new", {"note": "x" * 4000}),
        ):
            try:
                write()
            except results.FedqError as error:
                print(error)
        print(run.load_checkpoint().round, run.rounds(), run.summary())
        """,
        tmp_path,
    )
    *errors, state = done.stdout.splitlines()
    assert len(errors) == 5, done.stderr
    assert all(error.endswith("File too large; free some space") for error in errors)
    assert state == "1 [{'round': 1}] None"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("moment", ["first fsync", "replace", "last fsync", "unlink"])
def test_kill_while_saving(tmp_path: Path, moment: str) -> None:
    done = child(
        """
        run = RunDirectory.create(path, {"seed": 3})
        run.append_round({"round": 1})
        run.save_checkpoint(1, {"x": np.full(1000, 1.0)}, {"k": 1})
        run.append_round({"round": 2})
        moment, calls = sys.argv[2], []

        def die(*args, **kwargs):
            os._exit(9)

        def die_second(fd):
            calls.append(fd)
            if len(calls) == 2:
                os._exit(9)

        if moment == "unlink":
            results.Path.unlink = die
        elif moment == "replace":
            os.replace = die
        else:
            os.fsync = die if moment == "first fsync" else die_second
        run.save_checkpoint(2, {"x": np.full(1000, 2.0)}, {"k": 2})
        """,
        tmp_path,
        moment,
    )
    assert done.returncode == 9, done.stderr
    with RunDirectory.open(tmp_path) as run:
        last = run.load_checkpoint()
        assert last.round == (1 if moment in ("first fsync", "replace") else 2)
        assert last.meta == {"k": last.round}
        assert (last.tensors["x"] == last.round).all()
        run.truncate_rounds(last.round)
        assert [record["round"] for record in run.rounds()] == list(range(1, last.round + 1))
        run.save_checkpoint(3, {}, {})
        assert os.listdir(tmp_path / "checkpoint") == ["round-000003.safetensors"]


@pytest.mark.parametrize(
    "header", [{}, {"round": 1}, {"round": "1", "meta": {}}, {"round": 1, "meta": None}]
)
def test_a_checkpoint_without_its_header_is_damaged(tmp_path: Path, header: dict) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        run.save_checkpoint(1, STATE, {})
        (path,) = (tmp_path / "checkpoint").iterdir()
        results._save(path, STATE, {**header, "sha256": results._digest(STATE)})
        with pytest.raises(FedqError, match="damaged") as error:
            run.load_checkpoint()
        one_line(error)


def test_a_checkpoint_has_what_is_asked_for(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        run.save_checkpoint(3, {"weights": np.ones(2)}, {"layout": "ab"})
        assert run.load_checkpoint(tensors=["weights"], meta=["layout"]).round == 3
        for asked in ({"tensors": ["weights", "state"]}, {"meta": ["layout", "state"]}):
            with pytest.raises(FedqError, match="lacks state: another version") as error:
                run.load_checkpoint(**asked)
            one_line(error)


# --- results -------------------------------------------------------------------------------------


def test_model_bytes_are_a_function_of_the_values(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((i + 1, 2), i, np.float32) for i in range(12)}
    extra = {f"m{i}": [i, {"b": 1, "a": 2}] for i in range(12)}
    hashes = set()
    for number in range(4):
        turn = slice(None, None, -1 if number % 2 else 1)
        with RunDirectory.create(tmp_path / str(number), {}) as run:
            found = run.save_model(dict([*tensors.items()][turn]), dict([*extra.items()][turn]))
        hashes.add(found)
        data = (run.path / "model.safetensors").read_bytes()
        assert found == hashlib.sha256(data).hexdigest()
        back, metadata = results.read_model(run.path)
        assert metadata == extra
        assert list(back) == sorted(tensors)
        assert all((back[name] == tensors[name]).all() for name in tensors)
    assert len(hashes) == 1


def test_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        results.read_model(tmp_path)
    for junk in (b"", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"{}"):
        (tmp_path / "model.safetensors").write_bytes(junk)
        with pytest.raises(FedqError, match=r"model.safetensors is damaged") as error:
            results.read_model(tmp_path)
        one_line(error)


def test_summary(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        assert run.summary() is None
        run.write_summary({"seconds": 1.5, "accuracy": np.float64("nan"), "versions": {"a": "1"}})
        assert run.summary() == {"accuracy": None, "seconds": 1.5, "versions": {"a": "1"}}
    assert list(json.loads((tmp_path / "summary.json").read_text())) == [
        "accuracy",
        "seconds",
        "versions",
    ]
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(FedqError, match="damaged") as error:
        results.read_summary(tmp_path)
    one_line(error)


def test_default_paths_differ(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        path = results.default_run_path(tmp_path / "runs", "sweep")
        assert path not in seen
        seen.add(path)
        RunDirectory.create(path, {}).close()


def test_imports_stay_light() -> None:
    done = child(
        """
        results.versions()
        print([name for name in ("torch", "flwr", "hydra", "matplotlib") if name in sys.modules])
        """,
        "unused",
    )
    assert done.stdout.strip() == "[]", done.stderr
