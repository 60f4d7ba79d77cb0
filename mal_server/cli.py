"""The command `mal-server`: reads its arguments, calls, turns errors into exit codes. Imports torch only to serve."""

import argparse
import asyncio
import gc
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mal_server.ops import logging
from mal_server.scheduling.background import exit_process
from mal_train.core.command_line import add_common_options
from mal_train.core.errors import ConfigError, MalError
from mal_train.core.threads import wait_passively

PIP_LINE = "pip install 'mask-auto-labeler[server]'"
SERVER_PACKAGES = frozenset(
    {
        *("torch", "torchvision", "timm", "pydantic", "yaml", "pyrage", "safetensors"),
        *("grpc_health", "grpc_reflection", "prometheus_client"),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Exit codes: 0 done, 1 unexpected, a lost device, or no healthy server; 2 usage or settings, 4 disk or permission.
    """
    args = parser().parse_args(argv)
    wait_passively()
    if args.command != "serve":
        return _exit_code(args)
    try:
        return exit_process(_exit_code(args))
    # Whatever it is, threads that are still at work do not keep the process: as the interpreter would end it, but now.
    except Exception:
        traceback.print_exc()
        return exit_process(1)


def _exit_code(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SERVER_PACKAGES:
            raise
        print(f"mal-server: {error.name} is not installed. Run: {PIP_LINE}", file=sys.stderr)
        return 2
    except MalError as error:
        print(f"mal-server: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        # Before the server catches signals itself: torch takes seconds to import.
        print("mal-server: interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.command == "serve":
        return _serve(args)
    # Imported here, as below, so that a missing extra is one line and not a trace.
    from mal_server.config.server import default_config, load_config  # noqa: PLC0415

    if args.command == "default-config":
        print(default_config(), end="")
        return 0
    if args.command == "health":
        return _health(args)
    from mal_server.dry_run import check  # noqa: PLC0415

    for line in check(load_config(args.config, args.overrides)):
        print(line, flush=True)
    return 0


def _serve(args: argparse.Namespace) -> int:
    with _undisturbed() as hangups:
        from mal_server.config.server import load_config  # noqa: PLC0415

        config = load_config(args.config, args.overrides)
        from mal_server.server import serve  # noqa: PLC0415

        logging.set_up(args.log_level, args.log_format, sys.stderr)
        asyncio.run(
            serve(
                config,
                port_file=args.port_file,
                reread=lambda: load_config(args.config, args.overrides),
                was_asked=lambda: bool(hangups),
            )
        )
    return 0


@contextmanager
def _undisturbed() -> Iterator[list[int]]:
    """While packages are imported; `serve` lets the collector and SIGHUP in, once it can make use of them.

    Nothing of what imports make is garbage, and to walk through it again and again is a quarter of the start. SIGHUP
    would end the process, left to itself, which systemd takes for a clean end.

    Yields:
        The SIGHUPs that came.
    """
    hangups = list[int]()
    before = signal.signal(signal.SIGHUP, lambda number, _: hangups.append(number))
    gc.disable()
    try:
        yield hangups
    finally:
        gc.enable()
        signal.signal(signal.SIGHUP, before)


def _health(args: argparse.Namespace) -> int:
    from mal_server.config.server import load_config  # noqa: PLC0415
    from mal_server.ops.health_probe import HealthProbe, probe_of  # noqa: PLC0415

    papers = (args.tls_ca, args.tls_name, args.client_cert, args.client_key)
    probe = HealthProbe(args.address, args.service, args.timeout, *papers)
    if args.config is not None:
        probe = probe_of(load_config(args.config).listen, probe)
    elif not probe.address:
        raise ConfigError("health: whom? Give HOST:PORT, or the server's settings with -c FILE")
    found = probe.ask()
    print(f"{probe.address}: {found}")
    return 0 if found == "SERVING" else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="mal-server", description="Serves a sealed checkpoint over gRPC.")
    add_common_options(top)
    commands = top.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve until SIGTERM or Ctrl-C")
    _add_settings(serve)
    serve.add_argument(
        "--port-file",
        type=Path,
        metavar="FILE",
        help="write host:port there once the server answers; removed at the end",
    )
    serve.add_argument("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO")
    serve.add_argument("--log-format", choices=("text", "json"), default="text", help="of the log on stderr")
    check = commands.add_parser("check", help="say what serve would do, or what is wrong; opens no port")
    _add_settings(check)
    health = commands.add_parser("health", help="ask a running server; exit code 0 when it is SERVING, 1 when not")
    health.add_argument("address", nargs="?", default="", metavar="HOST:PORT", help="without: what -c says")
    health.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help="the server's settings (YAML): where it listens, its certificate, and what to show it",
    )
    health.add_argument("--service", default="", metavar="NAME", help="e.g. mal.v1.LabelingService; default: all of it")
    health.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds (default %(default)g)")
    health.add_argument(
        "--tls-ca", type=Path, metavar="CA.pem", help="authority to trust; neither it nor -c: plaintext"
    )
    health.add_argument("--tls-name", metavar="NAME", help="name in the server's certificate, if not HOST")
    health.add_argument("--client-cert", type=Path, metavar="CERT.pem", help="certificate to show, with its key")
    health.add_argument("--client-key", type=Path, metavar="KEY.pem", help="its private key, in a file of its own")
    commands.add_parser("default-config", help="print every setting with its default and its meaning")
    return top


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("-c", "--config", type=Path, metavar="FILE", help="settings (YAML); without: the defaults")
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file's")
