"""``fedq evaluate``: what is done is kept, what is not is said, and the page shows both."""

from __future__ import annotations

import io
import json
import shutil
import typing
from pathlib import Path
from typing import ClassVar

import jsonschema
import numpy as np
import pytest
from rich.console import Console

from fedq import cli, config, registry
from fedq.errors import ConfigError, FedqError
from fedq.evaluate import evaluate
from fedq.report import card as pages
from fedq.results import read_model
from fedq.robustness.base import Evaluation, Family, Work
from fedq.robustness.card import FAMILIES, STATEMENT, Card, Result, read_card
from fedq.robustness.outcome import Curve, Gate, Outcome, Plot
from fedq.robustness.subject import Subject

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "card.schema.json").read_text())
SUITES = sorted(path.stem for path in (config.conf_directory() / "suite").glob("*.yaml"))
HOSTILE = "<script>alert('&')</script>"
CALLS: list[str] = []


@registry.register("evaluation", "toy")
class Toy(Evaluation):
    family: ClassVar[Family] = "evasion"
    level: float = 0.5

    def run(self, subject: Subject, work: Work) -> list[Outcome]:
        CALLS.append(self.name)
        work.step(1, 2)
        work.folder.mkdir(parents=True)
        return [Outcome(name="toy", metric="accuracy", value=self.level, bound="upper")]


@registry.register("evaluation", "failing")
class Failing(Toy):
    def run(self, subject: Subject, work: Work) -> list[Outcome]:
        CALLS.append(self.name)
        raise FedqError("no such luck")


@registry.register("evaluation", "killed")
class Killed(Toy):
    alive: ClassVar[bool] = False

    def run(self, subject: Subject, work: Work) -> list[Outcome]:
        if not self.alive:
            raise KeyboardInterrupt
        return super().run(subject, work)


@registry.register("evaluation", "inapplicable")
class Inapplicable(Toy):
    def unsuitable(self, subject: Subject) -> str:
        return "it has no ears"


TOYS: tuple[type[Evaluation], ...] = (Toy, Failing, Killed, Inapplicable)
for toy in TOYS:
    del registry._TABLES["evaluation"][toy.name]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card") / "run"
    options = ["data=digits", "clients=5", "rounds=2", "model=mlp", "baseline=false"]
    assert cli.main(["simulate", *options, "engine.workers=1", f"run_dir={path}"]) == 0
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of the tests' own, known in a test alone."""
    for cls in TOYS:
        monkeypatch.setitem(registry._TABLES["evaluation"], cls.name, cls)
    CALLS.clear()


