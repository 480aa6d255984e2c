"""Configuration: what is unknown, misspelt or ill-typed is refused with the nearest valid name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedq import config, registry
from fedq.errors import ConfigError
from fedq.experiment import CHOICES, Experiment

EXPERIMENTS = sorted(path.stem for path in (config.conf_directory() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["codec=unifrom"], "unknown codec 'unifrom'; did you mean 'uniform'"),
        (["codec.bitz=4"], "'bitz'; did you mean 'bits'"),
        (["codec.bits=four"], "codec.bits must be int, not 'four'"),
        (["codec.bits=4.0"], "codec.bits must be int, not 4.0"),
        (["codec.bits=true"], "codec.bits must be int, not True"),
        (["codec.bits=99"], "1 to 16"),
        (["downlink=grid4", "downlink.bits=x"], "downlink.bits must be int"),
        (["downlink=nope"], "unknown downlink 'nope'"),
        (["codec=top_k", "codec.inner=fp17"], "unknown codec 'fp17'; did you mean 'fp16'"),
        (["codec.inner.bits=4"], "unknown option of codec=uniform 'inner'"),
        (["round=3"], "unknown option 'round'; did you mean 'rounds'"),
        (["rounds=three"], "rounds must be int"),
        (["rounds=0"], "rounds must be at least 1"),
        (["rounds=null"], "rounds must be int"),
        (["clients=0"], "clients must be at least 1"),
        (["clients_per_round=0"], "clients_per_round must be"),
        (["clients_per_round=1.5"], "clients_per_round must be"),
        (["run_dir=''"], "run_dir must be a path"),
        (["learning_rate=-1"], "learning_rate"),
        (["learning_rate_end=0"], "learning_rate_end must be a share"),
        (["batch_size=0"], "batch_size"),
        (["quorum=2"], "quorum"),
        (["max_examples=2000000"], "max_examples"),
        (["guard.norm_limit=-1"], "guard.norm_limit must be positive"),
        (["guard.quarantine_rounds=0"], "guard.quarantine_rounds must be at least 1"),
        (["guard=lenient"], "unknown guard 'lenient'"),
        (["server_memory_gb=0"], "server_memory_gb must be positive"),
        (["attack=alie", "attack.fraction=1.5"], "attack.fraction must lie in [0, 1)"),
        (["attack=ali"], "did you mean 'alie'"),
        (["attack=alie", "codec=dtcq", "uplink_context=true"], "attack needs uplink_context=false"),
        (["fleet=pishelf"], "did you mean 'pi_shelf'"),
        (["fleet=pi_shelf", "fleet.shares=[0.5,0.5]"], "need one entry per kind"),
        (["fleet=pi_shelf", "fleet.shares=[0.5,0.5,0.5,0.5,0.5]"], "must sum to 1, not 2.5"),
        (["fleet=pi_shelf", "fleet.devices=[pi_4,pi_6,pi_4,pi_4,pi_4]"], "did you mean 'pi_"),
        (["pacing=fedbuff"], "counts simulated time: choose a fleet"),
        (["pacing.deadline_s=3"], "counts simulated time: choose a fleet"),
        (["fleet=pi_shelf", "pacing=fedbuff", "sealed=true"], "needs sealed=false"),
        (
            ["fleet=pi_shelf", "pacing.over_selection=1.3", "attack=alie"],
            "a whole cohort or buffer",
        ),
        (
            [
                "fleet=pi_shelf",
                "pacing=fedbuff",
                "pacing.buffer=4",
                "aggregator=krum",
                "aggregator.f=1",
            ],
            "n >= 2 f + 3 updates, and has n = 4",
        ),
        (["fleet=mixed_iot", "privacy=gaussian", "privacy.noise_multiplier=1"], "must be always"),
        (["width_by=speed"], "chooses among quantization.widths"),
        (["budget=dadaquant", "codec=sign"], "needs a codec with bits or levels"),
        (["budget=dadaquant", "attack=alie"], "names a codec to each client"),
        (["aggregator=bulyan", "aggregator.f=0.3"], "n >= 4 f + 3"),
        (["aggregator=krum", "aggregator.f=-1"], "n >= 2 f + 3"),
        (["aggregator=krum", "aggregator.f=4"], "n >= 2 f + 3 updates, and has n = 10, f = 4"),
        (["aggregator=monna", "aggregator.f=5"], "n >= 2 f + 1 updates, and has n = 10"),
        (
            ["aggregator=bucketing", "aggregator.inner=krum", "aggregator.inner.f=2"],
            "n >= 2 f + 3 updates, and has n = 5",
        ),
        (
            [
                *(
                    f"aggregator{o}"
                    for o in ("=nearest_neighbour_mixing", ".inner=krum", ".inner.f=1")
                ),
                "clients=4",
            ],
            "n = 4",
        ),
        (["aggregator=bucketing", "aggregator.inner=fltrust"], "cannot stand inside bucketing"),
        (["downlink=error_feedback", "downlink.inner=sign"], "cannot feed errors back"),
        (["engine.workers=-1"], "engine.workers"),
        (["experiment=fedadm"], "did you mean 'fedadam'"),
        (["rounds"], "write option=value"),
        (["+rounds=3"], "without + or ~"),
        (["~codec"], "without + or ~"),
        (["seed=1,2"], "add -m to sweep"),
        (["data.name=5"], "data=mnist5k has no option 'name'"),
        (["data=npz"], "data=npz needs data.path"),
        (["plugins=[missing.py]"], "is not a Python file"),
        (["model.layers=3"], "option of model=auto 'layers'"),
        (["weighting=size"], "weighting"),
        (["baseline=maybe"], "baseline must be bool"),
        (["rounds.more=1"], "has no options"),
    ],
)
def test_wrong_use_is_one_clear_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", *EXPERIMENTS])
def test_every_experiment_round_trips(name: str) -> None:
    experiment = config.load([f"experiment={name}"] if name else [])
    assert Experiment.from_config(experiment.to_config()) == experiment


@pytest.mark.parametrize("choice", CHOICES)
def test_every_preset_builds(choice: str) -> None:
    directory = config.conf_directory() / choice
    for name in [path.stem for path in directory.glob("*.yaml")]:
        assert getattr(config.load([f"{choice}={name}"]), choice) is not None


def test_options_reach_the_object() -> None:
    experiment = config.load(
        ["codec=top_k", "codec.fraction=0.1", "codec.inner=uniform", "codec.inner.bits=3"]
    )
    assert experiment.codec.fraction == 0.1
    assert experiment.codec.inner.bits == 3
    assert config.load(["engine.workers=2", "data.seed=3"]).engine.workers == 2


def test_a_later_override_wins_over_an_experiment() -> None:
    assert config.load(["experiment=fedprox", "local_epochs=1"]).local_epochs == 1


def test_baseline_is_the_same_federation_in_float() -> None:
    options = ["seed=7", "rounds=3", "codec.bits=4", "clients=9", "clients_per_round=3"]
    experiment = config.load(options)
    baseline = config.baseline_of(experiment)
    assert baseline is not None
    assert baseline.codec.name == baseline.downlink.name == "identity"
    assert baseline.quantization.name == "none"
    assert (baseline.seed, baseline.rounds, baseline.clients) == (7, 3, 9)
    assert config.baseline_of(baseline) is None


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test registers."""
    monkeypatch.setitem(registry._TABLES, "codec", dict(registry.table("codec")))


