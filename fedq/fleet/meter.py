"""A TCP proxy that counts: what a link really carries, TLS and retries included.

For the demo, tests and benchmarks. It can also slow a link down, cut it, and swallow what is sent.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Self

_PIECE = 4096


class Meter:
    """Forwards one local port to a server.

    Args:
      target: Port on loopback.
      up_bytes_s: Most that goes up in a second; 0 is no limit.
      host: Address on which it listens.
    """

    def __init__(self, target: int, up_bytes_s: float = 0.0, host: str = "127.0.0.1") -> None:
        self.up_bytes = self.down_bytes = self.connections = 0
        self._target, self.up_bytes_s = target, up_bytes_s
        self._ends: set[socket.socket] = set()
        self._lock, self._cut, self._swallows = threading.Lock(), False, False
        self._listener = socket.create_server((host, 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def cut(self) -> None:
        """End all connections and refuse new ones, until :meth:`mend`."""
        with self._lock:
            self._cut = True
            ends = list(self._ends)
        for end in ends:
            _close(end)

    def swallow(self) -> None:
        """Leave connections open, also new ones, and lose all that is sent until :meth:`mend`.

        What was lost stays lost: such a connection is half open for ever.
        """
        self._swallows = True

    def mend(self) -> None:
        """Let connections through again."""
        self._cut = self._swallows = False

    def close(self) -> None:
        """End everything."""
        self.cut()
        _close(self._listener)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._cut:
                _close(near)
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=10)
            except OSError:
                _close(near)
                continue
            far.settimeout(None)
            with self._lock:
                self._ends |= {near, far}
                self.connections += 1
            for source, sink, up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(source, sink, up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        lost = False
        try:
            while data := source.recv(_PIECE):
                lost = lost or self._swallows
                if lost:
                    continue
                with self._lock:
                    if up:
                        self.up_bytes += len(data)
                    else:
                        self.down_bytes += len(data)
                sink.sendall(data)
                if up and self.up_bytes_s:
                    time.sleep(len(data) / self.up_bytes_s)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                _close(end)
            with self._lock:
                self._ends -= {source, sink}


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
