"""Releases: what a device runs is what its fleet signed, whole, or what it ran before."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedq import config, simulation
from fedq.errors import ConfigError
from fedq.experiment import Experiment
from fedq.export import _measure
from fedq.fleet import artefacts, identity, releases
from fedq.fleet.artefacts import MANIFEST, PROBE, SIGNATURE, Artefacts, NotReleasedError
from fedq.fleet.files import Fleet
from fedq.fleet.identity import Pair
from fedq.fleet.profile import Profile
from fedq.results import read_summary

PROBES = 16


@dataclass
class Shop:
    """A server's releases, as a function that gives parts of files; some may be tampered with."""

    ca: Pair
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fetched: list[tuple[str, int]] = field(default_factory=list)

    def put(self, model: bytes, probe: list[int] | None = None, **changes: Any) -> str:
        files = {"model.tflite": model, PROBE: b"examples"}
        manifest = {
            "model": "model.tflite",
            "probe": probe,
            "files": {n: [len(d), hashlib.sha256(d).hexdigest()] for n, d in files.items()},
            **changes,
        }
        text = json.dumps(manifest).encode()
        digest = hashlib.sha256(text).hexdigest()
        signature = identity.sign(self.ca, artefacts.SIGNED + text)
        self.files[digest] = {**files, MANIFEST: text, SIGNATURE: signature}
        return digest

    def fetch(self, digest: str, name: str, offset: int) -> bytes:
        self.fetched.append((name, offset))
        return self.files[digest].get(name, b"")[offset : offset + 1000]


@pytest.fixture(scope="module")
def ca() -> Pair:
    return identity.authority("shelf")


@pytest.fixture
def shop(ca: Pair) -> Shop:
    return Shop(ca)


@pytest.fixture
def device(tmp_path: Path, ca: Pair) -> Artefacts:
    return Artefacts(tmp_path / "artefacts", ca.certificate)


def test_a_release_is_swapped_in_whole_and_the_one_before_stays(
    shop: Shop, device: Artefacts
) -> None:
    first, second, third = (shop.put(bytes([n]) * 2500) for n in range(3))
    assert device.current == ""
    for digest in (first, second):
        assert device.install(digest, shop.fetch) == "not run here: for a microcontroller"
        assert device.current == digest
    model = device.root / "current" / "model.tflite"
    assert model.read_bytes() == b"\x01" * 2500
    shop.fetched.clear()
    device.install(first, shop.fetch)
    assert model.read_bytes() == b"\x00" * 2500
    assert shop.fetched == []  # it was still here
    device.install(third, shop.fetch)
    assert {path.name for path in device.root.iterdir()} == {first, third, "current"}


def test_what_was_fetched_is_not_fetched_again(shop: Shop, device: Artefacts) -> None:
    digest = shop.put(b"m" * 5000)

    def cut(digest: str, name: str, offset: int) -> bytes:
        if offset >= 3000:
            raise ConnectionError("cut")
        return shop.fetch(digest, name, offset)

    with pytest.raises(ConnectionError):
        device.install(digest, cut)
    assert device.current == ""
    shop.fetched.clear()
    device.install(digest, shop.fetch)
    offsets = [offset for name, offset in shop.fetched if name == "model.tflite"]
    assert offsets == [3000, 4000]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("manifest", "another one"),
        ("signature", "not signed"),
        ("stranger", "not signed"),
        ("model", "damaged"),
        ("short", "damaged"),
        ("long", "damaged"),
        ("name", "no file's name"),
        ("large", "too large"),
        ("endless", "too large"),
    ],
)
def test_what_is_not_the_fleets_is_refused_and_nothing_changes(
    what: str, why: str, shop: Shop, device: Artefacts
) -> None:
    good = shop.put(b"good")
    device.install(good, shop.fetch)
    if what == "stranger":
        shop.ca = identity.authority("shelf")
    files = {}
    if what == "name":
        files = {"files": {"../../key": [1, "00"]}}
    if what == "large":
        files = {"files": {"model.tflite": [1 << 30, "00"]}}
    digest = shop.put(b"bad" * 1000, **files)
    held = shop.files[digest]
    if what == "manifest":
        held[MANIFEST] += b" "
    if what == "signature":
        held[SIGNATURE] = held[SIGNATURE][:-1]
    if what == "endless":
        held[MANIFEST] += b" " * (1 << 17)
    if what == "model":
        held["model.tflite"] = b"worse" * 600
    if what == "short":
        held["model.tflite"] = b"bad"
    if what == "long":
        held["model.tflite"] += b"more"
        held["model.tflite"] = held["model.tflite"][:2000] + b"x" * 2000
    with pytest.raises(NotReleasedError, match=why):
        device.install(digest, shop.fetch)
    assert device.current == good
    assert {path.name for path in device.root.iterdir()} == {good, "current"}


