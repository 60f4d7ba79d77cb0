"""Options that several commands of `mal-client` share, and the objects that are built from their values."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mal_client.client import DEFAULT_TIMEOUT_S, AsyncClient, Client
from mal_client.images.image_files import ImageFiles
from mal_client.types import LabelOptions
from mal_train.core.addresses import split_addresses
from mal_train.core.console import Console, escape_control, print_result
from mal_train.core.errors import ConfigError
from mal_train.core.images.files import UrlImages
from mal_train.core.numbers import counted
from mal_train.core.secrets import read_secret_file
from mal_train.core.settings import Branch, RotatedBoxes, RowRules
from mal_train.core.storage.addresses import Location, is_remote, parse_location, redact
from mal_train.core.storage.hosts import AllowedHosts
from mal_train.core.storage.writing import refuse_same_location

if TYPE_CHECKING:
    from mal_client.formats.boxes import RowError

EXIT_SOME_FAILED = 3
"""Exit code of a command that finished although some items failed."""

LISTED = 5
"""Failures that a command prints; its errors file lists all of them."""

Commands = argparse._SubParsersAction  # argparse has no public name for it


def add_command(commands: Commands[argparse.ArgumentParser], name: str, description: str) -> argparse.ArgumentParser:
    """Adds the parser of one command.

    The parsed arguments have a function `can_resume(arguments)`: True if the same command, run again, resumes an
    interrupted run. By default it returns False; a command that can resume sets its own.
    """
    parser = commands.add_parser(name, help=description, description=f"{description[0].upper()}{description[1:]}.")
    parser.set_defaults(can_resume=lambda _: False)
    return parser


def add_connection_options(parser: argparse.ArgumentParser, *, allow_several: bool = False) -> None:
    """Adds the address of the server and the credentials for it."""
    parser.add_argument(
        "--server",
        required=True,
        metavar="HOST:PORT[,...]",
        help="address of mal-server; "
        + ("several addresses share the work" if allow_several else "several IP addresses share the calls")
        + ", and so do all IP addresses of a name",
    )
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds without a response after which the server counts as lost; above 0 (default: %(default)g)",
    )
    parser.add_argument(
        "--tls",
        action="store_true",
        help="encrypt the connection and verify the server with the public certificate authorities (default: no TLS)",
    )
    parser.add_argument(
        "--tls-ca",
        type=Path,
        metavar="CA.pem",
        help="encrypt the connection and verify the server with this certificate authority only (default: no TLS)",
    )
    parser.add_argument(
        "--client-cert", type=Path, metavar="CERT.pem", help="client certificate for mutual TLS (default: none)"
    )
    parser.add_argument(
        "--client-key",
        type=Path,
        metavar="KEY.pem",
        help="private key of the client certificate (default: the file of --client-cert)",
    )
    parser.add_argument(
        "--authority",
        metavar="NAME",
        help="name for which the certificates of the servers must be valid (default: that of --server)",
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with the bearer token for the server (default: no token)"
    )


def make_client(arguments: argparse.Namespace) -> Client:
    """Builds the client that the connection options describe."""
    return Client(arguments.server, **_client_arguments(arguments))


def make_async_client(arguments: argparse.Namespace) -> AsyncClient:
    """Builds the asyncio client that the connection options describe."""
    return AsyncClient(arguments.server, **_client_arguments(arguments))


@contextmanager
def make_clients(arguments: argparse.Namespace) -> Iterator[list[Client]]:
    """Builds a client for each address of `--server`, and closes them at the end of the block."""
    with ExitStack() as stack:
        addresses = split_addresses(arguments.server)
        shared = _client_arguments(arguments)
        yield [stack.enter_context(Client(address, **shared)) for address in addresses or [arguments.server]]


def add_dataset_options(parser: argparse.ArgumentParser, content: str = "COCO file with boxes") -> None:
    """Adds the annotation file, described by `content`, and the location of its images."""
    parser.add_argument(
        "--annotations",
        type=location,
        required=True,
        metavar="IN.json",
        help=f"{content}, as JSON or parquet (.parquet: a file, or a folder of parts), or its address (s3://…)",
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument(
        "--images",
        type=location,
        metavar="DIR",
        help="folder that the file names of the annotations are relative to, or its address (s3://…)",
    )
    images.add_argument(
        "--coco-url-hosts",
        metavar="HOST[,...]",
        help="alternative to --images: fetch each image from the coco_url of its row, from these hosts only; * allows "
        "every host with a public address, by https",
    )
    images.add_argument(
        "--image-glob",
        dest="images",
        type=local_pattern,
        metavar="PATTERN",
        help="alternative to --images: pattern of the image files, for example 'photos/**/*.jpg' (quoted; ** matches "
        "any folders); each file name of the annotations must be the end of exactly one path",
    )
    add_outside_option(parser)


def add_row_rules(parser: argparse.ArgumentParser) -> None:
    """Adds the options that tell how rows of the annotations are read."""
    parser.add_argument(
        "--crowd-as-objects",
        action="store_true",
        help="read annotations with iscrowd 1 as single objects; CVAT sets it for every mask (default: as crowd "
        "regions, which are copied and not counted)",
    )
    parser.add_argument(
        "--rotated-boxes",
        choices=[str(choice) for choice in RotatedBoxes],
        default=str(RotatedBoxes.REFUSE),
        help="rotated boxes, as CVAT exports them (attributes.rotation). refuse: no mask; upright: label the smallest "
        "upright box around each, and flag it (default: %(default)s)",
    )


def row_rules(arguments: argparse.Namespace) -> RowRules:
    """Returns the values of `add_row_rules`."""
    return RowRules(arguments.crowd_as_objects, RotatedBoxes(arguments.rotated_boxes))


def add_outside_option(parser: argparse.ArgumentParser, *, takes_patterns: bool = True) -> None:
    """Adds the permission to read images outside their folder, or outside that of a pattern if --images takes one."""
    pattern = " (or the one in which the pattern begins)" if takes_patterns else ""
    parser.add_argument(
        "--allow-outside-images",
        action="store_true",
        help=f"also read images outside the folder of --images{pattern}, where file "
        "names with '..', absolute names or symbolic links lead; only for annotations and folders that you trust "
        "(default: refuse such images)",
    )


def make_image_files(arguments: argparse.Namespace, annotations: Location | None = None) -> ImageFiles:
    """Finds the images that the options describe.

    Args:
        arguments: values of `add_dataset_options`.
        annotations: local annotation file, whose rows hold the URLs for --coco-url-hosts.

    Raises:
        BadDataset: there is no such folder, no match, or no URL.
        ConfigError: an entry of --coco-url-hosts is no host.
    """
    hosts = getattr(arguments, "coco_url_hosts", None)
    if hosts is None or annotations is None:
        return ImageFiles(arguments.images, allow_outside=arguments.allow_outside_images)
    # Imported here: the commands without it start faster.
    from mal_train.core.coco.image_urls import image_urls  # noqa: PLC0415

    return ImageFiles(UrlImages(image_urls(annotations), AllowedHosts.parse(hosts.split(","), "--coco-url-hosts")))


def location(text: str) -> Location:
    """Parses a path or address."""
    try:
        return parse_location(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_pattern(text: str) -> str:
    """Parses a pattern of local files."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{redact(text)}: patterns find local files; give --images for an address")
    return text


