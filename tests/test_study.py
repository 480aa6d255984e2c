"""A report over a study: seeds averaged, tasks apart, fronts, significance, and what is damaged."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedq import manifest
from fedq.errors import ConfigError, FedqError
from fedq.report import Study, find_runs, report, study_tables
from fedq.report.page import page
from fedq.report.runs import Run, survey
from fedq.report.study import front, interval, paired, remarks
from fedq.report.tables import note
from fedq.results import RunDirectory, read_config

FLOAT, UP = 4000, 1000


def write_run(
    path: Path,
    name: str,
    seed: int,
    top: float,
    *,
    up: int = UP,
    down: int = UP,
    rounds: int = 5,
    until: int | None = None,
    partition: str = "iid",
    metric: str = "accuracy",
    **extra: float,
) -> Path:
    """Write a run whose score grows linearly to ``top``; unfinished with ``until``."""
    is_float = name == "float"
    config = {
        "name": name,
        "seed": seed,
        "rounds": rounds,
        "data": {"name": "mnist5k"},
        "partition": {"name": partition},
        "codec": {"name": "identity" if is_float else "sign"},
        "downlink": {"name": "identity"},
    }
    last = rounds if until is None else until
    with RunDirectory.create(path, config) as run:
        for number in range(last + 1):
            sent = {"uplink_bytes": up, "downlink_bytes": down}
            record: dict[str, Any] = {key: value * (number > 0) for key, value in sent.items()}
            record |= {key: value * (number > 0) for key, value in extra.items()}
            run.append_round({"round": number, metric: top * number / rounds, **record})
        if until is None:
            sums = {"uplink_bytes": up * rounds, "downlink_bytes": down * rounds}
            versions = {"versions": {"fedq": "0.1.0"}}
            run.write_summary({"name": name, metric: top, "rounds": rounds, **sums, **versions})
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two methods and float, three seeds each, with time and energy."""
    extra = {"simulated_seconds": 60.0, "joules": 5.0}
    for seed in range(3):
        cost = {"up": FLOAT, "down": FLOAT}
        write_run(tmp_path / f"{seed}", "float", seed, 0.90 + seed / 100, **cost, **extra)
        write_run(tmp_path / f"1{seed}", "good", seed, 0.91 + seed / 100, **extra)
        write_run(tmp_path / f"2{seed}", "bad", seed, 0.50 + seed / 50, up=2 * UP, **extra)
    return tmp_path


def study(sweep: Path, reference: str | None = None) -> Study:
    return Study.of(find_runs([sweep]), reference)


def method(found: Study, label: str) -> Any:
    return next(m for m in found.methods if m.label == label)


# --- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 10])
def test_intervals_are_those_of_student(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    found = interval(list(values))
    assert found is not None
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert math.isclose(found.mean - (found.half or 0), low)
    assert math.isclose(found.mean + (found.half or 0), high)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_differences_are_tested_as_pairs(n: int) -> None:
    ours, theirs = np.random.default_rng(n).normal(size=(2, n))
    found = paired(dict(enumerate(ours)), {**dict(enumerate(theirs)), "alone": 9.0})
    assert found is not None
    assert found.difference.n == n
    assert found.p is not None
    assert math.isclose(found.p, stats.ttest_rel(ours, theirs).pvalue)


def test_what_has_no_deviation() -> None:
    assert interval([]) is None
    assert paired({0: 1.0}, {1: 1.0}) is None
    one, same, shifted = (
        paired({0: 1.0}, {0: 0.5}),
        paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}),
        paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}),
    )
    assert one is not None
    assert one.p is None
    assert same is not None
    assert same.p == 1.0
    assert shifted is not None
    assert shifted.p == 0.0


