"""Claims about the mask formats of a labeled file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal.v1 import types_pb2
from mal_client.client import Client
from mal_client.dataset.output import masks_dir
from mal_client.types import DatasetOptions
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.masks.rle import Rle, area, encode_mask
from mal_train.core.settings import MaskFormat
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, serving


def ring() -> NDArray[np.bool_]:
    """Returns the mask of a thick ring and an island beside it: two parts, one hole."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = (y - 15) ** 2 + (x - 15) ** 2
    mask: NDArray[np.bool_] = (distance < 100) & (distance > 25)
    mask[3:7, 33:38] = True
    return mask


class FixedMaskServer(FakeServer):
    """Answers every box with the same mask."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        super().__init__()
        self.rle = encode_mask(mask)

    def _result(self, instance: types_pb2.Instance, image_hw: tuple[int, int]) -> types_pb2.InstanceResult:
        result = super()._result(instance, image_hw)
        if result.masks:
            result.masks[0].coco_rle.counts = self.rle.counts
            result.area_px = area(self.rle)
        return result


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path)


def written(dataset: Dataset, mask: NDArray[np.bool_], options: DatasetOptions) -> dict[str, Any]:
    with serving(FixedMaskServer(mask)) as address, Client(address, timeout_s=20) as client:
        client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output, dataset_options=options)
    output: dict[str, Any] = json.loads(dataset.output.read_text())
    return output


def read_by_pycocotools(dataset: Dataset, annotation_id: int = 100) -> NDArray[np.bool_]:
    coco = COCO(str(dataset.output))
    return np.asarray(coco.annToMask(coco.loadAnns([annotation_id])[0])).astype(bool)


@pytest.mark.parametrize("mask_format", list(MaskFormat))
def test_pycocotools_reads_the_same_mask_from_every_format(dataset: Dataset, mask_format: MaskFormat) -> None:
    written(dataset, ring(), DatasetOptions(mask_format=mask_format))
    np.testing.assert_array_equal(read_by_pycocotools(dataset), ring())


def test_polygons_are_one_list_of_numbers_for_each_part(dataset: Dataset) -> None:
    output = written(dataset, ring(), DatasetOptions(mask_format=MaskFormat.POLYGONS))
    segmentation = output["annotations"][0]["segmentation"]
    assert len(segmentation) == 2
    assert all(isinstance(value, int | float) for polygon in segmentation for value in polygon)
    assert output["mask_auto_labeler"]["polygon_holes"] == "bridged"
    assert output["mask_auto_labeler"]["polygon_tolerance_px"] == 0.0


def test_a_tolerance_shortens_polygons_and_is_recorded(dataset: Dataset) -> None:
    exact = written(dataset, ring(), DatasetOptions(mask_format=MaskFormat.POLYGONS))
    thin = written(dataset, ring(), DatasetOptions(mask_format=MaskFormat.POLYGONS, polygon_tolerance_px=1.0))
    assert len(str(thin["annotations"])) < 0.8 * len(str(exact["annotations"]))
    assert thin["mask_auto_labeler"]["polygon_tolerance_px"] == 1.0
    mask = read_by_pycocotools(dataset)
    assert np.count_nonzero(mask & ring()) / np.count_nonzero(mask | ring()) > 0.85


def test_an_empty_mask_is_run_length_encoded_among_polygons(dataset: Dataset) -> None:
    empty = np.zeros((HEIGHT, WIDTH), bool)
    output = written(dataset, empty, DatasetOptions(mask_format=MaskFormat.POLYGONS))
    assert Rle.from_coco(output["annotations"][0]["segmentation"]) == encode_mask(empty)
    assert not read_by_pycocotools(dataset).any()


def test_png_masks_are_files_beside_the_output_that_their_rows_name(dataset: Dataset) -> None:
    dataset.coco["annotations"][3]["id"] = "../../box"
    dataset.coco["annotations"][4]["bbox"] = [0, 0, -1, 3]
    dataset.save()
    output = written(dataset, ring(), DatasetOptions(mask_format=MaskFormat.PNG))
    rows = output["annotations"]
    names = [row.get("mask_file") for row in rows]
    assert names == [f"out.masks/{name}.png" for name in (100, 101, 102, "row_3")] + [None, "out.masks/105.png"]
    assert sorted(path.name for path in masks_dir(dataset.output).iterdir()) == sorted(
        name.removeprefix("out.masks/") for name in names if name
    )
    with Image.open(dataset.folder / names[3]) as image:
        assert image.mode == "1"
        np.testing.assert_array_equal(np.asarray(image), ring())


@pytest.mark.parametrize("name", ["out.masks", "out.masks/100.png", "out.errors.jsonl", "out.json"])
def test_no_file_of_a_job_is_written_through_a_link(dataset: Dataset, name: str) -> None:
    victim, link = dataset.folder / "victim", dataset.folder / name
    if name == "out.masks":
        victim.mkdir()
    else:
        victim.write_text("precious")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)
    dataset.coco["annotations"][0]["bbox"] = [0, 0, -1, 0]  # a failure, for the list of failures
    dataset.coco["annotations"][1]["id"] = 100
    dataset.coco["annotations"][0]["id"] = 99
    dataset.save()
    with pytest.raises(OutputError):
        written(dataset, ring(), DatasetOptions(mask_format=MaskFormat.PNG))
    assert [*victim.iterdir()] == [] if victim.is_dir() else victim.read_text() == "precious"


@pytest.mark.parametrize("tolerance_px", [-1.0, float("nan"), float("inf")])
def test_an_invalid_tolerance_is_refused(tolerance_px: float) -> None:
    with pytest.raises(ConfigError, match=rf"^--polygon-tolerance .*: {tolerance_px}"):
        DatasetOptions(mask_format=MaskFormat.POLYGONS, polygon_tolerance_px=tolerance_px)


def test_a_tolerance_without_polygons_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--polygon-tolerance .*rle"):
        DatasetOptions(polygon_tolerance_px=1.0)
