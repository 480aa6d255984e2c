"""Models on a device: fetched from the server, checked, and swapped in at once.

A release is a few files, and a manifest that names each with its size and SHA-256. Its name is the
SHA-256 of the manifest, which the fleet's authority signs: a device runs what its fleet released,
whole, or what it ran before.

::

    artefacts/<digest>/    manifest.json, signature, the files; this one and the one before
    artefacts/current      link to what the device runs
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedq.errors import FedqError
from fedq.fleet import identity

MANIFEST, SIGNATURE, PROBE = "manifest.json", "signature", "probe.npz"
#: What is signed begins so: it can be taken for nothing else that the authority signs.
SIGNED = b"fedq release 1\n"
DIGEST = re.compile(r"[0-9a-f]{64}")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")
MAX_MANIFEST_BYTES, MAX_RELEASE_BYTES = 1 << 16, 1 << 28
#: As in the parity gate of an export: one example may stand at a tie.
AGREEMENT, CHECK_S = 0.998, 600.0
CURRENT = "current"
#: What the runner says of examples, by task.
ANSWERS = ("classes", "values", "errors")

#: Returns part of a release's file: digest, name, offset.
Fetch = Callable[[str, str, int], bytes]


class NotReleasedError(FedqError):
    """A release that this device does not run."""


@dataclass(frozen=True)
class Artefacts:
    """The releases on a device.

    Attributes:
      root: The folder.
      authority: The certificate of the fleet's authority, PEM.
    """

    root: Path
    authority: bytes

    @property
    def current(self) -> str:
        """The digest of what the device runs; empty if it runs nothing."""
        try:
            return os.readlink(self.root / CURRENT)
        except OSError:
            return ""

    def install(self, digest: str, fetch: Fetch) -> str:
        """Run a release from now on; what was fetched of it before is not fetched again.

        Returns:
          How it was checked: ``ok``, or why it was not executed.

        Raises:
          NotReleasedError: If it is not this fleet's, damaged, too large, or gives other classes
            here than on the server; the device runs what it ran before.
        """
        place = self.root / digest
        if not place.exists():
            temporary = self.root / f".{digest}"
            temporary.mkdir(parents=True, exist_ok=True)
            self._fetch(digest, temporary, fetch)
            temporary.replace(place)
        manifest = self._manifest(digest, place)
        said = _checked(place, manifest)
        before, link = self.current, self.root / f".{CURRENT}"
        link.unlink(missing_ok=True)
        link.symlink_to(digest)
        link.replace(self.root / CURRENT)
        for other in self.root.iterdir():
            if other.name.removeprefix(".") not in (digest, before, CURRENT):
                shutil.rmtree(other, ignore_errors=True)
        return said

    def _manifest(self, digest: str, folder: Path) -> dict[str, Any]:
        """Return a manifest that the authority signed."""
        text = (folder / MANIFEST).read_bytes()
        signature = (folder / SIGNATURE).read_bytes()
        if hashlib.sha256(text).hexdigest() != digest:
            raise NotReleasedError("its manifest is another one")
        if not identity.is_signed(self.authority, SIGNED + text, signature):
            raise NotReleasedError("its manifest is not signed by this device's fleet")
        manifest = json.loads(text)  # the fleet's own from here on
        assert isinstance(manifest, dict)
        return manifest

    def _fetch(self, digest: str, folder: Path, fetch: Fetch) -> None:
        try:
            for name in (MANIFEST, SIGNATURE):
                (folder / name).write_bytes(_whole(fetch, digest, name, MAX_MANIFEST_BYTES))
            manifest = self._manifest(digest, folder)
            if sum(size for size, _ in manifest["files"].values()) > MAX_RELEASE_BYTES:
                raise NotReleasedError("it is too large")
            for name, (size, sha256) in manifest["files"].items():
                if not FILE.fullmatch(name):
                    raise NotReleasedError("it has a file that is no file's name")
                _get(fetch, digest, folder / name, size, sha256)
        except NotReleasedError:
            shutil.rmtree(folder)
            raise


def _whole(fetch: Fetch, digest: str, name: str, most: int) -> bytes:
    data = b""
    while piece := fetch(digest, name, len(data)):
        data += piece
        if len(data) > most:
            raise NotReleasedError(f"its {name} is too large")
    return data


def _get(fetch: Fetch, digest: str, path: Path, size: int, sha256: str) -> None:
    """Fetch what is missing of a file; it is there and synced, or the release is not one."""
    with path.open("ab") as file:
        while (at := file.tell()) < size:
            data = fetch(digest, path.name, at)
            if not data or at + len(data) > size:
                break
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise NotReleasedError(f"its {path.name} is damaged")


def _checked(folder: Path, manifest: dict[str, Any]) -> str:
    """Execute a release in a process of its own; return ``ok``, or why it was not executed."""
    expected = manifest["probe"]
    if expected is None:
        return "not run here: for a microcontroller"
    command = [sys.executable, "-m", "fedq.export.runner", str(folder / manifest["model"])]
    try:
        done = subprocess.run(
            [*command, "--data", str(folder / PROBE), "--json"],
            capture_output=True,
            text=True,
            timeout=CHECK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotReleasedError(f"it does not finish within {CHECK_S:.0f} s") from None
    words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    if done.returncode:
        if "is not installed" in words[0]:
            return words[0].removeprefix("runner: ")
        raise NotReleasedError(f"it does not run here: {words[0]}")
    kind = manifest.get("answers", ANSWERS[0])
    given, wanted = (np.array(of, np.float64) for of in (json.loads(done.stdout)[kind], expected))
    if given.shape != wanted.shape:
        raise NotReleasedError(f"it gives {given.shape} {kind} in place of {wanted.shape}")
    near = np.abs(given - wanted) <= manifest.get("tolerance", 0.0)  # NaN is near nothing
    differing = int((~near).reshape(len(wanted), -1).any(1).sum())
    if differing > max(1, (1 - AGREEMENT) * len(expected)):
        raise NotReleasedError(f"{differing} of {len(expected)} {kind} differ from the server's")
    return "ok"