def test_methods_are_means_of_their_seeds(sweep: Path) -> None:
    found = study(sweep)
    assert [m.label for m in found.methods] == ["good", "float", "bad"]  # best first
    good = method(found, "good")
    assert good.by_seed("score") == {0: 0.91, 1: 0.92, 2: 0.93}
    assert math.isclose(good.mean("score").mean, 0.92)
    assert good.curve["round"] == [1, 2, 3, 4, 5]
    assert np.allclose(good.curve["total_bytes"], 2 * UP * np.arange(1, 6))
    assert np.allclose(good.curve["joules"], 5.0 * np.arange(1, 6))
    assert np.allclose(good.curve["score"], 0.92 * np.arange(1, 6) / 5)


def test_the_reference_is_float_unless_one_says(sweep: Path) -> None:
    found = study(sweep)
    assert [m.label for m in found.methods if m.is_reference] == ["float"]
    against = found.against(method(found, "good"))
    assert against is not None
    assert math.isclose(against.difference.mean, 0.01)
    named = study(sweep, reference="bad")
    assert [m.label for m in named.methods if m.is_reference] == ["bad"]
    assert named.against(method(named, "bad")) is None
    with pytest.raises(ConfigError, match="no method is called 'worst'; there are: "):
        study(sweep, reference="worst")


def test_of_a_run_and_its_repetition_the_finished_one_counts(tmp_path: Path) -> None:
    killed = write_run(tmp_path / "1", "mine", 0, 0.9, until=1)
    again = write_run(tmp_path / "2", "mine", 0, 0.9)
    runs = find_runs([tmp_path])
    found = Study.of(runs)
    assert [run.path for run in found.runs] == [again]
    assert remarks(runs, found) == [
        f"{killed}: left out, another run has its configuration and seed"
    ]


def test_runs_of_one_name_are_called_by_what_was_asked_of_them(tmp_path: Path) -> None:
    asked = {"1": ["rounds=5", "codec.bits=4"], "2": ["rounds=5", "codec.bits=2"], "a/3": []}
    for number, (place, overrides) in enumerate(asked.items()):
        path = write_run(tmp_path / place, "fedq", 0, 0.9, up=UP + number)
        config = read_config(path)
        with RunDirectory.open(path) as run:
            run.go_on({**config, "learning_rate": number})
            run.write_summary({"name": "fedq", "accuracy": 0.9, "rounds": 5})
        manifest.begin(path, config, overrides=[*overrides, f"run_dir={place}", "seed=0"])
    labels = {m.runs[0].path.name: m.label for m in Study.of(find_runs([tmp_path])).methods}
    assert labels == {"1": "rounds=5 codec.bits=4", "2": "rounds=5 codec.bits=2", "3": "fedq"}
    alike = [
        write_run(tmp_path / place / "7", "new", 0, 0.5, rounds=n)
        for place, n in (("x", 2), ("y", 3))
    ]
    assert sorted(m.label for m in Study.of(find_runs(alike)).methods) == ["new (x/7)", "new (y/7)"]


@pytest.mark.parametrize(
    "more",
    [
        {"quantization": {"name": "uniform"}},
        {"privacy": {"name": "gaussian"}},
        {"secure_aggregation": {"name": "secagg"}},
        {"attack": {"name": "sign_flip"}},
    ],
)
def test_float_is_nothing_but_float(more: dict[str, Any]) -> None:
    plain = {"codec": {"name": "identity"}, "downlink": {"name": "identity"}}
    off = {key: {"name": "none"} for key in ("quantization", "privacy", "attack", "pruning")}
    assert Run(Path("run"), plain | off, (), {}).is_float
    assert not Run(Path("run"), plain | off | more, (), {}).is_float


def test_masked_updates_are_not_the_codec_s() -> None:
    config = {"codec": {"name": "sign"}, "secure_aggregation": {"name": "secagg"}}
    assert Run(Path("run"), config, (), {}).codec == "secagg"


