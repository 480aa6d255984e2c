"""What is shown of a fleet, whatever its devices say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedq.cli import main
from fedq.errors import FedqError
from fedq.fleet import status
from fedq.fleet.files import Fleet
from fedq.fleet.gateway import FIGURES, WORDS, report_of


def found(**report: Any) -> dict[str, Any]:
    device = {
        "name": "pi-1", "status": "online", "seen_s_ago": 3.2, "up_bytes": 2_000_000,
        "down_bytes": 10, "refused": 0, "report": report, "wanted": "",
    }  # fmt: skip
    return {"name": "shelf", "server": "h:9443", "up": True, "devices": [device], "run": None}


def shown(state: dict[str, Any]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(status.render(state))
    return capture.get()


def test_the_table_has_what_a_device_reports() -> None:
    figures = {"round": 7, "memory_mb": 310, "images_s": 251.4, "up_bytes_s": 20_000.0}
    text = shown(found(**figures, temperature_c=61.5, throttled=5, fedq="0.1.0"))
    for words in ("pi-1", "online", "3 s ago", " 7 ", "310 MB", "251", "20 kB/s", "61.5"):
        assert words in text
    assert "0.1.0" in text
    assert "throttled" in text


@pytest.mark.parametrize("value", ["[/]", "[red]x", "nan", -1, 0, 1e999, True, [], None, "x" * 900])
def test_no_report_spoils_the_table(value: Any) -> None:
    header = json.dumps(dict.fromkeys([*FIGURES, *WORDS], value), default=str).encode()
    report = report_of(header) if value != "x" * 900 else dict.fromkeys(WORDS, value)
    assert "pi-1" in shown(found(**report))


def test_the_live_table_goes_on_while_the_server_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Fleet.create(tmp_path / "fleet", name="shelf", server="h")

    def states() -> Iterator[dict[str, Any]]:
        yield found(round=1)
        raise FedqError("the fleet's server does not answer; start it with fedq fleet up")

    coming, slept = states(), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "collect", lambda fleet: next(coming))
    monkeypatch.setattr(status.time, "sleep", sleep)
    assert main(["fleet", "status", "--watch", "--fleet", str(tmp_path / "fleet")]) == 0
    assert slept == [status.REFRESH_S] * 2
    assert "does not answer" in capsys.readouterr().out  # not a terminal: what it showed last
