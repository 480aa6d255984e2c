"""Peers' codecs in environments of their own, behind a line of JSON each; see ``peers/``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedq.errors import FedqError
from fedq.layout import Layout, Vector

HERE = Path(__file__).parent / "peers"
HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedq" / "peers"


@dataclass(frozen=True)
class Recipe:
    """How a peer is installed and what it is asked to do.

    Attributes:
      packages: For pip, without their dependencies: what else they need is this environment's.
      settings: What the adapter's ``encode`` is given, one row of the table each.
      unbiased: As the peer's paper promises.
      sends: Whether its bytes are a message's, not the size of arrays in memory.
    """

    packages: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    unbiased: bool
    sends: bool


PEERS = {
    "nncodec": Recipe(
        ("nncodec==2.1.3", "numpy<2", "tqdm"),
        tuple({"qp": qp} for qp in (-16, -8, -4, 0, 4, 8, 12)),
        unbiased=False,
        sends=True,
    ),
    # Its pipelines call np.reshape(newshape=), which NumPy 2.4 no longer has.
    "openfl": Recipe(
        ("openfl==1.9", "numpy<2.4", "dynaconf", "tqdm"),
        tuple({"n_bits": bits} for bits in (1, 2, 3, 4)),
        unbiased=True,
        sends=True,
    ),
    "bitsandbytes": Recipe(
        ("bitsandbytes==0.50.2",),
        tuple({"kind": kind} for kind in ("int8", "nf4")),
        unbiased=False,
        sends=False,
    ),
}


@dataclass(frozen=True)
class Peer:
    """A peer that waits for vectors."""

    name: str
    recipe: Recipe
    process: subprocess.Popen[str]
    folder: Path

    def code(
        self, x: Vector, layout: Layout, seed: int, settings: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Vector]:
        """Return the answer, with ``bytes``, ``encode_s`` and ``decode_s``, and the decoded vector.

        Raises:
          FedqError: If the peer has ended.
        """
        vector, decoded = self.folder / "vector.npy", self.folder / "decoded.npy"
        np.save(vector, x)
        request = {
            "vector": str(vector),
            "decoded": str(decoded),
            "layout": [[tensor.name, tensor.shape] for tensor in layout],
            "seed": seed,
            "settings": dict(settings),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline()), np.load(decoded)
        except (BrokenPipeError, json.JSONDecodeError):
            raise FedqError(_last_line((self.folder / "log").read_text())) from None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose peers."""
    parser.add_argument("--peers", nargs="*", default=[], help=f"of {', '.join(PEERS)}; or all")
    parser.add_argument("--install", action="store_true", help="make the peers' environments")
    parser.add_argument("--peers-home", type=Path, default=HOME, help="where these are")


def start(stack: ExitStack, options: argparse.Namespace, left_out: list[str]) -> Iterator[Peer]:
    """Yield the chosen peers, started; say of the others why not."""
    chosen = list(PEERS) if options.peers == ["all"] else options.peers
    for name in chosen:
        recipe, home = PEERS[name], options.peers_home / name
        if options.install and not (home / "installed").exists():
            reason = _install(recipe, home)
            if reason:
                left_out.append(f"{name} could not be installed here ({reason})")
                continue
        if not (home / "installed").exists():
            left_out.append(f"{name} is not installed: --install makes its environment")
            continue
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        process = subprocess.Popen(
            [home / "bin" / "python", HERE / f"{name}.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stack.enter_context((folder / "log").open("w")),
            text=True,
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            | {"OMP_NUM_THREADS": "1"},
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield Peer(name, recipe, process, folder)


def _install(recipe: Recipe, home: Path) -> str:
    """Make an environment; return why it failed, or nothing."""
    venv.create(home, with_pip=True, clear=True)
    packages = next(home.glob("lib/python*/site-packages"))
    # The same torch for all: what is installed here is visible there, after what the peer brings.
    own = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "host.pth").write_text("\n".join(own) + "\n")
    done = subprocess.run(
        [home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", *recipe.packages],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return _last_line(done.stderr)
    (home / "installed").touch()
    return ""


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
