"""The blocks of the documents are true: commands are accepted, quick ones run, files are quoted.

Every line of ``fedq`` goes through the real command, with a small finished run for RUN. What takes
long is stopped at the door of its work, when each option has been parsed, composed and checked. A
comment before a block, which no reader sees, says more:

* ``<!-- runs: -->``: nothing is stopped, federations are small;
* ``<!-- not run: WHY -->``: skipped, and pytest lists why;
* ``<!-- file: PATH -->``: the block is that file;
* ``<!-- before: PYTHON -->``: what a fragment of Python takes for granted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import shutil
import signal
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedq import cli, config, registry

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
BLOCK = re.compile(
    r"(?:^<!-- (runs|not run|file|before):\s(.*?)-->\n)?^```(\w*)\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
CI = {".ci/run", "mypy", "pytest", "ruff"}
#: What makes a run quick; what a line says itself comes after it.
SMALL = ("data=digits", "rounds=1", "clients=10", "baseline=false", "engine.workers=1")
#: Where work begins that takes long.
DOORS = (
    "fedq.allocate.allocate",
    "fedq.codec_report.survey",
    "fedq.evaluate.Work",
    "fedq.export._release.release",
    "fedq.jit.warm_up",
    "fedq.optimize.search",
    "fedq.personalise.personalise",
    "fedq.simulation.simulate",
    "fedq.sweep.run",
    "fedq.watch.serving",
)


@dataclass(frozen=True)
class Block:
    path: Path
    line: int
    note: str
    said: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPOSITORY)}:{self.line}"


def blocks(*languages: str) -> Any:
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(3)) + 1
            block = Block(path, line, match[1] or "", match[2] or "", match[3], match[4])
            if block.language in languages:
                found.append(block)
    return pytest.mark.parametrize("block", found, ids=str)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a shell block, as words, without what they set and where they write."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(
            re.sub(r"^([A-Z_]+=\S+ +)+", "", line), posix=True, punctuation_chars="&|;<>"
        )
        lexer.whitespace_split = True
        for word in lexer:
            if word in ("&&", "|", ";"):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words[: words.index(">")] if ">" in words else words


class Reached(BaseException):
    """The command has come to its work, so its options are in order."""


def stop(*_: Any, **__: Any) -> None:
    raise Reached


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one round."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    assert cli.main(["simulate", *SMALL, "baseline=true", f"run_dir={folder}"]) == 0
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to be in, and the signal handlers as they were afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("pi.json").write_text('{"training_macs_s": 1e9}')  # as `fedq fleet bench` writes it
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@blocks("sh", "bash")
def test_commands(
    block: Block,
    run: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if block.note == "not run":
        pytest.skip(block.said)
    if block.note != "runs":
        for door in DOORS:
            monkeypatch.setattr(door, stop)
    printed = ""
    for words in commands(block.text):
        if words[0] == "fedq":
            check_fedq([printed if word == "PUBLIC" else word for word in words[1:]], run)
            printed = capsys.readouterr().out.strip()
        elif words[0] == "pip":
            check_pip(words)
        elif words[0].startswith("python"):
            check_python(words[1:])
        elif words[0] == "flwr":
            config.load(" ".join(re.findall(r'hydra="(.*)"', " ".join(words))).split())
        elif words[0] in CI:
            continue  # what CI runs itself
        else:
            pytest.fail(
                f"nothing checks '{words[0]}'; <!-- not run: WHY --> before it leaves it out"
            )


def check_fedq(words: list[str], run: Path) -> None:
    """The command takes the line, and does it, or comes to its door."""
    words = [word.lstrip("/") for word in words]  # nothing outside of this directory
    for word in words:
        place = Path(word.removeprefix("resume="))
        if re.fullmatch(r"RUN|runs/[\w.-]+", str(place)) and not place.exists():
            shutil.copytree(run, place)
    if words[-1] == "runs/*":
        shutil.copytree(run, "runs/a")
        words[-1] = "runs/a"
    if words[0] == "fleet":
        check_fleet(words)
        return
    with contextlib.suppress(Reached):
        assert cli.main(small(words) if words[0] == "simulate" else words) == 0, words


def check_fleet(words: list[str]) -> None:
    """The command takes the line, and a run can be configured; tests/fleet does the rest."""
    options, rest = cli._parser().parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")]
    config.load([*getattr(options, "overrides", []), *rest])


def small(words: list[str]) -> list[str]:
    """Return a line with what makes it small, where it does not say otherwise."""
    keys = {word.partition("=")[0] for word in words}
    if "resume" in keys:
        return words
    if keys & {"experiment", "task"}:
        keys.add("data")
    return [words[0], *(text for text in SMALL if text.partition("=")[0] not in keys), *words[1:]]


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_commands_in_sentences_are_taken(path: Path) -> None:
    """`fedq COMMAND ARGUMENTS` in running text is parsed; a command's bare name is only named."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`fedq ([^`]+)`", text):
        words = ["1" if word == "N" else word for word in shlex.split(span)]
        if len(words) > 1 and "--help" not in words:
            _, rest = cli._parser().parse_known_args(words)
            assert not [word for word in rest if word.startswith("-")], span


def check_pip(words: list[str]) -> None:
    """Extras are there."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:fedq|\.)\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras


def check_python(words: list[str]) -> None:
    """What is run is there."""
    if words[0] != "-m":
        assert (REPOSITORY / words[0]).exists(), words[0]
    elif words[1] != "venv":
        assert importlib.util.find_spec(words[1]), words[1]


def check_file(block: Block) -> None:
    assert block.text == (REPOSITORY / block.said.strip()).read_text()


@blocks("python")
def test_fragments_of_python_run(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions are those of tests/test_docs.py; this runs what has no prompt."""
    if block.note == "file":
        check_file(block)
        return
    if ">>>" in block.text:
        return
    if block.note == "not run":
        compile(block.text, str(block), "exec")
        pytest.skip(block.said)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        registry, "_TABLES", {group: dict(registry.table(group)) for group in registry.GROUPS}
    )  # what a block registers is gone afterwards
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(block.said if block.note == "before" else "", names)
    exec(compile(block.text, str(block), "exec"), names)


@blocks("yaml")
def test_yaml_is_a_file_s_or_a_suite(block: Block, tmp_path: Path) -> None:
    if block.note == "file":
        check_file(block)
        return
    file = tmp_path / "suite.yaml"
    file.write_text(block.text)
    assert config.suite(str(file))


def test_ci_runs_what_it_is_said_to_run() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert all(name in script for name in CI - {".ci/run"})


def test_every_language_has_a_check() -> None:
    known = {"sh", "bash", "python", "yaml", "text", ""}
    for path in DOCUMENTS:
        assert {match[3] for match in BLOCK.finditer(path.read_text())} <= known, path
