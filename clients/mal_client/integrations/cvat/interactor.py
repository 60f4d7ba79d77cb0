"""An interaction function for CVAT's annotation page that turns a box and clicks into a mask. Needs the extra `cvat`.

`cvat-cli function run-agent` runs it (CVAT Online and Enterprise); `mal_client.integrations.cvat.nuclio` does the same
as a serverless function. It is not a detection function, because CVAT does not pass boxes to those.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk import models
from PIL import Image

from mal_client.client import Client
from mal_client.integrations.cvat.clicks import read_clicks
from mal_client.integrations.cvat.mask_encoding import mask_points
from mal_train.core.errors import InputError
from mal_train.core.secrets import read_secret_file


class BoxToMask:
    """CVAT InteractionFunction that takes one box, and points that correct its mask.

    Attributes:
        spec: the prompts that CVAT requests from the annotator.
    """

    spec = cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=1)

    def __init__(self, client: Client) -> None:
        self._client = client

    def preprocess_image(self, context: Any, image: Image.Image) -> bytes:
        """Encodes the image; the agent caches the result for further calls on the same image."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def detect(
        self, context: Any, pp_image: bytes, prompts: cvataa.InteractionPrompts
    ) -> list[cvataa.InteractionResultShape]:
        """Returns the mask of the box, which obeys the points; an empty list if no pixel reaches the threshold.

        Raises:
            InputError: there is no box, the box cannot be labeled, or no mask of the box can obey the points.
        """
        if prompts.bounding_box is None:
            raise InputError("bounding_box: missing; draw a box around the object")
        (x0, y0), (x1, y1) = prompts.bounding_box
        points = read_clicks(prompts.pos_points, prompts.neg_points)
        (label,) = self._client.label_image(pp_image, [(x0, y0, x1 - x0, y1 - y0)], points=[points])
        if label.error is not None:
            raise InputError(str(label.error))
        if not label.area or label.rle is None:
            return []
        confidence = models.AttributeValRequest(
            spec_id=cvataa.InteractionResultAttributes.CONFIDENCE.value, value=f"{label.score:.4f}"
        )
        return [cvataa.InteractionResultShape(type="mask", points=mask_points(label.rle), attributes=[confidence])]


def create(server: str, token_file: str = "", tls_ca: str = "") -> BoxToMask:
    """Creates the function; `cvat-cli` calls it with its options `-p server=str:HOST:PORT` and so on.

    Args:
        server: address of mal-server, HOST:PORT.
        token_file: file with the bearer token for the server; empty for none.
        tls_ca: PEM file of the certificate authority of the server; empty for no TLS.
    """
    token = read_secret_file(Path(token_file), "token_file").strip() if token_file else None
    return BoxToMask(Client(server, token=token, tls_ca=tls_ca or None))
