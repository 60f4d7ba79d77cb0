"""The command `mal-client cvat`: adds masks for the rectangles of a CVAT task."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    LISTED,
    Commands,
    add_command,
    add_connection_options,
    add_label_options,
    failures_message,
    make_client,
    make_label_options,
    print_error,
    print_line,
    read_secret,
)
from mal_client.dataset.progress import ProgressDisplay
from mal_train.core.command_line import RenamedOption
from mal_train.core.errors import ConfigError
from mal_train.core.numbers import counted

if TYPE_CHECKING:
    from mal_client.integrations.cvat.task_plan import SkippedShape, TaskPlan


def add_cvat(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    cvat = add_command(commands, "cvat", "add masks for the rectangles of a CVAT task")
    cvat.set_defaults(run=_cvat, can_resume=lambda arguments: not arguments.dry_run)
    add_connection_options(cvat)
    cvat.add_argument("--cvat", required=True, metavar="URL", help="CVAT server, for example https://app.cvat.ai")
    cvat.add_argument("--task", type=int, required=True, metavar="ID", help="ID of the task")
    cvat.add_argument(
        "--cvat-token-file",
        type=Path,
        metavar="FILE",
        help="file with a personal access token of CVAT; required unless --cvat-login-file is given",
    )
    cvat.add_argument(
        "--cvat-login-file", type=Path, metavar="FILE", help="file with USER:PASSWORD, in place of a token"
    )
    cvat.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="BOX=MASK",
        help="label MASK for the masks of rectangles with label BOX; repeatable (default: the label of the rectangle)",
    )
    cvat.add_argument(
        "--tight-boxes",
        action="store_true",
        help="also add the tight box of each mask, with the label of its rectangle (default: off)",
    )
    cvat.add_argument(
        "--dry-run", action="store_true", help="print the plan; label nothing and write nothing (default: off)"
    )
    cvat.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="progress of the task, from which the next run resumes; the original annotations are saved beside it "
        "(default: cvat-task-ID.ledger)",
    )
    cvat.add_argument("--ledger", action=RenamedOption, new="--journal")  # former name
    cvat.add_argument(
        "--restart",
        action="store_true",
        help="discard the journal and label everything again; masks already in the task are not added twice "
        "(default: resume)",
    )
    add_label_options(cvat)


def _cvat(arguments: argparse.Namespace) -> int:
    try:
        from mal_client.integrations.cvat.client import SdkClient  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'mask-auto-labeler[cvat]'") from None
    from mal_client.integrations.cvat.job import fetch_plan, label_task  # noqa: PLC0415 - other commands do not need it

    label_names = dict(_label_pair(text) for text in arguments.label)
    journal = arguments.journal or Path(f"cvat-task-{arguments.task}.ledger")
    token, login = _credentials(arguments)
    with closing(SdkClient(arguments.cvat, arguments.task, token=token, login=login)) as cvat:
        if arguments.dry_run:
            plan = fetch_plan(cvat, cvat.annotations(), label_names, first_group=1)
            print_line(_plan_line(plan))
            _print_skipped(plan.skipped)
            return EXIT_SOME_FAILED if plan.skipped else 0
        with make_client(arguments) as client, ProgressDisplay("cvat") as display:
            result = label_task(
                cvat,
                client,
                journal,
                make_label_options(arguments),
                label_names=label_names,
                tight_boxes=arguments.tight_boxes,
                restart=arguments.restart,
                on_progress=display,
            )
    errors_file = _write_errors(result.skipped, journal)
    print_line(
        f"{cvat.name}: {counted(result.written, 'mask')} added, {result.existing} already there, "
        f"{len(result.skipped)} failed"
    )
    for name in result.changed[:LISTED]:
        print_error(f"mal-client: {name} changed during the run; another user is editing the task")
    _print_skipped(result.skipped)
    if errors_file is not None:
        print_error(failures_message(len(result.skipped), errors_file))
    return EXIT_SOME_FAILED if result.skipped else 0


def _plan_line(plan: TaskPlan) -> str:
    frames = len({target.frame for target in plan.targets})
    labels = Counter(target.shape["label_id"] for target in plan.targets)
    by_label = ", ".join(f"label {label}: {count}" for label, count in labels.items())
    others = "is not a rectangle" if plan.other == 1 else "are not rectangles"
    return (
        f"{counted(len(plan.targets), 'rectangle')} on {counted(frames, 'frame')} would get a mask "
        f"({by_label or 'none'}), {len(plan.skipped)} cannot; "
        f"{counted(plan.other, 'annotation')} {others}; nothing was written"
    )


def _print_skipped(skipped: Sequence[SkippedShape]) -> None:
    for shape in skipped[:LISTED]:
        print_error(f"  {shape.key} (frame {shape.frame}): {shape.reason}")


def _write_errors(skipped: Sequence[SkippedShape], journal: Path) -> Path | None:
    """Writes the skipped rectangles beside the journal; returns the path, None if there are none."""
    from mal_train.core.atomic_io import write_text  # noqa: PLC0415

    if not skipped:
        return None
    errors_file = journal.with_name(f"{journal.name}.errors.jsonl")
    write_text(errors_file, "".join(json.dumps(vars(shape)) + "\n" for shape in skipped))
    return errors_file


def _credentials(arguments: argparse.Namespace) -> tuple[str | None, tuple[str, str] | None]:
    """Returns (token, login) of the CVAT account; one of them is None."""
    if (arguments.cvat_token_file is None) == (arguments.cvat_login_file is None):
        raise ConfigError("--cvat-token-file, --cvat-login-file: give exactly one of them")
    if arguments.cvat_token_file is not None:
        return read_secret(arguments.cvat_token_file, "--cvat-token-file"), None
    user, colon, password = read_secret(arguments.cvat_login_file, "--cvat-login-file").partition(":")
    if not colon:
        raise ConfigError(f"--cvat-login-file {arguments.cvat_login_file}: expected USER:PASSWORD")
    return None, (user, password)


def _label_pair(text: str) -> tuple[str, str]:
    source, sign, target = text.partition("=")
    if not sign or not source or not target:
        raise ConfigError(f"--label {text}: expected BOX=MASK, the names of two labels of the task")
    return source, target