def test_the_front_has_what_nothing_dominates(sweep: Path) -> None:
    found = study(sweep)
    (task,) = found.tasks
    assert [m.label for m in found.front(task, "total_bytes")] == ["good"]
    assert [m.label for m in found.front(task, "simulated_seconds")] == ["good"]  # equal cost
    cheap = write_run(sweep / "30", "cheap", 0, 0.2, up=1, down=1)
    runs = [*find_runs([sweep]), *find_runs([cheap])]
    labels = [m.label for m in front(Study.of(runs).methods, "total_bytes")]
    assert labels == ["cheap", "good"]


def test_bytes_to_reach_float_are_per_seed(sweep: Path) -> None:
    found = study(sweep)
    reached = found.to_reach(method(found, "good"))
    # 99 % of float's 0.90: good has 0.728 after four rounds, 0.91 after five.
    assert (reached.reached, reached.of) == (3, 3)
    assert reached.spent is not None
    assert reached.spent.mean == 5 * 2 * UP
    assert reached.ratio == FLOAT / UP
    missed = found.to_reach(method(found, "bad"))
    assert (missed.spent, missed.ratio, missed.reached, missed.of) == (None, None, 0, 3)


def test_tasks_stay_apart(sweep: Path) -> None:
    write_run(sweep / "40", "float", 0, 0.7, partition="dirichlet")
    write_run(sweep / "41", "good", 0, 0.6, partition="dirichlet")
    found = study(sweep)
    assert {task: [m.label for m in ms] for task, ms in found.tasks.items()} == {
        "mnist5k, iid": ["good", "float", "bad"],
        "mnist5k, dirichlet": ["float", "good"],
    }
    against = found.against(found.tasks["mnist5k, dirichlet"][1])
    assert against is not None
    assert math.isclose(against.difference.mean, -0.1)


def test_labels_are_the_overrides_in_which_namesakes_differ(tmp_path: Path) -> None:
    for number, bits in enumerate((2, 3)):
        path = tmp_path / str(number)
        overrides = ["rounds=5", f"codec.bits={bits}", "seed=0"]
        manifest.write(path, {"codec": {"name": "sign"}}, overrides)
        write_run(path, "same", 0, 0.5, rounds=5 + number)
    assert [m.label for m in study(tmp_path).methods] == ["codec.bits=2", "codec.bits=3"]