@pytest.mark.usefixtures("registered")
def test_plugins_register_new_names(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import numpy as np\n"
        "from fedq.codecs.identity import Identity\n"
        "from fedq.registry import register\n"
        "@register('codec', 'mine')\n"
        "class Mine(Identity):\n"
        "    level: int = 1\n"
    )
    experiment = config.load([f"plugins=[{plugin}]", "codec=mine", "codec.level=2"])
    assert experiment.codec.level == 2


def test_a_failing_plugin_is_one_line(tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text("raise RuntimeError('oops')\n")
    with pytest.raises(ConfigError, match=r"broken\.py fails: RuntimeError: oops"):
        config.load([f"plugins=[{plugin}]"])


def test_resume_changes_only_what_may_change() -> None:
    saved = config.load(["rounds=5"]).to_config()
    assert config.load_resumed(saved, ["rounds=9", "engine.workers=2"]).rounds == 9
    with pytest.raises(ConfigError, match="'codec' cannot change"):
        config.load_resumed(saved, ["codec.bits=2"])


def test_the_learning_rate_falls_linearly_to_its_end() -> None:
    falling = config.load(["rounds=5", "learning_rate=0.4", "learning_rate_end=0.5"])
    rates = [falling.training_in(round).learning_rate for round in range(1, 7)]
    assert rates == pytest.approx([0.4, 0.35, 0.3, 0.25, 0.2, 0.2])
    constant = config.load([])
    assert constant.training_in(7) == constant.training


def test_sweeps_expand() -> None:
    assert config.sweep(["seed=range(0,3)", "codec=sign,ternary"]) == [
        [f"seed={seed}", f"codec={codec}"] for seed in range(3) for codec in ("sign", "ternary")
    ]


def test_sweeps_expand_what_a_study_sweeps(study: str) -> None:
    cells = config.sweep([f"experiment={study}", "seed=5"])
    assert cells == [
        ["codec.bits=2", f"experiment={study}", "seed=5"],
        ["codec.bits=3", f"experiment={study}", "seed=5"],
    ]
    assert [config.load(cell).codec.bits for cell in cells] == [2, 3]
    given = config.sweep([f"experiment={study}", "codec.bits=7"])
    assert [config.load(cell).codec.bits for cell in given] == [7, 7]  # the study's two seeds
    assert config.is_study([f"experiment={study}"])
    assert not config.is_study(["experiment=int4"])


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An experiment that sweeps two options."""
    shutil.copytree(config.conf_directory(), tmp_path / "conf")
    (tmp_path / "conf" / "experiment" / "study.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /codec: uniform\n"
        "hydra:\n  sweeper:\n    params:\n      codec.bits: range(2,4)\n      seed: [0, 1]\n"
    )
    monkeypatch.setattr(config, "conf_directory", lambda: tmp_path / "conf")
    config._compose.cache_clear()
    yield "study"
    config._compose.cache_clear()


def test_sweeps_match_names() -> None:
    assert config.sweep(["experiment=glob(fed*,exclude=*m)"]) == [
        ["experiment=fedprox"],
        ["experiment=fedyogi"],
    ]
    with pytest.raises(ConfigError, match="matches nothing"):
        config.sweep(["experiment=glob(nothing*)"])


def test_an_interval_is_for_a_search() -> None:
    with pytest.raises(ConfigError, match="hydra/sweeper=optuna"):
        config.sweep(["learning_rate=interval(0.1,1)"])
    found = config.search(["hydra/sweeper=optuna", "learning_rate=interval(0.1,1)", "seed=3"])
    assert found is not None
    assert (found.fixed, found.trials, found.seed) == (("seed=3",), 20, 3)
    assert config.search(["learning_rate=0.1,0.2"]) is None


def test_a_run_of_an_older_version_gets_the_defaults_of_new_options():
    saved = config.load(["rounds=5"]).to_config()
    del saved["adversarial_eps"]
    assert config.load_resumed(saved, []) == config.load(["rounds=5"])


@pytest.mark.parametrize("method", config.choices("method"))
def test_methods_compose(method: str) -> None:
    found = config.load([f"method={method}"])
    assert found.name
    quantized = method.startswith("fedq") or method == "fp8"  # as published: others train in float
    assert (found.quantization.name != "none") == quantized


@pytest.mark.parametrize("task", config.choices("task"))
def test_tasks_compose(task: str) -> None:
    assert config.load([f"task={task}", "method=eden", "experiment=int4"]).codec.name == "eden"


def test_the_reproductions_are_all_methods_and_tasks() -> None:
    cells = config.sweep(["experiment=reproductions"])
    assert len(set(map(tuple, cells))) == len(cells)
    cells = [cell for cell in cells if "seed=0" in cell]  # seeds compose alike
    found = [config.load(cell) for cell in cells]
    assert {text for cell in cells for text in cell if text.startswith("method=")} == {
        f"method={name}" for name in config.choices("method")
    }
    assert len({(e.name, e.data.name, e.partition.name, e.seed) for e in found}) == len(cells)
    assert not any(e.baseline for e in found)
