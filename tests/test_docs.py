"""The documents say what is so: links lead somewhere, and what looks like a session is one."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedq import available, build, codecs, config, registry
from tests import command

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "docs"))
import _make  # noqa: E402
import make  # noqa: E402
import make_codecs  # noqa: E402

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/README.md", "examples/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OUTSIDE = ("https://", "http://", "mailto:")

every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY))
)


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text()) if kind == language]


def anchors(path: Path) -> set[str]:
    """The fragments that a document's headings answer to, as Git hosts make them."""
    text = BLOCK.sub("", path.read_text())
    return {_make.slug(heading) for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)}


@every_document
def test_links_resolve(path: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", path.read_text())):
        if link.startswith(OUTSIDE):
            continue
        name, _, fragment = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert target.is_relative_to(REPOSITORY), f"{link} leaves the repository"
        if fragment:
            assert fragment in anchors(target), f"{path.name} links to {link}"


@every_document
def test_sessions_run(path: Path) -> None:
    namespace: dict[str, object] = {}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for number, text in enumerate(blocks(path, "python")):
        if ">>>" in text and not text.lstrip().startswith('"""'):
            test = parser.get_doctest(text, namespace, f"{path.name}[{number}]", str(path), 0)
            runner.run(test, clear_globs=False)
            namespace = test.globs
    assert runner.failures == 0


def test_python_compiles() -> None:
    for path in DOCUMENTS:
        for text in blocks(path, "python"):
            if ">>>" not in text:
                compile(text, path.name, "exec")


def test_named_files_exist() -> None:
    """Paths in backticks below a folder of ours are there."""
    named = re.compile(r"`((?:fedq|tests|conf|clients|server|docs|benchmarks)/[\w./-]*)`")
    for path in DOCUMENTS:
        for name in named.findall(path.read_text()):
            assert (REPOSITORY / name).exists(), f"{path.name} names {name}"


# --- the example of CONTRIBUTING.md -------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Path]:
    """The example as a plug-in file; what it registers is forgotten afterwards."""
    (text,) = (b for b in blocks(REPOSITORY / "CONTRIBUTING.md", "python") if "@register" in b)
    path = tmp_path / "stochastic_sign.py"
    path.write_text(text)
    yield path
    registry._TABLES["codec"].pop("stochastic_sign", None)
    sys.modules.pop("fedq_plugin_stochastic_sign", None)


def laws() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "fedq_codec_laws", REPOSITORY / "tests" / "laws" / "test_codec_laws.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_codec_keeps_the_laws(example: Path) -> None:
    assert "stochastic_sign" not in available("codec")
    config.load_plugins([str(example)])
    codec = build("codec", "stochastic_sign")
    law = laws()
    law.test_config_round_trip(codec)
    for layout in law.LAYOUTS:
        law.test_round_trip_shape_and_size(codec, layout)
        law.test_zero_is_exact(codec, layout)
    law.test_same_seed_same_bytes(codec)
    for kind in law.EXTREMES:
        law.test_extremes_stay_finite_and_in_range(codec, kind, 40)
    for kind in law._vectors():
        law.test_unbiased(codec, kind)
    law.test_any_finite_vector_round_trips(codec)
    law.test_truncations_and_extensions(codec)
    law.test_mutated_and_resealed_payloads(codec)
    for scale in law.SCALES:
        law.test_extreme_bodies(codec, scale)
    for scale in (np.nan, np.inf, -1.0):
        body = np.float32(scale).tobytes() + b"\x00"
        with pytest.raises(law.DecodeError):
            codecs.decode(law.reframed(codec, law.Layout.flat(8), body), law.Layout.flat(8))
    module = sys.modules["fedq_plugin_stochastic_sign"]
    assert doctest.testmod(module).attempted == 2
    assert doctest.testmod(module).failed == 0


def test_the_example_runs_as_a_plug_in(example: Path) -> None:
    small = ("data=digits", "rounds=1", "clients=4", "clients_per_round=2", "baseline=false")
    options = (f"plugins=[{example.name}]", "codec=stochastic_sign", "run_dir=run", *small)
    done = command.run("simulate", *options, cwd=example.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads((example.parent / "run" / "summary.json").read_text())
    assert summary["codec"] == "stochastic_sign"
    assert 1 < summary["uplink_bits_per_parameter"] < 1.5


# --- what docs/make.py makes ---------------------------------------------------------------------


@pytest.mark.parametrize("maker", [made.__name__ for made in make.makers("pages")])
def test_what_is_made_is_this_version_s(maker: str) -> None:
    """Tables and the reference say what the registry, docstrings and results files say."""
    for path, text in sys.modules[maker].pages():
        assert path.read_text() == text, f"{path.name}: run python docs/make.py"


def test_the_reference_has_no_page_too_many() -> None:
    pages = {path.stem for path in (REPOSITORY / "docs" / "reference").iterdir()}
    assert pages == {*registry.GROUPS, "README", "run", "presets"}


def test_the_table_has_every_codec() -> None:
    names = re.findall(r"^\| `(\w+)` \|", make_codecs.table(), re.MULTILINE)
    assert names == available("codec")


def test_the_idea_can_be_drawn(tmp_path: Path) -> None:
    make_codecs.idea(tmp_path / "idea.svg")
    assert "<svg" in (tmp_path / "idea.svg").read_text()[:500]


# --- pages name all there is ---------------------------------------------------------------------


def test_the_page_names_every_quantizer() -> None:
    page = (REPOSITORY / "docs" / "quantization.md").read_text()
    for group in ("weight_quantizer", "activation_quantizer"):
        for name in available(group):
            assert re.search(rf"`{name}`|={name}\b", page), name


def test_the_page_of_physics_names_everything() -> None:
    page = (REPOSITORY / "docs" / "physics.md").read_text()
    for group in ("device", "link", "availability", "pacing", "budget"):
        for name in set(available(group)) - {"ideal"}:
            assert re.search(rf"`{name}`|name: {name}\b", page), name


def test_the_page_names_every_method() -> None:
    page = (REPOSITORY / "docs" / "studies.md").read_text()
    for name in config.choices("method"):
        assert f"`{name}`" in page, name