def test_where_lower_is_better_all_is_the_other_way_round(tmp_path: Path) -> None:
    """Errors fall to 0.2 of float; the good method ends at 0.201, the bad one at 0.3."""
    for seed in range(2):
        for name, end in (("float", 0.2), ("good", 0.201), ("bad", 0.3)):
            path = write_run(
                tmp_path / f"{name}{seed}", name, seed, end, metric="mae", partition="dirichlet",
                **({"up": FLOAT, "down": FLOAT} if name == "float" else {}),
            )  # fmt: skip
            lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
            for line in lines:
                line["mae"] = 1.0 - (1.0 - end) * line["round"] / 5
            (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run(tmp_path / "other", "float", 0, 0.9)
    found = study(tmp_path)
    task, other = found.tasks
    assert [m.label for m in found.tasks[task]] == ["float", "good", "bad"]
    assert [found.metric(name).name for name in (task, other)] == ["mae", "accuracy"]
    assert [m.label for m in found.front(task, "total_bytes")] == ["good", "float"]
    reached = found.to_reach(method(found, "good"))
    assert (reached.reached, reached.ratio) == (2, FLOAT / UP)  # 0.201 is below 0.2 / 0.99
    assert found.to_reach(method(found, "bad")).reached == 0
    report([tmp_path], tmp_path / "out")
    assert (tmp_path / "out" / "score_vs_bytes.svg").exists()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| method | seeds | MAE |" in text
    assert "| method | seeds | accuracy |" in text
    assert "Lower MAE is better" in text
    assert "0.201 ± 0" in text


# --- files ---------------------------------------------------------------------------------------


def test_a_study_gets_all_its_files(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report([sweep], out)
    names = {path.name for path in out.iterdir()}
    pictures = {
        f"{kind}_{of}.{suffix}"
        for kind in ("pareto", "accuracy_vs")
        for of in ("bytes", "time", "energy")
        for suffix in ("png", "svg")
    }
    tables = {"report.md", "report.csv", "summary.csv", "summary.tex", "report.html"}
    assert names >= pictures | tables
    for path in out.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    rows = list(csv.DictReader(io.StringIO((out / "summary.csv").read_text())))
    assert [row["method"] for row in rows] == ["good", "float", "bad"]
    assert math.isclose(float(rows[0]["score"]), 0.92)
    assert rows[0]["on_front_of_total_bytes"] == "True"
    assert float(rows[0]["joules"]) == 25


def test_costs_that_no_run_tells_of_have_no_picture(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / str(seed), "good", seed, 0.9)
    report([tmp_path])
    assert (tmp_path / "pareto_bytes.png").exists()
    assert not list(tmp_path.glob("*_time.*"))
    assert "simulated" not in (tmp_path / "report.md").read_text()


def test_bytes_on_the_wire_are_beside_those_of_messages(tmp_path: Path) -> None:
    """From the rounds, or from what a fleet's meters counted."""
    extra = {"wire_uplink_bytes": 1500, "wire_downlink_bytes": 1100, "simulated_seconds": 60.0}
    write_run(tmp_path / "1", "good", 0, 0.9, **extra)
    other = write_run(tmp_path / "2", "float", 0, 0.9)
    (other / "wire.json").write_text('{"pi": {"up_bytes": 20000, "down_bytes": 3000}}')
    found = study(tmp_path)
    assert [method(found, m).mean("wire_bytes").mean for m in ("good", "float")] == [13_000, 23_000]
    assert "| on the wire |" in study_tables.to_markdown(found)
    text = note(find_runs([tmp_path / "1"]))
    assert "good: 5 min simulated, 13.0 kB on the wire for 10.0 kB of messages." in text
    (other / "wire.json").write_text("{}x")
    with pytest.raises(FedqError, match=r"wire\.json is damaged"):
        find_runs([other])


def test_what_is_stored_and_what_is_zero_has_a_column(tmp_path: Path) -> None:
    for name, extra in (("pruned", {"weight_bytes": 500, "zero_weights": 0.5}), ("float", {})):
        path = write_run(tmp_path / name, name, 0, 0.9)
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(summary | extra))
    text = study_tables.to_markdown(study(tmp_path))
    assert "| weights stored | zeros |" in text
    assert "| 500 B | 50 % |" in text


def test_latex_is_balanced_and_escaped(sweep: Path) -> None:
    write_run(sweep / "50", "50 % of a_b & c\\d", 0, 0.5)
    text = study_tables.to_latex(study(sweep))
    assert r"50 \% of a\_b \& c\textbackslash{}d" in text
    (table,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    lines = [line for line in table[1].splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(table[0]) - 1}


def test_parquet_holds_the_same(sweep: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [study_tables.record(study(sweep), m) for m in study(sweep).methods]
    assert study_tables.write_parquet(rows, tmp_path / "a.parquet") is None
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == rows


def test_without_pyarrow_it_says_so(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_tables, "find_spec", lambda name: None)
    hint = study_tables.write_parquet([], tmp_path / "a.parquet")
    assert hint is not None
    assert "pip install" in hint


def test_the_page_needs_nothing_else(sweep: Path) -> None:
    write_run(sweep / "60", "</script><script>alert(1)", 0, 0.4)
    text = page(study(sweep), ["a note"])
    assert not re.search(r"(src|href)\s*=|url\(\s*['\"]?http|@import|fetch\(", text)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    content = json.loads(data)
    assert [cost["key"] for cost in content["costs"]] == [
        *("total_bytes", "uplink_bytes", "downlink_bytes", "simulated_seconds", "joules", "round"),
    ]
    (task,) = content["tasks"]
    assert "</script><script>alert(1)" in [m["label"] for m in task["methods"]]
    assert [len(m["seeds"]) for m in task["methods"]] == [3, 3, 3, 0]
    assert "a note" in content["notes"]


def test_a_browser_draws_intervals_until_they_would_cover_each_other(
    tab: Any, problems: list[str], tmp_path: Path
) -> None:
    for number in range(9):
        for seed in range(3):
            top = 0.5 + number / 20 + seed / 100
            write_run(tmp_path / f"{number}{seed}", f"method {number}", seed, top)
    (tmp_path / "report.html").write_text(page(study(tmp_path)))
    tab.goto((tmp_path / "report.html").as_uri())
    bands = tab.locator("#chart path[opacity='0.14']")
    assert bands.count() == 9
    assert not any(band.is_visible() for band in bands.all())
    chart = tab.locator("#chart svg").bounding_box()
    tab.mouse.move(chart["x"] + chart["width"] - 20, chart["y"] + 40)
    assert sum(band.is_visible() for band in bands.all()) == 1
    assert "method 8" in tab.inner_text("#tip")
    tab.locator("#legend button").first.click()  # eight are left
    assert all(band.is_visible() for band in bands.all())
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert not problems


def test_long_curves_are_thinned_to_their_end(tmp_path: Path) -> None:
    write_run(tmp_path / "1", "long", 0, 0.9, rounds=700)
    write_run(tmp_path / "2", "other", 0, 0.9)
    (data,) = re.findall(r'id="data">(.*?)</script>', page(study(tmp_path)))
    curve = json.loads(data)["tasks"][0]["methods"][0]["curve"]
    assert len(curve["round"]) <= 120
    assert curve["round"][-1] == 700


# --- what is not as it should be -----------------------------------------------------------------


def test_what_is_damaged_is_named_and_the_rest_shown(sweep: Path) -> None:
    (sweep / "10" / "config.yaml").write_text("[")
    (sweep / "11" / "rounds.jsonl").write_text("nonsense\n" * 3)
    (sweep / "70").mkdir()
    (sweep / "70" / "config.yaml").write_text("name: begun\n")
    (sweep / "71").mkdir()
    (sweep / "71" / "notes.txt").write_text("not a run")
    (sweep / "12" / "manifest.json").write_text('{"schema": 99, "config": {}}')
    found = survey([sweep])
    assert {path.name for path in found.left_out} == {"10", "11", "70"}
    assert method(Study.of(found.runs), "good").by_seed("score") == {2: 0.93}
    report([sweep], sweep / "out")
    text = (sweep / "out" / "report.md").read_text()
    for name in ("10", "11", "70"):
        assert re.search(rf"left out: .*/{name}:", text)


def test_unfinished_runs_do_not_count_beside_finished_ones(sweep: Path) -> None:
    write_run(sweep / "80", "good", 3, 0.99, until=2)
    found = study(sweep)
    assert set(method(found, "good").by_seed("score")) == {0, 1, 2}
    assert any("unfinished, 2 of 5 rounds" in line for line in remarks(found.runs))
    write_run(sweep / "81", "begun", 0, 0.5, until=1)
    assert "begun * (unfinished)" in study_tables.to_markdown(study(sweep))


def test_missing_figures_and_mixed_versions(sweep: Path) -> None:
    with RunDirectory.create(sweep / "90", {"name": "old", "seed": 0}) as run:
        run.append_round({"round": 1, "bytes": 5})
        run.write_summary({"name": "old", "rounds": 1, "versions": {"fedq": "0.0.1"}})
    found = study(sweep)
    said = remarks(found.runs)
    assert any("has no accuracy" in line for line in said)
    assert any("several versions of fedq: 0.0.1, 0.1.0" in line for line in said)
    report([sweep], sweep / "out")
    assert "old" in (sweep / "out" / "summary.csv").read_text()


def test_nothing_but_damage_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.yaml").write_text("[")
    with pytest.raises(FedqError, match="no run can be shown"):
        report([tmp_path])
