"""Simulated time and energy to an accuracy: float and fedq on each link, and four ways to pace.

Digits (8 x 8), 20 clients, 8 per round, Dirichlet(0.5), a small CNN. What is simulated: devices and
links, after the profiles of fedq/physics (docs/physics.md says where their figures are from, and
which are estimates). What is real: the training, the messages and their lengths.

First: every client a Raspberry Pi Zero 2 W, one link at a time; float32 messages against the main
job's (5-bit dithered up, lattice down). Second: boards and microcontrollers on Wi-Fi, LTE-M and
NB-IoT, slow by chance (sigma 0.8), 2 % of requests lost; rounds that wait, rounds with a deadline,
rounds of 1.3 times as many, and FedBuff, all for as many updates asked for.
"""

from __future__ import annotations

import sys

import _common
import _runs

FEDERATION = (
    "data=digits",
    "clients=20",
    "clients_per_round=8",
    "baseline=false",
    "engine.workers=2",
)
ROUNDS = 40
ACCURACY = 0.90
METHODS = {"float32": ("experiment=float_baseline",), "fedq": ()}
LINKS = ("wifi", "lte_m", "nb_iot", "lora")
ROUGH = (
    "fleet=mixed_iot",
    "fleet.availability=always",
    "fleet.straggler_sigma=0.8",
    "quorum=0.3",
)
PACES: dict[str, tuple[str, ...]] = {
    "wait for all": (),
    "deadline 4 s": ("pacing.deadline_s=4",),
    "1.3 times as many": ("pacing.over_selection=1.3",),
    "FedBuff, K = 4": ("pacing=fedbuff", "pacing.buffer=4"),
}


def main() -> None:
    options = _common.parser(__doc__).parse_args()
    rounds = 1 if options.quick else ROUNDS
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    links = LINKS[:1] if options.quick else LINKS
    on_links = []
    for link in links:
        for method, chosen in METHODS.items():
            fleet = ("fleet=mixture", "fleet.devices=[pi_zero_2_w]", f"fleet.links=[{link}]")
            found = measure([*chosen, *FEDERATION, *fleet], rounds, seeds)
            on_links.append({"link": link, "method": method, **found})
            print(on_links[-1], file=sys.stderr)
    paced = []
    for name, chosen in PACES.items():
        steps = 2 * rounds if "pacing=fedbuff" in chosen else rounds
        paced.append({"pacing": name, **measure([*FEDERATION, *ROUGH, *chosen], steps, seeds)})
        print(paced[-1], file=sys.stderr)
    columns = {
        "seconds": f"s to {ACCURACY:.0%}",
        "joules": f"J to {ACCURACY:.0%}",
        "radio": "of it radio",
        "bytes": f"bytes to {ACCURACY:.0%}",
        "accuracy": "accuracy at the end",
    }
    lost = {"updates": "updates", "lost": "lost"}
    _common.write(
        options.out,
        "physics",
        "Simulated time and energy to an accuracy",
        [
            *(__doc__ or "").split("\n\n")[1:],
            f"Means and ranges over seeds {seeds.start} to {seeds.stop - 1}. Seconds are "
            "simulated; joules are of all devices that were asked; bytes are both ways.",
            "## Links",
            _common.table({"link": "link", "method": "messages", **columns}, text(on_links)),
            "## Pacing",
            _common.table({"pacing": "pacing", **columns, **lost}, text(paced)),
        ],
        {"rounds": rounds, "target": ACCURACY, "links": on_links, "pacing": paced},
    )


def measure(overrides: list[str], rounds: int, seeds: range) -> dict[str, list[float | None]]:
    """Run a federation with each seed, and return its figures by seed."""
    found: dict[str, list[float | None]] = {}
    for seed in seeds:
        lines = _runs.rounds([*overrides, f"rounds={rounds}", f"seed={seed}"])
        flat = [{**line, **figures(line)} for line in lines]
        row = {
            key: _runs.to_reach(flat, ACCURACY, key)
            for key in ("simulated_seconds", "joules", "radio", "bytes")
        }
        row["seconds"] = row.pop("simulated_seconds")
        row["accuracy"] = max(line["accuracy"] for line in lines[-5:])
        row["updates"] = _runs.total(lines, "replies")
        row["lost"] = _runs.total(flat, "lost")
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    return found


def figures(line: _runs.Record) -> dict[str, float]:
    """Return what a round's record says in several places."""
    use = line.get("joules_by_use") or {"radio": 0.0}
    return {
        "radio": use["radio"],
        "bytes": line["uplink_bytes"] + line["downlink_bytes"],
        "lost": sum(line["rejected"].values()),
    }


def text(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return rows with lists of figures as their means and ranges."""
    return [
        {
            key: _runs.spread(value) if isinstance(value, list) else value
            for key, value in row.items()
        }
        for row in rows
    ]


if __name__ == "__main__":
    main()
