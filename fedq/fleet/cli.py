"""``fedq fleet``: the commands. Imports are inside, so that ``fedq --help`` does not wait."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedq.errors import ConfigError, FedqError

if TYPE_CHECKING:
    from fedq.doctor import Check
    from fedq.fleet.files import Fleet

FAILURE = 1
_NODE_OPTION = re.compile(r"(?:data(?:-[a-z-]+)?|partition-id|num-partitions|weight-bits)")


def add_parser(commands: Any) -> None:
    """Add ``fleet`` and its commands to the ``fedq`` command."""
    fleet = commands.add_parser(
        "fleet",
        help="real devices: set up, run, watch",
        description="Federated learning on real devices. On the server: init, up, run, status. "
        "On a device: join, node. Everything at once on this machine: demo.",
        allow_abbrev=False,
    )
    inner = fleet.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str,
        run: Callable[[argparse.Namespace], Any],
        help_: str,
        *,
        server: bool = True,
        overrides: bool = False,
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = inner.add_parser(
            name, help=help_, description=help_[0].upper() + help_[1:] + ".", allow_abbrev=False
        )
        if server:
            parser.add_argument(
                "--fleet",
                type=Path,
                default=Path(os.environ.get("FEDQ_FLEET", "fleet")),
                metavar="DIR",
                help="the fleet's directory (default: $FEDQ_FLEET, else ./fleet)",
            )
        parser.add_argument("--json", action="store_true", help="machine-readable")

        def call(options: argparse.Namespace, rest: list[str]) -> int:
            for text in rest:
                if text.startswith("-") or not overrides:
                    raise ConfigError(f"cannot use '{text}'; see fedq fleet {name} --help")
            if overrides:
                options.overrides = [*options.overrides, *rest]
            return int(run(options) or 0)

        parser.set_defaults(run=call)
        if overrides:
            parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE")
        return parser

    init = add("init", _init, "make a fleet: authority, certificate, a key and bundle per device")
    init.add_argument("devices", nargs="*", metavar="DEVICE")
    init.add_argument("--name", default="fleet", help="what the fleet is called")
    init.add_argument("--server", required=True, metavar="HOST", help="as devices reach it")
    init.add_argument("--port", type=int, default=9443, help="for devices (default: 9443)")
    init.add_argument(
        "--control-port", type=int, help="on loopback, for runs (default: the port after --port)"
    )
    init.add_argument("--listen", default="0.0.0.0", help="address to serve devices on")

    more = add("add", _add, "add devices to the fleet")
    more.add_argument("devices", nargs="+", metavar="DEVICE")
    remove = add("remove", _remove, "remove devices: their keys do not count any more")
    remove.add_argument("devices", nargs="+", metavar="DEVICE")
    rotate = add("rotate", _rotate, "make a new certificate (server), or new keys for devices")
    rotate.add_argument("what", nargs="+", metavar="server|DEVICE")

    up = add("up", _up, "start the server")
    up.add_argument("--foreground", action="store_true", help="stay, as a service does")
    add("down", _down, "stop the server; devices wait for it")
    status = add("status", _status, "show the devices and the newest run")
    status.add_argument("--watch", action="store_true", help="go on showing it, until Ctrl-C")
    logs = add("logs", _logs, "show the server's log, or a device's over ssh")
    logs.add_argument("device", nargs="?")
    logs.add_argument("--ssh", metavar="[USER@]HOST", help="where (default: the device's name)")
    logs.add_argument("-n", "--lines", type=int, default=40, help="last lines (default: 40)")

    run = add("run", _run, "train on the devices; options as for fedq simulate", overrides=True)
    run.add_argument(
        "--wait", type=float, default=60.0, metavar="SECONDS", help="for all devices (default: 60)"
    )

    run.add_argument("--min-memory", type=int, metavar="MB", help="devices with less are not asked")
    deploy = add("deploy", _deploy, "export a run's model and have devices run it")
    deploy.add_argument(
        "names", nargs="*", metavar="RUN | DEVICE", help="the run, then devices (default: all)"
    )
    deploy.add_argument("--to", default="litert", help="runtime, as for fedq export")
    deploy.add_argument(
        "--width",
        metavar="NAME",
        help="of a run with clients of several widths, such as w4 (default: each device's own)",
    )
    deploy.add_argument(
        "--rollback", action="store_true", help="no run: what the devices ran before"
    )
    deploy.add_argument(
        "--wait", type=float, default=60.0, metavar="SECONDS", help="for devices (default: 60)"
    )

    join = add("join", _join, "on a device: take in its enrolment bundle", server=False)
    join.add_argument("bundle", type=Path)
    join.add_argument("--into", type=Path, default=_device_directory(), metavar="DIR")
    join.add_argument(
        "--code", help="the enrolment code; without it, it is read from the terminal or stdin"
    )
    join.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of this device: data=npz data-path=/var/lib/fedq/data.npz partition-id=3",
    )
    node = add("node", _node, "on a device: wait for work and do it", server=False)
    node.add_argument("directory", nargs="?", type=Path, default=_device_directory())
    node.add_argument(
        "--check", action="store_true", help="only say whether the server accepts this device"
    )

    doctor = add("doctor", _doctor, "check the fleet, or with --device one device")
    doctor.add_argument(
        "--device",
        type=Path,
        nargs="?",
        const=_device_directory(),
        metavar="DIR",
        help="on a device: check this one",
    )
    enroll = add("enroll", _enroll, "over ssh: install, give a new key, start, report")
    enroll.add_argument("device")
    enroll.add_argument("--ssh", metavar="[USER@]HOST", help="where (default: the device's name)")
    enroll.add_argument("--wheels", type=Path, help="a wheelhouse to install from")
    enroll.add_argument("--node", action="append", default=[], metavar="KEY=VALUE")
    enroll.add_argument("--no-service", action="store_true", help="leave systemd alone")
    upgrade = add("upgrade", _upgrade, "over ssh: install newer software, start again, report")
    upgrade.add_argument("devices", nargs="+", metavar="DEVICE")
    upgrade.add_argument(
        "--ssh", metavar="[USER@]HOST", help="where, of one device (default: the device's name)"
    )
    upgrade.add_argument("--wheels", type=Path, required=True, help="a wheelhouse")

    wheels = add(
        "wheelhouse", _wheelhouse, "download what devices without a network need", server=False
    )
    wheels.add_argument("folder", type=Path)
    wheels.add_argument("--machine", choices=("aarch64", "x86_64"), default="aarch64")
    wheels.add_argument("--python", default="3.11", help="the devices' (default: 3.11)")
    wheels.add_argument(
        "--torch-index", metavar="URL", help="builds of PyTorch for CPUs (default: PyTorch's own)"
    )
    wheels.add_argument(
        "--with",
        dest="packages",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="also this, as installed here: ai-edge-litert, for the models that are deployed",
    )
    wheels.add_argument("--fedq-wheel", type=Path, help="fedq itself (default: built here)")
    bench = add("bench", _bench, "measure what this machine can do as a device", server=False)
    bench.add_argument("--model", default="auto")
    bench.add_argument("--codec", default="dithered")

    demo = add(
        "demo", _demo, "the whole of it on this machine, ports on loopback", server=False,
        overrides=True,
    )  # fmt: skip
    demo.add_argument("--nodes", type=int, default=3, help="devices (default: 3)")


def _device_directory() -> Path:
    return Path(os.environ.get("FEDQ_DEVICE", Path.home() / ".fedq" / "device"))


def _open(options: argparse.Namespace) -> Fleet:
    from fedq.fleet.files import Fleet

    return Fleet.open(options.fleet)


def _tell(options: argparse.Namespace, data: dict[str, Any], *lines: str) -> None:
    print(json.dumps(data) if options.json else "\n".join(lines))


def _log(*, quiet: bool = False) -> None:
    """Send fedq's own log to stderr, a line each; Flower's is not for users."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("fedq")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    for name in ("flwr", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


