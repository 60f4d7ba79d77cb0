"""An interaction function for CVAT's page: a box goes in, a mask comes out. Needs the extra `cvat`.

`cvat-cli function run-agent` runs it (CVAT Online and Enterprise); `mal_client.integrations.cvat.nuclio` is the same
for CVAT's own serverless functions. A detection function would be of no use: CVAT never tells those of any box.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk import models
from PIL import Image

from mal_client.client import Client
from mal_client.integrations.cvat.mask_encoding import mask_points
from mal_train.core.errors import InputError
from mal_train.core.secrets import read_secret_file


class BoxToMask:
    """CVAT's InteractionFunction: one box, no points.

    Attributes:
        spec: what CVAT's page asks of the annotator.
    """

    spec = cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=None, min_bounding_boxes=1)

    def __init__(self, client: Client) -> None:
        self._client = client

    def preprocess_image(self, context: Any, image: Image.Image) -> bytes:
        """The encoded picture, which the agent keeps for the next boxes on it."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def detect(
        self, context: Any, pp_image: bytes, prompts: cvataa.InteractionPrompts
    ) -> list[cvataa.InteractionResultShape]:
        """The mask of the box; nothing where no pixel reached the threshold.

        Raises:
            InputError: no box, or one that no mask can answer.
        """
        if prompts.bounding_box is None:
            raise InputError("no box; draw one round the object")
        (x0, y0), (x1, y1) = prompts.bounding_box
        (label,) = self._client.label_image(pp_image, [(x0, y0, x1 - x0, y1 - y0)])
        if label.error is not None:
            raise InputError(str(label.error))
        if not label.area or label.rle is None:
            return []
        confidence = models.AttributeValRequest(
            spec_id=cvataa.InteractionResultAttributes.CONFIDENCE.value, value=f"{label.score:.4f}"
        )
        return [cvataa.InteractionResultShape(type="mask", points=mask_points(label.rle), attributes=[confidence])]


def create(server: str, token_file: str = "", tls_ca: str = "") -> BoxToMask:
    """What `cvat-cli` calls with its `-p server=str:HOST:PORT`.

    Args:
        server: where mal-server listens.
        token_file: file with the token that it asks for; empty: none.
        tls_ca: PEM file of the authority that signed its certificate; empty: no encryption.
    """
    token = read_secret_file(Path(token_file), "token_file").strip() if token_file else None
    return BoxToMask(Client(server, token=token, tls_ca=tls_ca or None))
