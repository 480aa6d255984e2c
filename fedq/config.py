"""Command-line overrides -> an experiment: the one module that knows Hydra.

Hydra composes the choices (``conf/``, registered names, experiments, sweeps); the registry checks
every name, type and range, so that YAML, command line, wire and tests share one validation.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedq import registry
from fedq.errors import ConfigError, unknown
from fedq.experiment import CHOICES, COMPRESSION, Experiment, field_types

_PLAIN = re.compile(r"[\w./,:+@-]*", re.ASCII)  # commas: several values of a sweep
#: Choices of ``conf/`` that set any number of options, in the order in which they apply.
BUNDLES = ("task", "method", "experiment")
#: Hydra's own options that mean something here.
_SWEEPER = "hydra.sweeper", "hydra/sweeper"
#: Options that a resumed run may change: they do not alter what was already computed.
RESUMABLE = {
    "rounds",
    "engine",
    "baseline",
    "round_deadline_s",
    "decode_threads",
    "server_memory_gb",
    "trackers",
}


def conf_directory() -> Path:
    """Return the choices' directory: in the package (wheel) or beside it (checkout)."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError("the configuration files are missing; reinstall fedq")


def choices(option: str) -> list[str]:
    """Return the names an option accepts: registered names and the presets in ``conf/``."""
    registered = set(registry.names(CHOICES[option])) if option in CHOICES else set()
    return sorted({*presets(option)} | registered)


def presets(option: str) -> list[str]:
    """Return the names of an option's files in ``conf/``."""
    return sorted(path.stem for path in (conf_directory() / option).glob("*.yaml"))


def preset(option: str, name: str) -> str:
    """Return the text of a file in ``conf/``."""
    if name not in presets(option):
        raise unknown(option, name, presets(option))
    return (conf_directory() / option / f"{name}.yaml").read_text(encoding="utf-8")


def summary(option: str, name: str) -> str:
    """Return the comment at the head of a file in ``conf/``.

    >>> summary("experiment", "fedadam")
    'FedAdam (Reddi et al. 2021).'
    """
    head = itertools.takewhile(lambda line: line[:1] == "#", preset(option, name).splitlines())
    return " ".join(line.strip("# ") for line in head if "@package" not in line)


@cache
def _store_registered() -> None:
    store = ConfigStore.instance()
    for option, group in CHOICES.items():
        for name in set(registry.available(group)) - {*presets(option)}:
            store.store(group=option, name=name, node={"name": name})
    store.store(group="hydra/sweeper", name="optuna", node={"params": {}, "n_trials": 20})


def load_plugins(paths: Iterable[str]) -> None:
    """Import the user's own Python files, so that what they register can be chosen by name."""
    for path in paths:
        file = Path(path).expanduser().resolve()
        name = f"fedq_plugin_{file.stem}"
        if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(file):
            continue
        spec = importlib.util.spec_from_file_location(name, file)
        if file.suffix != ".py" or not file.is_file() or spec is None or spec.loader is None:
            raise ConfigError(f"plug-in {path} is not a Python file; give plugins=[FILE.py]")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ConfigError(f"plug-in {path} fails: {type(error).__name__}: {error}") from error
        _store_registered.cache_clear()
        _compose.cache_clear()


def _quoted(text: str) -> str:
    """Quote a path with spaces and the like, which Hydra's grammar would take apart."""
    key, equals, value = text.partition("=")
    path = key in {"run_dir", "resume", "name"} or key.endswith(".path")
    if not equals or not path or not value or value[0] in "'\"" or _PLAIN.fullmatch(value):
        return text
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for text in overrides:
        try:
            override = _parser().parse_override(_quoted(text))
        except (OverrideParseException, HydraException):
            raise ConfigError(f"cannot read '{text}'; write option=value") from None
        if override.is_delete() or override.is_add() or override.package is not None:
            raise ConfigError(f"cannot use '{text}'; write option=value without + or ~")
        root = override.key_or_group.split(".")[0]
        known = {*field_types(), *BUNDLES}
        if root not in known and not override.key_or_group.startswith(_SWEEPER):
            raise unknown("option", override.key_or_group, known)
        parsed.append(override)
    return parsed


