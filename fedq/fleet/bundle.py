"""Enrolment: one archive per device, and the code that opens the key inside.

The archive holds ``device.json``, ``ca.crt`` and ``key.pem``, which is encrypted with a code that
``fedq fleet init`` shows once: whoever finds the archive alone can do nothing with it.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedq.errors import ConfigError
from fedq.fleet import identity, units
from fedq.fleet.files import DEVICE, Device, Fleet, checked_host, checked_name

MAX_BYTES = 1 << 20
_FILES = (DEVICE, "ca.crt", "key.pem")


def enrol(fleet: Fleet, name: str) -> tuple[Fleet, str]:
    """Make a device's key and bundle; return the fleet with it, and the code.

    The server keeps the public half alone.
    """
    key, code = identity.device_key(), identity.enrolment_code()
    fleet = fleet.with_device(name, identity.public_line(key))
    device = {"name": name, "server": fleet.device_address}
    content = {
        DEVICE: json.dumps(device).encode(),
        "ca.crt": fleet.ca.certificate,
        "key.pem": identity.sealed(key, code),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for file, data in content.items():
            info = tarfile.TarInfo(file)
            info.size, info.mode = len(data), 0o600
            archive.addfile(info, io.BytesIO(data))
    identity.write_private(fleet.bundle(name), buffer.getvalue())
    return fleet, code


def join(
    archive: Path, code: str, root: Path, node: Mapping[str, bool | int | float | str]
) -> Device:
    """Make a device's directory out of its bundle; the key in there is the device's from then on.

    Args:
      archive: The bundle.
      code: Its code.
      root: The directory; what a device keeps in ``state/`` stays there.
      node: The device's own data and number.

    Raises:
      ConfigError: If the bundle is none, or the code is that of another.
    """
    content = _content(archive)
    key = identity.unsealed(content["key.pem"], code)
    try:
        described = json.loads(content[DEVICE])
        name, server = checked_name(described["name"]), str(described["server"])
        checked_host(server.rpartition(":")[0].strip("[]"))
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{archive} is damaged; copy it from the server again") from None
    root = root.resolve()
    settings: dict[str, Any] = {"root": root, "name": name, "server": server}
    if (path := node.get("data-path")) is not None:  # the service starts in another folder
        node = {**node, "data-path": str(Path(str(path)).expanduser().absolute())}
    if (root / DEVICE).exists():  # a new key for a device that was here
        device = replace(Device.open(root), **settings)
        device = replace(device, node={**device.node, **node})
    else:
        device = Device(**settings, node=dict(node))
    device.save()
    identity.write_private(device.key, identity.openssh(key))
    identity.write_private(device.ca, content["ca.crt"])
    (root / units.NODE).write_text(units.node(root, units.command()))
    return device


def _content(archive: Path) -> dict[str, bytes]:
    """Read the few small files of a bundle; nothing is unpacked by the names it carries."""
    try:
        if archive.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{archive} is too large for an enrolment bundle")
        content = {}
        with tarfile.open(archive, mode="r:") as bundle:
            for member in bundle:
                file = bundle.extractfile(member) if member.isreg() else None
                if member.name in _FILES and file is not None:
                    content[member.name] = file.read(MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read the bundle: {error}") from None
    except tarfile.TarError:
        raise ConfigError(f"{archive} is not an enrolment bundle") from None
    if set(content) != set(_FILES):
        raise ConfigError(f"{archive} is not an enrolment bundle")
    return content
