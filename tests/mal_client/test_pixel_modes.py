"""One rule for stored values in every command: what `check`, `label`, the playground and training see of each mode."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.dataset_check.check import check_dataset
from PIL import Image

from mal_train.core.errors import BadImage
from mal_train.core.images.decoder import RgbImage, decode_image
from mal_train.core.settings import Compat
from mal_train.data.annotations import read_training_boxes
from mal_train.data.datamodule import BoxDataModule, LoaderSettings
from tests.mal_client import fake_server
from tests.mal_client.fake_server import FakeServer, serving
from tests.mal_client.playground.playground_page import Page, error_of, send_image, with_playground
from tests.mal_train.core.images.test_pixels import HEIGHT, WIDTH, levels, saved, values_of, wide_png
from tests.mal_train.core.images.tiffs import tiff_of
from tests.mal_train.data.test_datamodule import CROPPING

AS_STORED, STRETCHED, DROPPED, REFUSED = None, "PIXELS_STRETCHED", "BANDS_DROPPED", "IMAGE_FORMAT"


def converted(mode: str) -> Image.Image:
    return Image.fromarray(levels(3)).convert(mode)


def lab() -> Image.Image:
    return Image.merge("LAB", Image.fromarray(levels(3)).split())


MODES: dict[str, tuple[str, Callable[[], bytes], str | None]] = {
    "8-bit": ("png", lambda: saved(Image.fromarray(levels(3)), "PNG"), AS_STORED),
    "bilevel": ("png", lambda: saved(converted("1"), "PNG"), AS_STORED),
    "palette": ("png", lambda: saved(converted("P"), "PNG"), AS_STORED),
    "alpha": ("png", lambda: saved(converted("RGBA"), "PNG"), AS_STORED),
    "CMYK": ("tif", lambda: saved(converted("CMYK"), "TIFF"), AS_STORED),
    "LAB": ("tif", lambda: saved(lab(), "TIFF"), AS_STORED),
    "16-bit": ("png", lambda: wide_png(values_of(levels(3), "u2"), 2), STRETCHED),
    "12 in 16": ("png", lambda: wide_png(levels().astype(np.uint16) * 16, 0), STRETCHED),
    "big-endian": ("tif", lambda: tiff_of(values_of(levels(), "u2"), order=">"), STRETCHED),
    "32-bit": ("tif", lambda: tiff_of(values_of(levels(3), "u4")), STRETCHED),
    "float": ("tif", lambda: tiff_of(values_of(levels(3), "f4")), STRETCHED),
    "signed": ("tif", lambda: tiff_of(values_of(levels(), "i2")), STRETCHED),
    "four bands": ("tif", lambda: tiff_of(levels(4), extra=(0,)), DROPPED),
    "two bands": ("tif", lambda: tiff_of(levels(2)), REFUSED),
    "five bands": ("tif", lambda: tiff_of(levels(5)), REFUSED),
    "complex": ("tif", lambda: tiff_of(levels().astype(np.complex64)), REFUSED),
}
"""Suffix and file of each mode, and what becomes of its values."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"images": {"id": 1, "file_name": "", "width": WIDTH, "height": HEIGHT}},
        {"annotations": {"id": 1, "image_id": 1, "category_id": 1, "bbox": [9, 9, 40, 30], "iscrowd": 0}},
        {"categories": {"id": 1, "name": "cup"}},
    ]
    (tmp_path / "boxes.json").write_text(json.dumps({key: [value] for row in rows for key, value in row.items()}))
    return tmp_path


def save(folder: Path, mode: str) -> bytes:
    suffix, make, _ = MODES[mode]
    content = make()
    coco = json.loads((folder / "boxes.json").read_text())
    coco["images"][0]["file_name"] = f"a.{suffix}"
    (folder / "boxes.json").write_text(json.dumps(coco))
    (folder / f"a.{suffix}").write_bytes(content)
    return content


