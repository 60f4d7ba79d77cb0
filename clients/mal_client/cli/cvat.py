"""`mal-client cvat`: gives the rectangles of a CVAT task their masks."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.cli.common import (
    SOME_FAILED,
    Commands,
    add_connection,
    add_options,
    add_verb,
    client_of,
    listed_in,
    options_of,
    read_word,
)
from mal_client.dataset.progress import ProgressDisplay
from mal_train.core.errors import ConfigError

if TYPE_CHECKING:
    from mal_client.integrations.cvat.task_plan import SkippedShape, TaskPlan

LISTED = 5


def add_cvat(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    verb = add_verb(commands, "cvat", "give the rectangles of a CVAT task their masks")
    verb.set_defaults(run=_run, goes_on=lambda arguments: not arguments.dry_run)
    add_connection(verb)
    verb.add_argument("--cvat", required=True, metavar="URL", help="the CVAT server, for example https://app.cvat.ai")
    verb.add_argument("--task", type=int, required=True, metavar="N", help="number of the task")
    verb.add_argument("--cvat-token-file", type=Path, metavar="FILE", help="holds a personal access token of CVAT")
    verb.add_argument("--cvat-login-file", type=Path, metavar="FILE", help="holds USER:PASSWORD, without a token")
    verb.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="BOX=MASK",
        help="masks of boxes with the label BOX get the label MASK (default: the same); may be given several times",
    )
    verb.add_argument("--dry-run", action="store_true", help="say what would be done; labels and writes nothing")
    verb.add_argument(
        "--ledger",
        type=Path,
        metavar="FILE",
        help="what was done so far, for the next run to go on from (default cvat-task-N.ledger); beside it the "
        "annotations as they were",
    )
    verb.add_argument("--restart", action="store_true", help="begin anew; masks that are there are not written twice")
    add_options(verb)


def _run(arguments: argparse.Namespace) -> int:
    try:
        from mal_client.integrations.cvat.client import SdkSite  # noqa: PLC0415 - comes with an extra
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'mask-auto-labeler[cvat]'") from None
    from mal_client.integrations.cvat.job import label_task, plan_of  # noqa: PLC0415 - what only this verb needs

    renamed = dict(_renaming(text) for text in arguments.label)
    ledger = arguments.ledger or Path(f"cvat-task-{arguments.task}.ledger")
    token, login = _access(arguments)
    with closing(SdkSite(arguments.cvat, arguments.task, token=token, login=login)) as site:
        if arguments.dry_run:
            plan = plan_of(site, site.annotations(), renamed, first_group=1)
            print(_summary(plan))
            _tell(plan.refusals, None)
            return SOME_FAILED if plan.refusals else 0
        with client_of(arguments) as client, ProgressDisplay("cvat") as display:
            result = label_task(
                site,
                client,
                ledger,
                options_of(arguments),
                renamed=renamed,
                restart=arguments.restart,
                on_progress=display,
            )
    print(f"{site.name}: {result.written} masks written, {result.already} were there, {len(result.refusals)} failed")
    for name in result.changed[:LISTED]:
        print(f"mal-client: {name} changed meanwhile; somebody else is at work on the task", file=sys.stderr)
    _tell(result.refusals, ledger)
    return SOME_FAILED if result.refusals else 0


def _summary(plan: TaskPlan) -> str:
    frames = len({target.frame for target in plan.targets})
    labels = Counter(target.shape["label_id"] for target in plan.targets)
    by_label = ", ".join(f"label {label}: {count}" for label, count in labels.items())
    return (
        f"{len(plan.targets)} rectangles on {frames} frames would get a mask ({by_label or 'none'}), "
        f"{len(plan.refusals)} cannot, {plan.other} annotations are no rectangles; nothing was written"
    )


def _tell(refusals: tuple[SkippedShape, ...] | list[SkippedShape], ledger: Path | None) -> None:
    from mal_train.core.atomic_io import write_text  # noqa: PLC0415

    for refusal in refusals[:LISTED]:
        print(f"  {refusal.key} (frame {refusal.frame}): {refusal.reason}", file=sys.stderr)
    if ledger is not None and refusals:
        errors = ledger.with_name(f"{ledger.name}.errors.jsonl")
        write_text(errors, "".join(json.dumps(vars(refusal)) + "\n" for refusal in refusals))
        print(listed_in(len(refusals), errors), file=sys.stderr)


def _access(arguments: argparse.Namespace) -> tuple[str | None, tuple[str, str] | None]:
    """(token, login) of the CVAT account."""
    if (arguments.cvat_token_file is None) == (arguments.cvat_login_file is None):
        raise ConfigError("give either --cvat-token-file or --cvat-login-file")
    if arguments.cvat_token_file is not None:
        return read_word(arguments.cvat_token_file, "--cvat-token-file"), None
    user, colon, password = read_word(arguments.cvat_login_file, "--cvat-login-file").partition(":")
    if not colon:
        raise ConfigError(f"--cvat-login-file {arguments.cvat_login_file}: USER:PASSWORD is needed")
    return None, (user, password)


def _renaming(text: str) -> tuple[str, str]:
    source, sign, target = text.partition("=")
    if not sign or not source or not target:
        raise ConfigError(f"--label {text}: BOX=MASK is needed, two labels of the task")
    return source, target
