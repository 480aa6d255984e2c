"""What every registered object is, read from the registry and from docstrings.

The pages of ``docs/reference/`` and ``fedq help`` are made of this. The texts are those of the
classes: the ``Args`` of an object, and of the classes it derives from, say what its options mean,
the first line of its module or its ``Reference`` where it comes from.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from fedq import registry
from fedq.errors import unknown
from fedq.experiment import CHOICES, Experiment, field_types

_ROLE = re.compile(r":\w+:`~?\.?([^`]*)`")
_SECTION = re.compile(
    r"^(Args|Attributes|Raises|Returns|Yields|Examples?|References?|Note):\n", re.MULTILINE
)
_ENTRY = re.compile(r"^  (\w[\w, ]*): (.*(?:\n(?:   .*|)$)*)", re.MULTILINE)
#: Options in an example.
_SHOWN = 3
#: How objects are chosen where no option of a run is named after their group, or where it takes
#: more than that; NAME is the object's.
_ROUTES = {
    "activation_quantizer": "fedq simulate quantization=qat quantization.activations=NAME",
    "availability": "fedq simulate fleet=pi_shelf fleet.availability=NAME",
    "budget": "fedq simulate fleet=pi_shelf budget=NAME",
    "device": "fedq simulate fleet=mixture 'fleet.devices=[NAME]' 'fleet.links=[wifi]'",
    "evaluation": "fedq evaluate RUN --suite full --only NAME",
    "evasion": "- {name: evasion, attacks: [apgd, NAME]}",
    "exporter": "fedq export RUN --to NAME",
    "device=measured": "fedq simulate fleet=mixture 'fleet.devices=[{name: measured, path: PATH}]' "
    "'fleet.links=[wifi]'",
    "link": "fedq simulate fleet=mixture 'fleet.devices=[pi_4]' 'fleet.links=[NAME]'",
    "pacing": "fedq simulate fleet=pi_shelf pacing=NAME",
    "privacy=example_gaussian": "fedq simulate quantization=none privacy=NAME",
    "tracker": "fedq simulate 'trackers=[NAME]'",
    "weight_quantizer": "fedq simulate quantization=qat quantization.weights=NAME",
}
#: What the objects of a group are, in one line.
GROUPS = {
    "activation_quantizer": "how activations become integers in quantization-aware training",
    "aggregator": "how the updates of a round become one",
    "attack": "what hostile clients do in training",
    "availability": "when the clients of a simulated fleet can be asked",
    "budget": "how many bits each client's codec has in each round",
    "codec": "how an update becomes bytes; `downlink=` takes the same, for the model",
    "data": "where training and test data come from",
    "device": "how fast a simulated device trains, and what it draws",
    "engine": "what runs the clients of a simulation",
    "evaluation": "a part of the card that `fedq evaluate` makes",
    "evasion": "attacks on the inputs of a trained model, for `fedq evaluate`",
    "exporter": "runtimes of devices, for `fedq export`",
    "fleet": "which devices and links the simulated clients have",
    "guard": "which updates are out of proportion",
    "link": "how long bytes take, and what the radio draws",
    "model": "the network",
    "pacing": "when a round closes, and who is asked meanwhile",
    "partition": "which client has which rows",
    "privacy": "noise on updates, and what it guarantees",
    "quantization": "what the deployed network computes with, and how training knows",
    "secure_aggregation": "what the server learns of each update",
    "server_optimizer": "how the mean update moves the model",
    "task": "what the network learns; a data set says which",
    "tracker": "where else the figures of each round go",
    "weight_quantizer": "how weights become integers in quantization-aware training",
}


@dataclass(frozen=True)
class Option:
    """One option: what a user may write, and what it does.

    Attributes:
      name: As in ``codec.NAME=``.
      type: Such as ``int``, ``codec`` or the values it may take.
      default: As on the command line; None if it must be given.
      meaning: In one or a few lines.
    """

    name: str
    type: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Entry:
    """A registered object.

    Attributes:
      group: Its group.
      name: Its name there.
      title: The first sentence of its module, which cites the source where there is one.
      text: The paragraphs of its docstring.
      background: The other paragraphs of its module.
      options: In order.
      example: A command that chooses it, or a line of a suite.
      reference: Papers and sections; empty if the title says it all, or there are none.
      module: Where it is written.
    """

    group: str
    name: str
    title: str
    text: str
    background: str
    options: tuple[Option, ...]
    example: str
    reference: str
    module: str


def entry(group: str, name: str) -> Entry:
    """Return what is known of a registered object.

    Example:
      >>> found = entry("codec", "top_k")
      >>> [(option.name, option.type, option.default) for option in found.options]
      [('fraction', 'float', '0.01'), ('inner', 'codec', 'fp16')]
      >>> found.example
      'fedq simulate codec=top_k codec.fraction=0.01 codec.inner=fp16'
    """
    cls = registry.lookup(group, name)
    text, sections = _sections(cls)
    return Entry(
        group,
        name,
        title(cls),
        text,
        _module(cls).partition("\n\n")[2],
        tuple(_options(cls)),
        _example(group, cls),
        _joined(sections.get("Reference", sections.get("References", ""))),
        cls.__module__,
    )


def entries(group: str) -> list[Entry]:
    """Return what is known of all objects of a group, by name."""
    return [entry(group, name) for name in registry.available(group)]


def title(cls: type) -> str:
    """Return the first sentence of the module that defines a class: what it is, and whose.

    >>> title(registry.lookup("codec", "ternary"))
    'TernGrad: stochastic rounding to {-s, 0, s} (Wen et al. 2017)'
    """
    return _joined(_module(cls).partition("\n\n")[0]).rstrip(".")


@cache
def run_options() -> tuple[Option, ...]:
    """Return the options of a run that are plain values, in order.

    >>> [(option.default, option.meaning) for option in run_options() if option.name == "rounds"]
    [('30', 'Rounds of federated training.')]
    """
    from fedq import config

    meanings, defaults = _meanings(Experiment), config.compose_config([])
    return tuple(
        Option(name, _type(hint), _value(defaults[name]), meanings.get(name, ""))
        for name, hint in field_types().items()
        if name not in CHOICES
    )


def group_of(option: str) -> str:
    """Return the group that an option of the command line, or a group's own name, stands for.

    >>> group_of("downlink"), group_of("link")
    ('codec', 'link')
    """
    group = CHOICES.get(option, option)
    if group not in registry.GROUPS:
        raise unknown("option", option, {*CHOICES, *registry.GROUPS})
    return group


# --- reading docstrings --------------------------------------------------------------------------


def _module(cls: type) -> str:
    return _doc(inspect.getmodule(cls))


def _sections(cls: type) -> tuple[str, dict[str, str]]:
    """Return the paragraphs of a class's own docstring, and its sections by heading."""
    parts = _SECTION.split(_doc(cls))
    return parts[0].strip(), dict(zip(parts[1::2], parts[2::2], strict=True))


