"""Layers point down: what a module may bring along, proved in fresh processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "flwr", "hydra", "ray", "matplotlib", "sklearn", "mlxtend")
RULES = {
    "fedq": HEAVY,
    "fedq.registry": (*HEAVY, "numba"),
    "fedq.wire": (*HEAVY, "numba"),
    "fedq.codecs": HEAVY,
    "fedq.feedback": HEAVY,
    "fedq.aggregators": HEAVY,
    "fedq.optimizers": HEAVY,
    "fedq.experiment": HEAVY,
    "fedq.results": HEAVY,
    "fedq.report": HEAVY,
    "fedq.state": HEAVY,
    "fedq.data": ("torch", "flwr", "hydra", "ray"),
    "fedq.config": ("torch", "ray"),
    "fedq.models": ("flwr", "hydra", "ray"),
    "fedq.quantization": ("flwr", "hydra", "ray"),
    "fedq.training": ("flwr", "hydra", "ray"),
    "fedq.strategy": ("torch", "hydra", "ray"),
    "fedq.client": ("torch", "hydra", "ray"),
    "fedq.server": ("hydra", "ray"),
    "fedq.engines.local": ("torch", "hydra", "ray"),
    "fedq.cli": HEAVY,
}
#: A package is loaded with all that registers in it.
LOADED = {"fedq.codecs": "codec", "fedq.aggregators": "aggregator", "fedq.data": "data"}


@pytest.mark.parametrize("module", RULES)
def test_a_layer_brings_only_what_it_may(module: str) -> None:
    load = f"import fedq.registry as r; r.table({LOADED[module]!r});" if module in LOADED else ""
    code = f"import sys, {module}; {load} print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.split(".")[0] for name in done.stdout.split()}
    assert not roots & set(RULES[module])