# --- who takes part ------------------------------------------------------------------------------


def _init(options: argparse.Namespace) -> None:
    from fedq.fleet import units
    from fedq.fleet.files import Fleet, checked_name

    for name in options.devices:
        checked_name(name)
    fleet = Fleet.create(
        options.fleet,
        name=options.name,
        server=options.server,
        port=options.port,
        control_port=options.control_port,
        listen=options.listen,
    )
    fleet.path(units.SUPERLINK).write_text(units.superlink(fleet.root, units.command()))
    _enrol(options, fleet, options.devices)


def _add(options: argparse.Namespace) -> None:
    fleet = _open(options)
    for name in options.devices:
        if name in fleet.devices:
            raise ConfigError(f"{name} is in the fleet; fedq fleet rotate {name} makes a new key")
    _enrol(options, fleet, options.devices)


def _rotate(options: argparse.Namespace) -> None:
    fleet = _open(options)
    devices = [name for name in options.what if name != "server"]
    for name in devices:
        fleet.require(name)
    if len(devices) < len(options.what):
        fleet.renew()
        if not options.json:
            print("new certificate for the server; restart it: fedq fleet down && fedq fleet up")
    _enrol(options, fleet, devices)


def _remove(options: argparse.Namespace) -> None:
    fleet = _open(options)
    for name in options.devices:
        fleet.require(name)
    for name in options.devices:
        fleet = fleet.without_device(name)
    _sync(fleet)
    _tell(options, {"devices": fleet.devices}, f"removed {', '.join(options.devices)}")


