"""Tests of the review queue."""

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.review.queue import FLAG_MEANINGS, SortBy, review_queue, write_worst
from PIL import Image
from pycocotools.coco import COCO

from deploy.demo.baselines import box_filled
from mal_train.core.coco.annotations import read_coco
from mal_train.core.errors import ConfigError
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset
from tests.mal_train.core.masks.hostile_runs import compressed, wrapping_runs

SCORES = [0.9, 0.2, 0.5, 0.95, 0.0, 0.5]
"""Scores of annotations 100 to 105; 102 and 105 are tied."""


def with_scores(folder: Path) -> Dataset:
    """Makes a labeled file: masks fill their boxes, 103 failed, 101 has flags."""
    dataset = make_dataset(folder)
    for row, score in zip(dataset.coco["annotations"], SCORES, strict=True):
        mask = box_filled(tuple(map(float, row["bbox"])), (HEIGHT, WIDTH))  # type: ignore[arg-type]
        row |= {"segmentation": mask.to_coco(), "score": score, "agreement": 1 - score, "flags": []}
    rows = dataset.coco["annotations"]
    rows[1]["flags"] = ["MULTI_PART", "BOX_CLIPPED"]
    rows[3] |= {"error": {"reason": "IMAGE_NOT_FOUND", "message": "no such file"}, "score": 0.0}
    dataset.save()
    return dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return with_scores(tmp_path)


def truth_of(dataset: Dataset, shifts: dict[int, float]) -> Path:
    """Writes true masks: the boxes, shifted to the right by some px."""
    rows = []
    for row in dataset.coco["annotations"]:
        x, y, w, h = row["bbox"]
        mask = box_filled((x + shifts.get(row["id"], 0.0), y, w, h), (HEIGHT, WIDTH))
        rows.append({**row, "segmentation": mask.to_coco()})
        rows[-1].pop("error", None)
    path = dataset.folder / "truth.json"
    path.write_text(json.dumps({**dataset.coco, "annotations": rows}))
    return path


def ids(queue: Any) -> list[int]:
    return [item.row["id"] for item in queue.worst]


def test_failed_annotations_come_first_then_the_lowest_score_with_ties_in_file_order(dataset: Dataset) -> None:
    queue = review_queue(dataset.json_path)
    assert ids(queue) == [103, 104, 101, 102, 105, 100]
    assert [item.rank for item in queue.worst] == [1, 2, 3, 4, 5, 6]
    assert (queue.masks, queue.failed, queue.omitted) == (5, 1, 0)
    assert queue.worst[0].reasons == ["no such file"]
    assert queue.worst[2].reasons == [FLAG_MEANINGS["MULTI_PART"], FLAG_MEANINGS["BOX_CLIPPED"]]


def test_agreement_can_rank_the_queue(dataset: Dataset) -> None:
    assert ids(review_queue(dataset.json_path, sort_by=SortBy.AGREEMENT, count=3)) == [103, 100, 102]


def test_crowds_and_masks_without_a_score_are_omitted_and_counted(dataset: Dataset) -> None:
    dataset.coco["annotations"][1]["iscrowd"] = 1
    del dataset.coco["annotations"][2]["score"]
    dataset.save()
    queue = review_queue(dataset.json_path)
    assert ids(queue) == [103, 104, 105, 100]
    assert queue.omitted == 2


@pytest.mark.parametrize("score", [10**400, math.nan, True, "0.5", [0.5]])
def test_a_score_that_is_no_finite_number_is_omitted(dataset: Dataset, score: Any) -> None:
    dataset.coco["annotations"][1] |= {"score": score, "flags": [["MULTI_PART"], {}]}
    dataset.save()
    assert review_queue(dataset.json_path).omitted == 1
    assert review_queue(dataset.json_path, sort_by=SortBy.AGREEMENT).worst[4].reasons == ["['MULTI_PART']", "{}"]


