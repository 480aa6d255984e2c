"""systemd units of the server and of a device; ``clients/`` and ``server/`` hold them filled in."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from fedq.errors import ConfigError

NODE, SUPERLINK = "fedq-node.service", "fedq-superlink.service"

_NODE = """\
# A device of a fedq fleet; made by fedq fleet join.
# sudo cp fedq-node.service /etc/systemd/system/ && sudo systemctl enable --now fedq-node
[Unit]
Description=fedq device
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={command} fleet node {root}
WorkingDirectory={root}
Restart=always
RestartSec=15
WatchdogSec=300
TimeoutStopSec=20
# The kernel ends the trainer, not the device, and nothing else on a small machine.
MemoryHigh=70%
MemoryMax=85%
OOMPolicy=continue
CPUWeight=50
Nice=10
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths={root}
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
UMask=0077
Environment=OMP_NUM_THREADS=1 NUMBA_CACHE_DIR={root}/state/numba

[Install]
WantedBy=multi-user.target
"""

_SUPERLINK = """\
# The server of a fedq fleet; made by fedq fleet init.
# sudo cp fedq-superlink.service /etc/systemd/system/
# sudo systemctl enable --now fedq-superlink
[Unit]
Description=fedq fleet server
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command} fleet up --foreground --fleet {root}
WorkingDirectory={root}
Restart=always
RestartSec=5
TimeoutStopSec=20
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths={root}
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
UMask=0077

[Install]
WantedBy=multi-user.target
"""


def command() -> str:
    """Return the fedq that runs: systemd takes a path, and knows no virtual environment."""
    beside = Path(sys.executable).with_name("fedq")
    return str(beside) if beside.exists() else shutil.which("fedq") or str(beside)


def node(root: Path, command: str) -> str:
    """Return the unit of a device in ``root``.

    >>> "ExecStart=/usr/bin/fedq fleet node /var/lib/fedq" in node(
    ...     Path("/var/lib/fedq"), "/usr/bin/fedq"
    ... )
    True
    """
    return _NODE.format(root=_word(root), command=_word(command))


def superlink(root: Path, command: str) -> str:
    """Return the unit of a fleet's server in ``root``."""
    return _SUPERLINK.format(root=_word(root), command=_word(command))


def _word(path: Path | str) -> str:
    """Return a path that a unit file takes as it is."""
    text = str(path)
    if not text.isprintable() or any(letter in text for letter in " \"'\\$%;"):
        raise ConfigError(f"{text!r} cannot stand in a unit file; use a path of plain letters")
    return text
