"""The interaction function as a Nuclio serverless function for a self-hosted CVAT; `deploy/cvat/` deploys it.

Nuclio calls `init_context` once per worker and `handler` once per box or click. The request body is CVAT's: `image` in
base64, `obj_bbox` as two corners, and the clicks so far in `pos_points` and `neg_points`. The response has the mask of
the full image as rows of 0 and 1, as CVAT's own functions return it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mal_client.client import Client
from mal_client.errors import ClientError
from mal_client.integrations.cvat.clicks import read_clicks
from mal_client.types import BoxXywh, Point
from mal_train.core.errors import InputError
from mal_train.core.secrets import read_secret_file

SERVER = "MAL_SERVER"
TOKEN_FILE = "MAL_TOKEN_FILE"
TLS_CA = "MAL_TLS_CA"
"""Environment variables that configure the function."""


def init_context(context: Any) -> None:
    """Creates the client of the server at MAL_SERVER."""
    token_file = os.environ.get(TOKEN_FILE)
    token = None if not token_file else read_secret_file(Path(token_file), TOKEN_FILE).strip()
    context.user_data.client = Client(os.environ[SERVER], token=token, tls_ca=os.environ.get(TLS_CA))


def handler(context: Any, event: Any) -> Any:
    """Labels the box of a CVAT request; the mask obeys its points.

    The status is 400 for an invalid request, and 503 if the server fails.
    """
    try:
        image_bytes, box, points = _parse_request(event.body)
        (label,) = context.user_data.client.label_image(image_bytes, [box], points=[points])
        if label.error is not None:
            raise InputError(str(label.error))
        body, status = {"mask": label.mask.astype(np.uint8).tolist()}, 200
    except (InputError, ClientError) as error:
        context.logger.error(str(error))
        body, status = {"error": str(error)}, 400 if isinstance(error, InputError) else 503
    return context.Response(body=json.dumps(body), headers={}, content_type="application/json", status_code=status)


def _parse_request(body: Any) -> tuple[bytes, BoxXywh, list[Point]]:
    """Returns the encoded image, the box and the points."""
    try:
        (x0, y0), (x1, y1) = body["obj_bbox"]
        box = (float(x0), float(y0), float(x1) - float(x0), float(y1) - float(y0))
        image_bytes = base64.b64decode(body["image"])
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error):
        raise InputError("obj_bbox, image: missing or invalid; draw a box around the object") from None
    return image_bytes, box, read_clicks(body.get("pos_points"), body.get("neg_points"))