@pytest.mark.parametrize(
    ("script", "said", "refused"),
    [
        ("print('{\"classes\": [0] * 16}'.replace('[0] * 16', str([0] * 16)))", "ok", None),
        ("print('{\"classes\": CLASSES}'.replace('CLASSES', str([1] + [0] * 15)))", "ok", None),
        (
            "print('{\"classes\": CLASSES}'.replace('CLASSES', str([1, 1] + [0] * 14)))",
            None,
            "2 of 16 classes differ",
        ),
        (
            "sys.exit('runner: ai-edge-litert is not installed; pip install ai-edge-litert')",
            "ai-edge-litert is not installed; pip install ai-edge-litert",
            None,
        ),
        ("sys.exit('runner: cannot load it')", None, "does not run here: runner: cannot load it"),
        ("os.kill(os.getpid(), 4)", None, "exit status -4"),
    ],
)
def test_a_release_is_executed_before_it_runs(
    script: str,
    said: str | None,
    refused: str | None,
    shop: Shop,
    device: Artefacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!{sys.executable}\nimport os, sys\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(artefacts.sys, "executable", str(stand_in))
    digest = shop.put(b"model", probe=[0] * PROBES)
    if refused is None:
        assert device.install(digest, shop.fetch) == said
        assert device.current == digest
    else:
        with pytest.raises(NotReleasedError, match=refused):
            device.install(digest, shop.fetch)
        assert device.current == ""


@pytest.mark.parametrize(("moved", "refused"), [(0.09, False), (0.2, True), (math.nan, True)])
def test_numbers_may_be_off_by_a_step_of_their_grid(
    moved: float,
    refused: bool,
    shop: Shop,
    device: Artefacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    about = {"output": {"scale": 0.05}, "task": {"divisor": 2.0}}
    tolerance = releases._tolerance(about, "values", [[1.0, 2.0]] * 4)
    assert tolerance == pytest.approx(0.15)
    assert releases._tolerance(about, "errors", [0.04, 0.01]) == pytest.approx(0.0225)
    stand_in = tmp_path / "python"
    said = json.dumps({"values": [[1.0, 2.0 + moved]] * 4})
    stand_in.write_text(f"#!{sys.executable}\nprint('{said}')\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(artefacts.sys, "executable", str(stand_in))
    probe: Any = [[1.0, 2.0]] * 4
    digest = shop.put(b"model", probe=probe, answers="values", tolerance=tolerance)
    if refused:
        with pytest.raises(NotReleasedError, match="4 of 4 values differ"):
            device.install(digest, shop.fetch)
    else:
        assert device.install(digest, shop.fetch) == "ok"


def test_devices_go_back_as_far_as_they_came(tmp_path: Path) -> None:
    fleet = Fleet.create(tmp_path / "fleet", name="shelf", server="127.0.0.1")
    digests = [str(n) * 64 for n in range(3)]
    for digest in digests:
        (fleet.path("releases") / digest).mkdir(parents=True)
    releases.want(fleet, {"a": digests[0], "b": digests[0]})
    releases.want(fleet, {"a": digests[1]})
    assert not (fleet.path("releases") / digests[2]).exists()  # nobody's
    assert releases.go_back(fleet, ["a"]) == {"a": digests[0]}
    assert not (fleet.path("releases") / digests[1]).exists()
    with pytest.raises(ConfigError, match="b has no release to go back to"):
        releases.go_back(fleet, ["b"])
    assert releases.wanted(fleet) == {"a": [digests[0]], "b": [digests[0]]}


@pytest.mark.parametrize(
    ("digest", "name"),
    [
        ("0" * 64, "../wanted.json"),
        ("0" * 64, ".hidden"),
        ("..", "fleet.json"),
        ("0" * 63, "model"),
        ("1" * 64, "model"),
        ("0" * 64, ""),
    ],
)
def test_no_file_but_a_releases_is_given_out(digest: str, name: str, tmp_path: Path) -> None:
    (tmp_path / ("0" * 64)).mkdir()
    (tmp_path / ("0" * 64) / "model").write_bytes(b"abcdef")
    assert releases.piece(tmp_path, "0" * 64, "model", 2, 3) == b"cde"
    assert releases.piece(tmp_path, "0" * 64, "model", 10**12, 3) == b""
    assert releases.piece(tmp_path, digest, name, 0, 3) is None


# --- which device runs which width ---------------------------------------------------------------


def mixed(*options: str) -> Experiment:
    return config.load(["quantization=mixed", "quantization.widths=[8,4,0]", *options])


REPORTS: dict[str, dict[str, Any]] = {
    "says": {"weight_bits": 4, "partition_id": 0, "images_s": 100.0},
    "float": {"weight_bits": 0, "images_s": 90.0},
    "numbered": {"partition_id": 4, "images_s": 90.0},
    "counted": {"images_s": 10.0},
}
NUMBERS = {"says": 3, "float": 3, "numbered": 3, "counted": 7}


def test_a_device_runs_the_width_that_it_trained() -> None:
    found = releases.widths(mixed(), list(REPORTS), REPORTS, NUMBERS)
    # The device's own word, float as the widest integers, then its number or Flower's.
    assert found == {"says": "w4", "float": "w8", "numbered": "w4", "counted": "w4"}
    fast = {name: {**report, "images_s": 90.0} for name, report in REPORTS.items()}
    fast["counted"]["images_s"] = 10.0
    by_speed = mixed("quantization.widths=[8,4,2]", "width_by=speed")
    found = releases.widths(by_speed, ["numbered", "counted"], fast, NUMBERS)
    assert found == {"numbered": "w8", "counted": "w2"}


def test_a_width_that_is_not_known_is_asked_for() -> None:
    reports = {"silent": {}, "strange": {"weight_bits": 3}}
    with pytest.raises(ConfigError, match=r"late has not said its width .* --width w8"):
        releases.widths(mixed(), ["late"], reports, {"late": 1})
    with pytest.raises(ConfigError, match=r"strange: weight-bits=3 is none of .*w8, w4, float"):
        releases.widths(mixed(), ["strange"], reports, {"strange": 1})


def test_each_width_is_a_release_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setattr(_measure, "memory_mb", lambda *of: (1.0, False))  # two processes each
    run, fleet = (
        tmp_path / "run",
        Fleet.create(tmp_path / "fleet", name="shelf", server="127.0.0.1"),
    )
    options = [
        "data=digits",
        "clients=2",
        "rounds=1",
        "engine.workers=1",
        "quantization=mixed",
        "read_out=distilled",
    ]
    experiment = config.load([*options, "quantization.widths=[8,2]", "read_out.examples=50"])
    simulation.run_experiment(experiment, run)
    assert releases.assigned(fleet, run, ["a", "b"], "w2") == {"a": "w2", "b": "w2"}
    for width, words in (("w4", "no width w4 to deploy; .* w8, w2"), (None, "fedq fleet up")):
        with pytest.raises(ConfigError, match=words):
            releases.assigned(fleet, run, ["a"], width)
    made = {width: releases.make(fleet, run, "litert", width) for width in ("w8", "w2")}
    releases.want(fleet, {"a": made["w8"], "b": made["w2"]})
    assert releases.wanted(fleet) == {"a": [made["w8"]], "b": [made["w2"]]}
    scores = read_summary(run)["accuracy_read_out"]
    for width, digest in made.items():
        manifest = json.loads((fleet.path("releases") / digest / MANIFEST).read_bytes())
        assert manifest["width"] == width
        assert manifest["accuracy"] == pytest.approx(scores[width], abs=0.02)
    bits = {
        width: set(
            json.loads((run / "export" / width / "litert" / "export.json").read_text())[
                "weight_bits"
            ].values()
        )
        for width in made
    }
    assert bits["w8"] == {8}
    assert 2 in bits["w2"]


# --- what a device measures ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("up_bytes_s", "chunk_bytes"),
    [(None, 5), (1.0, 1 << 14), (2_000, 1 << 14), (20_000, 1 << 17), (1e9, 1 << 20)],
)
def test_pieces_are_cut_for_the_uplink(up_bytes_s: float | None, chunk_bytes: int) -> None:
    assert Profile(up_bytes_s=up_bytes_s).chunk_bytes(5) == chunk_bytes


def test_a_profile_is_what_was_measured_and_seldom_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    assert Profile.read(path) == Profile()
    known = Profile().trained(1000, 2.0).sent(1 << 20, 10.0).sent(100, 60.0).trained(0, 1.0)
    assert known == Profile(images_s=500.0, up_bytes_s=105_000.0)
    known.save(path)
    assert Profile.read(path) == known
    Profile(images_s=510.0, up_bytes_s=106_000.0).save(path)
    assert Profile.read(path) == known
    over = Profile(images_s=510.0, up_bytes_s=104_000.0)  # cuts into smaller pieces
    assert over.chunk_bytes(0) != known.chunk_bytes(0)
    over.save(path)
    assert Profile.read(path) == over


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"images_s": "fast"}', '{"up_bytes_s": -1}', '{"images_s": true}']
)
def test_a_damaged_profile_is_no_profile(text: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    assert Profile.read(path) == Profile()
    assert np.isfinite(Profile.read(path).chunk_bytes(1))
