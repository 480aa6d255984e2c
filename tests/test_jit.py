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
