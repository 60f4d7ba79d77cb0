"""Images of a labeling job: which files are held open."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal_client.dataset.images import LARGE_OPEN, JobImages
from mal_client.images import large_image
from mal_client.images.image_files import ImageFiles
from mal_client.types import ServerLimits

from mal_train.core.coco.annotations import ImageInfo
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
