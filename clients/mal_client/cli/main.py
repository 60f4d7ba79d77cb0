"""The command `mal-client`: assembles its subcommands and maps their errors to exit codes.

Exit codes: 0 done · 1 server unavailable or unexpected error · 2 usage, configuration or input · 3 finished, but some
items failed · 4 disk or permission · 130 interrupted · 141 the reader of stdout closed it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from mal_client.cli.check import add_check
from mal_client.cli.common import Commands, add_command, add_connection_options, make_client, print_error
from mal_client.cli.convert import add_convert
from mal_client.cli.cvat import add_cvat
from mal_client.cli.evaluate import add_evaluate
from mal_client.cli.export import add_export
from mal_client.cli.label import add_label, add_merge
from mal_client.cli.label_studio import add_label_studio
from mal_client.cli.models import add_models
from mal_client.cli.playground import add_playground
from mal_client.cli.review import add_review
from mal_client.types import ServerInfo
from mal_train.core.atomic_io import stdout_exit_code
from mal_train.core.command_line import add_common_options, prepare_process
from mal_train.core.errors import MalError, OutputError
from mal_train.core.version import distribution_version

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    prepare_process()
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        if sys.stdout is not None:  # None after `>&-`
            sys.stdout.flush()
    except OSError as error:
        exit_code = stdout_exit_code(error)
        if exit_code is None:
            raise
        if exit_code == OutputError.exit_code:
            print_error(f"mal-client: stdout: {error.strerror}; free disk space")
        return exit_code
    except MalError as error:
        print_error(f"mal-client: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        print_error(f"mal-client: interrupted; {_resume_hint(arguments)}")
        return INTERRUPTED
    return code


def _resume_hint(arguments: argparse.Namespace) -> str:
    if not arguments.can_resume(arguments):
        return "no result was written"
    without = " without --restart" if getattr(arguments, "restart", False) else ""
    return f"run the same command{without} again to resume"


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="mal-client", description="Labels the boxes of images with masks, using a mal-server."
    )
    add_common_options(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_label(commands)
    add_merge(commands)
    add_convert(commands)
    add_export(commands)
    add_evaluate(commands)
    add_check(commands)
    add_review(commands)
    add_label_studio(commands)
    add_playground(commands)
    add_models(commands)
    add_cvat(commands)
    _add_info(commands)
    return parser


def _add_info(commands: Commands[argparse.ArgumentParser]) -> None:
    info = add_command(commands, "info", "print the server's models, settings and limits as JSON")
    info.set_defaults(run=_info)
    add_connection_options(info)


def _info(arguments: argparse.Namespace) -> int:
    with make_client(arguments) as client:
        print(_to_json(client.server_info()))
    return 0


def _to_json(info: ServerInfo) -> str:
    return json.dumps(
        {
            "server_version": info.version,
            "client_version": distribution_version(),
            "model": info.model.name,
            "checkpoint_sha256": info.model.checkpoint_sha256,
            "branch": str(info.model.branch),
            "branches": [str(branch) for branch in info.branches] or None,
            "arch": info.arch,
            "crop_size": info.crop_size,
            "margin_rate": info.margin_rate,
            "mask_thresholds": info.mask_thresholds,
            "categories": info.categories,
            "devices": info.devices,
            "precision": info.precision,
            "network_engine": info.network_engine,
            "models": [model.model.name for model in info.models],
            "data_folders": info.data_folders,
            "limits": vars(info.limits),
        },
        indent=2,
    )


if __name__ == "__main__":
    sys.exit(main())
