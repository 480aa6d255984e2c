"""A coverage-guided search for inputs that break a decoder (atheris, which is libFuzzer).

Compiled kernels show no coverage, so the child process runs them as plain Python. An input that
raises, decodes to what is not finite, takes seconds or a gigabyte ends the search with an error,
and stays as a file: ``python -m tests.fuzz --keep FILE`` puts it into the corpus.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT_S, MEMORY_MB, MAX_BYTES = 20, 1500, 600


def search(seconds: int, out: Path) -> int:
    """Search for some time, starting from the corpus; return 0 if nothing was found."""
    from tests.fuzz import CORPUS

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedq-fuzz-") as new:
        command = [
            *(sys.executable, "-m", "tests.fuzz.search", new, str(CORPUS)),
            *(f"-max_total_time={seconds}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MB}"),
            *(
                f"-max_len={MAX_BYTES}",
                f"-artifact_prefix={out.resolve()}/",
                "-print_final_stats=1",
            ),
        ]
        environment = {**os.environ, "FEDQ_JIT": "off"}
        return subprocess.run(command, env=environment, check=False).returncode


def main() -> None:
    """Run libFuzzer in this process; its options are the command line."""
    import atheris

    with atheris.instrument_imports(include=["fedq"]):
        import numpy as np

        from fedq.registry import table
        from tests import fuzz

        table("codec")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """Change the body nine times in ten, so that most tries pass the specification."""
        start = fuzz.head_bytes(data) if seed % 10 else 0
        if seed % 3 == 0:
            return fuzz.mutated(data, np.random.default_rng(seed))[:max_size]
        return data[:start] + atheris.Mutate(data[start:], max(max_size - start, 1))

    def test_one_input(data: bytes) -> None:
        fuzz.check(data)

    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
