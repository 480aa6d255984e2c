"""Secure aggregation of 100 clients and a model of 1 M parameters, and sealed updates of 1 MB.

CPU time of one core. A client's figure is the mean over clients of all that it does in a round:
rounding to the grid, keys, shares, masks, agreement, unmasking, and reading and writing what it
remembers between phases. The server's is that of the unmasking: from the last message to the sum.
The sum is compared with that of the survivors' integers. Beside it, in the same run, the primitives
of Flower's SecAgg+ do what its client and server do for the same cohort and threshold (masks,
shares, their encryption, quantization): its protocol does not run on Flower's message API.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import _common
import numpy as np

from fedq.envelope import SUITES, Opener, Round, seal
from fedq.keys import SimulatedRoster, simulated
from fedq.registry import build
from fedq.secagg import PHASES, Announcement, Coordinator, Party

LIMITS = {"client_ms": 60.0, "unmask_s": 0.5, "bytes_per_parameter": 2.0, "envelope_ms": 5.0}


def main() -> None:
    options = _common.parser(__doc__).parse_args()
    clients, d = (6, 2000) if options.quick else (100, 1_000_000)
    dropped = clients // 10 or 1
    # Once, unmeasured: kernels compile, and what simulated keys need is derived.
    ours(clients, 2000, dropped, 0, options.seed)
    rows = [
        ours(clients, d, 0, 0, options.seed),
        ours(clients, d, dropped, 0, options.seed),
        ours(clients, d, dropped, 4 if options.quick else 20, options.seed),
        flower(clients, d, dropped, options.seed),
    ]
    sealed = [envelope(name, suite, 10**6) for suite, name in enumerate(("AES", "ChaCha20"), 1)]
    columns = {
        "what": "protocol",
        "dropped": "dropped",
        "client_ms": "client (ms)",
        "mask_ms": "of it masks (ms)",
        "unmask_s": "unmask (s)",
        "bytes_per_parameter": "uplink (B per parameter)",
        "exact": "exact",
    }
    masked, theirs = rows[1], rows[-1]
    text = [
        __doc__.partition("\n\n")[2].strip().replace("\n", " ") if __doc__ else "",
        f"{clients} clients, {d:,} parameters, 8 bits, threshold two thirds, seed {options.seed}.",
        _common.table(columns, rows),
        f"Flower's primitives take {theirs['client_ms'] / masked['client_ms']:.0f} times the CPU "
        f"of a client, {theirs['unmask_s'] / masked['unmask_s']:.0f} times that of the server, and "
        f"{theirs['bytes_per_parameter'] / masked['bytes_per_parameter']:.1f} times the bytes.",
        _common.table(
            {"what": "sealed update of 1 MB", "seal_ms": "seal (ms)", "open_ms": "open (ms)",
             "overhead_bytes": "overhead (B)"},
            sealed,
        ),
    ]  # fmt: skip
    figures = {"limits": LIMITS, "secure_aggregation": rows, "envelope": sealed}
    _common.write(options.out, "secure_aggregation", "Secure aggregation", text, figures)


def timed(clock: Counter[str], name: str, call: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = call()
    clock[name] += time.process_time() - start  # type: ignore[assignment]
    return result


def ours(clients: int, d: int, dropped: int, neighbours: int, seed: int) -> dict[str, Any]:
    mode = build("secure_aggregation", "secagg", neighbours=neighbours)
    grid, roster, state = mode.grid(1), SimulatedRoster(seed), np.zeros(20, np.float32)
    announcement = Announcement(
        run="benchmark",
        round=1,
        session=os.urandom(16).hex(),
        clients=clients,
        parts=tuple((s.size, s.bits) for s in grid.segments(clients, d, state.size)),
        coding={},
        base="0" * 64,
        **mode.numbers(clients),
    )
    server = Coordinator(announcement, simulated(seed).signing, roster, range(clients))
    identities = [simulated(seed, i).signing for i in range(clients)]
    memories: list[bytes | None] = [None] * clients
    client, at_server, sent = Counter[str](), Counter[str](), 0
    expected = [np.zeros(s.size, np.int64) for s in announcement.segments]
    rng = np.random.default_rng(seed)
    delta = rng.normal(0, 0.05, d).astype(np.float32)
    for phase in PHASES:
        for i, message in timed(at_server, phase, lambda p=phase: server.messages(p)).items():
            if phase == "mask" and i >= clients - dropped:
                continue
            more = []
            if phase == "mask":
                more = [
                    timed(
                        client,
                        "grid",
                        lambda i=i: grid.encode(delta, state, loss=1.0, weight=1, seed=i),
                    )
                ]
                expected = [a + b for a, b in zip(expected, more[0], strict=True)]

            def answer(
                i: int = i, phase: str = phase, message: bytes = message, more=more
            ) -> bytes:  # type: ignore[no-untyped-def]
                party = Party(i, identities[i], roster, memory=memories[i])
                said: bytes = getattr(party, phase)(message, *more)
                memories[i] = party.memory()
                return said

            reply = timed(client, phase, answer)
            sent += len(reply)
            timed(at_server, phase, lambda a=(phase, i, reply): server.receive(*a))
    sums = timed(at_server, "sums", server.sums)
    graph = "complete graph" if not neighbours else f"{neighbours} neighbours"
    return {
        "what": f"fedq, {graph}",
        "clients": clients,
        "parameters": d,
        "dropped": dropped,
        "client_ms": 1e3 * sum(client.values()) / clients,
        "mask_ms": 1e3 * client["mask"] / clients,
        "unmask_s": at_server["sums"] + at_server["unmask"],
        "bytes_per_parameter": sent / d / (clients - dropped),
        "exact": "yes" if all(map(np.array_equal, sums, expected)) else "no",
        "client_phases_ms": {k: 1e3 * v / clients for k, v in client.items()},
        "server_phases_s": dict(at_server),
    }


def flower(clients: int, d: int, dropped: int, seed: int) -> dict[str, Any]:
    """Do what one client, and then the server, of Flower's SecAgg+ do, with its own functions."""
    from flwr.common.secure_aggregation.crypto import shamir, symmetric_encryption
    from flwr.common.secure_aggregation.quantization import quantize
    from flwr.common.secure_aggregation.secaggplus_utils import (
        pseudo_rand_gen,
        share_keys_plaintext_concat,
    )
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

    modulus, threshold = 1 << 32, clients * 2 // 3 + 1
    delta = np.random.default_rng(seed).normal(0, 0.05, d)
    shape, clock = [(d,)], Counter[str]()
    peer, _ = generate_key_pairs()

    def keys() -> tuple[list[bytes], bytes, bytes, Any]:
        (first, _), (second, _) = generate_key_pairs(), generate_key_pairs()
        shared = [
            symmetric_encryption.generate_shared_key(private, peer.public_key())
            for private in (first, second)
            for _ in range(clients - 1)
        ]
        return shared, private_key_to_bytes(first), os.urandom(32), second

    shared, secret, own, _ = timed(clock, "keys", keys)

    def share() -> tuple[list[bytes], list[bytes]]:
        seeds = shamir.create_shares(own, threshold, clients)
        secrets = shamir.create_shares(secret, threshold, clients)
        for i in range(1, clients):
            text = share_keys_plaintext_concat(0, i, seeds[i], secrets[i])
            symmetric_encryption.encrypt(shared[i - 1], text)
        return seeds, secrets

    seeds, secrets = timed(clock, "share", share)

    def mask() -> np.ndarray[Any, Any]:
        total = quantize([delta], 8.0, 1 << 22)[0] + pseudo_rand_gen(own, modulus, shape)[0]
        for key in shared[: clients - 1]:
            total = total + pseudo_rand_gen(key, modulus, shape)[0]
        return total % modulus

    masked = timed(clock, "mask", mask)

    def unmask() -> None:
        total = masked.copy()
        alive = clients - dropped
        for _ in range(alive):
            shamir.combine_shares(seeds[:threshold])
            total = total - pseudo_rand_gen(own, modulus, shape)[0]
        for _ in range(dropped):
            shamir.combine_shares(secrets[:threshold])
            for key in shared[:alive]:
                total = total - pseudo_rand_gen(key, modulus, shape)[0]
        total %= modulus

    timed(clock, "unmask", unmask)
    unmask_s = clock.pop("unmask")
    return {
        "what": "Flower SecAgg+, its primitives",
        "clients": clients,
        "parameters": d,
        "dropped": dropped,
        "client_ms": 1e3 * sum(clock.values()),
        "mask_ms": 1e3 * clock["mask"],
        "unmask_s": unmask_s,
        "bytes_per_parameter": masked.nbytes / d,
        "exact": "",
        "client_phases_ms": {k: 1e3 * v for k, v in clock.items()},
    }


def envelope(name: str, suite: int, size: int) -> dict[str, Any]:
    assert suite in SUITES
    payload, about = os.urandom(size), Round.of("benchmark", 1, b"", b"")
    identity, server = simulated(0, 1), simulated(0)
    clock, repeats = Counter[str](), 20
    for sequence in range(-1, repeats):
        opener = Opener(server, SimulatedRoster(0), about)
        start = time.process_time()
        blob = seal(
            payload, about, client=1, identity=identity, server=server.public,
            sequence=sequence + 1, suite=suite,
        )  # fmt: skip
        middle = time.process_time()
        opener.open(blob, size)
        if sequence >= 0:
            clock["seal"] += middle - start  # type: ignore[assignment]
            clock["open"] += time.process_time() - middle  # type: ignore[assignment]
    return {
        "what": {"AES": "AES-256-GCM", "ChaCha20": "ChaCha20-Poly1305"}[name],
        "seal_ms": 1e3 * clock["seal"] / repeats,
        "open_ms": 1e3 * clock["open"] / repeats,
        "overhead_bytes": len(blob) - size,
    }


if __name__ == "__main__":
    main()
