"""The ``fedq`` command."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import fedq
from fedq.errors import ConfigError, FedqError
from fedq.fleet import cli as fleet_cli

if TYPE_CHECKING:
    from fedq.experiment import Experiment

USE, FAILURE, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 for failure, 2 for wrong use.

    No peer, file or option causes a traceback: what fedq did not foresee is one line, too, with the
    details in a file.
    """
    parser = _parser()
    try:
        options, rest = parser.parse_known_args(arguments)
        run: Callable[[argparse.Namespace, list[str]], int] = options.run
        return run(options, rest)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except ConfigError as error:
        _complain(str(error))
        return USE
    except FedqError as error:
        _complain(str(error))
        return FAILURE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except OSError as error:
        _complain(" ".join(str(error).split()))
        return FAILURE
    except Exception as error:
        if os.environ.get("FEDQ_DEBUG"):
            raise
        with tempfile.NamedTemporaryFile(
            "w", prefix="fedq-error-", suffix=".log", delete=False
        ) as file:
            traceback.print_exc(file=file)
        _complain(
            f"{type(error).__name__}: {' '.join(str(error).split())} "
            f"(this is a bug in fedq; the details are in {file.name})"
        )
        return FAILURE


def _complain(text: str) -> None:
    print(f"fedq: {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedq",
        description="Federated learning with quantized updates for IoT fleets.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedq {fedq.__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )

    simulate = commands.add_parser(
        "simulate",
        help="train a federated quantized model with simulated clients (the main job)",
        description="Train a federated quantized model with simulated clients. Without options: "
        "50 clients, MNIST-5k, int8 QAT, dithered uplink, and float FedAvg beside it.",
        allow_abbrev=False,
    )
    simulate.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="run every combination of comma-separated values, and the studies of conf/experiment",
    )
    simulate.add_argument(
        "--jobs", type=int, metavar="N", help="with -m: runs at a time (default: as cores allow)"
    )
    simulate.add_argument(
        "--keep-going",
        action="store_true",
        help="with -m: leave out combinations that make no experiment, and run the others",
    )
    simulate.add_argument("overrides", nargs="*", metavar="OPTION=VALUE")
    simulate.set_defaults(run=_simulate)

    codecs = commands.add_parser(
        "codecs",
        help="every codec on a real update: bytes, error, bias, speed",
        description="Measure codecs on one client's real update, beside the Gaussian limits; write "
        "a table, a picture and JSON.",
        epilog="examples: fedq codecs --model mnist_cnn    "
        "fedq codecs --codec uniform,'top_k fraction=0.1 inner=sign'",
        allow_abbrev=False,
    )
    codecs.add_argument(
        "--model", default="small_cnn", help="whose update, as NAME or 'NAME OPTION=VALUE ...'"
    )
    codecs.add_argument(
        "--codec",
        action="append",
        default=[],
        metavar="CODEC[,CODEC...]",
        help="these alone, each as NAME or 'NAME OPTION=VALUE ...'",
    )
    codecs.add_argument("--all", action="store_true", help="all examples of each codec, not two")
    codecs.add_argument("--plugin", action="append", default=[], metavar="FILE.py")
    codecs.add_argument("--seed", type=int, default=0, help="of the update (default: 0)")
    codecs.add_argument(
        "--seconds",
        type=float,
        default=40.0,
        help="for all codecs together (default: 40); fewer seeds are tried if they do not suffice",
    )
    codecs.add_argument(
        "--json", action="store_true", help="machine-readable; no files but --out's"
    )
    codecs.add_argument("--out", type=Path, help="directory of picture and JSON (default: codecs)")
    codecs.set_defaults(run=_codecs)

    allocate = commands.add_parser(
        "allocate",
        help="bits per layer of a run's model, under a budget",
        description="Measure how much loss each layer adds at each width, and choose the widths of "
        "least loss within a budget; write a picture and JSON beside the run.",
        allow_abbrev=False,
    )
    allocate.add_argument("folder", type=Path, metavar="RUN")
    allocate.add_argument(
        "--bits",
        type=float,
        default=4.0,
        help="the budget, as what this width of all layers costs (default: 4)",
    )
    allocate.add_argument(
        "--cost",
        default="size",
        choices=("size", "energy", "latency"),
        help="what the budget is of: bytes, joules by a table of operations, or cycles of a "
        "bit-serial unit (default: size)",
    )
    allocate.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="TRIALS",
        help="search with Optuna, too, by the loss of all layers together (default: 0, no search)",
    )
    allocate.add_argument(
        "--weights",
        default="linear range=mse",
        help="scheme, as NAME or 'NAME OPTION=VALUE ...' (default: linear range=mse)",
    )
    allocate.add_argument(
        "--costs", type=Path, metavar="FILE.json", help="cost by layer and width, such as joules"
    )
    allocate.add_argument("--budget", type=float, help="in the unit of --cost or --costs")
    allocate.add_argument("--seed", type=int, default=0, help="of the examples (default: 0)")
    allocate.add_argument("--json", action="store_true", help="machine-readable; no files")
    allocate.set_defaults(run=_allocate)

    personalise = commands.add_parser(
        "personalise",
        help="what clients of a run gain by models of their own",
        description="Fine-tune a simulated run's model for each of its clients, and compare: the "
        "shared model, with the layers that clients kept for themselves, and fine-tuned. Writes "
        "personal.json beside the run.",
        allow_abbrev=False,
    )
    personalise.add_argument("folder", type=Path, metavar="RUN")
    personalise.add_argument("--epochs", type=int, default=1, help="of fine-tuning (default: 1)")
    personalise.add_argument("--learning-rate", type=float, help="default: the run's")
    personalise.add_argument("--json", action="store_true", help="machine-readable; no files")
    personalise.set_defaults(run=_personalise)

    export = commands.add_parser(
        "export",
        help="write a run's model for a device's runtime, and check it there",
        description="Write a run's quantized model for a device's runtime. The file is executed on "
        "the test set, and released only if it computes what was trained, in integers.",
        epilog="examples: fedq export runs/mine --to litert    "
        "fedq export runs/float_run --to onnx,c --calibrate 500",
        allow_abbrev=False,
    )
    export.add_argument("directory", type=Path, metavar="RUN")
    export.add_argument(
        "--to",
        required=True,
        metavar="NAME[,NAME...]",
        help="runtimes, as listed below",
    )
    export.add_argument(
        "--out",
        type=Path,
        help="directory (default: RUN/export, RUN/export/WIDTH with --width); one per runtime",
    )
    export.add_argument(
        "--quantization",
        help="post-training quantization, as NAME or 'NAME OPTION=VALUE ...' (default: the run's "
        "own, int8 for a float run)",
    )
    export.add_argument(
        "--calibrate",
        type=int,
        metavar="N",
        help="take activation ranges from N training examples (default: the run's own ranges, or "
        "512 examples if it has none)",
    )
    export.add_argument(
        "--width",
        metavar="NAME",
        help="of a run with clients of several widths, such as w4 (default: the first)",
    )
    export.add_argument(
        "--factorise",
        type=float,
        metavar="ENERGY",
        help="replace layers by products of thin ones that keep this share of each weight's "
        "squared norm, such as 0.9, where that saves parameters; refused if the file does not "
        "become smaller",
    )
    export.add_argument(
        "--steps",
        type=int,
        default=1,
        metavar="N",
        help="largest difference of a logit that passes, in output steps (default: 1); roundings "
        "add up in very deep networks",
    )
    export.add_argument("--json", action="store_true", help="machine-readable")
    export.set_defaults(run=_export)

    evaluate = commands.add_parser(
        "evaluate",
        help="robustness and privacy card of a run",
        description="Attack a run's deployed model, beside its float twin, and write what was "
        "found to card.json and card.html. A killed evaluation goes on where it was. Exit status "
        "1: a promise was broken, or an evaluation could not be carried out.",
        epilog="examples: fedq evaluate runs/mine --suite smoke    "
        "fedq evaluate runs/mine --only evasion,corruption",
        allow_abbrev=False,
    )
    evaluate.add_argument("directory", type=Path, metavar="RUN")
    evaluate.add_argument(
        "--suite",
        default="ci",
        metavar="SUITE",
        help="smoke (a minute), ci (minutes), full, or a FILE.yaml (default: ci)",
    )
    evaluate.add_argument(
        "--only", default="", metavar="NAME[,NAME...]", help="these evaluations of the suite alone"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of all evaluations (default: 0)")
    evaluate.add_argument(
        "--workers", type=int, default=0, help="processes of federations (default: one per core)"
    )
    evaluate.add_argument("--out", type=Path, help="directory (default: RUN/evaluation/SUITE)")
    evaluate.add_argument("--json", action="store_true", help="print card.json")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser(
        "report",
        help="tables, plots and a page over runs",
        description="Compare runs: means and intervals over seeds, Pareto fronts, curves.",
        epilog="examples: fedq report runs/study    fedq report runs/a runs/b --reference QSGD",
        allow_abbrev=False,
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="directory for page, tables and plots")
    report.add_argument(
        "--reference", metavar="METHOD", help="what others are compared with (default: float)"
    )
    report.set_defaults(run=_report)

    watch = commands.add_parser(
        "watch",
        help="a local page that shows a run while it goes on",
        description="Serve a page on this machine that shows a run, or all runs of a sweep, while "
        "they go on: curves, bytes, clients and rejections.",
        epilog="Another machine's: ssh -L 8700:127.0.0.1:8700 HOST",
        allow_abbrev=False,
    )
    watch.add_argument("directory", type=Path, metavar="RUN")
    watch.add_argument("--port", type=int, default=8700, help="default: 8700; 0 is any free one")
    watch.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1; there is no password"
    )
    watch.set_defaults(run=_watch)

    keys = commands.add_parser(
        "keys",
        help="identities of a fleet, for secure aggregation and sealed updates",
        description="Make and list the keys of a fleet. DIR is the authority's, best kept offline; "
        "a device needs keys of its own and what is in DIR/public. With a passphrase in "
        "FEDQ_KEY_PASSPHRASE, secret keys are encrypted at rest.",
        allow_abbrev=False,
    )
    keys.set_defaults(run=_keys)
    actions = keys.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, text, arguments in (
        ("init", "make an authority, a server and an empty roster", []),
        ("device", "on a device: make its keys, and print the public ones", []),
        ("add", "put a device on the roster, or give it new keys", ["CLIENT", "PUBLIC"]),
        ("revoke", "take a device off the roster", ["CLIENT"]),
        ("rotate", "give the server new keys", []),
        ("list", "show the roster", []),
    ):
        parsed = actions.add_parser(action, help=text, description=text, allow_abbrev=False)
        parsed.add_argument("directory", type=Path, metavar="DIR")
        for name in arguments:
            parsed.add_argument(name.lower(), metavar=name)

    explain = commands.add_parser(
        "help",
        help="what an option, or a choice such as codec=dtcq, means",
        description="Explain options: all of them, the choices of one, or one choice with its own "
        "options, an example and its source.",
        epilog="examples: fedq help    fedq help codec    fedq help codec=dtcq    fedq help rounds",
        allow_abbrev=False,
    )
    explain.add_argument("what", nargs="*", metavar="OPTION[=NAME]")
    explain.add_argument("--plugin", action="append", default=[], metavar="FILE.py")
    explain.set_defaults(run=_help)

    doctor = commands.add_parser(
        "doctor", help="check this machine", description="Check this machine.", allow_abbrev=False
    )
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    doctor.add_argument(
        "--compile", action="store_true", help="compile all kernels now, before a device needs them"
    )
    doctor.set_defaults(run=_doctor)

    fleet_cli.add_parser(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Lists the choices below the help of ``simulate`` and ``export``; that imports the classes."""

    def format_help(self) -> str:
        """Return the help, and the choices where there are any."""
        if self.prog.endswith(" export"):
            from fedq.registry import table

            lines = [
                f"  {name:12}{cls.device}\n{'':14}pip install 'fedq[{cls.extra}]'"  # type: ignore[attr-defined]
                for name, cls in table("exporter").items()
            ]
            return "\n".join([super().format_help(), "runtimes:", *lines, ""])
        if not self.prog.endswith(" simulate"):
            return super().format_help()
        from fedq import config
        from fedq.experiment import CHOICES, field_types

        names = [*CHOICES, *config.BUNDLES]
        values = " ".join(f"{key}=" for key in field_types() if key not in CHOICES)
        return "\n".join(
            [
                super().format_help(),
                "choices, whose own options follow a dot, as in codec.bits=4; see fedq help codec:",
                *(f"  {name + '=':18}{', '.join(config.choices(name))}" for name in names),
                "",
                "values:",
                *textwrap.wrap(values, 76, initial_indent="  ", subsequent_indent="  "),
                "",
                "examples:",
                "  fedq simulate codec=uniform codec.bits=3 codec.rounding=stochastic seed=1",
                "  fedq simulate data=npz data.path=mine.npz clients=20 rounds=60",
                "  fedq simulate -m experiment=fedavgm,fedadam seed=0,1,2",
                "  fedq simulate resume=runs/2026-01-31_12-00-00",
                "",
            ]
        )


def _no_flags(rest: list[str]) -> None:
    for text in rest:
        if text.startswith("-"):
            raise ConfigError(f"unknown flag '{text}'; see fedq --help")


def _simulate(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    overrides = [*options.overrides, *rest]
    from fedq import config
    from fedq.sweep import holds_sweep

    resume = config.option(overrides, "resume")
    if options.multirun or (resume is not None and holds_sweep(Path(str(resume)))):
        return _sweep(overrides, options.jobs, keep_going=options.keep_going)
    if options.jobs is not None or options.keep_going:
        raise ConfigError("--jobs and --keep-going are for sweeps; add -m")
    return _simulate_one(overrides)


def _sweep(overrides: list[str], jobs: int | None, *, keep_going: bool) -> int:
    from rich.console import Console

    from fedq import config
    from fedq.report import report
    from fedq.results import default_run_path

    resume = config.option(overrides, "resume")
    given = resume or config.option(overrides, "run_dir") or default_run_path(label="sweep")
    base = Path(str(given))
    rest = [text for text in overrides if not text.startswith(("run_dir=", "resume="))]
    searched = None if resume else config.search(rest)
    requests, invalid = _valid(config.sweep(rest)) if not resume and not searched else ([], [])
    for line in invalid:
        _complain(line)
    if invalid and not (keep_going and requests):
        hint = "; --keep-going runs the others" if requests else ""
        raise ConfigError(f"{len(invalid)} of these runs make no experiment{hint}")

    from fedq import optimize, progress, sweep

    console = Console()
    progress.log_to(console)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a service manager, a closed terminal
        signal.signal(number, signal.default_int_handler)
    try:
        if searched:
            with progress.cells(console, searched.trials) as display:
                ended = optimize.search(base, searched, display, jobs=jobs)
        else:
            cells = sweep.planned(base, rest) if resume else sweep.plan(base, requests)
            with progress.cells(console, len(cells)) as display:
                ended = sweep.run(base, cells, display, jobs=jobs)
    except KeyboardInterrupt:
        how = (
            f"the same command and run_dir={base}"
            if searched
            else f"fedq simulate -m resume={base}"
        )
        _complain(f"interrupted; continue with {how}")
        return INTERRUPTED
    failed = [end for end in ended if end.error is not None]
    for end in failed:
        _complain(f"{end.cell.path}: {end.error}")
    if len(failed) < len(ended):
        console.print(report([base]))
    console.print(f"results in {base}", soft_wrap=True, highlight=False)
    return FAILURE if failed or invalid else 0


def _valid(requests: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Return the runs that can be configured, and what is wrong with the others."""
    from fedq import config

    valid: list[list[str]] = []
    wrong: dict[str, None] = {}
    for request in requests:
        try:
            config.load(request)
            valid.append(request)
        except ConfigError as error:
            wrong[f"{' '.join(request)}: {error}"] = None
    return valid, list(wrong)


def _simulate_one(overrides: list[str]) -> int:
    from rich.console import Console

    from fedq import config, progress
    from fedq.report import report
    from fedq.results import default_run_path, read_config

    resume = config.option(overrides, "resume")
    experiment: Experiment
    if resume is None:
        experiment = config.load(overrides)
        if experiment.run_dir is None:
            experiment = experiment.replace(run_dir=str(default_run_path()))
    else:
        experiment = config.load_resumed(read_config(Path(str(resume))), overrides)
        experiment = experiment.replace(run_dir=str(resume))
    baseline = config.baseline_of(experiment) if experiment.baseline else None

    from fedq import simulation

    console = Console()
    progress.log_to(console)
    path = Path(str(experiment.run_dir))
    for number in (signal.SIGTERM, signal.SIGHUP):  # a service manager, a closed terminal
        signal.signal(number, signal.default_int_handler)
    try:
        simulation.simulate(
            experiment,
            baseline,
            resume=resume is not None,
            watch=progress.watch(console),
            overrides=overrides,
        )
    except KeyboardInterrupt:
        _complain(f"interrupted; continue with: fedq simulate {shlex.quote(f'resume={path}')}")
        return INTERRUPTED
    console.print(report([path]))
    console.print(f"results in {path}", soft_wrap=True, highlight=False)
    return 0


def _codecs(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    if rest:
        raise ConfigError(f"cannot use '{rest[0]}'; see fedq codecs --help")
    if not options.seconds > 0:
        raise ConfigError(f"--seconds must be positive, not {options.seconds:g}")
    from rich.console import Console

    from fedq import codec_report, config, progress
    from fedq.report import codecs

    config.load_plugins(options.plugin)
    specs = [spec for text in options.codec for spec in text.split(",")]
    chosen = [config.choice("codec", spec) for spec in specs]
    chosen = chosen or list(codec_report.examples(every=options.all))
    model = config.choice("model", options.model)

    import torch

    torch.set_num_threads(1)  # the update is a function of the seed
    with progress.steps(Console(stderr=True)) as watch:
        survey = codec_report.survey(
            model, chosen, seed=options.seed, seconds=options.seconds, watch=watch
        )
    folder = options.out or (None if options.json else Path("codecs"))
    written = [] if folder is None else codecs.write(survey, folder)
    if options.json:
        print(codecs.to_json(survey))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(codecs.codec_table(survey))
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    if rest:
        raise ConfigError(f"cannot use '{rest[0]}'; see fedq export --help")
    from rich.console import Console

    from fedq import config, progress, registry
    from fedq.report import exports
    from fedq.results import read_config, read_model

    exporters = [registry.build("exporter", name) for name in options.to.split(",")]
    experiment = config.load_resumed(read_config(options.directory), [])
    tensors, _ = read_model(options.directory)
    quantization = experiment.quantization
    if options.quantization or quantization.name == "none":
        quantization = config.choice("quantization", options.quantization or "int8")

    for exporter in exporters:  # what is not installed must not wait for the others
        exporter.check()
    console = Console()
    progress.log_to(console)
    from fedq.export._release import release
    from fedq.export._source import source

    network = source(
        experiment, tensors, quantization, options.calibrate, options.width, options.factorise
    )
    folder = options.out or options.directory / "export" / (options.width or "")
    released = []
    for exporter in exporters:
        with progress.steps(Console(stderr=True)) as watch:
            released.append(
                release(network, exporter, folder / exporter.name, watch, options.steps)
            )
    if options.json:
        print(exports.to_json(released))
        return 0
    console.print(exports.table(released))
    for item in released:
        if (factored := exports.factored(item.report)) is not None:
            console.print(factored, soft_wrap=True, highlight=False)
        console.print(f"wrote {item.path}", soft_wrap=True, highlight=False)
    return 0


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    if rest:
        raise ConfigError(f"cannot use '{rest[0]}'; see fedq evaluate --help")
    from rich.console import Console

    from fedq import evaluate, progress
    from fedq.report import card as pages

    console = Console(stderr=True)
    progress.log_to(console)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with progress.steps(console) as watch:
            card, folder = evaluate.evaluate(
                options.directory,
                options.suite,
                only=[name for name in options.only.split(",") if name],
                seed=options.seed,
                workers=options.workers,
                out=options.out,
                watch=watch,
            )
    except KeyboardInterrupt:
        _complain("interrupted; the same command goes on where it was")
        return INTERRUPTED
    if options.json:
        print(card.text(), end="")
    else:
        Console(width=None if sys.stdout.isatty() else 100).print(pages.table(card))
        print(f"wrote {folder / pages.PAGE}")
    return FAILURE if card.broken else 0


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    from rich.console import Console

    from fedq.report import report

    Console().print(report(options.runs, options.out, options.reference))
    return 0


def _watch(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    from fedq.watch import serving

    with serving(options.directory, options.host, options.port) as address:
        print(f"{options.directory} is shown at {address} until Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


def _help(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    from fedq import config
    from fedq import help as texts

    config.load_plugins(options.plugin)
    print("\n\n".join(texts.explain(what) for what in options.what) or texts.overview())
    return 0


def _keys(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    if rest:
        raise ConfigError(f"cannot use '{rest[0]}'; see fedq keys --help")
    from fedq.keys import Fleet, PublicKeys, make_device

    if options.action == "device":
        print(make_device(options.directory))
        return 0
    if options.action == "init":
        Fleet.init(options.directory)
        print(f"keep {options.directory}/authority offline; put {options.directory}/server on the")
        print(f"server (keys=DIR), and the files of {options.directory}/public on every device")
        return 0
    fleet = Fleet(options.directory)
    if options.action == "rotate":
        fleet.rotate_server()
    elif options.action in ("add", "revoke"):
        if not options.client.isdecimal():
            raise ConfigError(f"CLIENT is a device's number (partition-id), not {options.client}")
        if options.action == "add":
            fleet.add(int(options.client), PublicKeys.parse(options.public))
        else:
            fleet.revoke(int(options.client))
    roster = fleet.roster
    print(f"roster {roster.version}: copy {options.directory}/public/roster.json to all")
    print(f"  server  {str(roster.server)[:16]}")
    for client, keys in sorted(roster.devices.items()):
        print(f"  {client:6}  {str(keys)[:16]}{'  revoked' if client in roster.revoked else ''}")
    return 0


def _allocate(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    from rich.console import Console

    from fedq import config
    from fedq.allocate import allocate
    from fedq.report import allocation

    name, *more = options.weights.split()
    overrides = [f"quantization.weights={name}", *(f"quantization.weights.{o}" for o in more)]
    scheme = config.load(["quantization=qat", *overrides]).quantization.weights
    found = allocate(
        options.folder,
        bits=options.bits,
        scheme=scheme,
        cost=options.cost,
        costs=options.costs,
        budget=options.budget,
        search=options.search,
        seed=options.seed,
    )
    if options.json:
        print(found.to_json())
        return 0
    console = Console()
    console.print(allocation.render(found))
    console.print(f"{found.chosen.cost:,.0f} of {found.budget:,.0f} {found.unit}", highlight=False)
    if found.searched is not None:
        losses = ", ".join(f"{whose} {loss:.4g}" for whose, loss in found.joint.items())
        console.print(f"loss that all layers together add: {losses}", highlight=False)
    picture = options.folder / "allocation.png"
    allocation.draw(found, picture)
    picture.with_suffix(".json").write_text(found.to_json() + "\n")
    print(f"wrote {picture}\nfedq simulate {found.override}")
    return 0


def _personalise(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    from rich.console import Console

    from fedq import progress
    from fedq.personalise import FILE, personalise

    with progress.steps(Console(stderr=True)) as say:
        found = personalise(
            options.folder, epochs=options.epochs, learning_rate=options.learning_rate, say=say
        )
    if options.json:
        print(found.to_json())
        return 0
    print(f"{len(found.clients)} clients, accuracy in their own mixture of classes")
    for which in ("shared", "own", "tuned"):
        mean, worst = 100 * found.mean(which), 100 * found.worst(which)
        print(f"{which:8} mean {mean:5.1f} %   worst tenth {worst:5.1f} %")
    (options.folder / FILE).write_text(found.to_json() + "\n")
    print(f"wrote {options.folder / FILE}")
    return 0


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    _no_flags(rest)
    from rich.console import Console

    from fedq import doctor

    if options.compile:
        from fedq import jit

        jit.warm_up()
    checks = doctor.check()
    if options.json:
        print(doctor.to_json(checks))
    else:
        Console().print(doctor.render(checks))
    return FAILURE if any(check.status == "fail" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
