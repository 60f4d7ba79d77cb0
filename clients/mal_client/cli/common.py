"""Arguments that several verbs of `mal-client` share, and what is made of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mal_client.client import DEFAULT_TIMEOUT_S, AsyncClient, Client
from mal_client.types import LabelOptions
from mal_train.core.secrets import read_secret_file
from mal_train.core.settings import Branch

SOME_FAILED = 3
"""Exit code of a job that ran to its end, with failures."""

Commands = argparse._SubParsersAction  # argparse has no public name for it
PROSE = argparse.RawDescriptionHelpFormatter


def add_verb(commands: Commands[argparse.ArgumentParser], name: str, description: str) -> argparse.ArgumentParser:
    """A parser for one verb.

    Its default `goes_on` tells from the arguments whether an interrupted run keeps what it has for the next one.
    """
    parser = commands.add_parser(name, help=description, description=f"{description[0].upper()}{description[1:]}.")
    parser.set_defaults(goes_on=lambda _: False)
    return parser


def add_connection(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Where the server is and how to reach it."""
    parser.add_argument(
        "--server",
        required=True,
        metavar="HOST:PORT[,...]" if several else "HOST:PORT",
        help="where mal-server listens" + (", or several that share the work" if several else ""),
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds without any answer after which the server counts as lost (default %(default)g)",
    )
    parser.add_argument("--tls", action="store_true", help="encrypt, trusting the public authorities")
    parser.add_argument("--tls-ca", type=Path, metavar="CA.pem", help="encrypt, trusting this authority alone")
    parser.add_argument("--client-cert", type=Path, metavar="CERT.pem", help="certificate to show the server")
    parser.add_argument("--client-key", type=Path, metavar="KEY.pem", help="its key, if not in the same file")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token that the server asks for")


def client_of(arguments: argparse.Namespace) -> Client:
    """The client that `add_connection`'s arguments describe."""
    return _client(arguments, arguments.server)


def async_client_of(arguments: argparse.Namespace) -> AsyncClient:
    """The same for an event loop."""
    return AsyncClient(arguments.server, **_how(arguments))


@contextmanager
def clients_of(arguments: argparse.Namespace) -> Iterator[list[Client]]:
    """A client for each of several servers; closed at the end."""
    with ExitStack() as stack:
        addresses = [address.strip() for address in arguments.server.split(",") if address.strip()]
        yield [stack.enter_context(_client(arguments, address)) for address in addresses or [arguments.server]]


def add_data(parser: argparse.ArgumentParser, what: str = "COCO file with boxes") -> None:
    """The data set; `what` its annotations are."""
    parser.add_argument("--annotations", type=Path, required=True, metavar="IN.json", help=what)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--images", type=Path, metavar="DIR", help="folder that its file names start at")
    where.add_argument(
        "--image-glob",
        dest="images",
        metavar="PATTERN",
        help="instead: the pictures lie among the files of this pattern, for example 'photos/**/*.jpg' (quoted; ** "
        "means any folders), and a file name means the one file that ends in it",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """How boxes become masks."""
    parser.add_argument("--branch", choices=[str(branch) for branch in Branch], help="network (default: the server's)")
    parser.add_argument("--model", metavar="NAME", help="model that answers (default: the server's)")
    parser.add_argument("--threshold", type=float, metavar="P", help="mask above this probability, for all sizes")
    parser.add_argument("--agreement", action="store_true", help="also measure how far the two networks agree")
    parser.add_argument("--flip", action="store_true", help="average each map with its mirrored run")
    parser.add_argument(
        "--resolve-overlaps",
        action="store_true",
        help="give each pixel that several boxes of an image claim to one of them",
    )
    parser.add_argument(
        "--min-component-area",
        type=int,
        default=0,
        metavar="PX",
        help="take connected parts of fewer pixels out of each mask, the largest excepted, before score, area and "
        "flags are made (default: none)",
    )


def options_of(arguments: argparse.Namespace) -> LabelOptions:
    """What `add_options`'s arguments say."""
    branch = None if arguments.branch is None else Branch(arguments.branch)
    return LabelOptions(
        branch,
        arguments.threshold,
        agreement=arguments.agreement,
        flip=arguments.flip,
        min_component_area_px=arguments.min_component_area,
        model=arguments.model,
        resolve_overlaps=arguments.resolve_overlaps,
    )


def listed_in(count: int, path: Path) -> str:
    """Where all failures of a job can be read."""
    return f"mal-client: {'the failure is' if count == 1 else f'all {count} failures are'} listed in {path}"


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: a positive number of seconds is needed")
    return value


def read_word(path: Path, name: str) -> str:
    """Returns the secret in a file, without surrounding white space. Raises as `read_secret_file`."""
    return read_secret_file(path, name).strip()


def _client(arguments: argparse.Namespace, address: str) -> Client:
    return Client(address, **_how(arguments))


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of either client."""
    return {
        "timeout_s": arguments.timeout,
        "tls": arguments.tls,
        "tls_ca": arguments.tls_ca,
        "client_cert": arguments.client_cert,
        "client_key": arguments.client_key,
        "token": None if arguments.token_file is None else read_word(arguments.token_file, "--token-file"),
    }
