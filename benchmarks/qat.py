"""CPU time of a training step with fake quantizers over the float step, side by side.

    python benchmarks/qat.py                                  # fedq and torch.ao
    python benchmarks/qat.py --python VENV/bin/python         # and brevitas, from its own venv

Models are the keyword spotter and the image classifier of MLPerf Tiny, batch 32, one thread,
W8A8. A step is forward, loss, backward and SGD. Rounds go over all contestants in turn, and each
contestant's figure is its least CPU time of all rounds: the machine is shared, and noise only adds.
Brevitas runs in a process of its own, turn by turn with a float twin there; its ratio is to that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

MODELS: dict[str, tuple[tuple[int, ...], int]] = {
    "ds_cnn": ((1, 49, 10), 12),
    "resnet8": ((3, 32, 32), 10),
}
LIMITS = {"ds_cnn": 1.6, "resnet8": 1.35}
BATCH = 32


def batch(model: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs in channels-last order, as the trainer feeds them, and labels."""
    shape, classes = MODELS[model]
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.normal(size=(BATCH, *shape)).astype(np.float32))
    y = torch.from_numpy(random.integers(0, classes, BATCH))
    return x.to(memory_format=torch.channels_last), y


def stepper(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Return a function that takes one step of SGD."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    return step


def least(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return each contestant's least CPU time of a step, in ms."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            best[name] = min(best[name], 1e3 * (time.process_time() - begin))
    return best


def float_network(model: str, seed: int) -> nn.Module:
    """Return a network of fedq's zoo."""
    import fedq
    from fedq.models import create

    shape, classes = MODELS[model]
    return create(fedq.build("model", model), shape, classes, seed)


def fedq_networks(model: str, seed: int) -> dict[str, nn.Module]:
    """Return fedq's contestants."""
    import fedq

    lsq = {"weights": {"name": "lsq", "bits": 4}, "activations": {"name": "lsq", "bits": 8}}
    codebook = {"weights": {"name": "codebook", "bits": 2}}
    chosen = {
        "fedq W8A8": fedq.build("quantization", "uniform"),
        "fedq W4A8 LSQ": fedq.build("quantization", "qat", **lsq),
        "fedq W2A8 codebook": fedq.build("quantization", "qat", **codebook),
    }
    return {name: q.prepare(float_network(model, seed)) for name, q in chosen.items()}


def torch_network(model: str, seed: int) -> nn.Module:
    """Return the network prepared by torch.ao's FX graph mode, x86 defaults: W8A8 per channel."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = get_default_qat_qconfig_mapping("x86")
        x, _ = batch(model, seed)
        prepared: nn.Module = prepare_qat_fx(float_network(model, seed).train(), mapping, (x,))
    return prepared


def brevitas_network(model: str, seed: int) -> nn.Module:
    """Return the network with brevitas' layers: W8 per channel, A8, its own defaults else."""
    import brevitas.nn as qnn
    from brevitas.quant import (
        Int8ActPerTensorFloat,
        Int8WeightPerChannelFloat,
        Uint8ActPerTensorFloat,
    )

    def swapped(module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                new: nn.Module = qnn.QuantConv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size,
                    stride=child.stride,
                    padding=child.padding,
                    groups=child.groups,
                    bias=child.bias is not None,
                    weight_quant=Int8WeightPerChannelFloat,
                )
            elif isinstance(child, nn.Linear):
                new = qnn.QuantLinear(
                    child.in_features,
                    child.out_features,
                    bias=True,
                    weight_quant=Int8WeightPerChannelFloat,
                )
            elif isinstance(child, nn.ReLU):
                new = qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat)
            else:
                swapped(child)
                continue
            setattr(module, name, new)
        return module

    network = swapped(float_network(model, seed))
    return nn.Sequential(qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat), network)


def peer(rounds: int, seed: int) -> dict[str, dict[str, float]]:
    """Return brevitas' times beside float's, in this process."""
    times = {}
    for model in MODELS:
        x, y = batch(model, seed)
        networks = {"float": float_network(model, seed), "brevitas": brevitas_network(model, seed)}
        times[model] = least({n: stepper(net, x, y) for n, net in networks.items()}, rounds)
    return times


def main() -> None:
    """Time all contestants and write the results."""
    torch.set_num_threads(1)
    if (peers := _peer_arguments()) is not None:
        print(json.dumps(peer(*peers)))
        return
    from _common import parser, table, write

    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=60)
    options.add_argument("--python", type=Path, help="an interpreter that has brevitas and fedq")
    arguments = options.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    cells: list[dict[str, Any]] = []
    for model in MODELS:
        x, y = batch(model, arguments.seed)
        networks = {"float": float_network(model, arguments.seed)}
        networks |= fedq_networks(model, arguments.seed)
        networks["torch.ao FX"] = torch_network(model, arguments.seed)
        times = least({n: stepper(net, x, y) for n, net in networks.items()}, rounds)
        cells += [
            {"model": model, "who": n, "ms": ms, "over_float": ms / times["float"]}
            for n, ms in times.items()
        ]
    if arguments.python is not None:
        command = [str(arguments.python), __file__, "--peer", str(rounds), str(arguments.seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for model, times in json.loads(done.stdout.splitlines()[-1]).items():
            over = times["brevitas"] / times["float"]
            cells.append(
                {"model": model, "who": "brevitas", "ms": times["brevitas"], "over_float": over}
            )
    columns = {"who": "step", "ms": "CPU ms", "over_float": "over float"}
    text = []
    for model, limit in LIMITS.items():
        rows = sorted((c for c in cells if c["model"] == model), key=lambda c: c["over_float"])
        own = next(c["over_float"] for c in rows if c["who"] == "fedq W8A8")
        text += [
            f"## {model}, batch {BATCH}",
            table(columns, rows),
            f"Limit for W8A8: {limit}; measured {own:.2f}.",
        ]
    figures = {"seed": arguments.seed, "rounds": rounds, "batch": BATCH, "cells": cells}
    write(arguments.out, "qat", "A training step with fake quantizers", text, figures)


def _peer_arguments() -> tuple[int, int] | None:
    """Return rounds and seed if this process is the peer's."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--peer", nargs=2, type=int)
    known, _ = options.parse_known_args()
    return None if known.peer is None else (known.peer[0], known.peer[1])


if __name__ == "__main__":
    main()
