"""A local page that shows a run, or a sweep, while it goes on.

The truth is what the run writes, so that watching costs it nothing and any run can be watched, also
one on another machine whose directory is mounted here. The page asks every second for what is new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedq import manifest, registry, results
from fedq.errors import ConfigError, FedqError
from fedq.metrics import metric_of
from fedq.report.runs import Run

#: Files are looked at this often at most, however many pages ask.
LOOK_S = 0.5
#: New directories of a sweep are looked for this often.
SEARCH_S = 5.0
_PAGE = Path(__file__).with_name("report") / "watch.html"
_STYLE = Path(__file__).with_name("report") / "card.css"
#: What a page may do: run its own script, ask its own server, and nothing else.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)


class Feed:
    """What happened in the runs of a directory, in the order in which it was seen.

    Args:
      path: A run directory, or one that holds some.

    Raises:
      ConfigError: If there is no such directory.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with results.RunDirectory.create(folder, {"name": "mine", "rounds": 2}) as run:
      ...         run.append_round({"round": 1, "accuracy": 0.5})
      ...     feed = Feed(folder)
      ...     [event["kind"] for event in feed.after(0)], feed.after(2)
      (['run', 'round'], [])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if not path.is_dir():
            raise ConfigError(f"there is no directory {path}; give a run's or a sweep's")
        self.path = path
        self.events: list[dict[str, Any]] = []
        self._runs: dict[Path, _Followed] = {}
        self._lock = threading.Lock()
        self._looked = self._searched = float("-inf")

    def after(self, count: int) -> list[dict[str, Any]]:
        """Return all events but the first ``count``, having looked for new ones."""
        with self._lock:
            now = time.monotonic()
            if now - self._searched >= SEARCH_S:
                self._searched = now
                self._search()
            if now - self._looked >= LOOK_S:
                self._looked = now
                for run in self._runs.values():
                    self.events += run.news()
            return self.events[count:]

    def _search(self) -> None:
        inside = [self.path]
        if not results.holds_config(self.path):
            inside = [*_directories(self.path), *_directories(self.path / results.BASELINES)]
        for directory in inside:
            for path in (directory, directory / results.BASELINE):
                if path not in self._runs and results.holds_config(path):
                    self._runs[path] = _Followed(path, len(self._runs), self.path)


def _directories(path: Path) -> list[Path]:
    inside = [child for child in path.iterdir() if child.is_dir()] if path.is_dir() else []
    return sorted(inside, key=lambda child: (len(child.name), child.name))


class _Followed:
    """One run directory, and how far it was read."""

    def __init__(self, path: Path, number: int, root: Path) -> None:
        self._path, self._number = path, number
        self._place = "" if path == root else path.relative_to(root).as_posix()
        self._offset = 0
        self._known = self._ended = False

    def news(self) -> Iterator[dict[str, Any]]:
        """Yield what was written since the last call; what cannot be read is left for the next."""
        try:
            if not self._known:
                yield self._event("run", self._described())
                self._known = True
            yield from self._rounds()
            ended = (self._path / results.SUMMARY).exists()
            if ended and not self._ended:
                yield self._event("end", results.read_summary(self._path) or {})
            elif self._ended and not ended:
                yield self._event("resumed", {})
            self._ended = ended
        except (FedqError, OSError):
            return

    def _described(self) -> dict[str, Any]:
        config = results.read_config(self._path)
        run = Run(self._path, config, (), {})
        names = {
            key: (config.get(key) or {}).get("name", "")
            for key in ("model", "data", "quantization", "aggregator")
        }  # their options are in config.yaml
        return {
            "place": self._place,
            "name": run.name,
            "asked": self._asked(),
            "rounds": run.planned,
            # with its defaults: to know them would take the codecs, and a share of the run's CPU
            "facts": {**names, "codec": registry.describe(config.get("codec"))},
        }

    def _asked(self) -> list[str]:
        """Return what the command line said of the run, which tells cells of a sweep apart."""
        try:
            return manifest.decisive((manifest.read(self._path) or {}).get("overrides", ()))
        except FedqError:
            return []

    def _rounds(self) -> Iterator[dict[str, Any]]:
        path = self._path / results.ROUNDS
        if not path.exists():
            return
        with path.open("rb") as file:
            if file.seek(0, 2) < self._offset:  # a resumed run went back to its checkpoint
                self._offset = 0
                yield self._event("restart", {})
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        for line in data.splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("round"), int):
                    metric = metric_of(record)
                    about = None if metric is None else dataclasses.asdict(metric)
                    yield self._event("round", {**record, "metric": about})

    def _event(self, kind: str, content: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "run": self._number, "content": content}


def page() -> bytes:
    """Return the page: one file, nothing from elsewhere."""
    style = _STYLE.read_text(encoding="utf-8")
    return _PAGE.read_text(encoding="utf-8").replace("/*style*/", style).encode()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], feed: Feed) -> None:
        super().__init__(address, _Handler)
        self.feed = feed


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """Answer ``/`` with the page and ``/events?after=N`` with what is new."""
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/":
            self._answer(200, "text/html; charset=utf-8", page())
        elif url.path == "/events":
            after = urllib.parse.parse_qs(url.query).get("after", ["0"])[0]
            if not after.isascii() or not after.isdigit() or len(after) > 12:
                self._answer(400, "text/plain", b"after must be a count")
                return
            found = {"events": self.server.feed.after(int(after)), "now": time.time()}
            self._answer(200, "application/json", json.dumps(found).encode())
        else:
            self._answer(404, "text/plain", b"there is / and /events")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        with contextlib.suppress(ConnectionError):  # the tab was closed, or loaded afresh
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a request per second is no news."""


@contextlib.contextmanager
def serving(path: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve the page of a directory for as long as the context lasts, and yield its address.

    Args:
      path: A run directory, or one that holds some.
      host: To listen on; the page needs no password, so another than loopback shows it to all.
      port: 0 is any that is free.

    Raises:
      ConfigError: If there is no such directory, or the port cannot be had.
    """
    feed = Feed(path)
    try:
        server = _Server((host, port), feed)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; give another --port") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
