"""The command `mal-client label-studio`: an ML backend that predicts masks for Label Studio's rectangles."""

from __future__ import annotations

import argparse
import asyncio
import logging
from pathlib import Path

from mal_client.cli.common import (
    Commands,
    add_command,
    add_connection_options,
    add_label_options,
    add_polygon_tolerance,
    make_client,
    make_label_options,
    one_line,
    print_line,
    read_secret,
)
from mal_client.web_guard import WebGuard
from mal_train.core.addresses import is_loopback
from mal_train.core.command_line import RenamedOption
from mal_train.core.errors import ConfigError

PORT = 9090

TOLERANCE_PX = 1.0
"""Default tolerance of polygons: keeps a seventh of the points of the exact outline on scenes of 640x480 px."""


def add_label_studio(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    backend = add_command(commands, "label-studio", "run an ML backend that predicts masks for Label Studio")
    backend.set_defaults(run=_serve)
    add_connection_options(backend)
    backend.add_argument(
        "--label-studio",
        metavar="URL",
        help="Label Studio server to fetch images from, for example http://localhost:8080 (default: none)",
    )
    backend.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with an access token of a Label Studio account; sent to the server of --label-studio only "
        "(default: no token)",
    )
    backend.add_argument(
        "--local-files",
        type=Path,
        metavar="DIR",
        help="folder that Label Studio serves as local files; its images are read directly (default: none)",
    )
    backend.add_argument(
        "--image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="another host to fetch images from, without the token; repeatable (default: none)",
    )
    backend.add_argument("--picture-host", action=RenamedOption, new="--image-host")  # former name
    add_polygon_tolerance(backend, TOLERANCE_PX)
    backend.add_argument(
        "--tight-boxes", action="store_true", help="also predict the tight box of each mask (default: off)"
    )
    backend.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    backend.add_argument(
        "--port",
        type=int,
        default=PORT,
        help="port to listen on, 0 to 65535; 0 chooses a free one (default: %(default)d)",
    )
    backend.add_argument(
        "--credentials-file",
        type=Path,
        metavar="FILE",
        help="file with USER:PASSWORD that Label Studio must send; required unless --host is a loopback address",
    )
    backend.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name under which Label Studio may reach the backend, besides localhost and IP addresses; repeatable "
        "(default: none)",
    )
    add_label_options(backend)


def _serve(arguments: argparse.Namespace) -> int:
    try:
        # Imported here: these modules need an extra.
        from mal_client.integrations.label_studio.app import build_app  # noqa: PLC0415
        from mal_client.integrations.label_studio.images import ImageFetcher  # noqa: PLC0415
        from mal_client.integrations.label_studio.predictor import Predictor  # noqa: PLC0415
        from mal_client.web_server import bound, until_interrupted  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'mask-auto-labeler[labelstudio]'") from None

    credentials = _optional_secret(arguments.credentials_file, "--credentials-file")
    if credentials is not None and ":" not in credentials:
        raise ConfigError(f"--credentials-file {arguments.credentials_file}: expected USER:PASSWORD")
    if credentials is None and not is_loopback(arguments.host):
        raise ConfigError(
            f"--host {arguments.host}: other machines could use the access token through this backend; give "
            "--credentials-file, or listen on 127.0.0.1"
        )
    images = ImageFetcher(
        arguments.label_studio,
        _optional_secret(arguments.api_key_file, "--api-key-file"),
        arguments.local_files,
        arguments.image_host,
    )
    _log_lines()
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        with make_client(arguments) as client:
            predictor = Predictor(
                client,
                images,
                make_label_options(arguments),
                tolerance_px=arguments.polygon_tolerance,
                tight_boxes=arguments.tight_boxes,
            )
            # Before the port opens: a wrong address or token of the labeling server is an error of this command.
            version = predictor.model_version()

            guard = WebGuard(frozenset(map(str.lower, arguments.allow_host)), is_loopback(arguments.host))

            async def serve() -> None:
                app = build_app(predictor, credentials, guard)
                async with bound(app, arguments.host, arguments.port) as address:
                    print_line(f"serving {version} on {address}")
                    await until_interrupted()

            asyncio.run(serve())
    finally:
        images.close()
    return 0


def _log_lines() -> None:
    """Logs to stderr, one line for each message: requests and images choose parts of them."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)


class _LineFormatter(logging.Formatter):
    """Escapes control characters and line breaks in messages."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def _optional_secret(path: Path | None, option: str) -> str | None:
    return None if path is None else read_secret(path, option)
