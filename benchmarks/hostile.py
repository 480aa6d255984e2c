"""A million hostile payloads: every decoder, and the server with its guard.

Two thirds go to the decoders, as mutations of the corpus in `tests/fuzz/`; one third are whole
replies to a server in the middle of a round, for every example of every codec: bodies, states,
metadata and frames changed and sealed again. Each must be refused by name (`DecodeError` for
decoders, a counted rejection for the server) or be a finite update within the guard's limits. One
process with a limit of 1 GB for what it allocates.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import _common
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedq.guard import limit_memory
from tests import fuzz
from tests.fuzz import messages

PAYLOADS = 1_000_000
BATCH = 100
LIMIT_GB = 1.0


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--payloads", type=int, default=PAYLOADS)
    options = parser.parse_args()
    count = 3_000 if options.quick else options.payloads
    rng = np.random.default_rng(options.seed)
    corpus = [(path.parent.name, path.read_bytes()) for path in sorted(fuzz.CORPUS.glob("*/*"))]
    servers = messages.targets()
    for _, data in corpus:
        fuzz.check(data)  # compiled
    limit_memory(LIMIT_GB)
    before, start = _common.peak_resident_mb(), time.process_time()
    tally: dict[str, dict[str, int]] = {}

    def note(name: str, kind: str, accepted: bool) -> None:
        row = tally.setdefault(name, dict.fromkeys(KINDS, 0))
        row[kind] += 1
        row[f"{kind}_accepted"] += accepted

    sent = 0
    while sent < count:
        for name, data in (corpus[i] for i in rng.integers(len(corpus), size=2 * BATCH)):
            note(name, "payloads", fuzz.check(fuzz.mutated(data, rng)))
        for name, server in (servers[i] for i in rng.integers(len(servers), size=BATCH)):
            note(name, "replies", server.accepts(server.hostile(rng)))
        sent += 3 * BATCH
    seconds, grown = time.process_time() - start, _common.peak_resident_mb() - before
    rows = [{"codec": name, **row} for name, row in sorted(tally.items())]
    columns = {
        "codec": "codec",
        "payloads": "payloads",
        "payloads_accepted": "of them finite vectors",
        "replies": "replies",
        "replies_accepted": "of them within limits",
    }
    verdict = (
        f"{sent:,} hostile payloads in {seconds:.0f} s of one core: each was refused by name or "
        f"gave a finite vector. Peak memory grew by {grown:.0f} MB."
    )
    _common.write(
        options.out,
        "hostile",
        "Hostile payloads",
        [str(__doc__).strip(), verdict, _common.table(columns, rows)],
        {
            "seed": options.seed,
            "sent": sent,
            "cpu_seconds": seconds,
            "grown_mb": grown,
            "rows": rows,
        },
    )


KINDS = ("payloads", "payloads_accepted", "replies", "replies_accepted")

if __name__ == "__main__":
    main()