def compose_config(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose ``conf/`` and overrides into plain data for :meth:`Experiment.from_config`."""
    parsed = _parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise ConfigError(f"'{override.input_line}' gives several values; add -m to sweep")
    groups = _groups(parsed)
    config = copy.deepcopy(_compose(*_lines(groups))[0])
    for override in parsed:
        if override not in groups:
            _assign(config, _path(config, override.key_or_group), override.value())
    return config


def _groups(parsed: Iterable[Override]) -> list[Override]:
    """Return what Hydra composes; all else is assigned to what it has composed."""
    groups, parsed = [], list(parsed)
    for override in parsed:
        if override.key_or_group == "plugins":
            load_plugins(registry.convert(override.value(), tuple[str, ...], "plugins"))
    for override in parsed:
        key = override.key_or_group
        if key in CHOICES or key in BUNDLES:
            if override.value() not in choices(key):
                raise unknown(key, override.value(), choices(key))
            groups.append(override)
        elif key.startswith(_SWEEPER):
            groups.append(override)
    return groups


def _lines(overrides: Iterable[Override]) -> list[str]:
    return [str(override.input_line) for override in overrides]


@cache
def _compose(*lines: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration that Hydra composes of group choices, and ``hydra.sweeper``."""
    _store_registered()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            composed = compose("config", list(lines), return_hydra_config=True)
        sweeper = OmegaConf.to_container(composed.hydra.sweeper, resolve=False)
        with open_dict(composed):
            del composed["hydra"]
        config = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration does not compose: {_one_line(error)}") from error
    assert isinstance(config, dict)
    assert isinstance(sweeper, dict)
    return {str(key): value for key, value in config.items()}, {
        str(key): value for key, value in sweeper.items()
    }


def _path(config: Mapping[Any, Any], key: str) -> list[str]:
    """Split a dotted option; ``data.name`` means the field the chosen class declares for it."""
    path = key.split(".")
    if len(path) == 2 and path[1] == "name" and path[0] in CHOICES:
        chosen = config[path[0]]["name"]
        field = getattr(registry.lookup(CHOICES[path[0]], chosen), "name_option", None)
        if field is None:
            raise ConfigError(
                f"{path[0]}={chosen} has no option 'name'; choose with {path[0]}=NAME"
            )
        path[1] = field
    return path


def _assign(config: dict[Any, Any], path: list[str], value: Any) -> None:
    """Set a nested option; a name given for a nested object replaces the whole object."""
    node = config
    for depth, key in enumerate(path[:-1]):
        child = node.get(key)
        if isinstance(child, str):
            child = {"name": child}
        if child is None and depth:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"'{'.'.join(path[: depth + 1])}' has no options to set")
        node[key] = child
        node = child
    node[path[-1]] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def load(overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment that overrides describe.

    Raises:
      ConfigError: On anything unknown, misspelt, ill-typed or out of range.

    Example:
      >>> load(["codec=uniform", "codec.bits=4", "rounds=2"]).codec.bits
      4
    """
    return Experiment.from_config(compose_config(overrides))


def choice(option: str, text: str) -> Any:
    """Return the object that ``NAME OPTION=VALUE ...`` describes, as the option's overrides would.

    Example:
      >>> choice("codec", "uniform bits=4").bits
      4
    """
    try:
        name, *options = shlex.split(text)
    except ValueError:
        raise ConfigError(f"cannot read '{text}'; write NAME or 'NAME OPTION=VALUE ...'") from None
    return getattr(load([f"{option}={name}", *(f"{option}.{item}" for item in options)]), option)


def load_resumed(saved: Mapping[str, Any], overrides: Sequence[str]) -> Experiment:
    """Return the experiment of an interrupted run, with the few options that may still change.

    Options that the run's version of fedq did not have are as they are by default.
    """
    config = dict(saved)
    load_plugins(config.get("plugins", ()))
    if unknown_then := field_types().keys() - config.keys():
        defaults = compose_config([])
        config |= {key: defaults[key] for key in unknown_then}
    for override in _parse(overrides):
        root = override.key_or_group.split(".")[0]
        if root == "resume":
            continue
        if root not in RESUMABLE:
            raise ConfigError(
                f"'{root}' cannot change when resuming; only {', '.join(sorted(RESUMABLE))} can"
            )
        _assign(config, override.key_or_group.split("."), override.value())
    return Experiment.from_config(config)


def baseline_of(experiment: Experiment, name: str = "float_baseline") -> Experiment | None:
    """Return the experiment with what ``conf/experiment/<name>.yaml`` changes changed in it.

    It prunes nothing, and its server distils nothing. None if that leaves it as it is.
    """
    before = experiment.to_config()
    after = before | _changes(name)
    if all(after[key] == before[key] for key in CHOICES):
        return None
    return Experiment.from_config(after)


@cache
def _changes(name: str) -> dict[str, Any]:
    """Return what a baseline has in place of an experiment's own options."""
    plain, named = compose_config([]), compose_config([f"experiment={name}"])
    changed = {key: value for key, value in named.items() if value != plain[key]}
    changed |= {"resume": None, "run_dir": None}
    # As by default: no compression, and no choice of bits, which the experiment may not have.
    return changed | {key: plain[key] for key in (*COMPRESSION, "budget", "width_by")}


def option(overrides: Sequence[str], name: str) -> Any:
    """Return the last value that overrides give to a top-level option, or None."""
    values = [o.value() for o in _parse(overrides) if o.key_or_group == name]
    return values[-1] if values else None


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Expand Hydra's sweep syntax into one list of overrides per run.

    What ``hydra.sweeper.params`` of a chosen experiment, task or method sweeps comes first; an
    option that is given here replaces the one of the same name there.

    Raises:
      ConfigError: On what has no end, such as ``interval()``: that is for ``hydra/sweeper=optuna``.

    >>> sweep(["seed=0,1", "rounds=3"])
    [['seed=0', 'rounds=3'], ['seed=1', 'rounds=3']]
    """
    return [
        [line for line in cell if not line.startswith(_SWEEPER)]
        for given in _grid(_parse(overrides))
        for cell in _grid(_parse([*_studied(given), *given]))
    ]


def _grid(parsed: Sequence[Override]) -> list[list[str]]:
    axes: list[list[str]] = []
    for override in parsed:
        key = override.get_key_element()
        if override.is_sweep_override():
            axes.append([f"{key}={value}" for value in values(override)])
        else:
            axes.append(_lines([override]))
    return [list(cell) for cell in itertools.product(*axes)]


def suite(name: str) -> tuple[str, list[Any]]:
    """Return the name and the evaluations of a suite: one of ``conf/suite/``, or a YAML file.

    A suite is a list of evaluations, each a name or a mapping with a ``name`` and options.

    Raises:
      ConfigError: On a suite, evaluation or option that is unknown, naming the nearest.

    Example:
      >>> suite("smoke")[0]
      'smoke'
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = {path.stem for path in (conf_directory() / "suite").glob("*.yaml")}
        if name not in known:
            raise unknown("suite", name, [*known, "FILE.yaml"])
        path = conf_directory() / "suite" / f"{name}.yaml"
    try:
        listed = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read the suite {path}: {_one_line(error)}") from error
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"the suite {path} must be a list of evaluations, such as '- evasion'")
    return path.stem, [registry.from_config("evaluation", item) for item in listed]


