"""The vectors on which codecs are compared: clients' updates, drawn or trained.

Drawn at d = 2^20: N(0, 1), Laplace(1) and lognormal(0, 1), the last as in the EDEN and QUIC-FL
papers. Drawn with structure, for the bias: two non-zero coordinates of 4,096, and an embedding's
gradient, 4 non-zero rows of 128. All clients of a drawn set hold the same vector, so that nothing
averages out but what a codec randomises.

Trained: from one warm model each client trains one epoch on images of its own, whose classes follow
Dirichlet(0.5). `cnn` is the network of McMahan et al. 2017 (1,663,370 parameters), 300 images in
batches of 10, SGD with learning rate 0.05. `resnet_sgd` and `resnet_adam` are a ResNet-14 with
GroupNorm (392,098 parameters), 200 images in batches of 10, SGD with momentum 0.9 and Adam. All
images are MNIST-5k's, as no package ships CIFAR: figures on the ResNets are not comparable one to
one with those on CIFAR.

Every set is a function of its name and the client's number, up to the last bits of torch's
convolutions. Trained sets are kept in a cache directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _common
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import fedq
from fedq.data.base import Dataset
from fedq.data.base import load as load_data
from fedq.layout import Layout, Vector
from fedq.random import derive, generator

CLIENTS = 100
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedq" / "vectors"
D = 2**20


@dataclass(frozen=True)
class Vectors:
    """Updates of some clients.

    Attributes:
      name: A name from :data:`SETS`.
      layout: Names and shapes of the d coordinates.
      rows: (clients, d) float32; all rows of a drawn set are one vector.
    """

    name: str
    layout: Layout
    rows: NDArray[np.float32]

    @property
    def shared(self) -> bool:
        """Whether all clients hold the same vector."""
        return self.rows.strides[0] == 0


def main() -> None:
    parser = _common.parser(__doc__)
    add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.vectors, options.clients = ["gauss", "sparse", "embedding"], 2
    rows = []
    for name in options.vectors:
        vectors = load(name, options.clients, options.cache)
        x = vectors.rows[0].astype(np.float64)
        norms = np.linalg.norm(vectors.rows[:10], axis=1)
        common = np.linalg.norm(vectors.rows[:10].mean(axis=0, dtype=np.float64))
        rows.append(
            {
                "vectors": name,
                "parameters": x.size,
                "tensors": len(vectors.layout.tensors),
                "norm": float(np.linalg.norm(x)),
                "zeros": float(np.mean(x == 0)),
                "peak": float(np.abs(x).max() / x.std()),
                "kurtosis": float(np.mean((x - x.mean()) ** 4) / x.var() ** 2),
                "common": float((common / norms.mean()) ** 2),
            }
        )
    columns = {
        "vectors": "vectors",
        "parameters": "d",
        "tensors": "tensors",
        "norm": "norm",
        "zeros": "share of zeros",
        "peak": "largest/deviation",
        "kurtosis": "kurtosis",
        "common": "energy of the mean of 10",
    }
    text = [str(__doc__).strip(), _common.table(columns, rows)]
    _common.write(options.out, "vectors", "Test vectors", text, {"rows": rows})


def add_options(parser: Any) -> None:
    """Add the options of all benchmarks on these vectors."""
    parser.add_argument("--vectors", nargs="+", choices=SETS, default=list(SETS), metavar="NAME")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained sets are kept")


def load(name: str, clients: int = CLIENTS, cache: Path = CACHE) -> Vectors:
    """Return a set by name, trained now if it is not in the cache."""
    return SETS[name](name, clients, cache)


# --- drawn -------------------------------------------------------------------------------------


def _gauss(rng: np.random.Generator) -> Vector:
    return rng.standard_normal(D, np.float32)


def _laplace(rng: np.random.Generator) -> Vector:
    return rng.laplace(size=D).astype(np.float32)


def _lognormal(rng: np.random.Generator) -> Vector:
    return rng.lognormal(size=D).astype(np.float32)


def _sparse(rng: np.random.Generator) -> Vector:
    x = np.zeros(4096, np.float32)
    x[rng.choice(x.size, 2, replace=False)] = 1, 0.5
    return x


def _embedding(rng: np.random.Generator) -> Vector:
    x = np.zeros((128, 32), np.float32)
    x[rng.choice(len(x), 4, replace=False)] = rng.standard_normal((4, 32))
    return x.reshape(-1)


def _drawn(
    draw: Callable[[np.random.Generator], Vector],
    layout: Layout,
    name: str,
    clients: int,
    _: Path,
) -> Vectors:
    x = draw(generator(derive(0, "vectors", name)))
    return Vectors(name, layout, np.broadcast_to(x, (clients, x.size)))


# --- trained -----------------------------------------------------------------------------------


class FedAvgCnn(nn.Sequential):
    """The MNIST network of McMahan et al. 2017, "Communication-efficient learning", section 3."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(3136, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )


class ResNet(nn.Module):
    """ResNet-14 after He et al. 2016, section 4.2, with GroupNorm (Wu and He 2018)."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96), blocks: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, widths[0])
        inputs = (widths[0], *widths)
        self.blocks = nn.Sequential(
            *(
                _Block(width if block else narrower, width, stride=1 if block or not stage else 2)
                for stage, (narrower, width) in enumerate(zip(inputs, widths, strict=False))
                for block in range(blocks)
            )
        )
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (n, 10)."""
        x = self.blocks(functional.relu(self.norm(self.conv(x))))
        return self.fc(x.mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.short(x))


def _trained(
    network: Callable[[], nn.Module],
    optimizer: Callable[..., torch.optim.Optimizer],
    images: int,
    name: str,
    clients: int,
    cache: Path,
) -> Vectors:
    """Return the set from the cache, or train it and leave it there."""
    with _one_thread():
        torch.manual_seed(derive(0, "vectors", name))
        model = network()
        layout = Layout.of(dict(model.named_parameters()))
        path = cache / f"{name}-{clients}.npy"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            partly = path.with_suffix(f".{os.getpid()}.tmp")
            rows = np.lib.format.open_memmap(partly, "w+", np.float32, (clients, layout.size))
            for client, delta in enumerate(_deltas(model, optimizer, images, clients)):
                rows[client] = delta
            rows.flush()
            partly.rename(path)
    return Vectors(name, layout, np.load(path, mmap_mode="r"))


def _deltas(
    model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer], images: int, clients: int
) -> Iterator[Vector]:
    """Yield what each client's epoch adds to a model that 60 steps have warmed up."""
    data = load_data(fedq.build("data", "mnist5k"))
    rng = generator(derive(0, "vectors", "images"))
    _train(model, optimizer, data, rng.choice(len(data.y_train), 60 * 32), batch=32)
    start = [p.detach().clone() for p in model.parameters()]
    for client in range(clients):
        rng = generator(derive(0, "vectors", "images", client))
        share = rng.dirichlet(np.full(data.classes, 0.5))[data.y_train]
        own = rng.choice(len(share), images, p=share / share.sum())
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.data.copy_(value)
        _train(model, optimizer, data, own, batch=10)
        pairs = zip(model.parameters(), start, strict=True)
        yield torch.cat([(p.detach() - s).flatten() for p, s in pairs]).numpy()


def _train(
    model: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer],
    data: Dataset,
    rows: NDArray[np.int64],
    batch: int,
) -> None:
    """Go through the rows once, in their order."""
    x, y = torch.from_numpy(data.train_inputs(rows)), torch.from_numpy(data.y_train[rows])
    steps = optimizer(model.parameters())
    for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
        steps.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        steps.step()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Add up in one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_sgd, _adam = torch.optim.SGD, torch.optim.Adam
#: Name -> function of (name, clients, cache).
SETS: dict[str, Callable[[str, int, Path], Vectors]] = {
    "gauss": partial(_drawn, _gauss, Layout.flat(D)),
    "laplace": partial(_drawn, _laplace, Layout.flat(D)),
    "lognormal": partial(_drawn, _lognormal, Layout.flat(D)),
    "cnn": partial(_trained, FedAvgCnn, partial(_sgd, lr=0.05), 300),
    "resnet_sgd": partial(_trained, ResNet, partial(_sgd, lr=0.05, momentum=0.9), 200),
    "resnet_adam": partial(_trained, ResNet, partial(_adam, lr=1e-3), 200),
    "sparse": partial(_drawn, _sparse, Layout.flat(4096)),
    "embedding": partial(_drawn, _embedding, Layout(("embedding.weight",), ((128, 32),))),
}


if __name__ == "__main__":
    main()