def local_path(text: str) -> Path:
    """Parses the path of a file that is changed in place or locked, which no store allows."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{redact(text)}: must be a local path")
    return Path(text)


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that control how boxes become masks."""
    parser.add_argument(
        "--branch",
        choices=[str(branch) for branch in Branch],
        help="network that predicts the masks; mixed: mean of both (default: the server's setting)",
    )
    parser.add_argument("--model", metavar="NAME", help="name of the model (default: the server's default model)")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="mask threshold for boxes of every size, a probability between 0 and 1, both excluded (default: the "
        "checkpoint's thresholds by size class)",
    )
    parser.add_argument(
        "--agreement",
        action="store_true",
        help="also measure the IoU of the student's and the teacher's mask; doubles the work (default: off)",
    )
    parser.add_argument(
        "--flip",
        action="store_true",
        help="average each probability map with that of the mirrored crop; doubles the work (default: off)",
    )
    parser.add_argument(
        "--resolve-overlaps",
        action="store_true",
        help="assign pixels in which masks of an image overlap in part to one of them (default: off)",
    )
    parser.add_argument(
        "--min-component-area",
        type=int,
        default=0,
        metavar="PX",
        help="remove connected components of fewer pixels from each mask, except its largest; 0 or more (default: "
        "%(default)d, removes none)",
    )