def _enrol(options: argparse.Namespace, fleet: Fleet, devices: Sequence[str]) -> None:
    from fedq.fleet.bundle import enrol

    codes = {}
    for name in devices:
        fleet, codes[name] = enrol(fleet, name)
    _sync(fleet)
    data = {
        "fleet": str(fleet.root),
        "server": fleet.device_address,
        "bundles": {name: str(fleet.bundle(name)) for name in codes},
        "codes": codes,
    }
    lines = [f"fleet '{fleet.name}' in {fleet.root}, server {fleet.device_address}"]
    if codes:
        lines += ["", f"{'device':20} {'enrolment code, shown once':32} bundle"]
        lines += [f"{name:20} {code:32} {fleet.bundle(name)}" for name, code in codes.items()]
        lines += ["", "on each device: fedq fleet join BUNDLE, then fedq fleet node"]
    _tell(options, data, *lines)


def _sync(fleet: Fleet) -> None:
    """Tell a running server who takes part."""
    if fleet.pid() is not None:
        from fedq.fleet import control

        with control.connected(fleet) as client:
            control.sync(client, fleet)


# --- the server ----------------------------------------------------------------------------------


def _up(options: argparse.Namespace) -> None:
    from fedq.fleet import superlink

    fleet = _open(options)
    superlink.check_certificate(fleet)
    if options.foreground:
        superlink.serve(fleet)
        return
    started = superlink.start(fleet)
    _tell(
        options,
        {"started": started, "pid": fleet.pid(), "server": fleet.device_address},
        f"{'up' if started else 'was up already'}: devices connect to {fleet.device_address}",
    )


def _down(options: argparse.Namespace) -> None:
    from fedq.fleet import superlink

    stopped = superlink.stop(_open(options))
    _tell(options, {"stopped": stopped}, "stopped" if stopped else "was not up")


def _status(options: argparse.Namespace) -> None:
    from rich.console import Console

    from fedq.fleet import status

    fleet = _open(options)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.watch and not options.json:
        status.watch(fleet, console)
    elif options.json:
        print(json.dumps(status.collect(fleet)))
    else:
        console.print(status.render(status.collect(fleet)))


