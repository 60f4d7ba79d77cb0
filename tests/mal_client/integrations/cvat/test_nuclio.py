"""Tests of the serverless function for a self-hosted CVAT."""

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
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch, fake: FakeServer) -> Iterator[Any]:
    """Makes a context as Nuclio passes it to a function."""
    with serving(fake) as address:
        monkeypatch.setenv("MAL_SERVER", address)
        nuclio_context = SimpleNamespace(
            user_data=SimpleNamespace(), Response=SimpleNamespace, logger=logging.getLogger("nuclio")
        )
        nuclio.init_context(nuclio_context)
        yield nuclio_context
        nuclio_context.user_data.client.close()


def call(context: Any, **body: Any) -> Any:
    image = base64.b64encode(encoded(1)).decode()
    return nuclio.handler(context, SimpleNamespace(body={"image": image, "pos_points": [], "neg_points": []} | body))


def test_the_response_has_the_mask_of_the_full_image_as_rows(context: Any) -> None:
    response = call(context, obj_bbox=[[5, 4], [15, 12]])
    assert (response.status_code, response.content_type) == (200, "application/json")
    expected = decode_mask(box_filled((5.0, 4.0, 10.0, 8.0), (30, 40)))
    assert (np.array(json.loads(response.body)["mask"]) == expected).all()


def test_the_clicks_of_the_request_are_the_points_of_the_box(context: Any, fake: FakeServer) -> None:
    response = call(context, obj_bbox=[[5, 4], [15, 12]], pos_points=[[6, 5.5]], neg_points=[[9, 9], [10, 10]])
    assert response.status_code == 200
    (instance,) = fake.label_requests[-1].instances
    assert [(point.x, point.y, point.label) for point in instance.points] == [(6, 5.5, 1), (9, 9, 2), (10, 10, 2)]


def test_a_request_without_clicks_has_no_points(context: Any, fake: FakeServer) -> None:
    assert call(context, obj_bbox=[[5, 4], [15, 12]], pos_points=None).status_code == 200
    assert not fake.label_requests[-1].instances[0].points


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"obj_bbox": [[5, 4], [15, 12]], "pos_points": [[1]]}, "pos_points"),
        ({"obj_bbox": [[5, 4], [15, 12]], "neg_points": 3}, "neg_points"),
        ({"obj_bbox": None}, "obj_bbox"),
        ({"obj_bbox": [[5, 4]]}, "obj_bbox"),
        ({"obj_bbox": [[10**400, 4], [15, 12]]}, "obj_bbox"),
        ({"obj_bbox": [[90, 90], [99, 99]]}, "BAD_BOX"),
        ({"obj_bbox": [[5, 4], [15, 12]], "image": "AAAA"}, "image"),
    ],
)
def test_an_invalid_request_is_refused_with_its_reason(context: Any, body: dict[str, Any], name: str) -> None:
    response = call(context, **body)
    assert response.status_code == 400
    assert name in json.loads(response.body)["error"]
