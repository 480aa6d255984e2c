"""Every codec on one client's real update: bytes, error, bias, speed.

:func:`client_update` trains the update, :func:`measure` gives a codec's figures on any vector, and
:func:`survey` those of many codecs within a time. What is printed and drawn of them is in
:mod:`fedq.report.codecs`.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import fedq
from fedq import registry, wire
from fedq.codecs.base import Codec
from fedq.errors import ConfigError
from fedq.layout import Layout, Vector
from fedq.random import derive, generator

#: Means whose error is reported; the largest is the number of seeds that are tried.
COHORTS = (10, 100)
#: Examples of each codec that stand for it.
FEW = 2
PACKAGES = ("fedq", "numpy", "numba", "torch")
WARM_UP_IMAGES, OWN_IMAGES = 1000, 80
#: Calls that a speed is the best of, where the seed changes nothing.
_CALLS = 5


@dataclass(frozen=True)
class Figures:
    """What one codec does to one vector; see :func:`measure`.

    Attributes:
      codec: The codec in one line.
      config: Its configuration.
      unbiased: What it promises.
      payload_bytes: Mean length of a payload, header included.
      header_bytes: Of them, the frame around the body.
      bits_per_parameter: Of the whole payload.
      nmse: ``|y - x|^2 / |x|^2``, mean over seeds.
      nmse_of_mean: The same of the mean of n decoded vectors, by n; an estimate where n exceeds
        ``seeds``, None where these are too few for one.
      bias_ratio: ``n NMSE(n) / NMSE(1)`` for n = ``seeds``: 1 where errors average out, n where
        they do not; None for a single seed or without an error.
      seeds: Seeds tried.
      encode_mb_s: Best speed of a call, in 10**6 bytes of float32 per second of CPU.
      decode_mb_s: The same of decoding.
    """

    codec: str
    config: dict[str, Any]
    unbiased: bool
    payload_bytes: float
    header_bytes: int
    bits_per_parameter: float
    nmse: float
    nmse_of_mean: dict[int, float | None]
    bias_ratio: float | None
    seeds: int
    encode_mb_s: float
    decode_mb_s: float

    @property
    def limit(self) -> float:
        """The least NMSE of a Gaussian vector at this rate, for a codec of this kind."""
        return gaussian_limit(self.bits_per_parameter, unbiased=self.unbiased)

    def to_json(self) -> dict[str, Any]:
        """Return the figures under stable keys, JSON-ready."""
        means = {f"nmse_of_mean_{n}": self.nmse_of_mean[n] for n in COHORTS}
        plain = {key: value for key, value in vars(self).items() if key != "nmse_of_mean"}
        rate = self.bits_per_parameter
        return plain | means | {
            "limit_biased": gaussian_limit(rate, unbiased=False),
            "limit_unbiased": gaussian_limit(rate, unbiased=True),
        }  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """Figures of many codecs on one client's update.

    Attributes:
      model: Whose update it is, in one line.
      parameters: Its length.
      seed: What decided the update.
      figures: One per codec.
      left_out: Codecs that refuse the vector, and why.
    """

    model: str
    parameters: int
    seed: int
    figures: tuple[Figures, ...]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the survey, the machine and the versions under stable keys, JSON-ready."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "seed": self.seed,
            "machine": machine(),
            "versions": {package: metadata.version(package) for package in PACKAGES},
            "codecs": [figures.to_json() for figures in self.figures],
            "left_out": self.left_out,
        }


def machine() -> dict[str, Any]:
    """Return what speeds depend on; no names of machines or people.

    >>> sorted(machine())
    ['cores', 'cpu', 'platform', 'python']
    """
    info = Path("/proc/cpuinfo")
    named = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "cpu": named[0] if named else platform.machine(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def gaussian_limit(bits: float, *, unbiased: bool) -> float:
    """Return the least NMSE that any code of a Gaussian vector has at ``bits`` per coordinate.

    ``4**-R`` (Shannon 1959); for an unbiased code ``1 / (4**R - 1)``, which is the same code scaled
    up by ``1 / (1 - 4**-R)``. Real updates are not Gaussian: codes that use that go below.

    >>> gaussian_limit(1, unbiased=False), round(gaussian_limit(1, unbiased=True), 4)
    (0.25, 0.3333)
    """
    power = 2 * math.log(2) * bits
    return 1 / math.expm1(power) if unbiased else math.exp(-power)


def client_update(model: Any, seed: int = 0) -> tuple[Vector, Layout]:
    """Return what one client would send, (d,) float32, and its layout.

    Two epochs of SGD on 80 images of MNIST-5k, from a model that has seen 1,000 others. Models of
    series see an image's rows as 28 channels.

    Args:
      model: A registered model.
      seed: Decides weights, images and their order.

    Raises:
      ConfigError: If the model takes neither images nor series.
    """
    from fedq.data.base import load
    from fedq.training import trainer_for
    from fedq.training_config import TrainingConfig

    data = load(registry.build("data", "mnist5k"))
    shape = data.input_shape
    try:
        trainer = trainer_for(registry.to_config(model), "none", shape, data.classes, seed=seed)
    except ConfigError:
        shape = shape[1:]
        trainer = trainer_for(registry.to_config(model), "none", shape, data.classes, seed=seed)
    rows = generator(derive(seed, "rows")).permutation(len(data.y_train))
    others, own = np.split(rows[: WARM_UP_IMAGES + OWN_IMAGES], [WARM_UP_IMAGES])
    trained = None
    for images, epochs in ((others, 1), (own, 2)):
        x = data.train_inputs(images).reshape(-1, *shape)
        config = TrainingConfig(local_epochs=epochs, batch_size=10, learning_rate=0.05)
        trained = trainer.train(x, data.y_train[images], config, seed)
    assert trained is not None
    return trained.delta, trainer.layout


def examples(*, every: bool = False) -> Iterator[Codec]:
    """Yield the first examples of each registered codec, or every one."""
    for name, cls in registry.table("codec").items():
        for options in cls.examples[: None if every else FEW]:  # type: ignore[attr-defined]
            yield fedq.build("codec", name, **options)


def measure(codec: Codec, x: Vector, layout: Layout, seconds: float = math.inf) -> Figures:
    """Return a codec's figures on a vector.

    The mean of n is that of the same vector under n seeds, averaged over all choices of n among the
    seeds tried: with ``E_1`` the mean square of single errors and ``C`` the mean product of two
    different ones, ``NMSE(n) = (E_1 + (n - 1) C) / n``, which also estimates means of more seeds
    without bias. If the seed changes nothing, C is E_1.

    Args:
      codec: Any codec.
      x: (d,) float32, not all zero.
      layout: Of the d coordinates.
      seconds: After which no further seed is begun; one is always tried.

    Raises:
      ConfigError: If the codec refuses the vector.
    """
    power = float(np.sum(np.square(x, dtype=np.float64)))
    sizes, errors, encode_s, decode_s = [], [], [math.inf], [math.inf]
    total, first, fixed = np.zeros(x.size), np.zeros(0, np.float32), True
    payload = codec.encode(x, layout, 0)
    codec.decode(payload, layout)  # compiles
    start = time.perf_counter()
    for seed in range(max(COHORTS)):
        begun = time.process_time()
        payload = codec.encode(x, layout, seed)
        encoded = time.process_time()
        y = codec.decode(payload, layout)
        encode_s.append(encoded - begun)
        decode_s.append(time.process_time() - encoded)
        error = y.astype(np.float64) - x
        total += error
        sizes.append(len(payload))
        errors.append(float(error @ error) / power)
        first = y if seed == 0 else first
        fixed = fixed and np.array_equal(y, first)
        late = time.perf_counter() - start > seconds
        if late or (fixed and seed + 1 >= _CALLS):
            break
    tried = len(sizes)
    single = sum(errors) / tried
    if fixed and tried > 1:
        tried, common = max(COHORTS), single
    else:
        pairs = tried * (tried - 1)
        common = (float(total @ total) / power - sum(errors)) / pairs if pairs else math.nan

    def of_mean(n: int) -> float:
        return (single + (n - 1) * common) / n

    means = {n: of_mean(n) for n in COHORTS}
    enough = tried >= min(COHORTS)
    return Figures(
        codec=registry.describe(codec),
        config=registry.to_config(codec),
        unbiased=codec.unbiased,
        payload_bytes=sum(sizes) / len(sizes),
        header_bytes=len(payload) - len(wire.open_frame(payload, layout).body),
        bits_per_parameter=8 * sum(sizes) / len(sizes) / x.size,
        nmse=single,
        nmse_of_mean={n: e if enough and e >= 0 else None for n, e in means.items()},
        bias_ratio=tried * of_mean(tried) / single if single and tried > 1 else None,
        seeds=tried,
        encode_mb_s=x.nbytes / 1e6 / max(min(encode_s), 1e-9),
        decode_mb_s=x.nbytes / 1e6 / max(min(decode_s), 1e-9),
    )


def survey(
    model: Any,
    codecs: Sequence[Codec],
    *,
    seed: int = 0,
    seconds: float = math.inf,
    watch: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Survey:
    """Measure codecs on one client's update of a model.

    Args:
      model: A registered model.
      codecs: Each is measured once.
      seed: See :func:`client_update`.
      seconds: For all codecs together: each has its share of what the ones before it left, and
        fewer seeds if that is little.
      watch: Told before each step how many are done, how many there are, and its name.

    Raises:
      ConfigError: If the model takes neither images nor series, or the only codec refuses.
    """
    # Biased ones first: most need few seeds, which leaves the others more time.
    chosen = sorted(dict.fromkeys(codecs), key=lambda codec: codec.unbiased)
    watch(0, 1 + len(chosen), f"training a client of {registry.describe(model)}")
    x, layout = client_update(model, seed)
    figures, left_out = [], {}
    end = time.perf_counter() + seconds
    for done, codec in enumerate(chosen):
        name = registry.describe(codec)
        watch(1 + done, 1 + len(chosen), name)
        try:
            share = (end - time.perf_counter()) / (len(chosen) - done)
            figures.append(measure(codec, x, layout, share))
        except ConfigError as error:
            left_out[name] = str(error)
    if not figures:
        raise ConfigError(f"no codec takes this update: {next(iter(left_out.values()), 'none')}")
    return Survey(registry.describe(model), x.size, seed, tuple(figures), left_out)
