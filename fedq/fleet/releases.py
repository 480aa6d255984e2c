"""Models for devices, on the server: exported, signed, and which device should run which.

::

    releases/<digest>/     manifest.json, signature, the files; see ``artefacts``
    releases/wanted.json   per device the digests that it should run, the newest last
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedq.errors import ConfigError, FedqError
from fedq.export import runner
from fedq.fleet import identity
from fedq.fleet.artefacts import DIGEST, FILE, MANIFEST, PROBE, SIGNATURE, SIGNED
from fedq.fleet.files import Fleet, read_json, replace_file, write_json

PROBES = 32
KEPT = 8  #: releases to which a device can go back


def make(fleet: Fleet, run: Path, exporter: str) -> str:
    """Make a release of a run, exporting it if that was not done yet, and return its digest."""
    from fedq import registry

    folder = exported(run, exporter)
    about = read_json(folder / "export.json", f"no export in {folder}; run fedq export {run}")
    packed = folder / f"{about['file']}{runner.PACKED}"
    model = packed if packed.exists() else folder / about["file"]
    files = {path.name: path.read_bytes() for path in (model, folder / "export.json")}
    for name in registry.build("exporter", exporter).companions:
        files[name] = (folder / name).read_bytes()
    manifest: dict[str, Any] = {
        "fleet": fleet.name,
        "run": run.resolve().name,
        "exporter": exporter,
        "model": model.name,
        "accuracy": about["accuracy"],
        "probe": None,
    }
    if _runs(model):
        files[PROBE], manifest["probe"] = _probe(run, model)
    manifest["files"] = {
        name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()
    }
    text = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    digest = hashlib.sha256(text).hexdigest()
    place = fleet.path("releases") / digest
    if not place.exists():
        temporary = place.with_name(f".{digest}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        signature = identity.sign(fleet.ca, SIGNED + text)
        for name, data in {**files, MANIFEST: text, SIGNATURE: signature}.items():
            replace_file(temporary / name, data)
        temporary.replace(place)
    return digest


def exported(run: Path, exporter: str) -> Path:
    """Return the folder of a run's export, made if it is not there or older than the model."""
    folder, model = run / "export" / exporter, run / "model.safetensors"
    with contextlib.suppress(OSError):
        if (folder / "export.json").stat().st_mtime >= model.stat().st_mtime:
            return folder
    from fedq import config, registry
    from fedq.export._release import release
    from fedq.export._source import source
    from fedq.results import read_config, read_model

    chosen = registry.build("exporter", exporter)
    chosen.check()
    experiment = config.load_resumed(read_config(run), [])
    tensors, _ = read_model(run)
    quantization = experiment.quantization
    if quantization.name == "none":
        quantization = config.choice("quantization", "int8")
    release(source(experiment, tensors, quantization), chosen, folder)
    return folder


def _probe(run: Path, model: Path) -> tuple[bytes, list[int]]:
    """Return some test examples as a file, and the classes that the model gives them here."""
    from fedq import config
    from fedq.data.base import load
    from fedq.results import read_config

    dataset = load(config.load_resumed(read_config(run), []).data)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=dataset.x_test[:PROBES])
    path = model.with_name(f".{PROBE}")
    path.write_bytes(buffer.getvalue())
    try:
        classes = runner.classify(model, path)["classes"]
    except runner.RunnerError as error:
        raise FedqError(str(error)) from None
    finally:
        path.unlink()
    return buffer.getvalue(), classes


def _runs(model: Path) -> bool:
    return Path(model.name.removesuffix(runner.PACKED)).suffix in runner.SUFFIXES


def wanted(fleet: Fleet) -> dict[str, list[str]]:
    """Return per device the releases that it should run, the newest last."""
    path = fleet.path("releases") / "wanted.json"
    return {} if not path.exists() else read_json(path, "")


def want(fleet: Fleet, devices: Sequence[str], digest: str) -> None:
    """Have devices run a release."""
    found = wanted(fleet)
    for name in devices:
        before = [other for other in found.get(name, []) if other != digest]
        found[name] = [*before, digest][-KEPT:]
    _save(fleet, found)


def go_back(fleet: Fleet, devices: Sequence[str]) -> dict[str, str]:
    """Have devices run what they ran before; return what that is.

    Raises:
      ConfigError: If one of them has run nothing before.
    """
    found = wanted(fleet)
    for name in devices:
        if len(found.get(name, [])) < 2:
            raise ConfigError(f"{name} has no release to go back to; see fedq fleet status")
    for name in devices:
        found[name] = found[name][:-1]
    _save(fleet, found)
    return {name: found[name][-1] for name in devices}


def _save(fleet: Fleet, found: dict[str, list[str]]) -> None:
    folder = fleet.path("releases")
    write_json(folder / "wanted.json", found)
    used = {digest for digests in found.values() for digest in digests}
    for place in folder.iterdir():
        if DIGEST.fullmatch(place.name) and place.name not in used:
            shutil.rmtree(place)


def piece(root: Path, digest: str, name: str, offset: int, size: int) -> bytes | None:
    """Return part of a release's file, None if there is no such file; of any peer's request."""
    if not (DIGEST.fullmatch(digest) and FILE.fullmatch(name)):
        return None
    try:
        with (root / digest / name).open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except (OSError, OverflowError):
        return None
