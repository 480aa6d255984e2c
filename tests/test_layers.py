"""Layers point down: what a module may bring along, proved in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pkgutil import iter_modules

import pytest

import fedq

#: What each layer must not import; every module and package of fedq is in exactly one.
LAYERS: dict[str, tuple[str, str]] = {
    "core": (
        "errors registry training_config layout random wire codecs feedback aggregators optimizers "
        "downlink merging state experiment jit threads guard attacks privacy keys secagg envelope "
        "sealing metrics physics pacing budgets topologies capacity pruning distillation "
        "read_outs",
        "torch flwr hydra omegaconf ray rich matplotlib sklearn mlxtend safetensors",
    ),
    "files": (
        "results manifest trackers",
        "torch flwr hydra omegaconf ray rich matplotlib sklearn mlxtend numba",
    ),
    "report": (
        "report codec_report doctor cli watch reference",
        "torch flwr hydra omegaconf ray matplotlib sklearn mlxtend",
    ),
    "data": ("data", "torch flwr hydra omegaconf ray rich matplotlib sklearn mlxtend"),
    "learning": (
        "models tasks quantization training private_training accelerate export evasion adversarial",
        "flwr hydra omegaconf ray rich matplotlib",
    ),
    "configuration": ("config", "torch flwr ray rich matplotlib"),
    "protocol": (
        "records cohort rounds requests replies strategy client engines asynchronous flower "
        "secure_client secure_server",
        "torch hydra omegaconf ray matplotlib",
    ),
    "server": ("server progress", "hydra omegaconf ray matplotlib"),
    "programs": (
        "simulation sweep optimize help node fleet allocate personalise robustness evaluate",
        "ray matplotlib",
    ),
}

_IMPORT = """
import sys
from importlib import import_module
from pkgutil import walk_packages
for name in sys.argv[1:]:
    module = import_module("fedq." + name)
    if hasattr(module, "__path__"):
        for found in walk_packages(module.__path__, module.__name__ + "."):
            import_module(found.name)
print(*{name.split(".")[0] for name in sys.modules})
"""


def test_every_module_is_in_one_layer() -> None:
    listed = [name for modules, _ in LAYERS.values() for name in modules.split()]
    assert sorted(listed) == sorted(module.name for module in iter_modules(fedq.__path__))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_nothing_above_it(layer: str) -> None:
    modules, forbidden = LAYERS[layer]
    command = [sys.executable, "-c", _IMPORT, *modules.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    brought = set(done.stdout.split()) & set(forbidden.split())
    assert not brought


_HELP = """
import contextlib, io, sys
from fedq.cli import main
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(command.split())
print(*{name.split(".")[0] for name in sys.modules})
"""


def test_help_waits_for_nothing_heavy() -> None:
    commands = ["--help", "simulate --help", "report --help", "fleet --help"]
    command = [sys.executable, "-c", _HELP, *commands]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "flwr", "ray", "matplotlib", "sklearn"}
