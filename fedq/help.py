"""What ``fedq help`` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from fedq import config, reference
from fedq.errors import unknown
from fedq.experiment import CHOICES

_WIDTH = 100


def overview() -> str:
    """Return all options of a run, and what else has names."""
    chosen = [(f"{key}=", reference.GROUPS[group]) for key, group in CHOICES.items()]
    chosen[list(CHOICES).index("downlink")] = ("downlink=", "how the model becomes bytes: a codec")
    values = [(f"{o.name}={o.default}", o.meaning) for o in reference.run_options()]
    others = [(g, text) for g, text in reference.GROUPS.items() if g not in CHOICES.values()]
    return "\n".join(
        [
            "choices of a run; fedq help OPTION lists each one's names:",
            *_columns(chosen),
            "",
            "values of a run, with their defaults:",
            *_columns(values),
            "",
            "named by other options:",
            *_columns(others),
        ]
    )


def explain(what: str) -> str:
    """Return what an option means, or a choice of it.

    Raises:
      ConfigError: On an unknown option or name, naming the nearest.

    Example:
      >>> explain("rounds").splitlines()
      ['rounds=30 (int)', 'Rounds of federated training.']
    """
    option, _, name = what.partition("=")
    values = {o.name: o for o in reference.run_options()}
    if option in values:
        found = values[option]
        return f"{found.name}={found.default} ({found.type})\n{_wrapped(found.meaning)}"
    if option in config.BUNDLES:
        return _preset(option, name) if name else _presets(option)
    if option not in {*CHOICES, *reference.GROUPS}:
        raise unknown("option", option, {*values, *CHOICES, *config.BUNDLES, *reference.GROUPS})
    if name and name in config.presets(option):
        return _preset(option, name)
    group = reference.group_of(option)
    return _entry(reference.entry(group, name)) if name else _names(option, group)


def _names(option: str, group: str) -> str:
    listed = [(entry.name, entry.title) for entry in reference.entries(group)]
    text = [f"{option}: {reference.GROUPS[group]}", "", *_columns(listed)]
    return "\n".join([*text, "", _presets(option)] if config.presets(option) else text)


def _presets(option: str) -> str:
    listed = [(name, config.summary(option, name)) for name in config.presets(option)]
    return "\n".join([f"presets, {option}=NAME:", *_columns(listed)])


def _preset(option: str, name: str) -> str:
    return f"{option}={name} is a preset:\n\n{config.preset(option, name)}"


def _entry(entry: reference.Entry) -> str:
    parts = [f"{entry.group}={entry.name}\n{_wrapped(entry.title)}", entry.text]
    if entry.options:
        options = [(o.name, f"{_kind(o)}  {o.meaning}") for o in entry.options]
        parts.append("\n".join(["options:", *_columns(options)]))
    if entry.example:
        parts.append(f"example:\n  {entry.example}")
    if entry.reference:
        parts.append(f"source:\n{textwrap.indent(_wrapped(entry.reference), '  ')}")
    return "\n\n".join(part for part in parts if part)


def _kind(option: reference.Option) -> str:
    return option.type if option.default is None else f"{option.type} = {option.default}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False)


def _columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = min(24, max(len(key) for key, _ in rows)) + 4
    return [
        textwrap.fill(
            text, _WIDTH, initial_indent=f"  {key:{width}}", subsequent_indent=" " * (width + 2)
        )
        for key, text in rows
    ]
