"""Payloads in git: this version writes the same bytes and reads the same values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedq import Layout, codecs
from fedq.registry import from_config
from tests.golden import FOLDER, examples

EXAMPLES = [
    pytest.param(path, config, id=f"{path.parent.name}-{path.stem}") for path, config in examples()
]
FILES = [
    pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in FOLDER.glob("*/*.json")
]


@pytest.mark.parametrize(("path", "config"), EXAMPLES)
def test_every_example_has_a_golden_file(path: Path, config: dict) -> None:
    assert path.exists(), "run python -m tests.golden --write"
    assert json.loads(path.read_text())["codec"] == config


@pytest.mark.parametrize("path", FILES)
def test_golden(path: Path) -> None:
    case = json.loads(path.read_text())
    layout = Layout.of({name: np.empty(shape) for name, shape in case["layout"]})
    x = np.frombuffer(bytes.fromhex(case["x"]), "<f4")
    y = np.frombuffer(bytes.fromhex(case["y"]), "<f4")
    payload = bytes.fromhex(case["payload"])
    codec = from_config("codec", case["codec"])
    assert codec.encode(x, layout, case["seed"]) == payload
    for decoded in (codec.decode(payload, layout), codecs.decode(payload, layout)):
        assert decoded.tobytes() == y.astype(np.float32).tobytes()
