"""Damaged exports of annotation tools by the thousand: each gives rows and listed errors, or one clear error."""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mal_client.formats.boxes import BoxRecord, RowError, to_coco, write_result
from mal_client.formats.cvat import read_cvat
from mal_client.formats.label_files import ImageNames
from mal_client.formats.label_studio import read_label_studio

from mal_train.core.coco.annotations import read_coco
from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import from_segmentation
from tests.chaos.test_hostile_annotations import MAX_GROWTH_MIB, MAX_S, peak_mib
from tests.form import Form
from tests.mal_client.datasets import HEIGHT, WIDTH, make_dataset
from tests.mal_client.formats.test_cvat import box, coco_export, image, mask_of
from tests.mal_client.formats.test_label_studio import brush, noisy_mask, rectangle, region, task

Record = Callable[..., None]
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**63, 10**400, -1e300, float("nan"), float("inf"), "", "x", "\ud800", "0" * 5000),
    *([], {}, [[]], [None] * 3, {"id": {}}, "rectanglelabels", "brush", "labels", "\x00", "../../etc/passwd"),
)


def label_studio_export() -> Any:
    polygon = region("polygonlabels", {"points": [[10, 10], [60, 10], [60, 60]]}, "p")
    first = task(rectangle((5, 3, 27, 18)), brush(noisy_mask(0), "a-mask"), polygon)
    second = task(rectangle((1, 1, 9, 9), "r"), url="/data/upload/1/0f3c9a1b-image_1.png")
    return [first, second, task({"id": [1], "type": "labels"})]


def cvat_export() -> str:
    polygon = '<polygon label="cup" group_id="0" points="1,1;9,1;9,9"/>'
    shapes = [mask_of(noisy_mask(0), 4), box(5, 3, 32, 21.5, group=4), polygon]
    return f"<annotations>{image(*shapes)}{image(box(1, 1, 9, 9), name='image_1.png')}</annotations>"


def cvat_coco_export() -> Any:
    rows: list[dict[str, Any]] = [
        {"bbox": [6, 4, 23, 15], "iscrowd": 1, "segmentation": noisy_mask(0).to_coco()},
        {"bbox": [5, 3, 27, 18.5], "segmentation": []},
        {"bbox": [1, 21, 4, 4], "segmentation": [[1, 21, 5, 21, 5, 25]]},
    ]
    return json.loads(coco_export(*rows))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Returns (container, key) of every value of a JSON tree."""
    found: list[tuple[Any, Any]] = []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in entries:
        found.append((value, key))
        found += places(child)
    return found


def damaged_json(case: random.Random, export: Any) -> bytes:
    for _ in range(case.randint(1, 3)):
        # Those of the masks' many numbers are one choice of the others.
        some = [place for place in places(export) if not isinstance(place[1], int) or case.random() < 0.02]
        container, key = case.choice(some or [([None], 0)])
        if case.random() < 0.2:
            del container[key]
        elif case.random() < 0.2 and isinstance(container, list):
            container.insert(key, case.choice(container))
        else:
            container[key] = case.choice(ODD)
    return damaged_bytes(case, json.dumps(export).encode())


def damaged_xml(case: random.Random) -> bytes:
    content = cvat_export()
    for _ in range(case.randint(1, 3)):
        start = case.randrange(len(content))
        end = start + case.randint(0, 12)
        odd = case.choice(("", "-1", "1e999", "nan", "<", "/>", '"', "&x;", "9" * 400, "é", "\x00", ",", content[:40]))
        content = content[:start] + odd + content[end:]
    return damaged_bytes(case, content.encode())


def damaged_bytes(case: random.Random, content: bytes) -> bytes:
    if case.random() < 0.1:
        content = content[: case.randrange(len(content) + 1)]
    if case.random() < 0.1:
        at = case.randrange(len(content) + 1)
        content = content[:at] + bytes([case.randrange(256)]) + content[at + 1 :]
    return content


def convert(rows: Any, images: Path, folder: Path) -> str:
    """Converts rows and reads the result back; returns how it ended."""
    given = list(rows)
    result = to_coco(given, images)
    rows = sum(isinstance(row, BoxRecord | RowError) for row in given)
    assert result.boxes + len(result.errors) >= rows, "a row was lost"
    for error in result.errors:
        assert error.where
        assert len(error.message) < 20_000
    write_result(result, folder / "out.json")
    coco = read_coco(folder / "out.json")
    for row in coco.annotations:
        assert row.problem is None
        if "segmentation" in row.raw:
            from_segmentation(row.raw["segmentation"], HEIGHT, WIDTH)
    return "listed" if result.errors else "result"


@pytest.mark.promise("files", "A damaged export of an annotation tool gives rows and listed errors, or one clear error")
@pytest.mark.parametrize("tool", ["label-studio", "cvat", "cvat-coco"])
def test_damaged_exports_give_rows_and_listed_errors_or_one_clear_error(
    tool: str, form: Form, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time of a small file
    images = make_dataset(tmp_path).images_dir
    names = ImageNames(f"image_{number}.png" for number in range(3))
    is_xml = tool == "cvat"
    content = cvat_coco_export if tool == "cvat-coco" else label_studio_export
    export = tmp_path / ("annotations.xml" if is_xml else "export.json")
    count = form.pick(150, 20_000)
    outcomes: Counter[str] = Counter()
    slowest, before = 0.0, peak_mib()
    for number in range(count):
        case = random.Random(f"{form.seed} {number}")
        export.write_bytes(damaged_xml(case) if is_xml else damaged_json(case, content()))
        began = time.thread_time()
        try:
            rows = read_label_studio(export, names) if tool == "label-studio" else read_cvat(export, names)
            outcomes[convert(rows, images, tmp_path)] += 1
        except BadDataset as error:
            str(error).encode()  # can be printed
            outcomes["refused"] += 1
        except Exception as error:  # any other error is a bug; the note says how to repeat it
            error.add_note(f"case {number} of {tool}, seed {form.seed}")
            raise
        slowest = max(slowest, time.thread_time() - began)
    growth = peak_mib() - before
    record("damaged exports", tool=tool, cases=count, growth_mib=growth, slowest_ms=slowest * 1000, **outcomes)
    assert min(outcomes["listed"], outcomes["refused"]) > count / 50
    assert growth <= MAX_GROWTH_MIB
    assert slowest <= MAX_S