def add_polygon_tolerance(parser: argparse.ArgumentParser, default: float = 0.0) -> None:
    """Adds the largest distance between a polygon and the edge of its mask."""
    parser.add_argument(
        "--polygon-tolerance",
        type=float,
        default=default,
        metavar="PX",
        help="largest distance in pixels between a polygon and the edge of its mask; larger values give fewer points; "
        "0 or more (default: %(default)g, 0 is exact)",
    )


def refuse_outputs_over_inputs(inputs: Iterable[Location | None], outputs: Iterable[Location | None]) -> None:
    """Protects the files that a command reads. Raises ConfigError: an output is an input; None is no file."""
    for source, output in product(inputs, outputs):
        if source is not None and output is not None:
            refuse_same_location(source, output)


def make_label_options(arguments: argparse.Namespace) -> LabelOptions:
    """Builds the labeling options from the values of `add_label_options`."""
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


def print_line(text: str) -> None:
    """Prints one line to stdout. Text from files, servers and users neither moves the cursor nor forges a line."""
    print_result(one_line(text))


def print_outputs(outputs: Mapping[str, Location | None]) -> None:
    """Prints the location of each output that was written, by its name; None is no output."""
    for name, output in outputs.items():
        if output is not None:
            print_line(f"{name}: {redact(output)}")


def print_error(text: str) -> None:
    """Prints one line to stderr, like `print_line`."""
    Console().print(one_line(text))


def print_errors(errors: Sequence[RowError]) -> None:
    """Prints how many items were omitted for each reason, and the messages of the first."""
    for reason, count in Counter(error.reason for error in errors).most_common():
        print_error(f"mal-client: {reason}: {count} omitted")
    for error in errors[:LISTED]:
        print_error(f"  {error.message}")


def one_line(text: str) -> str:
    r"""Returns text without control characters and line breaks, each as an escape.

    >>> print(one_line("a.jpg\x1b[2J\nmal-client: done"))
    a.jpg\x1b[2J\nmal-client: done
    """
    return escape_control(text).replace("\n", "\\n")


def failures_message(count: int, path: Location) -> str:
    """Returns the line that names the errors file of a command."""
    return f"mal-client: {counted(count, 'failure')}; see {redact(path)}"


def positive_seconds(text: str) -> float:
    """Parses a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}; expected a number of seconds above 0")
    return value


def read_secret(path: Path, option: str) -> str:
    """Returns the token or password in a file, without surrounding white space.

    Raises:
        ConfigError: the file is unusable (see `read_secret_file`), or its text is not ASCII, as HTTP headers require.
    """
    text = read_secret_file(path, option).strip()
    if not text.isascii():
        raise ConfigError(f"{option}: {path}: not ASCII text; remove the byte order mark and other such characters")
    return text


def _client_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments that both client classes accept."""
    return {
        "timeout_s": arguments.timeout,
        "tls": arguments.tls,
        "tls_ca": arguments.tls_ca,
        "client_cert": arguments.client_cert,
        "client_key": arguments.client_key,
        "authority": arguments.authority,
        "token": None if arguments.token_file is None else read_secret(arguments.token_file, "--token-file"),
    }
