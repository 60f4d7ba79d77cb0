"""Images above the server's limits, labeled by windows, with a real server: the masks of the complete image."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal_client.async_client import AsyncClient
from mal_client.cli.common import EXIT_SOME_FAILED
from mal_client.cli.main import main
from mal_client.client import Client
from mal_client.dataset_check.check import check_dataset
from mal_client.errors import ItemError
from mal_client.images.image_input import EncodedImage
from mal_client.images.large_image import open_image
from mal_client.types import (
    SERVER_DEFAULTS,
    BoxLabel,
    DatasetOptions,
    Evaluation,
    LabelOptions,
    Progress,
    ServerLimits,
)
from PIL import Image

from mal_train.core.errors import BadImage
from mal_train.core.images import header
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.test_against_server import served
from tests.mal_train.core.images.tiffs import repeated_tiff, tiff_of

SIDE = 260
LIMITS = {"max_pixels": SIDE * SIDE, "max_side": 200}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Returns a dataset of one small image, and of large ones in tiles, strips, 16 bits and another format."""
    dataset = make_dataset(tmp_path, images=1)
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    files = {
        "tiles.tif": tiff_of(pixels, tile=64),
        "strips.tif": tiff_of(pixels.astype(np.uint16) * 9 + 77, rows_per_strip=8, big=True),
        "flat.tif": tiff_of(pixels[:, :, 0], deflate=False),
    }
    boxes = [[5, 6, 40, 30], [-4, 200.5, 60, 60], [130.25, 99.5, 70.5, 50], [500, 0, 9, 9], [20, 20, 0, 5]]
    for name, content in files.items():
        (dataset.images_dir / name).write_bytes(content)
        dataset.coco["images"].append({"id": name, "file_name": name, "width": SIDE, "height": SIDE})
        for number, box in enumerate(boxes):
            row = {"id": f"{name} {number}", "image_id": name, "category_id": 1, "bbox": box}
            dataset.coco["annotations"].append(row)
    dataset.save()
    return dataset


def labeled(dataset: Dataset, limits: dict[str, int]) -> dict[Any, dict[str, Any]]:
    with served(limits=limits) as address, Client(address) as client:
        notes = list[str]()
        client.label_dataset(
            dataset.json_path,
            dataset.images_dir,
            dataset.output,
            dataset_options=DatasetOptions(restart=True),
            on_notice=notes.append,
        )
    assert any(note.startswith("1 image with values beyond 8 bits") for note in notes)
    return dataset.labeled()


def test_rows_by_windows_are_those_of_the_complete_images(dataset: Dataset) -> None:
    whole, parts = labeled(dataset, {}), labeled(dataset, LIMITS)
    assert sum("error" not in row for row in parts.values()) == 2 + 3 * 3
    for name, row in whole.items():
        error, expected = parts[name].pop("error", None), row.pop("error", None)
        assert parts[name] == row
        assert (error or {}).get("reason") == (expected or {}).get("reason")


def test_a_window_whose_png_exceeds_the_limit_fails_alone(dataset: Dataset) -> None:
    limits = ServerLimits(1 << 26, 1 << 26, 100, SIDE * SIDE, 200, 12_000, 4)
    large = open_image(dataset.images_dir / "strips.tif", limits)
    assert large is not None
    small, wide, last = (part for _, _, part in large.parts([(5, 6, 20, 20), (0, 0, 150, 150), (9, 9, 20, 20)], 0.1))
    assert isinstance(small, EncodedImage)
    assert isinstance(last, EncodedImage)
    assert isinstance(wide, ItemError)
    assert wide.reason == "IMAGE_TOO_LARGE"


