"""Names to frozen dataclasses, and the one way to build them.

A registered object is its configuration: constructor arguments, YAML, command line and the bytes on
the wire all name the same fields. Only registered names can be built, never an import path. This
module is pure Python: no Hydra, no Flower, no torch.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, TypeVar, dataclass_transform

from fedq.errors import ConfigError, unknown

T = TypeVar("T")

#: Every group and the package (or module) that registers into it: one new file there is one new
#: name.
GROUPS: dict[str, str] = {
    "activation_quantizer": "fedq.quantization.activations",
    "aggregator": "fedq.aggregators",
    "attack": "fedq.attacks",
    "availability": "fedq.physics.availability",
    "budget": "fedq.budgets",
    "codec": "fedq.codecs",
    "data": "fedq.data",
    "device": "fedq.physics.devices",
    "engine": "fedq.engines",
    "evaluation": "fedq.robustness",
    "evasion": "fedq.evasion",
    "exporter": "fedq.export",
    "fleet": "fedq.physics.fleets",
    "guard": "fedq.guard",
    "link": "fedq.physics.links",
    "model": "fedq.models",
    "pacing": "fedq.pacing",
    "partition": "fedq.data.partitions",
    "privacy": "fedq.privacy",
    "pruning": "fedq.pruning",
    "quantization": "fedq.quantization",
    "read_out": "fedq.read_outs",
    "secure_aggregation": "fedq.secagg",
    "server_distillation": "fedq.distillation",
    "server_optimizer": "fedq.optimizers",
    "task": "fedq.tasks",
    "topology": "fedq.topologies",
    "tracker": "fedq.trackers",
    "weight_quantizer": "fedq.quantization.weights",
}

_TABLES: dict[str, dict[str, type]] = {group: {} for group in GROUPS}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def register(group: str, name: str) -> Callable[[type[T]], type[T]]:
    """Make a class a frozen, keyword-only dataclass known as ``group=name``."""

    def decorate(cls: type[T]) -> type[T]:
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        if group not in _TABLES:
            raise unknown("group", group, _TABLES)
        old = _TABLES[group].setdefault(name, cls)
        if old is not cls:
            raise ConfigError(f"{group}={name} is already taken by {old.__module__}")
        cls.group, cls.name = group, name  # type: ignore[attr-defined]
        return cls

    return decorate


@cache
def _load(group: str) -> None:
    package = import_module(GROUPS[group])
    for module in iter_modules(getattr(package, "__path__", ()), package.__name__ + "."):
        import_module(module.name)


def table(group: str) -> Mapping[str, type]:
    """Return the registered classes of a group by name, sorted."""
    if group not in _TABLES:
        raise unknown("group", group, _TABLES)
    _load(group)
    return dict(sorted(_TABLES[group].items()))


def available(group: str) -> list[str]:
    """Return the names that :func:`build` accepts for a group.

    >>> "identity" in available("codec")
    True
    """
    return list(table(group))


def names(group: str) -> list[str]:
    """Return what :func:`available` does, as the group's files say it: nothing is imported.

    >>> "resnet8" in names("model")
    True
    """
    if group not in _TABLES:
        raise unknown("group", group, _TABLES)
    return sorted(_written(group) | _TABLES[group].keys())


@cache
def _written(group: str) -> frozenset[str]:
    path = Path(__file__).parent.joinpath(*GROUPS[group].split(".")[1:])
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    pattern = re.compile(rf'^@register\("{group}", "(\w+)"\)$', re.MULTILINE)
    return frozenset(name for file in files for name in pattern.findall(file.read_text("utf-8")))


def lookup(group: str, name: object) -> type:
    """Return the class registered as ``group=name``; :class:`ConfigError` names the nearest one."""
    known = table(group)
    if not isinstance(name, str) or name not in known:
        raise unknown(group, name, known)
    return known[name]


def build(group: str, name: str, /, **options: Any) -> Any:
    """Build a registered object; the only construction path for YAML, the wire and tests.

    Args:
      group: One of :data:`GROUPS`.
      name: A name from :func:`available`.
      **options: Fields of the registered dataclass. A nested object is given as an instance, a
        name, or a mapping ``{"name": ..., **fields}``.

    Raises:
      ConfigError: For an unknown name or option, or a value of the wrong type or range.

    Example:
      >>> build("codec", "identity").name
      'identity'
    """
    return _build(group, name, options, where=group)


def _build(group: str, name: object, options: Mapping[str, Any], where: str) -> Any:
    cls = lookup(group, name)
    known = fields(cls)
    for option in options:
        if option not in known:
            raise unknown(f"option of {where}={name}", option, known)
    missing = [key for key, field in known.items() if field.required and key not in options]
    if missing:
        raise ConfigError(f"{where}={name} needs {', '.join(f'{where}.{key}' for key in missing)}")
    values = {
        key: convert(value, known[key].type, f"{where}.{key}") for key, value in options.items()
    }
    return cls(**values)


def from_config(group: str, config: object, where: str | None = None) -> Any:
    """Build from ``{"name": ..., **fields}`` (JSON or YAML); the inverse of :func:`to_config`.

    ``where`` is what errors call the object: the option that chose it, the group if not given.
    """
    where = where or group
    if isinstance(config, str):
        return _build(group, config, {}, where)
    if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
        raise ConfigError(f"{where} needs a mapping with a 'name', not {config!r}")
    options = {str(key): value for key, value in config.items() if key != "name"}
    return _build(group, config["name"], options, where)


def to_config(obj: Any) -> dict[str, Any]:
    """Return the JSON-ready ``{"name": ..., **fields}`` of a registered object.

    >>> to_config(build("codec", "identity"))
    {'name': 'identity'}
    """
    values = {key: getattr(obj, key) for key in fields(type(obj))}
    return {"name": obj.name} | {key: _plain(value) for key, value in values.items()}


def describe(choice: Any, group: str | None = None) -> str:
    """Return an object in one line: its name and the options that differ from their defaults.

    Args:
      choice: A registered object, or its configuration (see :func:`to_config`); all options of a
        configuration are named whose defaults are unknown.
      group: Of the configuration.

    Example:
      >>> describe(build("codec", "uniform", bits=4))
      'uniform(bits=4)'
      >>> describe({"name": "top_k", "fraction": 0.1, "inner": {"name": "fp16"}}, "codec")
      'top_k(fraction=0.1)'
      >>> describe({"name": "of_a_plugin", "symmetric": False})
      'of_a_plugin(symmetric=false)'
    """
    if is_registered(choice):
        choice, group = to_config(choice), choice.group
    if isinstance(choice, bool):
        return str(choice).lower()
    if isinstance(choice, list | tuple):
        return f"[{', '.join(describe(item, group) for item in choice)}]"
    if not isinstance(choice, Mapping):
        return "" if choice is None else str(choice)
    name = str(choice.get("name", ""))
    known: dict[str, Field] = {}
    if group is not None and name in table(group):
        known = fields(lookup(group, name))
    options = []
    for key, value in choice.items():
        if key == "name" or value is None:
            continue
        field = known.get(key)
        inner = _group_of(field.type) if field else None
        text = describe(value, inner)
        if field is None or field.required or text != describe(_plain(field.default), inner):
            options.append(f"{key}={text}")
    return f"{name}({', '.join(options)})" if options else name


def _group_of(hint: Any) -> str | None:
    """Return the group of a registered type, or of the items of a list of such."""
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return getattr(hint, "group", None)


def is_registered(obj: object) -> bool:
    """Whether ``obj`` is an instance of a registered class."""
    return dataclasses.is_dataclass(obj) and hasattr(type(obj), "group")


@dataclasses.dataclass(frozen=True)
class Field:
    """One option of a registered class: its resolved type and default."""

    name: str
    type: Any
    default: Any
    required: bool


@cache
def _fields(cls: type) -> tuple[Field, ...]:
    hints = typing.get_type_hints(cls)
    result = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default is dataclasses.MISSING
        result.append(Field(field.name, hints[field.name], None if required else default, required))
    return tuple(result)


def fields(cls: type) -> dict[str, Field]:
    """Return the options of a registered class by name, in declaration order."""
    return {field.name: field for field in _fields(cls)}


def _plain(value: Any) -> Any:
    """Return a field's value JSON-ready."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_config(value) if is_registered(value) else value


def convert(value: Any, hint: Any, where: str) -> Any:
    """Check ``value`` against a type hint, strictly: no text becomes a number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        for kind in kinds:
            try:
                return convert(value, kind, where)
            except ConfigError:
                if len(kinds) == 1:
                    raise
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ConfigError(f"{where} must be {names}, not {value!r}")
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        raise unknown(where, value, [str(arg) for arg in args])
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(convert(item, args[0], where) for item in value)
        raise ConfigError(f"{where} must be a list, not {value!r}")
    group = getattr(hint, "group", None)
    if isinstance(group, str):
        return value if isinstance(value, hint) else from_config(group, value, where)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    if hint is Any:
        return value
    raise ConfigError(f"{where} must be {getattr(hint, '__name__', hint)}, not {value!r}")
