"""The command `mal-client models`: lists, loads and unloads the models of a running server."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from mal_client.cli.common import Commands, add_command, add_connection_options, make_client, print_error, print_line
from mal_client.errors import ClientError
from mal_client.model_admin import ModelAdmin
from mal_client.types import ModelStatus
from mal_train.core.errors import ConfigError, InputError
from mal_train.core.settings import Branch


def add_models(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command, its subcommands and their options."""
    models = add_command(commands, "models", "list, load and unload the models of a running server")
    subcommands = models.add_subparsers(required=True, metavar="COMMAND")
    listing = add_command(subcommands, "list", "list the models in the server's memory")
    listing.set_defaults(run=_list)
    add_connection_options(listing)
    listing.add_argument("--json", action="store_true", help="print JSON (default: a line per model)")
    load = add_command(subcommands, "load", "load a checkpoint and serve it without interruption")
    load.set_defaults(run=_load)
    add_connection_options(load)
    load.add_argument("name", metavar="NAME", help="name to serve the model under; replaces a model of that name")
    load.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER/PATH",
        help="checkpoint: a name in the server's model_folders and a path below that folder (default: reload the "
        "checkpoint that the server's settings name)",
    )
    load.add_argument(
        "--branch",
        choices=[str(branch) for branch in Branch],
        help="network that predicts the masks of requests that name none (default: the server's setting)",
    )
    unload = add_command(subcommands, "unload", "stop serving a model after its running calls have finished")
    unload.set_defaults(run=_unload)
    add_connection_options(unload)
    unload.add_argument("name", metavar="NAME", help="name of the model")


def _list(arguments: argparse.Namespace) -> int:
    with make_client(arguments) as client:
        rows = {server.address: ModelAdmin(server).list_models() for server in client.servers()}
    if arguments.json:
        several = len(rows) > 1
        found = [_to_dict(row) | ({"server": address} if several else {}) for address in rows for row in rows[address]]
        print(json.dumps(found, indent=2))
        return 0
    for address, statuses in rows.items():
        for row in statuses:
            print_line(f"{_prefix(address, len(rows))}{_line(row)}")
    return 0


def _line(row: ModelStatus) -> str:
    state = "retiring" if row.is_retiring else "default" if row.is_default else "serving"
    model = row.info.model
    return (
        f"{model.name:<24} {state:<9} {model.checkpoint_sha256[:12]}  {row.info.arch}, {model.branch}, "
        f"{', '.join(row.info.devices)} in {row.info.precision} by {row.info.network_engine}, {row.calls} calls"
    )


def _load(arguments: argparse.Namespace) -> int:
    folder, separator, path = (arguments.source or "").partition("/")
    if arguments.source is not None and not (folder and separator and path):
        raise ConfigError(
            f"--from {arguments.source}: expected FOLDER/PATH, FOLDER a name in the server's model_folders"
        )
    branch = None if arguments.branch is None else Branch(arguments.branch)

    def load(admin: ModelAdmin) -> str:
        info, replaced = admin.load(arguments.name, folder, path, branch)
        note = "" if replaced is None else f", replaces {replaced.checkpoint_sha256[:12]}"
        model = info.model
        return f"{model.name}: serving {model.checkpoint_sha256[:12]} ({info.arch}, {model.branch}){note}"

    return _on_each_server(arguments, load)


def _unload(arguments: argparse.Namespace) -> int:
    def unload(admin: ModelAdmin) -> str:
        model = admin.unload(arguments.name)
        return f"{model.name}: {model.checkpoint_sha256[:12]} unloaded"

    return _on_each_server(arguments, unload)


def _on_each_server(arguments: argparse.Namespace, change: Callable[[ModelAdmin], str]) -> int:
    """Changes the models of each server behind the address; returns the exit code of the last failure."""
    exit_code = 0
    with make_client(arguments) as client:
        servers = client.servers()
        for server in servers:
            try:
                print_line(f"{_prefix(server.address, len(servers))}{change(ModelAdmin(server))}")
            except (ClientError, InputError) as error:
                # The others must not keep the old model because of this one.
                print_error(f"mal-client: {error}")
                exit_code = error.exit_code
    return exit_code


def _prefix(address: str, count: int) -> str:
    return f"{address}  " if count > 1 else ""


def _to_dict(row: ModelStatus) -> dict[str, Any]:
    info = row.info
    return {
        "name": info.model.name,
        "checkpoint_sha256": info.model.checkpoint_sha256,
        "branch": str(info.model.branch),
        "branches": [str(branch) for branch in info.branches] or None,
        "state": "retiring" if row.is_retiring else "serving",
        "default": row.is_default,
        "calls": row.calls,
        "arch": info.arch,
        "devices": info.devices,
        "precision": info.precision,
        "network_engine": info.network_engine,
    }
