"""The live page: what a run writes arrives, in order and once, whatever is torn or hostile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from fedq import manifest
from fedq.errors import ConfigError
from fedq.results import RunDirectory
from fedq.watch import Feed, page, serving


def record(number: int, **more: Any) -> dict[str, Any]:
    return {
        "round": number,
        "accuracy": number / 10,
        "float_accuracy": 0.9,
        "sampled": 3,
        "replies": 2,
        "uplink_bytes": 1000,
        "downlink_bytes": 2000,
        "float32_uplink_bytes": 30_000,
        "float32_downlink_bytes": 30_000,
        "rejected": {"malformed": 1},
        "reasons": ["malformed: <b>bold</b>"],
        "train_loss": 0.5,
        "seconds": 0.1,
        **more,
    }


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("fedq.watch.LOOK_S", 0)
    monkeypatch.setattr("fedq.watch.SEARCH_S", 0)
    return Feed


def kinds(events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(event["kind"], event["content"].get("round")) for event in events]


def test_each_line_is_told_once_and_in_order(feed: Any, tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", {"name": "mine", "rounds": 3}) as run:
        followed = feed(tmp_path / "run")
        assert kinds(followed.after(0)) == [("run", None)]
        for number in (0, 1, 2):
            run.append_round(record(number))
            assert kinds(followed.after(len(followed.events))) == [("round", number)]
        run.write_summary({"accuracy": 0.2})
        assert kinds(followed.after(len(followed.events))) == [("end", None)]
        assert followed.after(len(followed.events)) == []
        assert kinds(followed.after(0))[:2] == [("run", None), ("round", 0)]
    described = followed.events[0]["content"]
    assert (described["place"], described["name"], described["rounds"]) == ("", "mine", 3)
    assert followed.events[1]["content"]["metric"]["title"] == "accuracy"


def test_to_watch_takes_neither_torch_nor_the_codecs(tmp_path: Path) -> None:
    config = {"name": "mine", "rounds": 2, "codec": {"name": "top_k", "inner": {"name": "fp16"}}}
    with RunDirectory.create(tmp_path / "run", config) as run:
        run.append_round(record(1))
    script = (
        "import sys; from fedq.watch import Feed; events = Feed(sys.argv[1]).after(0); "
        "print(events[0]['content']['facts']['codec'], len(events), "
        "*{'torch', 'numba', 'fedq.codecs'} & sys.modules.keys())"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(run.path)], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["top_k(inner=fp16)", "2"]


def test_a_torn_line_waits_for_its_end(feed: Any, tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", {"name": "mine", "rounds": 3}).close()
    followed, lines = feed(tmp_path / "run"), tmp_path / "run" / "rounds.jsonl"
    text = json.dumps(record(1)) + "\n"
    lines.write_text(text[:40])
    assert kinds(followed.after(0)) == [("run", None)]
    lines.write_text(text + "damaged\n[1]\n" + json.dumps(record(2)) + "\n")
    assert kinds(followed.after(1)) == [("round", 1), ("round", 2)]


def test_a_resumed_run_starts_its_curve_anew(feed: Any, tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", {"name": "mine", "rounds": 3}) as run:
        followed = feed(tmp_path / "run")
        for number in (1, 2):
            run.append_round(record(number))
        run.write_summary({})
        followed.after(0)
        known = len(followed.events)
        run.truncate_rounds(1)
        (tmp_path / "run" / "summary.json").unlink()
        assert kinds(followed.after(known)) == [("restart", None), ("round", 1), ("resumed", None)]


def test_a_sweep_s_runs_appear_as_they_start(feed: Any, tmp_path: Path) -> None:
    followed = feed(tmp_path)
    assert followed.after(0) == []
    for name in ("2", "10", "2/baseline", "baselines/1"):
        with RunDirectory.create(tmp_path / name, {"name": "cell", "rounds": 1}) as run:
            run.append_round(record(1))
    manifest.begin(tmp_path / "10", {}, overrides=["codec.bits=4", "run_dir=10"])
    found = [event["content"] for event in followed.after(0) if event["kind"] == "run"]
    assert [run["place"] for run in found] == ["2", "2/baseline", "10", "baselines/1"]
    assert [run["asked"] for run in found] == [[], [], ["codec.bits=4"], []]
    shutil.rmtree(tmp_path / "10")
    assert followed.after(len(followed.events)) == []


def test_a_damaged_run_hides_no_other(feed: Any, tmp_path: Path) -> None:
    for name in ("1", "2"):
        with RunDirectory.create(tmp_path / name, {"name": "cell", "rounds": 1}) as run:
            run.append_round(record(1))
    (tmp_path / "1" / "config.yaml").write_text(": not yaml")
    assert kinds(feed(tmp_path).after(0)) == [("run", None), ("round", 1)]


def ask(address: str) -> tuple[int, bytes, Any]:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def test_the_server_gives_the_page_and_the_events_and_nothing_else(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", {"name": "<script>", "rounds": 3}) as run:
        run.append_round(record(1))
    (tmp_path / "secret").write_text("secret")
    with serving(tmp_path / "run") as address:
        status, body, headers = ask(address)
        assert (status, body) == (200, page())
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        status, body, _ = ask(address + "events?after=1")
        assert status == 200
        assert [e["content"]["round"] for e in json.loads(body)["events"]] == [1]
        for path in ("../secret", "%2e%2e/secret", "run/config.yaml", "events/x"):
            assert ask(address + path)[0] == 404
        for after in ("-1", "x", "9" * 400, "1e3"):
            assert ask(address + f"events?after={after}")[0] == 400


def test_the_page_asks_nobody_else() -> None:
    text = page().decode()
    assert "/*style*/" not in text
    assert "--paper" in text
    addresses = text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert "http://" not in addresses
    assert "https://" not in addresses


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory"), serving(tmp_path / "none"):
        pass
    with serving(tmp_path) as address:
        port = int(address.rsplit(":", 1)[1].strip("/"))
        with pytest.raises(ConfigError, match="another --port"), serving(tmp_path, port=port):
            pass
    with pytest.raises(ConfigError, match="another --port"), serving(tmp_path, port=70_000):
        pass


def test_a_browser_shows_a_run_while_it_goes_on(
    tab: Any, problems: list[str], tmp_path: Path
) -> None:
    with (
        RunDirectory.create(tmp_path / "run", {"name": "<i>mine</i>", "rounds": 4}) as run,
        serving(tmp_path / "run") as address,
    ):
        run.append_round(record(1))
        tab.goto(address)
        tab.wait_for_selector("#round:has-text('round 1 of')")
        run.append_round(record(2))
        tab.wait_for_selector("#round:has-text('round 2 of')")
        assert tab.inner_text("#name") == "<i>mine</i>"
        assert tab.inner_text("#state") == "running"
        assert "20.0 %" in tab.inner_text("#tiles")
        assert "<b>bold</b>" in tab.inner_text("#reasons")
        assert tab.evaluate("document.querySelector('#by-round polyline').points.length") == 2
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        run.write_summary({"accuracy": 0.2})
        tab.wait_for_selector("#state:has-text('finished')")
        assert not problems
