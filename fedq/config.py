"""Command-line overrides -> an experiment: the one module that knows Hydra.

Hydra composes the choices (``conf/``, registered names, experiments, sweeps); the registry checks
every name, type and range, so that YAML, command line, wire and tests share one validation.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedq import registry
from fedq.errors import ConfigError, unknown
from fedq.experiment import CHOICES, Experiment, field_types

#: Options that a resumed run may change: they do not alter what was already computed.
_PLAIN = re.compile(r"[\w./,:+@-]*", re.ASCII)  # commas: several values of a sweep
RESUMABLE = {
    "rounds",
    "engine",
    "baseline",
    "round_deadline_s",
    "decode_threads",
    "server_memory_gb",
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
    presets = {path.stem for path in (conf_directory() / option).glob("*.yaml")}
    registered = set(registry.available(CHOICES[option])) if option in CHOICES else set()
    return sorted(presets | registered)


@cache
def _store_registered() -> None:
    store = ConfigStore.instance()
    for option, group in CHOICES.items():
        presets = {path.stem for path in (conf_directory() / option).glob("*.yaml")}
        for name in registry.available(group):
            if name not in presets:
                store.store(group=option, name=name, node={"name": name})


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


def _quoted(text: str) -> str:
    """Quote a path with spaces and the like, which Hydra's grammar would take apart."""
    key, equals, value = text.partition("=")
    path = key in {"run_dir", "resume", "name"} or key.endswith(".path")
    if not equals or not path or not value or value[0] in "'\"" or _PLAIN.fullmatch(value):
        return text
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(_quoted(text))
        except (OverrideParseException, HydraException):
            raise ConfigError(f"cannot read '{text}'; write option=value") from None
        if override.is_delete() or override.is_add() or override.package is not None:
            raise ConfigError(f"cannot use '{text}'; write option=value without + or ~")
        root = override.key_or_group.split(".")[0]
        known = {*field_types(), "experiment"}
        if root not in known:
            raise unknown("option", override.key_or_group, known)
        parsed.append(override)
    return parsed


def compose_config(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose ``conf/`` and overrides into plain data for :meth:`Experiment.from_config`."""
    parsed = _parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise ConfigError(f"'{override.input_line}' gives several values; add -m to sweep")
        if override.key_or_group == "plugins":
            load_plugins(registry.convert(override.value(), tuple[str, ...], "plugins"))
    groups = [o for o in parsed if o.key_or_group in CHOICES or o.key_or_group == "experiment"]
    for override in groups:
        valid = choices(override.key_or_group)
        if override.value() not in valid:
            raise unknown(override.key_or_group, override.value(), valid)
    _store_registered()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            composed = compose("config", [str(o.input_line) for o in groups])
        config = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the configuration does not compose: {_one_line(error)}") from error
    assert isinstance(config, dict)
    for override in parsed:
        if override not in groups:
            _assign(config, _path(config, override.key_or_group), override.value())
    return {str(key): value for key, value in config.items()}


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

    None if that leaves it as it is.
    """
    plain, named = compose_config([]), compose_config([f"experiment={name}"])
    changed = {key: value for key, value in named.items() if value != plain[key]}
    changed |= {"resume": None, "run_dir": None}
    before = experiment.to_config()
    after = before | changed
    if all(after[key] == before[key] for key in CHOICES):
        return None
    return Experiment.from_config(after)


def option(overrides: Sequence[str], name: str) -> Any:
    """Return the last value that overrides give to a top-level option, or None."""
    values = [o.value() for o in _parse(overrides) if o.key_or_group == name]
    return values[-1] if values else None


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Expand Hydra's sweep syntax into one list of overrides per run.

    >>> sweep(["seed=0,1", "rounds=3"])
    [['seed=0', 'rounds=3'], ['seed=1', 'rounds=3']]
    """
    axes: list[list[str]] = []
    for override in _parse(overrides):
        line = str(override.input_line)
        if override.is_sweep_override():
            key = override.get_key_element()
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([line])
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