def test_ground_truth_whose_runs_wrap_around_is_no_mask(dataset: Dataset) -> None:
    truth = truth_of(dataset, {})
    coco = json.loads(truth.read_text())
    counts = compressed(wrapping_runs(np.random.default_rng(0), HEIGHT * WIDTH)).decode()
    coco["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
    truth.write_text(json.dumps(coco))
    assert [quality.count for quality in review_queue(dataset.json_path, truth=truth).qualities] == [4, 4]


def test_a_file_without_the_sort_key_is_refused(tmp_path: Path, dataset: Dataset) -> None:
    for row in dataset.coco["annotations"]:
        del row["agreement"]
        row.pop("error", None)
    dataset.save()
    with pytest.raises(ConfigError, match=r"in\.json: .*'agreement'.* --agreement"):
        review_queue(dataset.json_path, sort_by=SortBy.AGREEMENT)


def test_ground_truth_measures_the_orders(dataset: Dataset) -> None:
    # The two lowest scores have bad masks, the highest a perfect one.
    truth = truth_of(dataset, {104: 8.0, 101: 6.0, 102: 2.0, 105: 3.0})
    queue = review_queue(dataset.json_path, truth=truth)
    score, agreement = queue.qualities
    assert (score.sort_by, score.count, score.bad_count) == (SortBy.SCORE, 5, 2)
    assert score.spearman == pytest.approx(0.975, abs=0.01)
    assert (score.bad_in_worst_tenth, score.bad_in_worst_fifth) == (0.25, 0.5)
    assert agreement.spearman is not None
    assert score.spearman is not None
    assert agreement.spearman == pytest.approx(-score.spearman)
    assert agreement.bad_in_worst_fifth == 0
    by_id = {item.row["id"]: item.iou for item in queue.worst}
    assert by_id[100] == 1
    assert by_id[103] is None
    assert by_id[104] == pytest.approx(2 / 18, abs=0.01)


def test_ground_truth_without_a_mask_of_these_annotations_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    boxes = [{**row, "segmentation": []} for row in dataset.coco["annotations"]]
    truth = tmp_path / "boxes.json"
    truth.write_text(json.dumps({**dataset.coco, "annotations": boxes}))
    with pytest.raises(ConfigError, match=r"boxes\.json: .*in\.json"):
        review_queue(dataset.json_path, truth=truth)


def spoiled_truth(dataset: Dataset) -> Path:
    """Writes true masks of which one is empty, one cannot be read, one is missing, and one is a crowd region."""
    path = truth_of(dataset, {})
    coco = json.loads(path.read_text())
    by_id = {row["id"]: row for row in coco["annotations"]}
    by_id[100]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    by_id[101]["segmentation"] = [[1, 2, 3]]
    by_id[102]["iscrowd"] = 1
    path.write_text(json.dumps({**coco, "annotations": [row for row in by_id.values() if row["id"] != 104]}))
    return path


def test_masks_without_a_true_one_are_not_measured_but_counted(dataset: Dataset) -> None:
    queue = review_queue(dataset.json_path, truth=spoiled_truth(dataset))
    reasons = {"EMPTY_GROUND_TRUTH": 1, "BAD_GROUND_TRUTH": 1, "CROWD": 1, "NO_GROUND_TRUTH": 1}
    assert queue.not_compared.counts == reasons
    assert queue.to_dict()["not_compared"] == reasons
    assert [(quality.count, quality.bad_count) for quality in queue.qualities] == [(1, 0), (1, 0)]
    assert {item.row["id"]: item.iou for item in queue.worst if item.iou is not None} == {105: 1.0}


def test_the_command_names_masks_without_a_true_one(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    assert main(["review", *given, "--ground-truth", str(spoiled_truth(dataset))]) == 3
    err = capsys.readouterr().err
    for number, reason in ((100, "EMPTY_GROUND_TRUTH"), (101, "BAD_GROUND_TRUTH"), (104, "NO_GROUND_TRUTH")):
        assert f"{reason}: annotation {number}: " in err


def test_a_true_mask_of_another_image_is_not_compared(dataset: Dataset) -> None:
    path = truth_of(dataset, {})
    coco = json.loads(path.read_text())
    coco["annotations"][0]["image_id"] = 3
    path.write_text(json.dumps(coco))
    assert review_queue(dataset.json_path, truth=path).not_compared.counts == {"NO_GROUND_TRUTH": 1}


def test_a_file_without_bad_masks_has_no_share_of_them(dataset: Dataset) -> None:
    score, _ = review_queue(dataset.json_path, truth=truth_of(dataset, {})).qualities
    assert score.line().endswith("none has IoU < 0.5")


def test_the_worst_are_exported_as_a_coco_file_in_their_order(dataset: Dataset) -> None:
    output = dataset.folder / "worst.json"
    write_worst(review_queue(dataset.json_path, count=3), dataset.json_path, output)
    raw = json.loads(output.read_text())
    assert [(row["id"], row["review_rank"]) for row in raw["annotations"]] == [(103, 1), (104, 2), (101, 3)]
    assert [row["id"] for row in raw["images"]] == [1, 2, 3]
    assert raw["annotations"][2]["mine"] == "note 101"
    assert all(row.problem is None for row in read_coco(output).annotations)
    assert len(COCO(str(output)).getAnnIds()) == 3


def test_the_command_writes_a_page_with_images_of_the_worst_and_the_quality_of_the_order(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset.images_dir / "image_2.png").unlink()
    page, queue, worst = (dataset.folder / name for name in ("page.html", "queue.json", "worst.json"))
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--worst", "5"]
    files = ["--report", str(page), "--output", str(queue), "--export", str(worst)]
    assert main(["review", *given, *files, "--ground-truth", str(truth_of(dataset, {104: 8.0}))]) == 0
    printed = capsys.readouterr().out
    assert "5 masks, 1 without a mask" in printed
    assert "order by score: Spearman" in printed
    meanings = f"{FLAG_MEANINGS['MULTI_PART']}; {FLAG_MEANINGS['BOX_CLIPPED']}"
    assert printed.partition("worst:\n")[2].splitlines()[:5] == [
        "  1. annotation 103, image_1.png: no mask; no such file",
        "  2. annotation 104, image_2.png: score 0.00",
        f"  3. annotation 101, image_0.png: score 0.20; {meanings}",
        "  4. annotation 102, image_1.png: score 0.50",
        "  5. annotation 105, image_2.png: score 0.50",
    ]
    assert [row["annotation_id"] for row in json.loads(queue.read_text())["worst"]] == [103, 104, 101, 102, 105]
    text = page.read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 3, "two of the five are on the missing image"
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(images[1]))))
    assert (first == (255, 214, 0)).all(axis=2).any(), "the box is drawn"
    assert "Not shown: 2 masks" in text
    assert "Quality of the order" in text
    assert FLAG_MEANINGS["MULTI_PART"] in text


