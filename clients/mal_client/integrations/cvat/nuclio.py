"""The same interaction as a serverless function of a CVAT that one runs oneself: `deploy/cvat/` has what nuclio needs.

Nuclio calls `init_context` once for each worker and `handler` for each box. The body is CVAT's: the picture in base64,
`obj_bbox` as two corners; the answer is the whole picture's mask as rows of 0 and 1, which is what CVAT takes from its
own functions.
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
from mal_client.types import BoxXywh
from mal_train.core.errors import InputError
from mal_train.core.secrets import read_secret_file

SERVER = "MAL_SERVER"
TOKEN_FILE = "MAL_TOKEN_FILE"
TLS_CA = "MAL_TLS_CA"
"""Environment variables of the function."""


def init_context(context: Any) -> None:
    """Opens the channel to the server that MAL_SERVER names."""
    token_file = os.environ.get(TOKEN_FILE)
    token = None if not token_file else read_secret_file(Path(token_file), TOKEN_FILE).strip()
    context.user_data.client = Client(os.environ[SERVER], token=token, tls_ca=os.environ.get(TLS_CA))


def handler(context: Any, event: Any) -> Any:
    """One call of CVAT."""
    try:
        content, box = _asked(event.body)
        (label,) = context.user_data.client.label_image(content, [box])
        if label.error is not None:
            raise InputError(str(label.error))
        body, status = {"mask": label.mask.astype(np.uint8).tolist()}, 200
    except (InputError, ClientError) as error:
        context.logger.error(str(error))
        body, status = {"error": str(error)}, 400 if isinstance(error, InputError) else 503
    return context.Response(body=json.dumps(body), headers={}, content_type="application/json", status_code=status)


def _asked(body: Any) -> tuple[bytes, BoxXywh]:
    """The encoded picture and the box."""
    try:
        (x0, y0), (x1, y1) = body["obj_bbox"]
        return base64.b64decode(body["image"]), (float(x0), float(y0), float(x1) - float(x0), float(y1) - float(y0))
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise InputError("no box or no picture in the call; draw a box round the object") from None