@pytest.mark.parametrize("is_async", [False, True])
def test_one_image_is_labeled_by_windows_as_completely(dataset: Dataset, is_async: bool) -> None:
    boxes: list[list[float]] = [[5, 6, 40, 30], [-4, 200.5, 60, 60], [20, 20, 0, 5], [0, 0, SIDE, SIDE]]

    async def label(address: str, path: Path, options: LabelOptions) -> list[BoxLabel]:
        async with AsyncClient(address) as client:
            return await client.label_image(path, boxes, options)

    def labels(limits: dict[str, int], options: LabelOptions = SERVER_DEFAULTS) -> list[BoxLabel]:
        path = dataset.images_dir / "strips.tif"
        with served(limits=limits) as address, Client(address) as client:
            return asyncio.run(label(address, path, options)) if is_async else client.label_image(path, boxes, options)

    whole, parts = labels({}), labels(LIMITS)
    assert [label.index for label in parts] == [0, 1, 2, 3]
    assert [(label.rle, label.score, label.flags) for label in parts[:3]] == [
        (label.rle, label.score, label.flags) for label in whole[:3]
    ]
    assert [label.error.reason for label in parts if label.error is not None] == ["BAD_BOX", "IMAGE_TOO_LARGE"]
    with pytest.raises(BadImage) as raised:
        labels(LIMITS, LabelOptions(resolve_overlaps=True))
    assert raised.value.reason == "IMAGE_TOO_LARGE"


MEASURED = """
import sys
from pathlib import Path
from mal_client.cli.main import main
code = main(sys.argv[1:])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
sys.exit(code)
"""
MAX_CLIENT_MIB = 256
"""Peak memory of the client process; the image has 2.5 GiB of pixels."""


@pytest.mark.slow
def test_a_tiff_of_30_000_by_30_000_px_with_1_000_boxes_is_labeled_within_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    tile = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8).repeat(50, axis=0).repeat(50, axis=1)
    (tmp_path / "large.tif").write_bytes(repeated_tiff(tile, 60))
    corners, sizes = rng.uniform(0, 29_000, (1000, 2)), rng.uniform(20, 800, (1000, 2))
    rows = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": [*corner, *size]}
        for number, (corner, size) in enumerate(zip(corners.tolist(), sizes.tolist(), strict=True))
    ]
    coco = {"images": [{"id": 1, "file_name": "large.tif"}], "annotations": rows}
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    files = ["--annotations", str(tmp_path / "boxes.json"), "--images", str(tmp_path)]
    with served() as address:
        given = ["label", "--server", address, *files, "--output", str(tmp_path / "out.json")]
        done = subprocess.run([sys.executable, "-c", MEASURED, *given], capture_output=True, text=True, check=True)
    labeled_rows = json.loads((tmp_path / "out.json").read_text())["annotations"]
    assert len(labeled_rows) == 1000
    assert all(row["segmentation"]["size"] == [30_000, 30_000] and "error" not in row for row in labeled_rows)
    peak_mib = int(done.stdout.splitlines()[-1]) / 1024
    print(f"peak memory of the client: {peak_mib:.0f} MiB")
    assert peak_mib <= MAX_CLIENT_MIB


def test_other_formats_get_the_limit_its_setting_and_the_remedy(dataset: Dataset) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(dataset.images_dir / "large.png")
    dataset.coco["images"] = [{"id": 1, "file_name": "large.png"}]
    dataset.coco["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}]
    dataset.save()
    with served(limits=LIMITS) as address:
        files = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
        command = ["label", "--server", address, *files, "--output", str(dataset.output)]
        assert main(command) == EXIT_SOME_FAILED
    error = dataset.labeled()[1]["error"]
    assert error["reason"] == "IMAGE_TOO_LARGE"
    for text in ("limits.max_side", "limits.max_pixels", "200", str(SIDE * SIDE), "TIFF"):
        assert text in error["message"]


@pytest.fixture
def with_truth(dataset: Dataset) -> Dataset:
    """Returns the dataset with a mask for each box, and with two crowd regions on a large image."""
    for row in dataset.coco["annotations"]:
        x, y, width, height = row["bbox"]
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height / 2, x, y + height]]
    crowds = [{**dataset.coco["annotations"][5], "id": f"crowd {number}", "iscrowd": 1} for number in range(2)]
    dataset.coco["annotations"] += crowds
    dataset.save()
    return dataset


def evaluated(dataset: Dataset, limits: dict[str, int], **options: Any) -> tuple[Evaluation, list[str]]:
    notes = list[str]()
    with served(limits=limits) as address, Client(address) as client:
        evaluation = client.evaluate(dataset.json_path, dataset.images_dir, on_notice=notes.append, **options)
    return evaluation, notes


