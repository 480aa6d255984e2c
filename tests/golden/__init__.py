"""Golden vectors: payloads that every later version must still write and read.

One JSON file per codec and example holds the configuration, the layout, the input (little-endian
float32, hexadecimal), the seed, the payload and the decoded vector. ``python -m tests.golden
--write`` writes missing files and refuses to change existing ones without ``--force``; ``--check``
compares, without pytest, where there is Python, NumPy and little else (``tests/aarch64.sh``).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedq import random
from fedq.layout import Layout
from fedq.registry import build, table, to_config

FOLDER = Path(__file__).parent
SEED = 20_240_229

LAYOUT = Layout(
    ("conv.weight", "conv.bias", "gain", "head.weight"), ((3, 2, 3, 3), (3,), (), (4, 10))
)


def golden_input() -> np.ndarray:
    """Return the (98,) input: heavy-tailed, with zeros, from integers only."""
    word = random.words(SEED, LAYOUT.size, "golden").astype(np.int64) - 2**31
    x = np.ldexp((word >> 16).astype(np.float64) ** 3, -48)
    x[::7] = 0
    return x.astype(np.float32)


def _slug(options: Any) -> str:
    if isinstance(options, dict):
        items = options.items()
        return "_".join(v if k == "name" else f"{k}-{_slug(v)}" for k, v in items) or "default"
    return str(options).lower()


def examples() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Return each example's file and configuration."""
    for name, cls in table("codec").items():
        for options in cls.examples:
            path = FOLDER / name / f"{_slug(dict(options))}.json"
            yield path, to_config(build("codec", name, **options))


def golden_case(config: dict[str, Any]) -> dict[str, Any]:
    """Return the golden record of one configuration, as this version computes it."""
    options = {key: value for key, value in config.items() if key != "name"}
    codec = build("codec", config["name"], **options)
    x = golden_input()
    payload = codec.encode(x, LAYOUT, SEED)
    return {
        "codec": config,
        "layout": [[name, list(shape)] for name, shape in zip(*_parts(LAYOUT), strict=True)],
        "seed": SEED,
        "x": x.astype("<f4").tobytes().hex(),
        "payload": payload.hex(),
        "y": codec.decode(payload, LAYOUT).astype("<f4").tobytes().hex(),
    }


def _parts(layout: Layout) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    return layout.names, layout.shapes


def write(force: bool) -> int:
    """Write missing files; return how many existing ones differ and were left alone."""
    kept = 0
    for path, config in examples():
        text = json.dumps(golden_case(config), indent=1) + "\n"
        old = path.read_text() if path.exists() else None
        if old is not None and old != text and not force:
            print(f"{path} differs; --force would break every payload written so far")
            kept += 1
        elif old != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path}")
    return kept


def check() -> int:
    """Encode and decode every golden vector; return how many differ, and print their names."""
    files, different = sorted(FOLDER.glob("*/*.json")), 0
    for path in files:
        case = json.loads(path.read_text())
        if golden_case(case["codec"]) != case:
            print(f"{path.relative_to(FOLDER)} differs")
            different += 1
    print(f"{platform.machine()}: {len(files)} golden vectors, {different} differ")
    return different
