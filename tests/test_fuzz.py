"""The fuzz corpus and deterministic mutations of it: refused, or finite and of the right size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedq.registry import build, table
from tests import fuzz
from tests.fuzz import messages

FOLDERS = sorted(path for path in fuzz.CORPUS.iterdir() if path.is_dir())
MUTATIONS = 25
REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_corpus_and_mutations(folder):
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        fuzz.check(data)
        rng = np.random.default_rng(len(data))
        for _ in range(MUTATIONS):
            fuzz.check(fuzz.mutated(data, rng))


@pytest.mark.parametrize("name", table("codec"))
def test_every_example_is_in_the_corpus(name):
    for path, data in fuzz.seeds():
        if path.parent.name == name:
            assert path.exists(), "run python -m tests.fuzz --write"
            assert path.stat().st_size < 1000
            assert fuzz.check(data)


_DIGEST = """
import hashlib
from fedq import codecs
from fedq.errors import DecodeError
from tests import fuzz
digest = hashlib.sha256()
for path in sorted(fuzz.CORPUS.glob("*/*")):
    payload, layout, reference = fuzz.opened(path.read_bytes())
    try:
        digest.update(codecs.decode(payload, layout, reference=reference).tobytes())
    except DecodeError:
        digest.update(b"refused")
print(digest.hexdigest())
"""


def test_kernels_decode_the_same_without_a_compiler():
    digests = set()
    for jit in ("on", "off"):
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "FEDQ_JIT": jit},
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def test_mutations_reach_the_bodies():
    """Most mutations of a body keep the codec: they are refused by it, not by the frame."""
    _, data = next(item for item in fuzz.seeds() if item[0].parent.name == "uniform")
    start, rng = fuzz.head_bytes(data), np.random.default_rng(0)
    assert start > 1
    kept = [fuzz.mutated(data, rng)[:start] == data[:start] for _ in range(100)]
    assert sum(kept) > 80


def test_checks_can_fail(monkeypatch):
    def broken(payload, layout, *, reference=None):
        return np.full(layout.size, np.nan, np.float32)

    monkeypatch.setattr(fuzz.codecs, "decode", broken)
    with pytest.raises(AssertionError):
        fuzz.check(b"\0")


@pytest.mark.parametrize("name", table("codec"))
def test_a_server_refuses_hostile_replies_or_gets_a_sane_update(name):
    rng = np.random.default_rng(len(name))
    for options in table("codec")[name].examples[:2]:
        server = messages.Target.of(build("codec", name, **options))
        outcomes = [server.accepts(server.hostile(rng)) for _ in range(40)]
        assert not all(outcomes)


def test_hostile_replies_reach_the_decoders():
    server = messages.Target.of(build("codec", "uniform"))
    rng, report = np.random.default_rng(0), server.current.report
    accepted = sum(server.accepts(server.hostile(rng)) for _ in range(300))
    assert 10 < accepted < 290
    assert report.received > 250