def suite(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def card_of(*outcomes: Outcome, **changes: object) -> Card:
    result = Result(
        key="toy",
        evaluation={"name": "toy"},
        family="evasion",
        seed=0,
        model_sha256="0" * 64,
        state="done",
        date="2026-01-31T12:00:00Z",
        outcomes=outcomes,
    )
    values = {
        "run": {
            "name": "mine",
            "directory": "mine",
            "model_sha256": "0" * 64,
            "accuracy": 0.9,
            "float_accuracy": 0.91,
            "integer": True,
            "test_examples": 100,
            "config": config.load([]).to_config(),
        },
        "suite": "smoke",
        "seed": 0,
        "date": "2026-01-31T12:00:00Z",
        "versions": {},
        "hardware": {"cpu": "any", "cores": 2, "memory_gb": None},
        "results": (result,),
    }
    return Card(**(values | changes))  # type: ignore[arg-type]


EVERY_STATUS = (
    Outcome(
        name="PGD",
        metric="accuracy",
        value=0.24,
        twin=0.26,
        bound="upper",
        interval=(0.2, float("nan")),
        gates=(Gate("not masked", True, "0 % zero"),),
        plot=Plot("a", "eps", "%", (Curve("own", (0.0, 1.0), (1.0, 0.0), dashed=True),)),
    ),
    Outcome(
        name="masked",
        metric="accuracy",
        value=0.95,
        gates=(Gate("not masked", False, "97 % zero"),),
    ),
    Outcome(name="few", metric="TPR", value=0.1, status="withheld", reason="9 non-members"),
    Outcome(name="none", metric="TPR", status="skipped", reason="one class"),
    Outcome(name="audit", metric="epsilon", value=9.0, status="failed", reason="above 8"),
)


# --- suites --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_names_evaluations_that_exist(name: str) -> None:
    label, evaluations = config.suite(name)
    assert label == name
    assert evaluations


def test_the_full_suite_holds_every_evaluation_of_the_package() -> None:
    own = {n for n, cls in registry.table("evaluation").items() if cls.__module__ != __name__}
    assert {evaluation.name for evaluation in config.suite("full")[1]} == own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name: to\n", "did you mean 'toy'"),
        ("- {name: toy, levle: 1.0}\n", "did you mean 'level'"),
        ("- {name: toy, level: high}\n", "level must be float"),
        ("toy: 1\n", "must be a list"),
        ("", "must be a list"),
        ("- [\n", "cannot read the suite"),
    ],
)
def test_a_wrong_suite_is_one_error_that_names_the_nearest(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config.suite(suite(tmp_path, text))


def test_unknown_suites_and_evaluations_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        config.suite("smok")
    with pytest.raises(ConfigError, match="cannot read the suite"):
        config.suite(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="did you mean 'toy'"):
        evaluate(run, suite(tmp_path, "- toy"), only=["tyo"])


# --- resuming ------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(run: Path, tmp_path: Path) -> None:
    mine = suite(tmp_path, "- toy\n- {name: toy, level: 0.25}\n")
    first, folder = evaluate(run, mine)
    assert folder == run / "evaluation" / "mine"
    assert [result.key for result in first.results] == ["toy", "toy-2"]
    assert not list(folder.glob("partial/*"))
    second, _ = evaluate(run, mine)
    assert CALLS == ["toy", "toy"]
    assert second.results == first.results
    evaluate(run, mine, seed=1)
    assert len(CALLS) == 4
    evaluate(run, suite(tmp_path, "- toy\n- {name: toy, level: 0.5}\n"), seed=1)
    assert len(CALLS) == 5
    (folder / "toy.json").write_text("{")
    evaluate(run, mine, seed=1)
    assert len(CALLS) == 6
    tensors, _ = read_model(run)
    shifted = {name: np.asarray(tensor + 1e-3, np.float32) for name, tensor in tensors.items()}
    rewrite(run, shifted)
    evaluate(run, mine, seed=1)
    assert len(CALLS) == 8


def rewrite(run: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, run / "model.safetensors", {"fedq": "{}"})


def test_a_killed_evaluation_leaves_a_card_and_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = suite(tmp_path, "- toy\n- killed\n- {name: toy, level: 0.1}\n")
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, mine)
    partial = read_card(run / "evaluation" / "mine")
    assert partial.missing == ["killed", "toy-2"]
    assert "Not evaluated yet: killed, toy-2." in pages.page(partial)
    monkeypatch.setattr(Killed, "alive", True)
    whole, _ = evaluate(run, mine)
    assert CALLS == ["toy", "killed", "toy"]
    assert not whole.missing


def test_only_some_are_done_and_the_others_kept(run: Path, tmp_path: Path) -> None:
    mine = suite(tmp_path, "- toy\n- inapplicable\n")
    card, _ = evaluate(run, mine, only=["inapplicable"])
    assert card.missing == ["toy"]
    assert card.results[1].state == "skipped"
    assert card.results[1].reason == "it has no ears"
    card, _ = evaluate(run, mine, only=["toy"])
    assert not card.missing
    assert CALLS == ["toy"]


def test_one_that_cannot_be_carried_out_is_said_and_tried_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = suite(tmp_path, "- failing\n- toy\n")
    command = ["evaluate", str(run), "--suite", mine, "--json"]
    assert cli.main(command) == 1
    card = json.loads(capsys.readouterr().out)
    assert [result["state"] for result in card["results"]] == ["error", "done"]
    assert card["results"][0]["reason"] == "no such luck"
    assert cli.main(command) == 1
    assert CALLS == ["failing", "toy", "failing"]


