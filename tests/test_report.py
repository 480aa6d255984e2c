"""Tables say what the run directories hold; the plot is drawn, whatever the runs look like."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fedq.errors import ConfigError, FedqError
from fedq.registry import build, describe, to_config
from fedq.report import (
    comparison_table,
    equal_accuracy,
    find_runs,
    load_run,
    plot_accuracy_vs_bytes,
    report,
    to_csv,
    to_markdown,
)
from fedq.results import RunDirectory

PARAMETERS, COHORT = 35_000, 10
FLOAT_BYTES = 4 * PARAMETERS * COHORT
FLOAT = {"name": "identity"}


def write_run(
    path: Path,
    name: str = "fedq",
    *,
    codec: Any = None,
    downlink: Any = None,
    up: int = 14_000,
    down: int = 56_000,
    top: float = 0.95,
    rounds: int = 20,
    until: int | None = None,
) -> Path:
    """Write a run whose accuracy rises to ``top``; interrupted after round ``until``."""
    codec = codec or {"name": "dithered", "bits": 0.4}
    config = {
        "name": name,
        "rounds": rounds,
        "clients": 50,
        "model": {"name": "cnn"},
        "data": {"name": "mnist5k"},
        "partition": {"name": "dirichlet", "alpha": 0.3},
        "codec": codec,
        "downlink": downlink or {"name": "model8"},
    }
    accuracy = 0.1
    with RunDirectory.create(path, config) as run:
        for number in range((rounds if until is None else until) + 1):
            accuracy = 0.1 + (top - 0.1) * (1 - math.exp(-number / 4))
            sent = {
                "uplink_bytes": up,
                "downlink_bytes": down,
                "float32_uplink_bytes": FLOAT_BYTES,
                "float32_downlink_bytes": FLOAT_BYTES,
            }
            if number == 0:
                sent = dict.fromkeys(sent, 0)
            scores = {"accuracy": accuracy, "float_accuracy": accuracy + 0.01}
            run.append_round({"round": number, **scores, **sent, "rejected": {}, "seconds": 0.5})
        if until is None:
            run.write_summary(
                {
                    "name": name,
                    "accuracy": accuracy,
                    "float_accuracy": accuracy + 0.01,
                    "rounds": rounds,
                    "parameters": PARAMETERS,
                    "uplink_bytes": up * rounds,
                    "downlink_bytes": down * rounds,
                    "uplink_bits_per_parameter": 32 * up / FLOAT_BYTES,
                    "downlink_bits_per_parameter": 32 * down / FLOAT_BYTES,
                    "seconds": 12.5,
                    "seed": 0,
                    "model_sha256": "ab" * 32,
                }
            )
    return path


def write_float(path: Path, **options: Any) -> Path:
    sizes = {"up": FLOAT_BYTES, "down": FLOAT_BYTES}
    return write_run(path, "float_baseline", codec=FLOAT, downlink=FLOAT, **sizes | options)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    write_float(write_run(tmp_path / "a") / "baseline")
    return tmp_path / "a"


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def printed(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def check_image(path: Path) -> None:
    image = imread(path)
    assert image.shape[:2] == (1000, 1600)
    ink = (image[..., :3] < 0.75).any(axis=-1)
    assert ink.mean() > 0.005
    margin = 4  # nothing is cut off at the edges
    assert not ink[:margin].any()
    assert not ink[-margin:].any()
    assert not ink[:, :margin].any()
    assert not ink[:, -margin:].any()


# --- finding runs --------------------------------------------------------------------------------


def test_a_run_brings_its_baseline(pair: Path) -> None:
    runs = find_runs([pair, pair / "baseline", pair])
    assert [run.name for run in runs] == ["fedq", "float_baseline"]
    assert [run.is_float for run in runs] == [False, True]


def test_a_sweep_is_its_runs_in_order(tmp_path: Path) -> None:
    for number in range(11):
        write_run(tmp_path / str(number), f"run {number}", rounds=2)
    (tmp_path / "notes").mkdir()
    assert [run.name for run in find_runs([tmp_path])] == [f"run {n}" for n in range(11)]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "new", {}).close()
    for path, says in [
        ("nowhere", "there is no run directory"),
        (".hidden", "there is no run directory"),
        ("new", "has no results yet"),
        ("new/checkpoint", "there is no run directory"),
    ]:
        with pytest.raises(ConfigError, match=says) as error:
            find_runs([tmp_path / path])
        assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        report([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="at least one run"):
        report([])


def test_an_interrupted_run_is_reported_from_its_rounds(tmp_path: Path) -> None:
    whole = load_run(write_run(tmp_path / "whole"))
    cut = load_run(write_run(tmp_path / "cut", until=8))
    assert not cut.finished
    assert (cut.done, cut.planned) == (8, 20)
    assert cut.uplink_bytes == 8 * 14_000
    assert cut.uplink_bits == pytest.approx(whole.uplink_bits)
    assert cut.score == cut.rounds[-1]["accuracy"]
    assert cut.seconds == pytest.approx(4.5)
    assert "fedq (unfinished)" in to_markdown([cut])
    assert "8 of 20" in to_markdown([cut])


def test_a_baseline_that_has_just_begun_is_left_out(pair: Path) -> None:
    for name in ("rounds.jsonl", "summary.json"):
        (pair / "baseline" / name).unlink()
    assert [run.name for run in find_runs([pair])] == ["fedq"]


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "bare", {}) as run:
        run.write_summary({"rounds": 3, "accuracy": float("nan")})
    row = to_markdown([load_run(run.path)]).splitlines()[2]
    assert row == "| bare |  | - | - | 0 B | - | 0 B | - | 0 B | - | 3 | - |"


# --- arithmetic ----------------------------------------------------------------------------------


def test_curve_is_cumulative_and_skips_what_was_not_evaluated(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", {}) as run:
        run.append_round({"round": 0, "accuracy": 0.1, "uplink_bytes": 0, "downlink_bytes": 0})
        for number, accuracy in enumerate([0.5, None, 0.7], 1):
            sent = {"uplink_bytes": 10 * number, "downlink_bytes": 1}
            run.append_round({"round": number, "accuracy": accuracy, **sent})
    assert load_run(run.path).curve == ((11, 0.5), (63, 0.7))


def test_bytes_at_equal_accuracy(pair: Path) -> None:
    ours, theirs = find_runs([pair])
    equal = equal_accuracy(ours, theirs)
    assert equal is not None
    assert theirs.score is not None
    # The same accuracies in both: the same round, so the ratio is that of bytes per round.
    assert equal.ratio == pytest.approx(2 * FLOAT_BYTES / 70_000)
    assert equal.level == pytest.approx(0.99 * theirs.score)
    assert equal_accuracy(theirs, theirs).ratio == 1  # type: ignore[union-attr]


def test_a_run_that_stays_below_is_compared_at_its_own_best(tmp_path: Path) -> None:
    weak = load_run(write_run(tmp_path / "weak", top=0.6))
    strong = load_run(write_float(tmp_path / "strong", top=0.95))
    equal = equal_accuracy(weak, strong)
    assert equal is not None
    assert equal.level == weak.score
    assert equal.float_bytes < strong.total_bytes
    assert equal.run_bytes == weak.total_bytes


# --- tables --------------------------------------------------------------------------------------


def test_markdown(pair: Path) -> None:
    head, align, ours, theirs, blank, note, *_ = to_markdown(find_runs([pair])).split("\n")
    assert head.count("|") == align.count("|") == ours.count("|") == theirs.count("|")
    assert ours == (
        "| fedq | dithered(bits=0.4) | 94.4 % | 95.4 % | 280 kB | 0.32 | 1.12 MB | 1.28 "
        "| 1.40 MB | 40x less | 20 | 12 s |"
    )
    assert "| 28.0 MB | 32.0 | 28.0 MB | 32.0 | 56.0 MB | reference | 20 | 12 s |" in theirs
    assert blank == ""
    assert note == "fedq reached 93.5 % with 1.19 MB, float with 47.6 MB: 40x less."


def test_csv_holds_plain_numbers(pair: Path) -> None:
    runs = find_runs([pair])
    ours, theirs = rows(to_csv(runs))
    assert int(ours["uplink_bytes"]) == 280_000
    assert int(ours["total_bytes"]) == runs[0].total_bytes == 1_400_000
    assert float(ours["accuracy"]) == runs[0].score
    assert float(ours["times_fewer_bytes"]) == pytest.approx(40)
    assert float(theirs["times_fewer_bytes"]) == 1
    assert ours["finished"] == "true"
    assert ours["path"] == pair.as_posix()
    assert ours["model_sha256"] == "ab" * 32


def test_without_a_float_run_the_same_messages_as_float32_are_the_measure(tmp_path: Path) -> None:
    runs = find_runs([write_run(tmp_path / "a")])
    assert "the same messages as float32" in to_markdown(runs)
    assert float(rows(to_csv(runs))[0]["times_fewer_bytes"]) == pytest.approx(40)


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_table_fits_and_is_plain(pair: Path, width: int) -> None:
    runs = find_runs([pair])
    text = printed(comparison_table(runs), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "…" not in text
    for cell in ("fedq", "float_baseline", "94.4 %", "95.4 %", "280 kB", "40x less", "12 s"):
        assert cell in text


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    name = "[red]a|b[/] $x_1$"
    runs = find_runs([write_run(tmp_path / "a", name, codec={"name": "c", "levels": [1, 2]})])
    assert name in printed(comparison_table(runs))
    assert "c(levels=[1, 2])" in printed(comparison_table(runs))
    assert "[red]a\\|b[/] $x_1$" in to_markdown(runs)
    assert rows(to_csv(runs))[0]["run"] == name
    check_image(plot_accuracy_vs_bytes(runs, tmp_path / "plot.png"))


def test_equal_names_become_paths(tmp_path: Path, pair: Path) -> None:
    other = write_run(tmp_path / "b" / "run")
    found = [row["run"] for row in rows(to_csv(find_runs([pair, other])))]
    assert found == ["a", "a/baseline", "b/run"]


# --- plot and report -----------------------------------------------------------------------------


def test_plots(tmp_path: Path, pair: Path) -> None:
    write_run(tmp_path / "cut", "cut", until=1)
    write_run(tmp_path / "flat", "flat", top=0.1)
    write_run(tmp_path / "perfect", "perfect", top=1.0, up=1, down=1)
    for paths in (["a"], ["cut"], ["flat"], ["a", "cut", "flat", "perfect"]):
        found = find_runs([tmp_path / path for path in paths])
        check_image(plot_accuracy_vs_bytes(found, tmp_path / "plot.png"))


def test_plots_are_reproducible(pair: Path, tmp_path: Path) -> None:
    runs = find_runs([pair])
    images = [plot_accuracy_vs_bytes(runs, tmp_path / f"{n}.png").read_bytes() for n in range(2)]
    assert images[0] == images[1]


def test_report_of_one_run_writes_into_it(pair: Path) -> None:
    text = printed(report([pair]))
    check_image(pair / "accuracy_vs_bytes.png")
    assert "40x less" in text
    assert "wrote" in text
    assert not (pair / "report.md").exists()


def test_report_of_several(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_run(tmp_path / "b", "other")
    report([pair, other], out=tmp_path / "out")
    names = {"accuracy_vs_bytes.png", "accuracy_vs_bytes.svg", "report.csv", "report.md"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    assert len(rows((tmp_path / "out/report.csv").read_text())) == 3
    monkeypatch.chdir(tmp_path)
    report([pair, other])
    assert names <= {path.name for path in Path("report").iterdir()}
    report([tmp_path])  # a sweep's directory
    assert (tmp_path / "report.md").exists()


def test_report_that_cannot_be_written(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedqError, match="name another folder with --out"):
        report([pair], out=tmp_path / "file")


def test_report_before_the_first_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path / "a", until=0)
    assert "0 of 20" in printed(report([tmp_path / "a"]))
    assert not (tmp_path / "a" / "accuracy_vs_bytes.png").exists()
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot_accuracy_vs_bytes(find_runs([tmp_path / "a"]), tmp_path / "plot.png")


def test_damaged_summary_is_one_line(pair: Path) -> None:
    (pair / "summary.json").write_text(json.dumps([1]))
    with pytest.raises(FedqError, match=r"summary\.json is damaged"):
        report([pair])


def test_plot_shows_every_run_in_its_colour(pair: Path, tmp_path: Path) -> None:
    image = imread(plot_accuracy_vs_bytes(find_runs([pair]), tmp_path / "plot.png"))
    for colour in ("#0072B2", "#4D4D4D"):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(image[..., :3] - rgb).max(axis=-1) < 0.02).sum() > 500


def test_reading_and_tables_do_not_import_matplotlib() -> None:
    code = "import sys, fedq.report; print({'matplotlib', 'torch', 'flwr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_codec_text_is_the_summary_s(tmp_path: Path) -> None:
    codec = build("codec", "error_feedback", inner={"name": "uniform", "bits": 6})
    write_run(tmp_path / "run", codec=to_config(codec))
    assert load_run(tmp_path / "run").codec == describe(codec)
