"""Images of a labeling job: which files are held open, and how often they are located."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal_client.bulk.work_queue import WorkItem
from mal_client.dataset.images import LARGE_OPEN, JobImages
from mal_client.images import large_image
from mal_client.images.image_files import ImageFiles
from mal_client.types import ServerLimits

from mal_train.core.coco.annotations import ImageInfo
from mal_train.core.errors import BadImage
from mal_train.core.images.large_tiff import open_large
from tests.mal_train.core.images.tiffs import tiff_of

SMALL, LARGE = 8, 40
LIMITS = ServerLimits(1 << 20, 1 << 20, 10, 1 << 20, 20, 1 << 20, 4)


def test_small_images_do_not_close_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [LARGE, *[SMALL] * (2 * LARGE_OPEN)]
    for index, side in enumerate(sides):
        (tmp_path / f"{index}.tif").write_bytes(tiff_of(np.zeros((side, side, 3), np.uint8), tile=16))
    opened = Counter[str]()

    def counted(path: Path, *args: Any) -> Any:
        opened[path.name] += 1
        return open_large(path, *args)

    monkeypatch.setattr(large_image, "open_large", counted)
    rows = [ImageInfo(index, f"{index}.tif", side, side) for index, side in enumerate(sides)]
    images = JobImages(ImageFiles(tmp_path), rows, LIMITS, 0.6, resolve_overlaps=False, writes_png=False)
    found = [images.is_large(index) for index in range(len(sides))]
    assert found == [True, *[False] * (len(sides) - 1)]
    assert images.is_large(0)
    assert opened["0.tif"] == 1


def test_an_image_that_has_grown_since_its_boxes_were_put_together_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tif").write_bytes(tiff_of(np.zeros((LARGE, LARGE, 3), np.uint8), tile=16))
    images = JobImages(ImageFiles(tmp_path), [ImageInfo(0, "0.tif", LARGE, LARGE)], LIMITS, 0.6, resolve_overlaps=False)
    with pytest.raises(BadImage) as refused:
        images.load(WorkItem("0", {0: (0.0, 0.0, 4.0, 4.0), 1: (4.0, 4.0, 4.0, 4.0)}))
    assert refused.value.reason == "IMAGE_TOO_LARGE"


def test_a_small_image_is_located_once_and_once_more_when_it_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outside = tmp_path / "images", tmp_path / "secret.png"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"inside")
    outside.write_bytes(b"outside")
    files = ImageFiles(folder)
    located = Counter[str]()
    locate = files.locate

    def counted(name: str) -> Any:
        located[name] += 1
        return locate(name)

    monkeypatch.setattr(files, "locate", counted)
    images = JobImages(files, [ImageInfo(0, "0.png", SMALL, SMALL)], LIMITS, 0.6, resolve_overlaps=False)
    item = WorkItem("0", {0: (0.0, 0.0, 4.0, 4.0)})
    assert not images.is_large(0)
    assert images.load(item).content == b"inside"
    assert located["0.png"] == 1
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to(outside)
    with pytest.raises(BadImage) as refused:
        images.load(item)
    assert refused.value.reason == "IMAGE_NOT_FOUND"