def test_the_command_prints_a_table_and_where_the_page_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        cli.main(["evaluate", str(run), "--suite", suite(tmp_path, "- toy"), f"--out={out}"]) == 0
    )
    printed = capsys.readouterr().out
    assert "at most 50.0 %" in printed
    assert str(out / "card.html") in printed
    jsonschema.validate(json.loads((out / "card.json").read_text()), SCHEMA)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["nowhere"], 2), (["."], 2), (["nowhere", "extra"], 2), (["nowhere", "--workers=-1"], 2)],
)
def test_wrong_use_is_one_line(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", *arguments]) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_that_is_not_finite_is_not_evaluated(run: Path, tmp_path: Path) -> None:
    tensors, _ = read_model(run)
    name = next(iter(tensors))
    rewrite(run, tensors | {name: np.full_like(tensors[name], np.nan)})
    with pytest.raises(FedqError, match=f"{name} is not finite"):
        evaluate(run, suite(tmp_path, "- toy"))


# --- the card ------------------------------------------------------------------------------------


def test_a_card_of_every_status_fits_the_schema_and_comes_back() -> None:
    card = card_of(*EVERY_STATUS)
    values = json.loads(card.text())
    jsonschema.validate(values, SCHEMA)
    again = Card.from_json(values)
    assert json.loads(again.text()) == values
    assert again.broken
    with pytest.raises(FedqError, match="schema 2"):
        Card.from_json(values | {"schema": 2})


@pytest.mark.parametrize(
    "change", [{"status": "measured"}, {"status": "robust"}, {"reason": ""}, {"extra": 1}]
)
def test_the_schema_refuses_what_a_card_must_not_say(change: dict[str, object]) -> None:
    values = json.loads(card_of(EVERY_STATUS[1]).text())
    values["results"][0]["outcomes"][0] |= change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)


def test_families_have_titles_in_cards_and_schema() -> None:
    known = typing.get_args(Family)
    assert tuple(FAMILIES) == known
    assert tuple(SCHEMA["$defs"]["result"]["properties"]["family"]["enum"]) == known


def test_the_worst_comes_first() -> None:
    weak = Outcome(name="weak", metric="accuracy", value=0.1, bound="upper")
    (result,) = card_of(*EVERY_STATUS, weak).results
    names = [outcome.name for outcome in result.worst_first]
    assert names == ["audit", "masked", "few", "weak", "PGD", "none"]


def test_the_page_is_one_file_with_what_must_be_seen() -> None:
    page = pages.page(card_of(*EVERY_STATUS))
    for foreign in ("http:", "https:", "src=", "<script", "url(", "@import"):
        assert foreign not in page
    for seen in ("INVALID", "WITHHELD", "FAILED", "97 % zero", "9 non-members", STATEMENT):
        assert seen in page
    assert "prefers-color-scheme:dark" in page
    assert "<svg" in page


def test_text_is_escaped_everywhere() -> None:
    hostile = Outcome(
        name=HOSTILE,
        metric=HOSTILE,
        value=1.0,
        unit=HOSTILE,
        threat=HOSTILE,
        status="withheld",
        reason=HOSTILE,
        budget={HOSTILE: HOSTILE},
        gates=(Gate(HOSTILE, True, HOSTILE),),
        details={HOSTILE: [{HOSTILE: HOSTILE}], "list": [HOSTILE]},
        plot=Plot(HOSTILE, HOSTILE, HOSTILE, (Curve(HOSTILE, (0.0,), (1.0,)),)),
    )
    card = card_of(hostile, suite=HOSTILE, versions={HOSTILE: HOSTILE})
    run = {**card.run, "name": HOSTILE, "directory": HOSTILE}
    assert "<script" not in pages.page(card_of(hostile, run=run, suite=HOSTILE))


def test_the_table_shows_a_figure_only_if_it_may_be_relied_on() -> None:
    out = io.StringIO()
    Console(width=100, file=out).print(pages.table(card_of(*EVERY_STATUS)))
    printed = out.getvalue()
    assert "at most 24.0 %" in printed
    assert "95.0 %" not in printed
    assert "masked: 97 % zero" in printed


@pytest.mark.parametrize(
    ("x", "y", "log"),
    [((0.0,), (0.0,), False), ((1e-3, 1.0), (0.0, 1.0), True), ((1.0, 2.0), (5.0, 5.0), False)],
)
def test_any_plot_is_drawn_inside_its_frame(
    x: tuple[float, ...], y: tuple[float, ...], log: bool
) -> None:
    from fedq.report._figure import figure

    drawn = figure(Plot("t", "x", "y", (Curve("c", x, y),), log))
    assert "nan" not in drawn
    assert "polyline" in drawn
