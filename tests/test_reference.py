"""The reference and ``fedq help``: everything registered is explained, from one source."""

from __future__ import annotations

import shlex

import pytest

from fedq import cli, config, reference, registry
from fedq.experiment import CHOICES


@pytest.mark.parametrize("group", registry.GROUPS)
def test_everything_is_explained(group: str) -> None:
    assert set(reference.GROUPS) == set(registry.GROUPS)
    for entry in reference.entries(group):
        assert entry.title, entry
        assert entry.text, entry
        for option in entry.options:
            assert option.meaning, f"the docstring of {group}={entry.name} says nothing of {option}"


def test_options_of_a_run_are_explained() -> None:
    assert all(option.meaning for option in reference.run_options())
    for option in [*CHOICES, *config.BUNDLES]:
        for name in config.presets(option):
            assert config.summary(option, name), f"conf/{option}/{name}.yaml begins with no comment"


@pytest.mark.parametrize("group", registry.GROUPS)
def test_an_example_chooses_what_it_is_of(group: str) -> None:
    """One of each group, that with the most options: composing all takes too long."""
    entries = [e for e in reference.entries(group) if e.example.startswith("fedq simulate")]
    for entry in sorted(entries, key=lambda e: len(e.example) * ("PATH" not in e.example))[-1:]:
        chosen = str(config.load(shlex.split(entry.example)[2:]).to_config())
        assert f"'{entry.name}'" in chosen, entry.example


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("codec=dtcq", "Target in bits per parameter"),
        ("downlink=grid4", "4-bit grid"),
        ("device=pi_4", "pidramble.com"),
        ("rounds", "Rounds of federated training"),
        ("method", "eden"),
        ("codec", "presets, codec=NAME"),
    ],
)
def test_help_says(what: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", what]) == 0
    assert said in capsys.readouterr().out


def test_help_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    out = capsys.readouterr().out
    names = [*CHOICES, *registry.GROUPS, *(option.name for option in reference.run_options())]
    assert all(name in out for name in names)


@pytest.mark.parametrize(
    ("what", "nearest"), [("codec=dtq", "dtcq"), ("rouns", "rounds"), ("method=edn", "eden")]
)
def test_help_names_the_nearest(
    what: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["help", what]) == 2
    assert f"did you mean '{nearest}'" in capsys.readouterr().err
