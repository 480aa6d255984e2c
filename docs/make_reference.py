"""The pages of docs/reference/: every registered object, its options, an example and its source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import _make
from _make import DOCS

from fedq import config, reference, registry
from fedq.experiment import CHOICES

FOLDER = DOCS / "reference"
_CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
#: What Markdown would read, but for code, which is indented, and bullets.
_SPECIAL = re.compile(r"^(?: {4}.*|[*] )|([*_<])", re.MULTILINE)
_ADDRESS = re.compile(r"https://[\w./#%-]*[\w/]")


def pages() -> Iterator[tuple[Path, str]]:
    """Yield all pages."""
    yield FOLDER / "README.md", index()
    yield FOLDER / "run.md", run()
    yield FOLDER / "presets.md", presets()
    for group in registry.GROUPS:
        yield FOLDER / f"{group}.md", page(group)


def index() -> str:
    """Return the page that lists the groups."""
    options: dict[str, list[str]] = {}
    for option, group in CHOICES.items():
        options.setdefault(group, []).append(f"`{option}=`")
    rows = [
        [
            f"[{group}]({group}.md)",
            ", ".join(options.get(group, [])),
            reference.GROUPS[group],
            str(len(registry.available(group))),
        ]
        for group in registry.GROUPS
    ]
    return (
        "# Reference\n\n"
        "Everything that has a name, made by `python docs/make.py` from the registry and the "
        "docstrings.\n`fedq help codec=dtcq` says the same on the command line.\n\n"
        "- [Values of a run](run.md): rounds, seeds, clients, training.\n"
        "- [Presets](presets.md): the files of `conf/`.\n\n"
        f"{_make.table(['group', 'option', 'what', 'objects'], rows, right=3)}\n"
    )


def run() -> str:
    """Return the page of the plain options of a run."""
    rows = [_option(option) for option in reference.run_options()]
    return (
        "# Values of a run\n\n"
        "Options of `fedq simulate` and `fedq fleet run` that are no choice of a "
        "registered object,\nsuch as `rounds=20`.\n\n"
        f"{_options(rows)}\n"
    )


def presets() -> str:
    """Return the page of the files in ``conf/``."""
    parts = ["# Presets", "Files of `conf/`, each an option's value, such as `codec=dithered`."]
    for option in [*CHOICES, *config.BUNDLES]:
        names = config.presets(option)
        if names:
            rows = [[f"`{name}`", prose(config.summary(option, name))] for name in names]
            parts += [f"## {option}", _make.table(["name", "what"], rows)]
    return "\n\n".join(parts) + "\n"


def page(group: str) -> str:
    """Return the page of a group."""
    what = reference.GROUPS[group]
    parts = [f"# {group}", f"{what[:1].upper()}{what[1:]}."]
    modules: set[str] = set()
    for entry in reference.entries(group):
        parts += [f"## {entry.name}", f"{prose(entry.title)}.", prose(entry.text)]
        if entry.module not in modules:
            parts.append(prose(entry.background))
        modules.add(entry.module)
        if entry.options:
            parts.append(_options([_option(option) for option in entry.options]))
        if entry.example:
            language = "sh" if entry.example.startswith("fedq ") else "yaml"
            parts.append(f"```{language}\n{entry.example}\n```")
        if entry.reference:
            parts.append(f"Source: {prose(entry.reference)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _options(rows: list[list[str]]) -> str:
    return _make.table(["option", "type", "default", "what"], rows)


def _option(option: reference.Option) -> list[str]:
    default = "required" if option.default is None else f"`{option.default}`"
    kinds = ", ".join(f"`{kind}`" for kind in option.type.split("|"))
    return [f"`{option.name}`", kinds, default, prose(option.meaning)]


def prose(text: str) -> str:
    """Return a docstring's text as Markdown: code stays code, all else says what it says."""
    parts = _CODE.split(text)
    parts[::2] = map(_escaped, parts[::2])
    parts[1::2] = (f"`{code.strip('`')}`" for code in parts[1::2])
    return "".join(parts)


def _escaped(text: str) -> str:
    text = re.sub(r" ?::$", ":", text, flags=re.MULTILINE)
    text = _SPECIAL.sub(lambda found: found[0] if found[1] is None else f"\\{found[1]}", text)
    text = _ADDRESS.sub(r"<\g<0>>", text)
    return _ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", text)
