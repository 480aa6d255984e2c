"""Names to frozen dataclasses."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pkgutil import iter_modules

import pytest

from fedq import available, build, registry
from fedq.errors import ConfigError
from fedq.registry import GROUPS, describe, from_config, lookup, table, to_config


@pytest.mark.parametrize("group", GROUPS)
def test_groups_hold_frozen_keyword_only_dataclasses(group):
    for name, cls in table(group).items():
        assert (cls.group, cls.name) == (group, name)
        assert cls.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(cls))
        assert cls.__module__.startswith(GROUPS[group]) or not cls.__module__.startswith("fedq.")
        assert lookup(group, name) is cls
    assert available(group) == sorted(available(group))


@pytest.mark.parametrize("group", GROUPS)
def test_names_are_read_without_imports(group):
    assert registry.names(group) == registry.available(group)


def test_every_public_codec_module_registers_a_codec():
    package = import_module(GROUPS["codec"])
    modules = {module.name for module in iter_modules(package.__path__)}
    public = {name for name in modules if not name.startswith("_")} - {"base"}
    assert public == set(available("codec"))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'uniform'"):
        build("codec", "unifrom")
    with pytest.raises(ConfigError, match="did you mean 'bits'"):
        build("codec", "uniform", bit=4)
    with pytest.raises(ConfigError, match="did you mean 'codec'"):
        available("codecs")
    with pytest.raises(ConfigError, match="did you mean 'nearest'"):
        build("codec", "uniform", rounding="neerest")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": "4"},
        {"bits": 4.0},
        {"bits": True},
        {"bits": None},
        {"symmetric": 1},
        {"rounding": 0},
        {"rounding": None},
    ],
)
def test_values_are_not_coerced(options):
    with pytest.raises(ConfigError):
        build("codec", "uniform", **options)


def test_nested_objects_by_instance_name_or_mapping():
    sign = build("codec", "sign")
    for inner in (sign, "sign", {"name": "sign"}):
        assert build("codec", "error_feedback", inner=inner).inner == sign
    with pytest.raises(ConfigError, match=r"needs codec\.inner"):
        build("codec", "error_feedback")
    with pytest.raises(ConfigError):
        build("codec", "error_feedback", inner={"bits": 4})
    with pytest.raises(ConfigError):
        build("codec", "error_feedback", inner=3)


def test_config_round_trip_of_nested_objects():
    codec = build("codec", "error_feedback", inner={"name": "top_k", "fraction": 0.25})
    config = to_config(codec)
    assert config["inner"]["inner"] == {"name": "fp16"}
    assert from_config("codec", config) == codec
    for bad in (None, 3, {}, {"name": 3}, ["uniform"]):
        with pytest.raises(ConfigError):
            from_config("codec", bad)


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match="already taken"):

        @registry.register("codec", "identity")
        class Other:
            pass

    with pytest.raises(ConfigError, match="unknown group"):
        registry.register("nothing", "x")(type("X", (), {}))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("uniform", {}, "uniform"),
        ("uniform", {"bits": 6, "symmetric": False}, "uniform(bits=6, symmetric=false)"),
        ("top_k", {"inner": "fp16"}, "top_k"),
        (
            "error_feedback",
            {"inner": {"name": "uniform", "bits": 6}, "decay": 0.5},
            "error_feedback(inner=uniform(bits=6), decay=0.5)",
        ),
    ],
)
def test_an_object_and_its_configuration_have_one_description(name, options, text):
    codec = build("codec", name, **options)
    assert describe(codec) == describe(to_config(codec), "codec") == text
    assert describe({"name": name, **options}, "codec") == text


def test_unknown_configurations_are_described_in_full():
    config = {"name": "of_a_plugin", "x": 1, "y": None, "inner": {"name": "raw"}}
    for group in ("codec", None):
        assert describe(config, group) == "of_a_plugin(x=1, inner=raw)"
    assert describe("iid", "partition") == "iid"
    assert describe(None) == ""
