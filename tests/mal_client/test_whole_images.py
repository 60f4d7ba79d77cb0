"""Options about all boxes of an image: no retry, split or resumed run may take the boxes apart."""

from pathlib import Path

import pytest
from mal_client.client import Client
from mal_client.errors import TOO_MANY_BOXES, InvalidRequest
from mal_client.types import LabelOptions

from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, Limits, serving
from tests.mal_client.test_label_image import BOXES, PIXELS

WHOLE = LabelOptions(resolve_overlaps=True)
APART = LabelOptions()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path, images=2, boxes=4)


def sent(fake: FakeServer) -> list[list[int]]:
    return [[instance.instance_id for instance in request.instances] for request in fake.label_requests]


def test_a_retried_box_takes_all_boxes_of_its_image_along() -> None:
    fake = FakeServer(Faults(retry_boxes={1: 2}))
    with serving(fake) as address, Client(address, timeout_s=20) as client:
        labels = client.label_image(PIXELS, BOXES, WHOLE)
    assert all(label.ok for label in labels)
    assert sent(fake) == [[0, 1, 2]] * 3


def test_a_retried_box_of_a_dataset_takes_all_boxes_of_its_image_along(dataset: Dataset) -> None:
    fake = FakeServer(Faults(retry_boxes={1: 1}))
    with serving(fake) as address, Client(address, timeout_s=20) as client:
        result = client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output, WHOLE)
    assert (result.labeled, result.failed_count) == (8, 0)
    assert sorted(sent(fake)) == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(("options", "reason"), [(WHOLE, TOO_MANY_BOXES), (APART, None)])
def test_more_boxes_than_one_request_takes_are_refused_or_split(options: LabelOptions, reason: str | None) -> None:
    fake = FakeServer(limits=Limits(max_boxes=2))
    with serving(fake) as address, Client(address, timeout_s=20) as client:
        if reason is None:
            assert len(client.label_image(PIXELS, BOXES, options)) == len(BOXES)
            return
        with pytest.raises(InvalidRequest) as caught:
            client.label_image(PIXELS, BOXES, options)
    assert caught.value.reason == reason
    assert not fake.label_requests


def test_an_image_of_too_many_boxes_fails_alone_and_the_others_are_labeled(dataset: Dataset) -> None:
    del dataset.coco["annotations"][4:6]
    dataset.save()
    fake = FakeServer(limits=Limits(max_boxes=3))
    with serving(fake) as address, Client(address, timeout_s=20) as client:
        result = client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output, WHOLE)
    assert (result.labeled, result.failed_count) == (2, 4)
    assert {row.error.reason for row in result.failed} == {TOO_MANY_BOXES}
    assert "image_0.png" in result.failed[0].error.message


def test_an_item_whose_masks_exceed_a_message_is_not_split(dataset: Dataset) -> None:
    for options, failed in ((WHOLE, 8), (APART, 0)):
        fake = FakeServer(limits=Limits(boxes_per_response=2))
        with serving(fake) as address, Client(address, timeout_s=20) as client:
            result = client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output, options)
        assert result.failed_count == failed


def test_a_resumed_job_labels_all_boxes_of_an_image_with_a_failed_one(dataset: Dataset) -> None:
    breaking = FakeServer(Faults(retry_boxes={5: 10**6}))
    with serving(breaking) as address, Client(address, timeout_s=1) as client:
        first = client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output, WHOLE)
    fake = FakeServer()
    with serving(fake) as address, Client(address, timeout_s=20) as client:
        result = client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output, WHOLE)
    assert not first.is_final
    assert (result.labeled, result.failed_count) == (8, 0)
    assert sent(fake) == [[4, 5, 6, 7]]
