"""``fedq codecs``: figures are what they are called, and the table and the picture show them."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fedq import Layout, build, cli, codec_report, registry
from fedq.codec_report import Figures, Survey, gaussian_limit, measure, survey
from fedq.errors import ConfigError, FedqError
from fedq.report import codecs

LAYOUT = Layout(("w", "b"), ((30, 40), (60,)))
X = np.random.default_rng(0).laplace(size=LAYOUT.size).astype(np.float32)
DITHERED = build("codec", "uniform", bits=3, rounding="dithered")
MLP = build("model", "mlp")
TOP = ["codecs", "left_out", "machine", "model", "parameters", "seed", "versions"]
KEYS = (
    "codec config unbiased payload_bytes header_bytes bits_per_parameter nmse bias_ratio seeds "
    "encode_mb_s decode_mb_s nmse_of_mean_10 nmse_of_mean_100 limit_biased limit_unbiased"
)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_report, "client_update", lambda model, seed: (X, LAYOUT))


@pytest.fixture(scope="module")
def found() -> Survey:
    """Figures of every example, of as many seeds as little time allows."""
    rows = [measure(codec, X, LAYOUT, 0.02) for codec in codec_report.examples(every=True)]
    return Survey("mlp", X.size, 0, tuple(rows), {"broken": "does [not] fit"})


def printed(shown: Survey, width: int = 100) -> str:
    out = io.StringIO()
    Console(width=width, file=out).print(codecs.codec_table(shown))
    return out.getvalue()


# --- figures -------------------------------------------------------------------------------------


def test_figures_are_those_of_the_payloads():
    figures = measure(DITHERED, X, LAYOUT)
    payloads = [DITHERED.encode(X, LAYOUT, seed) for seed in range(100)]
    y = np.stack([DITHERED.decode(payload, LAYOUT) for payload in payloads]).astype(np.float64)
    power = np.sum(X.astype(np.float64) ** 2)
    assert figures.seeds == 100
    assert figures.payload_bytes == pytest.approx(np.mean([len(p) for p in payloads]))
    assert figures.bits_per_parameter == pytest.approx(8 * figures.payload_bytes / X.size)
    assert figures.nmse == pytest.approx(np.mean(np.sum((y - X) ** 2, axis=1)) / power)
    mean_of_all = np.sum((y.mean(axis=0) - X) ** 2) / power
    assert figures.nmse_of_mean[100] == pytest.approx(mean_of_all)
    assert figures.bias_ratio == pytest.approx(100 * mean_of_all / figures.nmse)
    tens = [np.sum((part.mean(axis=0) - X) ** 2) / power for part in np.split(y, 10)]
    assert figures.nmse_of_mean[10] == pytest.approx(np.mean(tens), rel=0.1)


def test_bias_stays_and_noise_averages_out():
    biased, unbiased = measure(build("codec", "sign"), X, LAYOUT), measure(DITHERED, X, LAYOUT)
    assert biased.bias_ratio == pytest.approx(100)
    assert biased.nmse_of_mean == pytest.approx({10: biased.nmse, 100: biased.nmse})
    assert unbiased.bias_ratio == pytest.approx(1, abs=0.2)
    exact = measure(build("codec", "identity"), X, LAYOUT)
    assert (exact.nmse, exact.bias_ratio) == (0, None)


def test_without_time_one_seed_is_tried_and_nothing_is_made_up():
    figures = measure(DITHERED, X, LAYOUT, seconds=0)
    assert figures.seeds == 1
    assert figures.nmse > 0
    assert figures.bias_ratio is None
    assert set(figures.nmse_of_mean.values()) == {None}


def test_means_of_more_seeds_than_tried_are_estimates(monkeypatch):
    whole = measure(DITHERED, X, LAYOUT)
    ticks = itertools.count()
    monkeypatch.setattr(codec_report.time, "perf_counter", lambda: next(ticks))
    part = measure(DITHERED, X, LAYOUT, seconds=30.5)
    assert part.seeds == 31
    assert part.nmse_of_mean[100] == pytest.approx(whole.nmse_of_mean[100], rel=0.5)
    assert part.bias_ratio == pytest.approx(1, abs=0.2)


def test_limits():
    for bits in (0.1, 1, 4):
        biased, unbiased = (gaussian_limit(bits, unbiased=law) for law in (False, True))
        assert biased == pytest.approx(4**-bits)
        assert unbiased == pytest.approx(1 / (4**bits - 1))


def test_header_and_body_are_the_payload():
    figures = measure(build("codec", "identity"), X, LAYOUT)
    assert figures.payload_bytes == figures.header_bytes + X.nbytes


@pytest.mark.parametrize("name", registry.table("model"))
def test_every_model_has_an_update(name, monkeypatch):
    monkeypatch.setattr(codec_report, "WARM_UP_IMAGES", 40)
    x, layout = codec_report.client_update(build("model", name), seed=1)
    assert x.shape == (layout.size,)
    assert np.isfinite(x).all()
    assert x.any()


def test_an_update_is_a_function_of_the_seed(monkeypatch):
    monkeypatch.setattr(codec_report, "WARM_UP_IMAGES", 40)
    first, again, other = (codec_report.client_update(MLP, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.usefixtures("no_training")
def test_all_codecs_are_surveyed_once_and_told_of():
    told: list[tuple[int, int, str]] = []
    twice = [*codec_report.examples(), *codec_report.examples()]
    shown = survey(MLP, twice, seconds=0, watch=lambda *what: told.append(what))
    named = {row.config["name"] for row in shown.figures}
    assert named | {name.split("(")[0] for name in shown.left_out} == set(
        registry.available("codec")
    )
    assert len({row.codec for row in shown.figures}) == len(shown.figures)
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert {total for _, total, _ in told} == {len(told)}


class Refusing(type(build("codec", "identity"))):  # type: ignore[misc]
    def _encode(self, x, layout, seed):
        raise ConfigError("needs what is not here")


@pytest.mark.usefixtures("no_training")
def test_a_codec_that_refuses_is_left_out():
    shown = survey(MLP, [Refusing(), DITHERED], seconds=0)
    assert [row.config["name"] for row in shown.figures] == ["uniform"]
    assert shown.left_out == {"identity": "needs what is not here"}
    assert "left out: identity: needs what is not here" in printed(shown)
    with pytest.raises(ConfigError, match="no codec takes this update: needs"):
        survey(MLP, [Refusing()], seconds=0)


def test_json_is_plain_and_has_stable_keys(found: Survey):
    text = json.loads(codecs.to_json(found))
    assert sorted(text) == TOP
    assert {"cpu", "cores", "python"} <= set(text["machine"])
    assert {"fedq", "numpy", "numba"} <= set(text["versions"])
    assert len(text["codecs"]) == len(found.figures)
    for row in text["codecs"]:
        assert set(row) == set(KEYS.split())
        registry.from_config("codec", row["config"])


# --- table ---------------------------------------------------------------------------------------


def test_table_fits_and_shows_every_codec(found: Survey):
    text = printed(found)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "\x1b" not in text
    for row in found.figures:
        assert row.config["name"] in text
    assert "does [not] fit" in text


def test_table_has_unbiased_codecs_first_and_few_bits_first(found: Survey):
    groups = codecs._groups(found.figures)
    assert [unbiased for unbiased, _ in groups] == [True, False]
    for unbiased, rows in groups:
        assert all(row.unbiased is unbiased for row in rows)
        rates = [row.bits_per_parameter for row in rows]
        assert rates == sorted(rates)
    text = printed(found)
    assert text.index("limit 1/(4^R-1)") < text.index("limit 4^-R")


# --- picture -------------------------------------------------------------------------------------


def test_picture_names_every_codec_and_no_names_overlap(found: Survey):
    figure = codecs.plot(found)
    figure.canvas.draw()
    one, many = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one client", "mean of 100"]
    names = [text.get_text() for text in one.texts]
    assert set(names) == {row.config["name"] for row in found.figures}
    for axes in (one, many):
        boxes = [text.get_window_extent() for text in axes.texts]
        frame = axes.get_window_extent()
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_files_are_whole_and_reproducible(found: Survey, tmp_path: Path):
    written = codecs.write(found, tmp_path / "a")
    assert [path.name for path in written] == ["codecs.png", "codecs.svg", "codecs.json"]
    image = imread(written[0])
    assert image.shape[:2] == (1024, 1920)
    ink = (image[..., :3] < 0.75).any(axis=-1)
    assert ink.mean() > 0.005
    assert not any(edge.any() for edge in (ink[:4], ink[-4:], ink[:, :4], ink[:, -4:]))
    assert "<svg" in written[1].read_text()[:500]
    for first, again in zip(written, codecs.write(found, tmp_path / "b"), strict=True):
        assert first.read_bytes() == again.read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(FedqError, match="name another folder with --out"):
        codecs.write(found, tmp_path / "file")


@pytest.mark.parametrize("name", ["identity", "sign", "uniform"])
def test_a_single_codec_can_be_drawn(name: str, tmp_path: Path):
    row: Figures = measure(build("codec", name), X, LAYOUT, 0)
    codecs.write(Survey("mlp", X.size, 0, (row,), {}), tmp_path)


# --- command -------------------------------------------------------------------------------------


def test_command_prints_a_table_and_writes_the_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["codecs", "--model", "mlp", "--codec", "sign,dithered", "--seconds", "1"]) == 0
    said = capsys.readouterr()
    assert "uniform(bits=5" in said.out
    assert "wrote codecs/codecs.png" in said.out
    assert "2/3  sign" in said.err
    assert sorted(path.name for path in (tmp_path / "codecs").iterdir()) == sorted(
        [*codecs.PLOTS, codecs.JSON]
    )


@pytest.mark.usefixtures("no_training")
def test_command_prints_json_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["codecs", "--json", "--seconds", "0.1", "--codec", "top_k fraction=0.1 inner=sign"]
    assert cli.main(command) == 0
    (row,) = json.loads(capsys.readouterr().out)["codecs"]
    assert row["config"] == {"name": "top_k", "fraction": 0.1, "inner": {"name": "sign"}}
    assert row["nmse_of_mean_100"] == pytest.approx(row["nmse"])
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*command, "--out", "there"]) == 0
    written = json.loads((tmp_path / "there" / codecs.JSON).read_text())
    assert written["codecs"][0]["config"] == row["config"]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--codec", "unifrom"], 2, "did you mean 'uniform'?"),
        (["--codec", "uniform bits=99"], 2, "codec.bits must be from 1 to 16"),
        (["--codec", "uniform 'bits"], 2, "cannot read 'uniform 'bits'"),
        (["--codec", ""], 2, "cannot read ''"),
        (["--model", "mlpp"], 2, "did you mean 'mlp'?"),
        (["--seconds", "0"], 2, "--seconds must be positive"),
        (["--seconds", "nan"], 2, "--seconds must be positive"),
        (["--what"], 2, "unknown flag '--what'"),
        (["sign"], 2, "cannot use 'sign'"),
        (["--plugin", "none.py"], 2, "plug-in none.py"),
        (["--codec", "sign", "--out", "{file}"], 1, "name another folder with --out"),
    ],
)
def test_wrong_use_is_one_line(arguments, status, says, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    full = [text.replace("{file}", str(tmp_path / "file")) for text in arguments]
    assert cli.main(["codecs", *full]) == status
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("fedq: ")
    assert says in line


def test_a_plug_in_can_be_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(codec_report, "client_update", lambda model, seed: (X, LAYOUT))
    file = tmp_path / "zero.py"
    file.write_text(
        "from fedq.codecs.identity import Identity\n"
        "from fedq.registry import register\n"
        "@register('codec', 'of_a_file')\n"
        "class OfAFile(Identity):\n    pass\n"
    )
    try:
        assert cli.main(f"codecs --plugin {file} --codec of_a_file --json".split()) == 0
    finally:
        registry._TABLES["codec"].pop("of_a_file", None)
    assert json.loads(capsys.readouterr().out)["codecs"][0]["codec"] == "of_a_file"
