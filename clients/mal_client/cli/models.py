"""mal-client models: which models a server has in memory, and changes of them without a restart."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mal_client.cli.common import Commands, add_connection, add_verb, client_of
from mal_client.model_admin import ModelAdmin
from mal_client.types import ModelStatus
from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch


def add_models(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb, its verbs and their arguments."""
    models = add_verb(commands, "models", "list, load and unload the models of a running server")
    verbs = models.add_subparsers(required=True, metavar="VERB")
    listed = add_verb(verbs, "list", "every model in the server's memory")
    listed.set_defaults(run=_list)
    add_connection(listed)
    listed.add_argument("--json", action="store_true", help="as JSON")
    load = add_verb(verbs, "load", "put a checkpoint into service without a gap, or say why it cannot be")
    load.set_defaults(run=_load)
    add_connection(load)
    load.add_argument("name", metavar="NAME", help="name under which it answers; one that is served is replaced")
    load.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER/PATH",
        help="a folder of the server's model_folders and the checkpoint below it (default: the checkpoint that the "
        "server's settings name, read anew)",
    )
    load.add_argument("--branch", choices=[str(branch) for branch in Branch], help="network that answers by default")
    unload = add_verb(verbs, "unload", "take a model out of service; calls that it has are finished")
    unload.set_defaults(run=_unload)
    add_connection(unload)
    unload.add_argument("name", metavar="NAME")


def _list(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        rows = ModelAdmin(client).list_models()
    if arguments.json:
        print(json.dumps([_described(row) for row in rows], indent=2))
        return 0
    for row in rows:
        state = "retiring" if row.is_retiring else "default" if row.is_default else "serving"
        model = row.info.model
        print(
            f"{model.name:<24} {state:<9} {model.checkpoint_sha256[:12]}  {row.info.arch}, {model.branch}, "
            f"{', '.join(row.info.devices)} in {row.info.precision}, {row.calls} calls"
        )
    return 0


def _load(arguments: argparse.Namespace) -> int:
    folder, separator, path = (arguments.source or "").partition("/")
    if arguments.source is not None and not (folder and separator and path):
        raise ConfigError(f"--from {arguments.source}: FOLDER/PATH is needed, a folder of the server's model_folders")
    branch = None if arguments.branch is None else Branch(arguments.branch)
    with client_of(arguments) as client:
        info, replaced = ModelAdmin(client).load(arguments.name, folder, path, branch)
    before = "" if replaced is None else f", in the place of {replaced.checkpoint_sha256[:12]}"
    print(f"{info.model.name}: {info.model.checkpoint_sha256[:12]} answers ({info.arch}, {info.model.branch}){before}")
    return 0


def _unload(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        gone = ModelAdmin(client).unload(arguments.name)
    print(f"{gone.name}: {gone.checkpoint_sha256[:12]} answers no more")
    return 0


def _described(row: ModelStatus) -> dict[str, Any]:
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
    }
