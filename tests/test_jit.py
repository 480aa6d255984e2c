"""Compiled kernels where nothing can be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fedq

CODE = """
import numpy as np
import fedq
from fedq.aggregators.mean import MeanStream
layout, x = fedq.Layout.flat(4), np.ones(4, np.float32)
codec = fedq.build("codec", "uniform")
stream = MeanStream(4)
stream.add(codec.decode(codec.encode(x, layout), layout), 2)
stream.merge(stream)
mean = fedq.build("aggregator", "mean")(x[None], np.ones(1))
print(fedq.__file__, *stream.result(), *mean)
"""


def test_kernels_work_on_a_read_only_disk(tmp_path: Path) -> None:
    package = tmp_path / "fedq"
    shutil.copytree(Path(fedq.__file__).parent, package, ignore=shutil.ignore_patterns("__pyc*"))
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").write_text("")  # no folder can be made here, even by root
    nowhere = str(package / "__pycache__")
    done = subprocess.run(
        [sys.executable, "-B", "-c", CODE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "HOME": nowhere,
            "XDG_CACHE_HOME": nowhere,
            "NUMBA_CACHE_DIR": nowhere,
        },
    )
    assert done.returncode == 0, done.stderr
    file, *values = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert values == ["1.0"] * 8


def _run(code: str, jit: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "FEDQ_JIT": jit},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


GOLDEN = """
import json
import fedq.jit
from tests.golden import examples, golden_case
assert not fedq.jit.COMPILED
differ = [p.name for p, config in examples() if json.loads(p.read_text()) != golden_case(config)]
print("differ:", *differ)
"""


def test_golden_vectors_without_a_jit() -> None:
    assert _run(GOLDEN, "off").split() == ["differ:"]


BYTES = """
import hashlib
import numpy as np
import fedq.jit
from fedq import DecodeError, random
from fedq.codecs import _bits, _range, _rans, _uniform
from fedq.privacy import _entropy, _samplers

digest = hashlib.sha256()
word = random.words(1, 1500).astype(np.int64)
values = ((word >> 16) ** 3 // 2**44 - 4).astype(np.int32)
values[500:900] = 0
values[::300] = 1 << 24
side = (word % 32).astype(np.uint8)
for coder in (_rans, _range):
    for known in (None, side):
        body = coder.encode(values, [(1400, 70), (100, 1)], 9000, known)
        assert np.array_equal(coder.decode(body, [(1400, 70), (100, 1)], known), values)
        digest.update(body)
for bits in range(1, 17):
    codes = (word[:333] % 2**bits).astype(np.int32)
    body = _bits.pack(codes, bits)
    assert np.array_equal(_bits.unpack(body, 333, bits), codes)
    digest.update(body)
    try:
        _bits.unpack(body[:-1] + b"\\xff", 333, bits)
    except DecodeError:
        digest.update(b"refused")
x = ((word - 2**31) * 2.0**-28).astype(np.float32)
sizes, step = np.array([700, 300, 500]), np.array([0.5, 0.03, 3e36])
offset = np.array([-1.0, 0.0, 0.1])
for words in (None, random.words(2, 1500)):
    codes = _uniform.quantize(x, words, sizes, offset, step, 100, 200)
    y = _uniform.dequantize(codes * 2 % 201, words, sizes, offset, step, 100, 200)
    digest.update(codes.tobytes() + y.tobytes())
for sigma in (1, 7, 1 << 22):
    digest.update(_samplers.discrete_gaussian(sigma, 50, _entropy.Entropy(3)).tobytes())
for table in (_samplers.gaussian_table(0.5), _samplers.skellam_table(7.0)):
    digest.update(table.sample(500, _entropy.Entropy(4)).tobytes())
print(fedq.jit.COMPILED, digest.hexdigest())
"""


def test_same_bytes_with_and_without_a_jit() -> None:
    compiled, plain = _run(BYTES, "on").split(), _run(BYTES, "off").split()
    assert (compiled[0], plain[0]) == ("True", "False")
    assert compiled[1] == plain[1]


def test_warm_up_leaves_the_kernels_on_disk(tmp_path: Path) -> None:
    """One codec's kernels, as compiling all of them takes too long for a test."""
    code = (
        "import fedq.jit, fedq.registry, fedq.codecs.uniform as u\n"
        "import fedq.aggregators.median as m\n"
        "known = {'codec': {'uniform': u.Uniform}, 'aggregator': {'median': m.Median}}\n"
        "fedq.registry.table = known.get\n"
        "fedq.jit.warm_up()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    kept = {path.name.split("-")[0] for path in tmp_path.rglob("*.nbi")}
    assert {
        "_uniform._quantize",
        "_bits._fill",
        "_range._coder.locals.run",
        "_order._middle_mean",
    } <= kept