def test_the_page_shows_text_and_numbers_that_only_json_can_hold(dataset: Dataset) -> None:
    dataset.coco["annotations"][1] |= {"score": 10**400, "flags": ["half \ud800"]}
    dataset.save()
    page = dataset.folder / "page.html"
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--report", str(page)]
    assert main(["review", *given, "--sort-by", "agreement"]) == 0
    assert "half \\ud800" in page.read_text()


@pytest.mark.parametrize("command", ["review", "check", "evaluate"])
@pytest.mark.parametrize("option", ["--output", "--report"])
def test_no_report_replaces_the_file_that_it_is_about(dataset: Dataset, command: str, option: str) -> None:
    before = dataset.json_path.read_bytes()
    link = dataset.folder / "linked"
    link.symlink_to(dataset.folder)
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    server = ["--server", "127.0.0.1:1"] if command == "evaluate" else []
    assert main([command, *given, *server, option, str(link / dataset.json_path.name)]) == ConfigError.exit_code
    assert dataset.json_path.read_bytes() == before


def test_an_annotation_without_an_image_row_stays_in_the_queue(dataset: Dataset) -> None:
    dataset.coco["annotations"][3]["image_id"] = 77
    dataset.save()
    queue = review_queue(dataset.json_path)
    assert ids(queue)[0] == 103
    assert "  1. annotation 103, no image: no mask" in "\n".join(queue.lines())
