"""The command mal-client: its verbs put together, and what their errors mean to a shell.

Exit codes: 0 done · 2 usage, configuration or input · 3 finished, but some items failed · 4 disk or permission ·
1 the server was not there, or something unexpected · 130 interrupted · 141 whoever read the output closed it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from mal_client.cli.check import add_check
from mal_client.cli.common import Commands, add_connection, add_verb, client_of
from mal_client.cli.convert import add_convert, add_export
from mal_client.cli.cvat import add_cvat
from mal_client.cli.evaluate import add_evaluate
from mal_client.cli.label import add_label, add_merge
from mal_client.cli.label_studio import add_label_studio
from mal_client.cli.models import add_models
from mal_client.cli.playground import add_playground
from mal_client.cli.review import add_review
from mal_client.types import ServerInfo
from mal_train.core.atomic_io import stdout_exit_code
from mal_train.core.command_line import add_common_options
from mal_train.core.errors import MalError, OutputError
from mal_train.core.version import distribution_version

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        if sys.stdout is not None:  # as it is after `>&-`
            sys.stdout.flush()
    except OSError as error:
        lost = stdout_exit_code(error)
        if lost is None:
            raise
        if lost == OutputError.exit_code:
            print(f"mal-client: standard output: {error.strerror}; free some space", file=sys.stderr)
        return lost
    except MalError as error:
        print(f"mal-client: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"mal-client: interrupted; {_way_on(arguments)}", file=sys.stderr)
        return INTERRUPTED
    return code


def _way_on(arguments: argparse.Namespace) -> str:
    """What is left of an interrupted job."""
    if not arguments.goes_on(arguments):
        return "no result was written"
    without = ", without --restart," if getattr(arguments, "restart", False) else ""
    return f"the same command{without} goes on where this one ended"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mal-client", description="Masks from boxes, by a mal-server.")
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
    info = add_verb(commands, "info", "what the server serves and accepts")
    info.set_defaults(run=_info)
    add_connection(info)


def _info(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        print(_described(client.server_info()))
    return 0


def _described(info: ServerInfo) -> str:
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
            "models": [model.model.name for model in info.models],
            "data_folders": info.data_folders,
            "limits": vars(info.limits),
        },
        indent=2,
    )


if __name__ == "__main__":
    sys.exit(main())
