"""Points of annotations: the labeled file has the corrected masks, keeps the points and says which rows they are."""

import json
from typing import Any

import numpy as np
import pytest
from mal_client.client import Client
from mal_client.dataset_check.check import check_dataset
from mal_client.errors import InvalidRequest
from mal_client.types import DatasetOptions, DatasetResult

from mal_train.core.coco.stream import copy_coco
from mal_train.core.errors import ConfigError
from mal_train.core.masks.points import MAX_POINTS
from mal_train.core.masks.rle import Rle, decode_mask
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, Limits, serving
from tests.mal_client.test_against_server import served
from tests.mal_train.core.images.tiffs import tiff_of

POINTS: list[list[float]] = [[3.5, 4.5, 1], [6, 5, 0]]
OUTSIDE: list[list[float]] = [[30, 20, 1]]


@pytest.fixture
def dataset(tmp_path: Any) -> Dataset:
    """Returns a dataset whose first row has points, its second key points, and three others points that are invalid."""
    dataset = make_dataset(tmp_path)
    rows = dataset.coco["annotations"]
    rows[0]["points"] = POINTS
    rows[1] |= {"keypoints": [3, 4, 2], "num_keypoints": 1, "points": None}
    rows[2]["points"] = OUTSIDE
    rows[3]["points"] = [[3, 4]]
    rows[4]["points"] = [[3, 4, 1]] * (MAX_POINTS + 1)
    dataset.save()
    return dataset


def label(dataset: Dataset, limits: dict[str, int] | None = None, **options: Any) -> DatasetResult:
    with served(limits=limits or {}) as address, Client(address) as client:
        dataset_options = DatasetOptions(**options)
        return client.label_dataset(
            dataset.json_path, dataset.images_dir, dataset.output, dataset_options=dataset_options
        )


def pixels(row: dict[str, Any], points: list[list[float]]) -> list[bool]:
    mask = decode_mask(Rle.from_coco(row["segmentation"]))
    return [bool(mask[int(y), int(x)]) for x, y, _ in points]


def test_rows_with_points_get_masks_that_obey_them_and_are_marked(dataset: Dataset) -> None:
    result = label(dataset)
    rows = dataset.labeled()
    assert pixels(rows[100], POINTS) == [True, False]
    assert (rows[100]["points"], rows[100]["corrected"]) == (POINTS, True)
    assert rows[101]["keypoints"] == [3, 4, 2]
    assert [key for key, row in rows.items() if "corrected" in row] == [100]
    assert {failed.annotation_id: failed.error.reason for failed in result.failed} == dict.fromkeys(
        (102, 103, 104), "BAD_POINT"
    )
    for failed in result.failed:
        assert str(failed.annotation_id) in failed.error.message
        assert rows[failed.annotation_id]["error"]["reason"] == "BAD_POINT"


def test_labeling_the_output_again_changes_no_mask(dataset: Dataset) -> None:
    label(dataset)
    before = dataset.labeled()
    dataset.json_path.write_bytes(dataset.output.read_bytes())
    label(dataset)
    assert dataset.labeled() == before


def test_a_row_without_points_is_not_marked_any_more(dataset: Dataset) -> None:
    label(dataset)
    dataset.coco = json.loads(dataset.output.read_text())
    del dataset.coco["annotations"][0]["points"]
    dataset.save()
    label(dataset)
    assert "corrected" not in dataset.labeled()[100]


def test_points_in_parquet_are_those_of_json(dataset: Dataset) -> None:
    label(dataset)
    expected = dataset.labeled()
    parquet = dataset.folder / "in.parquet"
    copy_coco(dataset.json_path, parquet)
    with served() as address, Client(address) as client:
        client.label_dataset(parquet, dataset.images_dir, dataset.folder / "out.parquet")
    copy_coco(dataset.folder / "out.parquet", dataset.output)
    assert dataset.labeled() == expected


def test_images_that_are_read_by_windows_are_corrected_as_completely(dataset: Dataset) -> None:
    image = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    (dataset.images_dir / "image_0.png").rename(dataset.images_dir / "unused.png")
    (dataset.images_dir / "image_0.tif").write_bytes(tiff_of(image, tile=16))
    dataset.coco["images"][0]["file_name"] = "image_0.tif"
    dataset.coco["images"] = dataset.coco["images"][:1]
    dataset.coco["annotations"] = dataset.coco["annotations"][:2]
    dataset.coco["annotations"][0]["points"] = [*POINTS, [39, 29, 0]]
    dataset.save()
    label(dataset)
    whole = dataset.labeled()
    label(dataset, {"max_pixels": 900, "max_side": 35})
    assert dataset.labeled() == whole
    assert pixels(whole[100], POINTS) == [True, False]


def test_changed_points_are_another_job(dataset: Dataset) -> None:
    fake = FakeServer(Faults(kill_after=1), Limits(max_items_in_flight=1))
    with serving(fake) as address, Client(address, timeout_s=10) as client:
        client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output)
        fake.faults = Faults()
        dataset.coco["annotations"][0]["points"] = POINTS[:1]
        dataset.save()
        with pytest.raises(ConfigError, match="input_sha256"):
            client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output)


def test_a_server_that_ignores_points_gets_no_job_with_points(dataset: Dataset) -> None:
    fake = FakeServer(limits=Limits(max_points=0))
    with serving(fake) as address, Client(address) as client, pytest.raises(InvalidRequest) as refused:
        client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output)
    assert refused.value.reason == "POINTS_UNSUPPORTED"
    assert not fake.label_requests
    assert not dataset.output.exists()


def test_check_finds_the_rows_whose_points_fail(dataset: Dataset) -> None:
    issues = check_dataset(dataset.json_path, dataset.images_dir).issues
    assert {code: issue.count for code, issue in issues.items()} == {"BAD_POINT": 3}