def _logs(options: argparse.Namespace) -> None:
    fleet, count = _open(options), max(options.lines, 0)
    if options.device is not None:
        from fedq.fleet import remote

        fleet.require(options.device)
        lines = remote.log(remote.over_ssh(options.ssh or options.device), count)
    elif options.ssh is not None:
        raise ConfigError("--ssh is for a device's log: fedq fleet logs DEVICE --ssh HOST")
    else:
        try:
            text = fleet.path("superlink.log").read_text(errors="replace")
        except FileNotFoundError:
            raise FedqError("no log yet; start the server with fedq fleet up") from None
        lines = text.splitlines()
    lines = lines[-count:] if count else []
    _tell(options, {"lines": lines}, *lines)


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from fedq import progress
    from fedq.fleet import serverapp
    from fedq.report import report
    from fedq.results import read_summary

    console = Console(stderr=options.json)
    progress.log_to(console)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    path = serverapp.run(
        _open(options),
        options.overrides,
        wait_s=options.wait,
        min_memory_mb=options.min_memory,
        watch=progress.watch(console),
        say=lambda text: console.print(text, soft_wrap=True, highlight=False),
    )
    if options.json:
        print(json.dumps({"run": str(path), "summary": read_summary(path)}))
        return
    console.print(report([path]))
    console.print(f"results in {path}", soft_wrap=True, highlight=False)


def _deploy(options: argparse.Namespace) -> int:
    from fedq.fleet import control, releases, status

    fleet, names = _open(options), list(options.names)
    if not options.rollback:
        if not names:
            raise ConfigError("name the run: fedq fleet deploy RUN, or --rollback")
        run = Path(names.pop(0))
        if not (run / "model.safetensors").exists():
            raise ConfigError(f"{run} is no finished run; name the run first, then devices")
    for name in names:
        fleet.require(name)
    names = names or list(fleet.devices)
    if not names:
        raise ConfigError("this fleet has no devices; add some with fedq fleet add NAME")
    widths: dict[str, str] = {}
    if options.rollback:
        releases.go_back(fleet, names)
    else:
        widths = releases.assigned(fleet, run, names, options.width)
        made = {one: releases.make(fleet, run, options.to, one) for one in set(widths.values())}
        releases.want(fleet, {name: made[width] for name, width in widths.items()})
    if fleet.pid() is not None:
        control.announce(fleet)
    found = status.wait_for_releases(fleet, names, options.wait)
    for name, release in found.items():
        if widths.get(name):
            release["width"] = widths[name]
    lines = [
        f"{name:20} {release['runs'][:12]:12} {release.get('width', ''):4} {release['said']}"
        for name, release in found.items()
    ]
    _tell(options, {"devices": found}, *lines)
    return 0 if all(release["runs"] == release["wanted"] for release in found.values()) else FAILURE


# --- a device ------------------------------------------------------------------------------------


def _join(options: argparse.Namespace) -> None:
    from fedq.fleet.bundle import join
    from fedq.fleet.doctor import check_data

    code = options.code
    if code is None:
        if sys.stdin.isatty():
            print("enrolment code: ", end="", file=sys.stderr, flush=True)
        code = sys.stdin.readline()
    device = join(options.bundle, code, options.into, _node_options(options.node))
    data = check_data(device)
    _tell(
        options,
        {
            "device": device.name,
            "server": device.server,
            "directory": str(device.root),
            "data": asdict(data),
        },
        f"{device.name} of the fleet at {device.server}, in {device.root}",
        _about_data(data),
        f"try it: fedq fleet node {device.root}",
        f"for ever: sudo cp {device.root}/fedq-node.service /etc/systemd/system/ && "
        "sudo systemctl enable --now fedq-node",
    )


def _about_data(data: Check) -> str:
    return f"data: {data.detail}" + (f"; {data.remedy}" if data.remedy else "")


