"""Provides what all three commands share: version, shell completion, renamed options, and the state of the process."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from mal_train.core.console import escape_unencodable
from mal_train.core.proxies import exempt_this_machine
from mal_train.core.version import distribution_version

COMPLETION_PIP_LINE = "pip install 'mask-auto-labeler[completion]'"
SHELLS = ("bash", "zsh", "tcsh")


class RenamedOption(argparse.Action):
    """Option that is refused under its former name with a message that gives the new name.

    >>> parser = argparse.ArgumentParser(prog="tool")
    >>> _ = parser.add_argument("--licence", action=RenamedOption, new="--license")
    >>> parser.parse_args(["--licence", "MIT"])
    Traceback (most recent call last):
    SystemExit: 2
    """

    def __init__(self, option_strings: Sequence[str], dest: str, *, new: str, **_: Any) -> None:
        # "?": the old option may have taken a value or none.
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        self._new = new

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Ends the command with exit code 2."""
        parser.error(f"{self.option_strings[0]} has a new name: {self._new}")


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: object, *__: object) -> NoReturn:
        try:
            import shtab  # noqa: PLC0415 (an extra)
        except ModuleNotFoundError:
            parser.error(f"--print-completion needs shtab: {COMPLETION_PIP_LINE}")
        print(shtab.complete(parser, str(shell)))
        parser.exit()


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--version` and `--print-completion` to the top parser of a command."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {distribution_version()}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        default=argparse.SUPPRESS,
        help="print a completion script for this shell and exit",
    )


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line whose overrides `a.b=c` may come before, between and after options.

    Positional arguments of argparse may not. Ends the process with exit code 2 for arguments that are not known.

    Args:
        parser: sets `takes_overrides` for the commands that take any, and `override_hints`, by name, for overrides of
            which a command that takes none has an option instead.
        argv: arguments; None: those of the process.

    Returns:
        The arguments; `overrides` holds all overrides in their order.
    """
    arguments, rest = parser.parse_known_args(argv)
    takes_overrides = getattr(arguments, "takes_overrides", False)
    late = [text for text in rest if takes_overrides and not text.startswith("-") and "=" in text]
    unknown = [text for text in rest if text not in late]
    if unknown:
        hints = getattr(arguments, "override_hints", {})
        remedies = [f"; {hints[name]}" for name in (text.partition("=")[0] for text in unknown) if name in hints]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(remedies)}")
    arguments.overrides = [*getattr(arguments, "overrides", ()), *late]
    return arguments


def prepare_process() -> None:
    """Prepares the process of a command: its output to any terminal, and its connections to this machine."""
    escape_unencodable()
    exempt_this_machine()
