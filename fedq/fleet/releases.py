"""Models for devices, on the server: exported, signed, and which device should run which.

After a run with clients of several widths, each device gets the model of its own width, chosen as
the run itself chooses it.

::

    releases/<digest>/     manifest.json, signature, the files; see ``artefacts``
    releases/wanted.json   per device the digests that it should run, the newest last
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedq.capacity import Capacities, variant_of, width_for
from fedq.errors import ConfigError, FedqError
from fedq.export import runner
from fedq.fleet import identity
from fedq.fleet.artefacts import ANSWERS, DIGEST, FILE, MANIFEST, PROBE, SIGNATURE, SIGNED
from fedq.fleet.files import Fleet, read_json, replace_file, write_json
from fedq.fleet.profile import capacity_of
from fedq.metrics import metric_of

if TYPE_CHECKING:
    from fedq.experiment import Experiment

PROBES = 32
KEPT = 8  #: releases to which a device can go back


def make(fleet: Fleet, run: Path, exporter: str, width: str = "") -> str:
    """Make a release of a run, exporting it if that was not done yet, and return its digest.

    Args:
      fleet: Whose authority signs.
      run: The run directory.
      exporter: By name.
      width: Of a run of several widths, such as ``w4``.
    """
    from fedq import registry

    folder = exported(run, exporter, width)
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
        "width": width,
        "probe": None,
    }
    metric = metric_of(about)
    assert metric is not None
    manifest[metric.name] = about[metric.name]
    if _runs(model):
        files[PROBE], answers = _probe(run, model)
        kind = next(kind for kind in ANSWERS if kind in answers)
        manifest |= {"probe": answers[kind], "answers": kind}
        manifest["tolerance"] = _tolerance(about, kind, answers[kind])
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


def exported(run: Path, exporter: str, width: str = "") -> Path:
    """Return the folder of a run's export, made if it is not there or older than the model."""
    folder, model = run / "export" / width / exporter, run / "model.safetensors"
    with contextlib.suppress(OSError):
        if (folder / "export.json").stat().st_mtime >= model.stat().st_mtime:
            return folder
    from fedq import config, registry
    from fedq.export._release import release
    from fedq.export._source import source
    from fedq.results import read_config, read_model

    chosen = registry.build("exporter", exporter)
    chosen.check()
    read_out = run / "read_out" / width  # what this width is served, if the run says so
    if width and (read_out / model.name).exists():
        run = read_out
    experiment = config.load_resumed(read_config(run), [])
    tensors, _ = read_model(run)
    quantization = experiment.quantization
    if quantization.name == "none":
        quantization = config.choice("quantization", "int8")
    given = source(experiment, tensors, quantization, width=width or None)
    release(given, chosen, folder)
    return folder


def widths(
    experiment: Experiment,
    names: Sequence[str],
    reports: Mapping[str, Mapping[str, Any]],
    numbers: Mapping[str, int],
) -> dict[str, str]:
    """Return the width of each device's weights, by the rule of the run.

    Devices that train in float get the widest integers: releases are integers.

    Args:
      experiment: Of a run with several widths.
      names: The devices.
      reports: What each device of the fleet says of itself; speeds are compared with the median's.
      numbers: That Flower gave to the devices; of those that have no ``partition-id``.

    Raises:
      ConfigError: If a device has said nothing yet, or a width that the run has not.
    """
    quantization = experiment.quantization
    variants, bits = quantization.variants, quantization.widths
    if not any(bits):
        raise ConfigError("the run has no integer widths; export it by fedq export --quantization")
    widest = f"w{max(bits)}"
    speeds = {name: capacity_of(report) for name, report in reports.items()}
    median = Capacities(dict(enumerate(speeds.values()))).median.speed
    found = {}
    for name in names:
        if name not in reports or name not in numbers:
            raise ConfigError(
                f"{name} has not said its width since the server started; wait until it is on line,"
                f" or choose: fedq fleet deploy RUN {name} --width {widest}"
            )
        asked = None
        if experiment.width_by == "speed":
            asked = variants[width_for(bits, speeds[name].speed, median)]
        said = reports[name].get("weight_bits")
        number = int(reports[name].get("partition_id", numbers[name]))
        try:
            width = variants[variant_of(variants, said, asked, number)]
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        found[name] = widest if width == "float" else width
    return found


def assigned(
    fleet: Fleet, run: Path, names: Sequence[str], width: str | None = None
) -> dict[str, str]:
    """Return the width that each device should run; empty texts of a run with one width.

    Args:
      fleet: Its server is asked what devices say of themselves.
      run: The run directory.
      names: The devices.
      width: For all of them, such as ``w4``; None is their own.
    """
    from fedq import config
    from fedq.fleet import control
    from fedq.results import read_config

    experiment = config.load_resumed(read_config(run), [])
    variants = [name for name in experiment.quantization.variants if name != "float"]
    if width is not None or len(experiment.quantization.variants) == 1:
        if width is not None and width not in variants:
            had = ", ".join(filter(None, variants)) or "one width"
            raise ConfigError(f"the run has no width {width} to deploy; it was trained with {had}")
        return dict.fromkeys(names, width or "")
    if fleet.pid() is None:
        raise ConfigError(
            "devices of several widths say theirs to the fleet's server; start it with fedq fleet"
            f" up, or choose --width {variants[0] if variants else ''}".rstrip()
        )
    with control.connected(fleet) as client:
        ids = {node.public_key: node.node_id for node in control.nodes(client)}
    reports = {name: seen["report"] for name, seen in control.seen(fleet).items() if seen["report"]}
    numbers = {name: ids[key] for name, key in fleet.nodes().items() if key in ids}
    return widths(experiment, names, reports, numbers)


def _tolerance(about: Mapping[str, Any], kind: str, answers: Sequence[Any]) -> float:
    """Return how far answers may be from these where outputs are off by a step of their grid."""
    step = float(about["output"]["scale"])
    if kind == "values":
        return 1.5 * step * float(about["task"]["divisor"])
    if kind == "errors":  # of e with |e| at most r: 2 r step + step^2
        return 2 * step * math.sqrt(max(answers)) + step**2
    return 0.0


def _probe(run: Path, model: Path) -> tuple[bytes, dict[str, Any]]:
    """Return some test examples as a file, and what the runner says of them here."""
    from fedq import config
    from fedq.data.base import load
    from fedq.results import read_config

    dataset = load(config.load_resumed(read_config(run), []).data)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=dataset.x_test[:PROBES])
    path = model.with_name(f".{PROBE}")
    path.write_bytes(buffer.getvalue())
    try:
        answers = runner.classify(model, path)
    except runner.RunnerError as error:
        raise FedqError(str(error)) from None
    finally:
        path.unlink()
    return buffer.getvalue(), answers


def _runs(model: Path) -> bool:
    return Path(model.name.removesuffix(runner.PACKED)).suffix in runner.SUFFIXES


def wanted(fleet: Fleet) -> dict[str, list[str]]:
    """Return per device the releases that it should run, the newest last."""
    path = fleet.path("releases") / "wanted.json"
    return {} if not path.exists() else read_json(path, "")


def want(fleet: Fleet, digests: Mapping[str, str]) -> None:
    """Have devices run releases, each its own."""
    found = wanted(fleet)
    for name, digest in digests.items():
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
