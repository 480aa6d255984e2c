"""Which cells a sweep has, and how it divides a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedq import config, manifest, sweep
from fedq.errors import ConfigError, FedqError

GRID = [["seed=0"], ["seed=1"], ["seed=1", "codec=sign"]]


def names(cells: list[sweep.Cell], base: Path) -> list[str]:
    return [cell.path.relative_to(base).as_posix() for cell in cells]


def test_a_plan_is_cells_after_their_baselines(tmp_path: Path) -> None:
    cells = sweep.plan(tmp_path, GRID)
    assert names(cells, tmp_path) == ["baselines/1", "baselines/2", "1", "2", "3"]
    assert [cell.label for cell in cells] == [
        *("float FedAvg seed=0", "float FedAvg seed=1"),
        *("seed=0", "seed=1", "seed=1 codec=sign"),
    ]
    assert [cell.experiment.seed for cell in cells] == [0, 1, 0, 1, 1]


def test_a_cell_keeps_its_place(tmp_path: Path) -> None:
    first = sweep.plan(tmp_path, GRID)
    before = {path: path.read_text() for path in tmp_path.rglob("manifest.json")}
    assert sweep.plan(tmp_path, GRID) == first
    assert before == {path: path.read_text() for path in tmp_path.rglob("manifest.json")}
    grown = sweep.plan(tmp_path, [["seed=2", "baseline=false"], *GRID[::-1]])
    assert names(grown, tmp_path) == ["baselines/2", "baselines/1", "4", "3", "2", "1"]


def test_where_and_how_fast_do_not_make_another_cell(tmp_path: Path) -> None:
    sweep.plan(tmp_path, [["seed=0"]])
    cells = sweep.plan(tmp_path, [["seed=0", "engine.workers=3", "baseline=false"]])
    assert names(cells, tmp_path) == ["1"]


def test_a_cell_may_be_the_baseline_of_others(tmp_path: Path) -> None:
    cells = sweep.plan(tmp_path, [["experiment=float_baseline"], ["codec=sign"]])
    assert names(cells, tmp_path) == ["1", "2"]
    assert (manifest.read(tmp_path / "2") or {})["baseline"] == "../1"


def test_an_earlier_plan_is_found_again(tmp_path: Path) -> None:
    cells = sweep.plan(tmp_path, GRID)
    again = sweep.planned(tmp_path)
    assert [(c.path, c.label, c.experiment) for c in again] == [
        (c.path, c.label, c.experiment) for c in cells
    ]
    longer = sweep.planned(tmp_path, ["rounds=50"])
    assert {cell.experiment.rounds for cell in longer} == {50}
    assert sweep.planned(tmp_path) == longer
    with pytest.raises(ConfigError, match="cannot change when resuming"):
        sweep.planned(tmp_path, ["seed=3"])


def test_a_damaged_manifest_costs_its_cell_alone(tmp_path: Path) -> None:
    sweep.plan(tmp_path, GRID)
    (tmp_path / "2" / manifest.MANIFEST).write_text("{")
    with pytest.raises(FedqError, match="damaged"):
        manifest.read(tmp_path / "2")
    assert "2" not in names(sweep.planned(tmp_path), tmp_path)
    assert names(sweep.plan(tmp_path, GRID), tmp_path)[-3:] == ["1", "4", "3"]


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    manifest.write(tmp_path, {"seed": 1})
    content = json.loads((tmp_path / manifest.MANIFEST).read_text())
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(content | {"schema": 99}))
    with pytest.raises(FedqError, match="schema 99"):
        manifest.read(tmp_path)


def test_a_manifest_lists_all_seeds(tmp_path: Path) -> None:
    manifest.write(tmp_path, config.load(["data=digits", "seed=7"]).to_config())
    found = manifest.read(tmp_path)
    assert found is not None
    assert found["seeds"] == {"seed": 7, "data.seed": 0}


@pytest.mark.parametrize("error", [FedqError("no data"), RuntimeError("a bug of a plug-in")])
def test_what_cannot_be_prepared_is_left_to_the_cells(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which report it, each for itself: the sweep goes on."""
    tried: list[object] = []

    def load(data: object) -> None:
        tried.append(data)
        raise error

    monkeypatch.setattr(sweep, "load", load)
    sweep._prepare([config.load(["codec=sign"])])
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("workers", "jobs", "cores", "runs", "want"),
    [
        (0, None, 8, 20, (8, 1)),  # many cells with one worker each
        (0, None, 8, 3, (3, 2)),
        (0, None, 8, 1, (1, 8)),
        (4, None, 8, 20, (2, 4)),
        (16, None, 8, 20, (1, 8)),  # as asked, but not twice
        (0, 2, 8, 20, (2, 4)),
        (0, 1, 8, 20, (1, 8)),
        (16, 1, 8, 20, (1, 8)),
        (0, None, 8, 0, (1, 8)),
    ],
)
def test_cells_times_workers_are_at_most_the_cores(
    workers: int, jobs: int | None, cores: int, runs: int, want: tuple[int, int]
) -> None:
    experiments = [config.load([f"engine.workers={workers}"])] * runs
    division = sweep.share(experiments, jobs, cores)
    assert (division.jobs, division.workers) == want
    assert division.jobs * max(workers, division.workers) <= max(cores, workers)


@pytest.mark.parametrize(("workers", "jobs"), [(0, 0), (0, 9), (4, 3)])
def test_more_than_the_cores_is_refused(workers: int, jobs: int) -> None:
    with pytest.raises(ConfigError, match="jobs"):
        sweep.share([config.load([f"engine.workers={workers}"])] * 9, jobs, cores=8)