def checked(folder: Path, _: bytes) -> tuple[RgbImage | None, str | None]:
    found = set(check_dataset(folder / "boxes.json", folder).issues) & {STRETCHED, DROPPED, REFUSED}
    return None, next(iter(found), None)


def labeled(folder: Path, _: bytes) -> tuple[RgbImage | None, str | None]:
    """Returns the pixels that the server decodes, and what the command says of them."""
    seen: list[RgbImage] = []

    def decode(*arguments: Any, **options: Any) -> RgbImage:
        seen.append(decode_image(*arguments, **options))
        return seen[-1]

    output = folder / "out.json"
    given = ["--annotations", str(folder / "boxes.json"), "--images", str(folder), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch, serving(FakeServer()) as address:
        patch.setattr(fake_server, "decode_image", decode)
        code = main(["label", "--server", address, *given])
    (row,) = json.loads(output.read_text())["annotations"]
    assert code == (3 if "error" in row else 0)
    return (seen[-1], AS_STORED) if seen else (None, row["error"]["reason"])


def in_playground(_: Path, content: bytes) -> tuple[RgbImage | None, str | None]:
    async def pixels(page: Page) -> tuple[RgbImage | None, str | None]:
        async with page.post("/api/images", data=content) as response:
            if response.status != 200:
                return None, (await error_of(page.post("/api/images", data=content)))[1]["reason"]
        sha256 = await send_image(page, content)
        async with page.get(f"/api/images/{sha256}/pixels") as response:
            return np.asarray(Image.open(io.BytesIO(await response.read())).convert("RGB")), AS_STORED

    found: tuple[RgbImage | None, str | None] = with_playground(pixels)
    return found


def trained_on(folder: Path, _: bytes) -> tuple[RgbImage | None, str | None]:
    """Returns the pixels that training cuts, and what it counts."""
    boxes = read_training_boxes(folder / "boxes.json", folder, min_area=0, max_area=1e9, compat=Compat.NONE)
    module = BoxDataModule(boxes, CROPPING, LoaderSettings(batch_size=1, num_workers=0, seed=0))
    dataset = module.train_dataloader().dataset
    try:
        pixels = dataset._image(0)  # type: ignore[attr-defined]
    except BadImage as error:
        return None, error.reason
    counts = module.formats()
    return pixels, STRETCHED if counts.stretched else DROPPED if counts.dropped else AS_STORED


@pytest.mark.parametrize("surface", [checked, labeled, in_playground, trained_on])
@pytest.mark.parametrize("mode", MODES)
def test_every_command_sees_the_same_pixels_and_says_the_same(
    folder: Path, mode: str, surface: Callable[[Path, bytes], tuple[RgbImage | None, str | None]]
) -> None:
    expected = MODES[mode][2]
    content = save(folder, mode)
    pixels, said = surface(folder, content)
    assert said == expected or (said is None and surface in {labeled, in_playground} and expected != REFUSED)
    if pixels is not None:
        np.testing.assert_array_equal(pixels, decode_image(content))
    else:
        assert surface is checked or expected == REFUSED


@pytest.mark.parametrize("mode", ["16-bit", "four bands", "8-bit"])
def test_a_labeling_run_counts_the_images_that_check_reports(
    folder: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(folder, mode)
    labeled(folder, b"")
    said = capsys.readouterr().err
    assert ("beyond 8 bits" in said) == (MODES[mode][2] == STRETCHED)
    assert ("further bands" in said) == (MODES[mode][2] == DROPPED)


def test_an_image_that_is_refused_is_not_counted_as_stretched(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(folder, "16-bit")
    coco = json.loads((folder / "boxes.json").read_text())
    coco["images"][0]["width"] = WIDTH + 1
    (folder / "boxes.json").write_text(json.dumps(coco))
    _, said = labeled(folder, b"")
    assert said == "IMAGE_SIZE_MISMATCH"
    assert "beyond 8 bits" not in capsys.readouterr().err
