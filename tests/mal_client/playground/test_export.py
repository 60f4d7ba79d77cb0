"""The COCO file of what stands on the playground's page."""

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
    asking,
    kernel,
    lines_of,
    playground,
    refusal,
    sent,
    visit,
)
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, SHA256


def drawn(box: Any, answer: Any, *, category: str = "cup", image: int = 0, threshold: float | None = None) -> Any:
    return {"image": image, "box": box, "category": category, "threshold": threshold, "answer": answer}


def exported(*annotations: Any, options: dict[str, Any] | None = None) -> Any:
    """What `annotations(lines)` gives as a file, for the lines of a disc and of a corner."""

    async def ask(page: Page) -> Any:
        found = await lines_of(page, await sent(page), asking(DISC_BOX, BOX_IN_CORNER))
        rows = [row(found) if callable(row) else row for row in annotations]
        images = [{"file_name": "disc.png", "width": 60, "height": 40}]
        body = {"images": images, "annotations": rows, "options": options or {}}
        async with page.post("/api/coco", json=body) as answer:
            return await answer.json()

    return visit(ask)


def test_the_file_holds_the_servers_codes_and_the_boxes_as_they_were_drawn() -> None:
    box = [18.25, 8, 24, 24]
    file = exported(lambda found: drawn(box, found["b0"], threshold=0.4))
    row = file["annotations"][0]
    assert row["segmentation"] == kernel(DISC_BOX).rle.to_coco()
    assert row["bbox"] == box
    assert row["area"] == kernel(DISC_BOX).area
    assert row["threshold"] == 0.4
    assert file["images"] == [{"id": 1, "file_name": "disc.png", "width": 60, "height": 40}]


def test_the_file_is_the_one_that_the_bulk_client_writes(tmp_path: Path) -> None:
    async def ask(address: str) -> Any:
        async with playground(address) as page:
            found = await lines_of(page, await sent(page), asking(DISC_BOX, BOX_IN_CORNER, (0, 0, 0, 3)))
            boxes = [[18, 8, 24, 24], [0, 0, 20, 15], [0, 0, 0, 3]]
            body = {
                "images": [{"file_name": "disc.png", "width": 60, "height": 40}],
                "annotations": [drawn(box, found[f"b{at}"]) for at, box in enumerate(boxes)],
                "options": {},
            }
            async with page.post("/api/coco", json=body) as answer:
                return await answer.json()

    with served() as address, Client(address, timeout_s=20) as client:
        page_file = asyncio.run(ask(address))
        (tmp_path / "disc.png").write_bytes(DISC_PNG)
        kept = ("id", "image_id", "category_id", "bbox", "iscrowd")
        rows = [{name: row[name] for name in kept} for row in page_file["annotations"]]
        (tmp_path / "in.json").write_text(json.dumps({**page_file, "annotations": rows}))
        client.label_dataset(tmp_path / "in.json", tmp_path, tmp_path / "out.json")
    bulk_file = json.loads((tmp_path / "out.json").read_text())
    # The message names the annotation there, and stands beside the box here.
    for file in (page_file, bulk_file):
        file["annotations"][2]["error"].pop("message")
    assert page_file == bulk_file


def test_a_box_without_a_mask_keeps_its_row_and_says_why() -> None:
    error = {"error": {"code": "UNAVAILABLE", "reason": "", "message": "nobody there"}}
    file = exported(drawn([1, 2, 3, 4], error), drawn([5, 6, 7, 8], None), drawn([None, 0, 1, 1], None))
    first, second, third = file["annotations"]
    assert first["error"] == {"reason": "UNAVAILABLE", "message": "nobody there"}
    assert second["error"]["reason"] == "NOT_ANSWERED"
    assert third["error"]["reason"] == "BAD_BOX"
    assert [row["bbox"] for row in (first, second)] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_classes_of_the_model_keep_their_ids_and_new_ones_follow() -> None:
    rows = [drawn([1, 1, 5, 5], None, category=name) for name in ("tea pot", "disc", "  ", "tea pot")]
    file = exported(*rows)
    assert {row["name"]: row["id"] for row in file["categories"]} == {"disc": 7, "tea pot": 8, "object": 9}
    assert [row["category_id"] for row in file["annotations"]] == [8, 7, 9, 8]


def test_a_mask_of_other_weights_than_the_files_says_so() -> None:
    def other(found: Any) -> Any:
        return drawn([1, 1, 5, 5], {**found["b0"], "model": {**found["b0"]["model"], "checkpoint_sha256": "cd" * 32}})

    same, changed = exported(lambda found: drawn([1, 1, 5, 5], found["b0"]), other)["annotations"]
    assert "checkpoint_sha256" not in same
    assert changed["checkpoint_sha256"] == "cd" * 32


def test_the_options_of_the_page_are_the_files_provenance() -> None:
    file = exported(drawn([1, 1, 5, 5], None), options={"branch": "teacher", "flip": True})
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
def test_a_mask_that_is_none_is_not_written(change: dict[str, Any]) -> None:
    async def ask(page: Page) -> tuple[int, dict[str, Any]]:
        found = await lines_of(page, await sent(page), asking(DISC_BOX))
        images = [{"file_name": "disc.png", "width": 60, "height": 40}]
        row = drawn([1, 1, 5, 5], {**found["b0"], **change})
        return await refusal(page.post("/api/coco", json={"images": images, "annotations": [row], "options": {}}))

    status, error = visit(ask)
    assert (status, error["code"]) == (400, "INVALID_ARGUMENT")
