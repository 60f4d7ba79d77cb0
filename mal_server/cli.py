"""Defines the command `mal-server`: options, dispatch and exit codes. Imports torch only to serve."""

import argparse
import asyncio
import gc
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from mal_server.ops import logging
from mal_server.scheduling.background import exit_process
from mal_train.core.command_line import add_common_options, parse_arguments, prepare_process
from mal_train.core.console import escape_control, print_result
from mal_train.core.errors import ConfigError, MalError
from mal_train.core.threads import spin_briefly

PIP_LINE = "pip install 'mask-auto-labeler[server]'"
SERVER_PACKAGES = frozenset(
    {
        *("torch", "torchvision", "timm", "pydantic", "yaml", "pyrage", "safetensors", "cryptography"),
        *("grpc_health", "grpc_reflection", "prometheus_client"),
    }
)


def run() -> NoReturn:
    """Runs the command of this process and ends it, without waiting for threads in the middle of long work."""
    try:
        exit_code = main()
    # The interpreter would do the same, but wait for those threads first.
    except Exception:
        traceback.print_exc()
        exit_code = 1
    sys.exit(exit_process(exit_code))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 done; 1 unexpected error, lost device or unhealthy server; 2 usage, settings or checkpoint; 4 disk or permission.
    """
    prepare_process()
    args = parse_arguments(parser(), argv)
    spin_briefly()
    try:
        return _run(args)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SERVER_PACKAGES:
            raise
        print(f"mal-server: {error.name} is not installed. Run: {PIP_LINE}", file=sys.stderr)
        return 2
    except MalError as error:
        print(f"mal-server: {escape_control(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        # Only before the server installs its signal handlers: importing torch takes seconds.
        print("mal-server: interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.command == "serve":
        return _serve(args)
    # Imported here, as below, so that a missing extra is reported in one line instead of a trace.
    from mal_server.config.server import default_config, json_schema, load_config  # noqa: PLC0415

    if args.command == "default-config":
        print(json_schema() + "\n" if args.json_schema else default_config(), end="")
        return 0
    if args.command == "health":
        return _health(args)
    from mal_server.dry_run import check  # noqa: PLC0415

    for line in check(load_config(args.config, args.overrides)):
        print_result(line)
    return 0


def _serve(args: argparse.Namespace) -> int:
    with _deferring_hangups() as hangups:
        from mal_server.config.server import load_config  # noqa: PLC0415

        config = load_config(args.config, args.overrides)
        from mal_server.lifecycle import serve  # noqa: PLC0415

        logging.set_up(args.log_level, args.log_format, sys.stderr)
        asyncio.run(
            serve(
                config,
                port_file=args.port_file,
                reload_config=lambda: load_config(args.config, args.overrides),
                reload_at_start=lambda: bool(hangups),
            )
        )
    return 0


@contextmanager
def _deferring_hangups() -> Iterator[list[int]]:
    """Records SIGHUP and disables the garbage collector while packages are imported; `serve` takes both over.

    Imports create no garbage, and collecting it takes a quarter of the start time. The default action of SIGHUP ends
    the process, which systemd takes for a clean exit.

    Yields:
        The SIGHUPs received so far.
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

    tls = (args.tls_ca, args.tls_name, args.client_cert, args.client_key)
    probe = HealthProbe(args.address, args.service, args.timeout, *tls)
    if args.config is not None:
        probe = probe_of(load_config(args.config).listen, probe)
    elif not probe.address:
        raise ConfigError("health: no address; give HOST:PORT or -c FILE")
    state = probe.check()
    print_result(f"{probe.address}: {state}")
    return 0 if state == "SERVING" else 1


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    top = argparse.ArgumentParser(prog="mal-server", description="Serves checkpoints over gRPC.")
    add_common_options(top)
    commands = top.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve until SIGTERM or Ctrl-C")
    _add_settings(serve)
    serve.add_argument(
        "--port-file",
        type=Path,
        metavar="FILE",
        help="write HOST:PORT to FILE once the server is ready; removed at exit",
    )
    serve.add_argument("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO")
    serve.add_argument("--log-format", choices=("text", "json"), default="text", help="format of the log on stderr")
    check = commands.add_parser("check", help="validate settings, files and devices without serving; opens no port")
    _add_settings(check)
    health = commands.add_parser("health", help="check a running server; exit code 0 if it is SERVING, 1 if not")
    health.add_argument(
        "address", nargs="?", default="", metavar="HOST:PORT", help="default: the address in the settings of -c"
    )
    health.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help="the server's settings (YAML), from which address, certificate and client certificate are taken",
    )
    health.add_argument(
        "--service", default="", metavar="NAME", help="e.g. mal.v1.LabelingService; default: the server as a whole"
    )
    health.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds (default %(default)g)")
    health.add_argument(
        "--tls-ca", type=Path, metavar="CA.pem", help="authority to trust; without it and -c: plaintext"
    )
    health.add_argument(
        "--tls-name", metavar="NAME", help="name that the server's certificate must be valid for; default: HOST"
    )
    health.add_argument("--client-cert", type=Path, metavar="CERT.pem", help="client certificate (mTLS), with its key")
    health.add_argument(
        "--client-key", type=Path, metavar="KEY.pem", help="private key of the client certificate, if in another file"
    )
    default_config = commands.add_parser("default-config", help="print every setting with its default and meaning")
    default_config.add_argument(
        "--json-schema",
        action="store_true",
        help="print the JSON Schema of the settings instead; save it as FILE and begin the YAML file with "
        "'# yaml-language-server: $schema=FILE', so that editors complete and check it",
    )
    return top


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-c", "--config", type=Path, metavar="FILE", help="settings (YAML); default: the built-in defaults"
    )
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file")
    command.set_defaults(takes_overrides=True)