def _node_options(texts: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Return a node's configuration; numbers are numbers.

    >>> _node_options(["data=npz", "data-path=/data/own.npz", "partition-id=3"])
    {'data': 'npz', 'data-path': '/data/own.npz', 'partition-id': 3}
    """
    found: dict[str, bool | int | float | str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not _NODE_OPTION.fullmatch(key):
            raise ConfigError(
                f"cannot use --node {text}; write data=NAME, data-OPTION=VALUE, partition-id=N "
                "or weight-bits=N"
            )
        try:
            found[key] = json.loads(value) if value[:1] in "-0123456789tf" else value
        except ValueError:
            found[key] = value
    return found


def _node(options: argparse.Namespace) -> None:
    from fedq.fleet.files import Device

    device = Device.open(options.directory)
    os.environ["FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"] = str(device.chunk_bytes)  # read at import
    from fedq.fleet import device as process

    _log(quiet=options.json)
    if options.check:
        from fedq.fleet.doctor import check_data

        node_id, data = process.check(device), check_data(device)
        _tell(
            options,
            {
                "device": device.name,
                "server": device.server,
                "node_id": node_id,
                "data": asdict(data),
            },
            f"{device.server} accepts {device.name}",
            _about_data(data),
        )
        return
    process.serve(device)


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fedq import doctor
    from fedq.fleet import doctor as fleet_doctor
    from fedq.fleet.files import Device

    if options.device is not None:
        found = fleet_doctor.check_device(Device.open(options.device))
    else:
        found = fleet_doctor.check_fleet(_open(options))
    if options.json:
        print(doctor.to_json(found))
    else:
        Console().print(doctor.render(found))
    return FAILURE if any(item.status == "fail" for item in found) else 0


# --- over ssh ------------------------------------------------------------------------------------


def _enroll(options: argparse.Namespace) -> None:
    from fedq.fleet import remote

    _node_options(options.node)  # a misspelling must not wait for the network
    transport = remote.over_ssh(options.ssh or options.device)
    fleet = remote.enroll(
        _open(options), options.device, transport, node=options.node, wheels=options.wheels
    )
    _sync(fleet)  # the service is not up until the server accepts it
    said = remote.accepted(transport)
    how = "none" if options.no_service else remote.serve(transport)
    text = "runs as a service" if how == "service" else "start it there: fedq fleet node"
    _tell(options, {"device": options.device, "runs": how, "said": said}, said, text)


def _upgrade(options: argparse.Namespace) -> int:
    from fedq.fleet import remote

    fleet, failed = _open(options), {}
    for name in options.devices:
        fleet.require(name)
    if options.ssh is not None and len(options.devices) > 1:
        raise ConfigError("--ssh is one device's host; name the others in ~/.ssh/config")
    for name in options.devices:
        try:
            remote.upgrade(remote.over_ssh(options.ssh or name), options.wheels)
        except FedqError as error:
            failed[name] = str(error)
    done = [name for name in options.devices if name not in failed]
    lines = [f"{name}: upgraded" for name in done]
    _tell(
        options,
        {"upgraded": done, "failed": failed},
        *lines,
        *(f"{name}: {why}" for name, why in failed.items()),
    )
    return FAILURE if failed else 0


def _wheelhouse(options: argparse.Namespace) -> None:
    from fedq.fleet import wheelhouse

    sizes = wheelhouse.make(
        options.folder,
        options.fedq_wheel,
        options.machine,
        options.python,
        options.torch_index or wheelhouse.CPU_BUILDS,
        options.packages,
    )
    total = sum(sizes.values())
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    lines = [f"{size / 1e6:8.1f} MB  {name}" for name, size in largest]
    _tell(
        options,
        {"folder": str(options.folder), "total_bytes": total, "wheels": sizes},
        *lines,
        f"{total / 1e6:8.1f} MB  in all, {len(sizes)} wheels in {options.folder}",
    )


def _bench(options: argparse.Namespace) -> None:
    from fedq.fleet import bench

    found = bench.profile(options.model, options.codec)
    _tell(options, found, *(f"{key:16} {value}" for key, value in found.items()))


def _demo(options: argparse.Namespace) -> None:
    from rich.console import Console

    from fedq.fleet import demo

    console = Console(stderr=options.json)
    found = demo.run(options.nodes, options.overrides, console)
    if options.json:
        print(json.dumps(found))
