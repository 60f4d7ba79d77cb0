"""Claims about the serverless function for a CVAT that one runs oneself."""

import base64
import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mal_client.integrations.cvat import nuclio

from deploy.demo.baselines import box_filled
from mal_train.core.masks.rle import decode_mask
from tests.mal_client.fake_server import FakeServer, serving
from tests.mal_client.integrations.cvat.cvat_task import encoded


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As nuclio gives it to a function."""
    with serving(FakeServer()) as address:
        monkeypatch.setenv("MAL_SERVER", address)
        made = SimpleNamespace(
            user_data=SimpleNamespace(), Response=SimpleNamespace, logger=logging.getLogger("nuclio")
        )
        nuclio.init_context(made)
        yield made
        made.user_data.client.close()


def call(context: Any, **body: Any) -> Any:
    picture = base64.b64encode(encoded(1)).decode()
    return nuclio.handler(context, SimpleNamespace(body={"image": picture, "pos_points": [], "neg_points": []} | body))


def test_a_box_becomes_the_mask_of_the_whole_picture_in_rows(context: Any) -> None:
    answer = call(context, obj_bbox=[[5, 4], [15, 12]])
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    expected = decode_mask(box_filled((5.0, 4.0, 10.0, 8.0), (30, 40)))
    assert (np.array(json.loads(answer.body)["mask"]) == expected).all()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"obj_bbox": None}, "draw a box"),
        ({"obj_bbox": [[5, 4]]}, "draw a box"),
        ({"obj_bbox": [[90, 90], [99, 99]]}, "BAD_BOX"),
        ({"obj_bbox": [[5, 4], [15, 12]], "image": "AAAA"}, "refused"),
    ],
)
def test_what_cannot_be_answered_says_why(context: Any, body: dict[str, Any], words: str) -> None:
    answer = call(context, **body)
    assert answer.status_code == 400
    assert words in json.loads(answer.body)["error"]
