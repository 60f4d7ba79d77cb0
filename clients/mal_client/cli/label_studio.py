"""`mal-client label-studio`: an ML backend that gives Label Studio's rectangles their masks."""

from __future__ import annotations

import argparse
import asyncio
import logging
from pathlib import Path

from mal_client.cli.common import Commands, add_connection, add_options, add_verb, client_of, options_of, read_word
from mal_train.core.errors import ConfigError
from mal_train.core.net import is_loopback

PORT = 9090

TOLERANCE_PX = 1.0
"""Of polygons: a seventh of the points that the exact line has, on scenes of 640x480 px."""


def add_label_studio(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    verb = add_verb(commands, "label-studio", "an ML backend for Label Studio: rectangles become masks")
    verb.set_defaults(run=_serve)
    add_connection(verb)
    verb.add_argument(
        "--label-studio", metavar="URL", help="where Label Studio runs, whose pictures are fetched with the key"
    )
    verb.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="holds an access token of a Label Studio account"
    )
    verb.add_argument(
        "--local-files", type=Path, metavar="DIR", help="folder that Label Studio serves as local files, read directly"
    )
    verb.add_argument(
        "--picture-host",
        action="append",
        default=[],
        metavar="HOST",
        help="another host that pictures may come from, fetched without a key; may be given several times",
    )
    verb.add_argument(
        "--polygon-tolerance",
        type=float,
        default=TOLERANCE_PX,
        metavar="PX",
        help="how far polygons may run beside a mask's edge, where the project takes polygons (default %(default)s)",
    )
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    verb.add_argument(
        "--port", type=int, default=PORT, help="port to listen on; 0 takes a free one (default %(default)d)"
    )
    verb.add_argument(
        "--credentials-file", type=Path, metavar="FILE", help="holds USER:PASSWORD that Label Studio has to show"
    )
    add_options(verb)


def _serve(arguments: argparse.Namespace) -> int:
    try:
        # Imported here: they need what an extra brings.
        from mal_client.integrations.label_studio.app import build_app  # noqa: PLC0415
        from mal_client.integrations.label_studio.images import ImageFetcher  # noqa: PLC0415
        from mal_client.integrations.label_studio.predictor import Predictor  # noqa: PLC0415
        from mal_client.web import bound, until_interrupted  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'mask-auto-labeler[labelstudio]'") from None

    credentials = _word(arguments.credentials_file, "--credentials-file")
    if credentials is not None and ":" not in credentials:
        raise ConfigError(f"--credentials-file {arguments.credentials_file}: USER:PASSWORD is needed")
    if credentials is None and not is_loopback(arguments.host):
        raise ConfigError(
            f"--host {arguments.host}: is reached from other machines, which would all get masks of what the access "
            "token opens; give --credentials-file, whose USER:PASSWORD Label Studio then shows, or listen on 127.0.0.1"
        )
    pictures = ImageFetcher(
        arguments.label_studio,
        _word(arguments.api_key_file, "--api-key-file"),
        arguments.local_files,
        arguments.picture_host,
    )
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        with client_of(arguments) as client:
            predictor = Predictor(client, pictures, options_of(arguments), tolerance_px=arguments.polygon_tolerance)
            # Before anything is served: a wrong address or token is an error of this command, not of Label Studio.
            version = predictor.model_version()

            async def live() -> None:
                async with bound(build_app(predictor, credentials), arguments.host, arguments.port) as address:
                    print(f"serving {version} on {address}", flush=True)
                    await until_interrupted()

            asyncio.run(live())
    finally:
        pictures.close()
    return 0


def _word(path: Path | None, name: str) -> str | None:
    return None if path is None else read_word(path, name)