def test_an_evaluation_by_windows_is_that_of_the_complete_images(with_truth: Dataset) -> None:
    whole, notes = evaluated(with_truth, {})
    parts, notes_of_parts = evaluated(with_truth, {**LIMITS, "max_boxes": 2})
    assert parts.overall == whole.overall
    assert parts.overall.count == 2 + 3 * 3
    assert (parts.ap_at_1, parts.ap_at_score, parts.images) == (whole.ap_at_1, whole.ap_at_score, 4)
    assert (parts.worst, parts.skipped, parts.images_skipped) == (whole.worst, whole.skipped, 0)
    assert notes == notes_of_parts
    assert notes[-1].startswith("1 image with values beyond 8 bits")


def test_an_evaluation_by_windows_is_resumed(with_truth: Dataset, tmp_path: Path) -> None:
    resume = tmp_path / "evaluation.records"
    with served(limits=LIMITS) as address, Client(address) as client:
        expected = client.evaluate(with_truth.json_path, with_truth.images_dir)

        def stop(progress: Progress) -> None:
            if progress.images_done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            client.evaluate(with_truth.json_path, with_truth.images_dir, resume=resume, on_progress=stop)
        notes = list[str]()
        resumed = client.evaluate(with_truth.json_path, with_truth.images_dir, resume=resume, on_notice=notes.append)
    assert any("resuming" in note for note in notes)
    assert resumed == expected


def test_an_object_whose_window_exceeds_the_limit_is_skipped_alone(with_truth: Dataset) -> None:
    for row in with_truth.coco["annotations"]:
        if row["id"] == "tiles.tif 0":
            row["bbox"] = [0, 0, SIDE, SIDE]
    with_truth.save()
    evaluation, _ = evaluated(with_truth, LIMITS)
    assert evaluation.skipped["IMAGE_TOO_LARGE"] == 1
    assert [row.annotation_id for row in evaluation.skipped_rows if row.reason == "IMAGE_TOO_LARGE"] == ["tiles.tif 0"]
    assert evaluation.overall.count == 2 + 3 * 3 - 1


def test_an_image_that_the_server_refuses_is_named_by_its_file(with_truth: Dataset) -> None:
    with_truth.coco["images"][1]["file_name"] = "large.png"
    with_truth.save()
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(with_truth.images_dir / "large.png")
    evaluation, _ = evaluated(with_truth, {**LIMITS, "max_boxes": 2})
    assert evaluation.skipped_messages["IMAGE_TOO_LARGE"].startswith(f"large.png: {SIDE}x{SIDE} px")


def test_an_evaluation_with_resolved_overlaps_skips_images_that_are_read_by_windows(with_truth: Dataset) -> None:
    evaluation, _ = evaluated(with_truth, LIMITS, options=LabelOptions(resolve_overlaps=True))
    assert (evaluation.overall.count, evaluation.images, evaluation.images_skipped) == (2, 1, 3)
    assert evaluation.skipped["IMAGE_TOO_LARGE"] == 3 * 5


def test_overlaps_are_refused_for_images_that_are_read_by_windows(dataset: Dataset) -> None:
    rows = labeled_with_overlaps(dataset)
    errors = {row["error"]["reason"] for name, row in rows.items() if isinstance(name, str)}
    assert errors == {"IMAGE_TOO_LARGE"}
    assert all("error" not in row for name, row in rows.items() if isinstance(name, int))


def labeled_with_overlaps(dataset: Dataset) -> dict[Any, dict[str, Any]]:
    with served(limits=LIMITS) as address, Client(address) as client:
        options = LabelOptions(resolve_overlaps=True)
        client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output, options)
    return dataset.labeled()


def test_check_tells_that_images_are_read_by_windows_and_finds_damaged_blocks(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = header.ImageLimits(**LIMITS)
    monkeypatch.setattr("mal_client.dataset_check.check.DEFAULT_LIMITS", limits)
    report = check_dataset(dataset.json_path, dataset.images_dir)
    assert report.issues["IMAGE_BY_WINDOWS"].count == 3
    path = dataset.images_dir / "tiles.tif"
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    assert check_dataset(dataset.json_path, dataset.images_dir).issues["IMAGE_DECODE_FAILED"].count == 1
    row = dataset.coco["images"][1]
    row["width"] = SIDE + 1
    dataset.json_path.write_text(json.dumps(dataset.coco))
    assert check_dataset(dataset.json_path, dataset.images_dir, decode=False).issues["IMAGE_SIZE_MISMATCH"].count == 1
