"""The heat map: every run of a sweep is in its cell, seeds are averaged, nothing else is drawn."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from fedq.report import heatmap
from fedq.report.heatmap import AttackGrid
from fedq.report.runs import Run
from fedq.results import BASELINE

ATTACKS: dict[str, dict[str, Any]] = {
    "model_replacement": {"name": "model_replacement", "fraction": 0.3},
    "none": {"name": "none"},
    "sign_flip(scale=3.0)": {"name": "sign_flip", "fraction": 0.3, "scale": 3.0},
}
RULES = ("mean", "median")


def run(attack: str, rule: str, codec: str, seed: int, accuracy: float, **more: float) -> Run:
    config = {
        "attack": ATTACKS[attack],
        "aggregator": {"name": rule},
        "codec": {"name": codec},
        "seed": seed,
        "data": {"name": "digits"},
    }
    return Run(Path(f"{attack}-{rule}-{codec}-{seed}"), config, (), {"accuracy": accuracy, **more})


def sweep() -> list[Run]:
    runs = []
    for place, attack in enumerate(ATTACKS):
        for rule in RULES:
            for codec in ("uniform", "sign"):
                for seed in (0, 1):
                    score = 0.9 - 0.2 * place - 0.1 * (rule == "mean") + 0.02 * seed
                    more = {"attack_success": 0.5} if attack == "model_replacement" else {}
                    runs.append(run(attack, rule, codec, seed, score, **more))
    return runs


def grid(runs: list[Run]) -> AttackGrid:
    found = AttackGrid.of(runs)
    assert found is not None
    return found


def test_cells_are_means_over_seeds() -> None:
    found = grid(sweep())
    assert found.attacks == ["none", "model_replacement", "sign_flip(scale=3.0)"]
    assert found.aggregators == ["mean", "median"]
    assert found.codecs == ["uniform", "sign"]
    assert found.mean("accuracy", "none", "mean", "sign") == pytest.approx(0.61)
    assert found.values("accuracy", "none", "median", "sign") == pytest.approx([0.7, 0.72])
    assert found.mean("accuracy", "none", "krum", "sign") is None
    assert found.rows("attack_success") == ["model_replacement"]
    assert found.caption == "30% of clients hostile; mean of 2 seeds"


def test_without_two_attacks_and_two_rules_there_is_none() -> None:
    runs = sweep()
    assert AttackGrid.of([]) is None
    assert AttackGrid.of([r for r in runs if r.config["attack"]["name"] == "none"]) is None
    assert AttackGrid.of([r for r in runs if r.config["aggregator"]["name"] == "mean"]) is None
    unfinished = [Run(r.path, r.config, (), {}) for r in runs]
    assert AttackGrid.of(unfinished) is None
    assert AttackGrid.of([Run(Path(BASELINE), r.config, (), r.summary) for r in runs]) is None


def test_shares_that_differ_are_named() -> None:
    other = run("sign_flip(scale=3.0)", "mean", "sign", 0, 0.5)
    other = Run(
        other.path, {**other.config, "attack": {"name": "sign_flip", "fraction": 0.4}}, (),
        other.summary,
    )  # fmt: skip
    found = grid([*sweep(), other])
    assert "sign_flip(fraction=0.4)" in found.attacks
    assert found.caption.startswith("mean of 2 seeds")


def test_files(tmp_path: Path) -> None:
    found = grid(sweep()[:-1])
    paths = heatmap.write(found, tmp_path)
    assert [p.name for p in paths] == [
        f"attack_grid.{kind}" for kind in ("png", "svg", "md", "csv")
    ]
    assert imread(tmp_path / "attack_grid.png").shape[1] > 800
    before = [path.read_bytes() for path in paths]
    heatmap.write(found, tmp_path)
    assert [path.read_bytes() for path in paths] == before
    rows = list(csv.DictReader(io.StringIO((tmp_path / "attack_grid.csv").read_text())))
    assert len(rows) == 12
    assert rows[0]["attack"] == "none"
    assert float(rows[0]["accuracy"]) == pytest.approx(0.61)
    assert float(rows[0]["accuracy_deviation"]) == pytest.approx(0.02 / 2**0.5)
    assert rows[0]["attack_success"] == ""
    assert rows[-1]["runs"] == "1"
    text = (tmp_path / "attack_grid.md").read_text()
    assert "| none | 61.0 | 71.0 |" in text
    assert text.count("**backdoor success**") == 2


def test_a_missing_cell_is_empty() -> None:
    runs = [r for r in sweep() if (r.config["attack"]["name"], r.config["aggregator"]["name"])
            != ("none", "median")]  # fmt: skip
    assert "| none | 61.0 |  |" in heatmap.to_markdown(grid(runs))
    console = Console(record=True, width=100)
    console.print(*heatmap.render(grid(runs)))
    assert "ASR 50.0 %" in console.export_text()