def values(override: Override) -> list[str]:
    """Return the values that an override sweeps, as text."""
    if override.is_interval_sweep():
        raise ConfigError(
            f"'{override.input_line}' has no end of values; add hydra/sweeper=optuna to search it, "
            "or list some"
        )
    value: object = override._value
    if isinstance(value, Glob):
        found = value.filter(choices(override.key_or_group))
        if not found:
            raise ConfigError(f"'{override.input_line}' matches nothing")
        return found
    return list(override.sweep_string_iterator())


def _studied(overrides: Sequence[str]) -> list[str]:
    """Return what ``hydra.sweeper.params`` sweeps beside these overrides."""
    parsed = _parse(overrides)
    given = {override.key_or_group for override in parsed}
    params = _sweeper(parsed).get("params") or {}
    return [f"{key}={_as_text(value)}" for key, value in params.items() if key not in given]


def _as_text(value: Any) -> str:
    """Return a swept value as Hydra's grammar writes it; YAML may have made it a number."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _sweeper(parsed: Sequence[Override]) -> dict[str, Any]:
    """Return ``hydra.sweeper`` as the choices that are not swept compose it."""
    return _compose(*_lines(_groups(o for o in parsed if not o.is_sweep_override())))[1]


def is_study(overrides: Sequence[str]) -> bool:
    """Whether the choices name a study: what ``-m`` would make several runs of."""
    return bool(_sweeper(_parse(overrides)).get("params"))


@dataclass(frozen=True)
class Search:
    """A search with Optuna in place of a grid.

    Attributes:
      fixed: Overrides that all trials have in common.
      space: Overrides that say where to search, in Hydra's grammar.
      trials: How many to run.
      seed: Of the sampler; it is the experiment's.
    """

    fixed: tuple[str, ...]
    space: tuple[Override, ...]
    trials: int
    seed: int


def search(overrides: Sequence[str]) -> Search | None:
    """Return the search that ``hydra/sweeper=optuna`` asks for, None for a grid."""
    parsed = _parse(overrides)
    sweeper = _sweeper(parsed)
    if "n_trials" not in sweeper:
        return None
    trials = sweeper["n_trials"]
    if not isinstance(trials, int) or trials < 1:
        raise ConfigError(f"hydra.sweeper.n_trials must be at least 1, not {trials}")
    every = _parse([*_studied(overrides), *overrides])
    space = tuple(o for o in every if o.is_sweep_override())
    if not space:
        raise ConfigError("hydra/sweeper=optuna has nothing to search; sweep an option")
    fixed = [o for o in every if not o.is_sweep_override()]
    seeds = [o.value() for o in fixed if o.key_or_group == "seed"]
    lines = tuple(line for line in _lines(fixed) if not line.startswith(_SWEEPER))
    return Search(lines, space, trials, int([0, *seeds][-1]))  # type: ignore[arg-type]