def _meanings(cls: type) -> dict[str, str]:
    """Return what ``Args`` say, the class's own first and then those that it derives from."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        _, sections = _sections(base)
        for heading in ("Args", "Attributes"):
            for names, meaning in _ENTRY.findall(sections.get(heading, "")):
                for name in names.split(", "):
                    found.setdefault(name, _joined(meaning))
    return found


def _joined(text: str) -> str:
    return " ".join(text.split())


def _doc(obj: Any) -> str:
    """Return a docstring, with Sphinx's roles as plain code."""
    return _ROLE.sub(r"``\1``", inspect.cleandoc(obj.__doc__ or ""))


def _options(cls: type) -> Iterator[Option]:
    meanings = _meanings(cls)
    for name, field in registry.fields(cls).items():
        default = None if field.required else _value(field.default)
        yield Option(name, _type(field.type), default, meanings.get(name, ""))


def _type(hint: Any) -> str:
    """Return a type as a user would say it.

    >>> _type(Literal["a", "b"]), _type(float | None), _type(tuple[int, ...])
    ('a|b', 'float or null', 'list of int')
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(_value(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type(args[0])}"
    if args:
        return " or ".join("null" if arg is type(None) else _type(arg) for arg in args)
    return str(getattr(hint, "group", getattr(hint, "__name__", hint)))


def _value(value: Any) -> str:
    """Return a value as the command line has it."""
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return value or "''"
    if isinstance(value, float) and value >= 1e6:
        return f"{value:g}"
    return registry.describe(value)


# --- examples ------------------------------------------------------------------------------------


def _example(group: str, cls: Any) -> str:
    """Return a command that chooses an object, with the options that are its first to turn."""
    if group == "task":
        return ""
    option = next((key for key, value in CHOICES.items() if value == group), "")
    route = f"fedq simulate {option}=NAME"
    route = _ROUTES.get(f"{group}={cls.name}", _ROUTES.get(group, route))
    command = route.replace("NAME", cls.name).replace("[apgd, apgd]", "[apgd]")
    key = re.search(r"([\w.]+)=NAME$", route)
    if key is None:
        return command
    return " ".join([command, *list(_overrides(key[1], cls))[:_SHOWN]])


def _overrides(key: str, cls: Any) -> Iterator[str]:
    """Yield options at their defaults; where there is none, as in the class's first example."""
    given: Mapping[str, Any] = next((e for e in getattr(cls, "examples", ()) if e), {})
    for name, field in registry.fields(cls).items():
        value = given.get(name) if field.default is None else field.default
        if value is None and (field.required or name == "path"):
            value = name.upper()
        text = _value(value).replace(", ", ",")
        if value and "(" not in text:  # neither off nor empty, nor long
            shown = "name" if name == getattr(cls, "name_option", None) else name
            yield f"'{key}.{shown}={text}'" if "[" in text else f"{key}.{shown}={text}"
