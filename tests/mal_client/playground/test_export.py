"""Tests of the playground's COCO file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from mal_client.client import Client

from mal_train.core.masks.rle import Rle
from tests.mal_client.playground.playground_page import (
    BOX_IN_CORNER,
    Page,
    error_of,
    expected_label,
    label_body,
    lines_of,
    playground,
    send_image,
    with_playground,
)
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, SHA256


def annotation(box: Any, result: Any, *, category: str = "cup", image: int = 0, threshold: float | None = None) -> Any:
    return {"image": image, "box": box, "category": category, "threshold": threshold, "result": result}


def exported(*annotations: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
    """Returns the file of annotations; callables get the lines of the boxes of the disc and of a corner."""

    async def run(page: Page) -> Any:
        lines = await lines_of(page, await send_image(page), label_body(DISC_BOX, BOX_IN_CORNER))
        rows = [row(lines) if callable(row) else row for row in annotations]
        images = [{"file_name": "disc.png", "width": 60, "height": 40}]
        body = {"images": images, "annotations": rows, "options": options or {}, **more}
        async with page.post("/api/coco", json=body) as response:
            return await response.json()

    return with_playground(run)


def test_the_file_has_the_masks_of_the_server_and_the_drawn_boxes() -> None:
    box = [18.25, 8, 24, 24]
    file = exported(lambda lines: annotation(box, lines["b0"], threshold=0.4))
    row = file["annotations"][0]
    assert row["segmentation"] == expected_label(DISC_BOX).rle.to_coco()
    assert row["bbox"] == box
    assert row["area"] == expected_label(DISC_BOX).area
    assert row["threshold"] == 0.4
    assert file["images"] == [{"id": 1, "file_name": "disc.png", "width": 60, "height": 40}]


def test_a_row_with_points_keeps_them_and_is_marked_if_it_has_a_mask() -> None:
    points = [[20.5, 10, 1], [30.5, 20.5, 0]]

    def corrected(lines: Any) -> Any:
        return {**annotation(DISC_BOX, lines["b0"]), "points": points}

    first, second, third = exported(
        corrected, lambda lines: annotation(DISC_BOX, lines["b0"]), {**annotation(DISC_BOX, None), "points": points}
    )["annotations"]
    assert (first["points"], first["corrected"]) == (points, True)
    assert "points" not in second
    assert "corrected" not in second
    assert (third["points"], third["error"]["reason"]) == (points, "NOT_ANSWERED")
    assert "corrected" not in third


def test_a_point_outside_of_the_tight_box_corrects_the_mask_of_the_drawn_one() -> None:
    drawn, points = [10, 4, 40, 32], [[11.5, 5.5, 0]]
    (row,) = exported(lambda lines: {**annotation(drawn, lines["b0"]), "points": points}, tight_boxes=True)[
        "annotations"
    ]
    x, y, _, _ = row["bbox"]
    assert x > points[0][0]
    assert y > points[0][1]
    assert row["corrected"] is True


def test_tight_boxes_take_the_place_of_the_drawn_ones_where_there_is_a_mask() -> None:
    drawn = [18.25, 8, 24, 24]
    rows = exported(lambda lines: annotation(drawn, lines["b0"]), annotation(drawn, None), tight_boxes=True)[
        "annotations"
    ]
    tight = expected_label(DISC_BOX).mask_box
    assert tight is not None
    assert tight != tuple(drawn)
    assert [row["bbox"] for row in rows] == [list(tight), drawn]


def test_a_threshold_that_is_no_finite_number_is_not_stated() -> None:
    file = exported(lambda lines: annotation([18.25, 8, 24, 24], lines["b0"], threshold=10**400))
    assert "threshold" not in file["annotations"][0]


def test_the_file_equals_that_of_the_dataset_client(tmp_path: Path) -> None:
    async def run(address: str) -> Any:
        async with playground(address) as page:
            lines = await lines_of(page, await send_image(page), label_body(DISC_BOX, BOX_IN_CORNER, (0, 0, 0, 3)))
            boxes = [[18, 8, 24, 24], [0, 0, 20, 15], [0, 0, 0, 3]]
            body = {
                "images": [{"file_name": "disc.png", "width": 60, "height": 40}],
                "annotations": [annotation(box, lines[f"b{index}"]) for index, box in enumerate(boxes)],
                "options": {},
            }
            async with page.post("/api/coco", json=body) as response:
                return await response.json()

    with served() as address, Client(address, timeout_s=20) as client:
        page_file = asyncio.run(run(address))
        (tmp_path / "disc.png").write_bytes(DISC_PNG)
        fields = ("id", "image_id", "category_id", "bbox", "iscrowd")
        rows = [{name: row[name] for name in fields} for row in page_file["annotations"]]
        (tmp_path / "in.json").write_text(json.dumps({**page_file, "annotations": rows}))
        client.label_dataset(tmp_path / "in.json", tmp_path, tmp_path / "out.json")
    bulk_file = json.loads((tmp_path / "out.json").read_text())
    # Only the dataset client names the annotation in the message.
    for file in (page_file, bulk_file):
        file["annotations"][2]["error"].pop("message")
    assert page_file == bulk_file


def test_a_box_without_a_mask_keeps_its_row_with_an_error() -> None:
    error = {"error": {"code": "UNAVAILABLE", "reason": "", "message": "no server"}}
    file = exported(annotation([1, 2, 3, 4], error), annotation([5, 6, 7, 8], None), annotation([None, 0, 1, 1], None))
    first, second, third = file["annotations"]
    assert first["error"] == {"reason": "UNAVAILABLE", "message": "no server"}
    assert second["error"]["reason"] == "NOT_ANSWERED"
    assert third["error"]["reason"] == "BAD_BOX"
    assert [row["bbox"] for row in (first, second)] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_categories_of_the_model_keep_their_ids_and_new_ones_follow() -> None:
    rows = [annotation([1, 1, 5, 5], None, category=name) for name in ("tea pot", "disc", "  ", "tea pot")]
    file = exported(*rows)
    assert {row["name"]: row["id"] for row in file["categories"]} == {"disc": 7, "tea pot": 8, "object": 9}
    assert [row["category_id"] for row in file["annotations"]] == [8, 7, 9, 8]


def test_a_mask_of_other_weights_states_its_checkpoint() -> None:
    def other(lines: Any) -> Any:
        return annotation(
            [1, 1, 5, 5], {**lines["b0"], "model": {**lines["b0"]["model"], "checkpoint_sha256": "cd" * 32}}
        )

    same, changed = exported(lambda lines: annotation([1, 1, 5, 5], lines["b0"]), other)["annotations"]
    assert "checkpoint_sha256" not in same
    assert changed["checkpoint_sha256"] == "cd" * 32


def test_the_options_of_the_page_are_in_the_provenance_of_the_file() -> None:
    file = exported(annotation([1, 1, 5, 5], None), options={"branch": "teacher", "flip": True})
    assert file["mask_auto_labeler"]["branch"] == "teacher"
    assert file["mask_auto_labeler"]["flip"] is True
    assert file["mask_auto_labeler"]["checkpoint_sha256"] == SHA256


@pytest.mark.parametrize(
    "change",
    [
        {"rle": {"size": [41, 60], "counts": Rle(41, 60, b"`\\2").to_coco()["counts"]}},
        {"rle": {"size": [40, 60], "counts": "00"}},
        {"rle": None},
        {"score": 2},
        {"score": None},
        {"flags": "many"},
    ],
)
def test_an_invalid_mask_is_refused(change: dict[str, Any]) -> None:
    async def run(page: Page) -> tuple[int, dict[str, Any]]:
        lines = await lines_of(page, await send_image(page), label_body(DISC_BOX))
        images = [{"file_name": "disc.png", "width": 60, "height": 40}]
        row = annotation([1, 1, 5, 5], {**lines["b0"], **change})
        return await error_of(page.post("/api/coco", json={"images": images, "annotations": [row], "options": {}}))

    status, error = with_playground(run)
    assert (status, error["code"]) == (400, "INVALID_ARGUMENT")
