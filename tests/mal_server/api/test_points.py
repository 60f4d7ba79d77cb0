"""Points that correct masks: obeyed by the mask of their box, refused with it, and without effect on all others."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from google.rpc import code_pb2
from mal.v1 import evaluation_pb2, labeling_pb2, model_pb2, types_pb2

from mal_server.api.serialization.labeling_messages import CallDefaults, read_label_request
from mal_server.config.limits import Limits
from mal_server.inference.preparation import BOXES_PER_TASK
from mal_server.scheduling.priority import Priority
from mal_train.core.images.decoder import encode_png
from mal_train.core.masks.points import MAX_POINTS
from mal_train.core.settings import Branch
from tests.mal_server.calls import bulk, fields_of, mask_of, reason_of, refusal, with_server
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, Running, bright_disc, encoded, label, label_request

POSITIVE, NEGATIVE = types_pb2.POINT_LABEL_POSITIVE, types_pb2.POINT_LABEL_NEGATIVE
DARK, BRIGHT = (20.5, 10.5), (30.5, 20.5)
"""In the box of the disc: a corner outside of the disc, and its center."""
OTHER_BOX = (14.0, 4.0, 32.0, 32.0)

Sent = tuple[float, float, int]


def with_points(request: labeling_pb2.LabelImageRequest, index: int, *points: Sent) -> labeling_pb2.LabelImageRequest:
    """Adds points x, y, label to an instance of a request."""
    for x, y, point_label in points:
        request.instances[index].points.add(x=x, y=y, label=point_label)
    return request


def corrected(*points: Sent) -> labeling_pb2.LabelImageRequest:
    """Returns a request for two boxes, the first of which has points."""
    return with_points(label_request(DISC_BOX, OTHER_BOX), 0, *points)


def at(result: types_pb2.InstanceResult, point: tuple[float, float]) -> bool:
    return bool(mask_of(result)[int(point[1]), int(point[0])])


def test_the_mask_of_a_box_obeys_its_points_and_the_others_stay_as_they_are() -> None:
    async def work(running: Running) -> Any:
        plain = await label(running, label_request(DISC_BOX, OTHER_BOX))
        return plain, await label(running, corrected((*DARK, POSITIVE), (*BRIGHT, NEGATIVE)))

    (plain, other), (found, unchanged) = with_server(work)
    assert [at(plain, DARK), at(plain, BRIGHT)] == [False, True]
    assert [at(found, DARK), at(found, BRIGHT)] == [True, False]
    assert unchanged == other


def test_items_of_a_stream_obey_their_points() -> None:
    answers = with_server(lambda running: bulk(running, corrected((*DARK, POSITIVE)), label_request(DISC_BOX)))
    found = {result.instance_id: result for result in answers["item 0"].response.results}
    assert at(found[0], DARK)
    assert not at(answers["item 1"].response.results[0], DARK)


def test_points_of_a_large_request_stay_with_their_boxes() -> None:
    boxes = [DISC_BOX] * (2 * BOXES_PER_TASK + 1)
    request = with_points(label_request(*boxes), BOXES_PER_TASK + 2, (*DARK, POSITIVE))
    results = with_server(lambda running: label(running, request))
    assert [result.instance_id for result in results if at(result, DARK)] == [BOXES_PER_TASK + 2]


def test_points_of_a_part_are_in_pixels_of_the_larger_image() -> None:
    whole = corrected((*DARK, POSITIVE), (*BRIGHT, NEGATIVE), (58.0, 38.0, NEGATIVE))
    part = corrected((*DARK, POSITIVE), (*BRIGHT, NEGATIVE), (58.0, 38.0, NEGATIVE))
    part.image.content = encode_png(np.ascontiguousarray(bright_disc()[:38, 2:56]))
    part.image.region.CopyFrom(types_pb2.ImageRegion(x=2, y=0, image_width=60, image_height=40))
    del whole.instances[1], part.instances[1]
    (expected,) = with_server(lambda running: label(running, whole))
    (found,) = with_server(lambda running: label(running, part))
    assert found == expected
    assert [at(found, DARK), at(found, BRIGHT)] == [True, False]


@pytest.mark.parametrize(
    "points",
    [
        [(math.nan, 20.0, POSITIVE)],
        [(30.0, math.inf, NEGATIVE)],
        [(60.0, 20.0, NEGATIVE)],
        [(-0.5, 20.0, NEGATIVE)],
        [(5.0, 5.0, POSITIVE)],
        [(30.2, 20.2, POSITIVE), (30.8, 20.8, NEGATIVE)],
        [(30.0, 20.0, POSITIVE)] * (MAX_POINTS + 1),
        [(1e300, -1e300, NEGATIVE)],
    ],
    ids=["nan", "infinite", "outside", "negative", "outside the box", "contradiction", "too many", "far"],
)
def test_points_that_no_mask_can_obey_fail_their_box_alone(points: list[Sent]) -> None:
    bad, good = with_server(lambda running: label(running, corrected(*points)))
    assert (bad.status.code, reason_of(bad.status)) == (code_pb2.INVALID_ARGUMENT, "BAD_POINT")
    assert len(bad.masks) == 0
    assert good.status.code == code_pb2.OK


def test_of_too_many_points_no_more_are_decoded_than_show_it() -> None:
    point = types_pb2.Instance(points=[types_pb2.Point(x=20.0, y=10.0, label=POSITIVE)]).SerializeToString()
    request = label_request(DISC_BOX, OTHER_BOX)
    request.instances[0].MergeFromString(point * 1_000_000)
    assert len(request.instances[0].points) == 1_000_000
    decoded = read_label_request(request, Limits(), CallDefaults(Branch.STUDENT, Priority.INTERACTIVE, math.inf))
    assert [len(points) for points in decoded.points or ()] == [MAX_POINTS + 1, 0]


def test_as_many_points_as_the_limit_says_are_accepted() -> None:
    async def work(running: Running) -> Any:
        info = await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        points = [(20.0 + index % 8, 10.0 + index // 8, NEGATIVE) for index in range(info.limits.max_points)]
        return info.limits.max_points, await label(running, corrected(*points))

    limit, (found, _) = with_server(work)
    assert limit == MAX_POINTS
    assert found.status.code == code_pb2.OK


@pytest.mark.parametrize("point_label", [types_pb2.POINT_LABEL_UNSPECIFIED, 7])
def test_a_point_without_a_known_label_is_a_fault_of_the_request(point_label: int) -> None:
    _, status, _ = refusal(lambda running: label(running, corrected((*DARK, POSITIVE), (*BRIGHT, point_label))))
    assert fields_of(status) == ["instances[0].points[1].label"]


def test_a_click_on_a_cached_image_sends_no_image() -> None:
    async def work(running: Running) -> Any:
        sent = await label(running, corrected((*DARK, POSITIVE)))
        click = corrected((*DARK, POSITIVE))
        click.image.content_sha256 = hashlib.sha256(DISC_PNG).hexdigest()
        assert click.ByteSize() < 300
        return sent, await label(running, click)

    sent, by_hash = with_server(work)
    assert by_hash == sent


def test_an_evaluation_refuses_points() -> None:
    truth = evaluation_pb2.GroundTruth(category_id=1, instance=corrected((*DARK, POSITIVE)).instances[0])
    image = evaluation_pb2.EvaluateImage(
        item_id="a", image=types_pb2.ImageSource(content=encoded(bright_disc())), ground_truth=[truth]
    )

    async def work(running: Running) -> Any:
        async def requests() -> Any:
            yield evaluation_pb2.EvaluateRequest(options=evaluation_pb2.EvaluateOptions())
            yield evaluation_pb2.EvaluateRequest(image=image)

        return [response async for response in running.evaluation.Evaluate(requests())][-1].result

    result = with_server(work)
    assert (result.images, result.images_skipped) == (0, 1)
    assert "points" in result.skipped[0].message
