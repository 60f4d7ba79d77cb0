"""LVIS's metrics: the numbers of the package `lvis`, and the rules that differ from COCO's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mal_train.core.coco.annotations import Annotation, parse_coco
from mal_train.core.masks import rle
from mal_train.core.metrics.average_precision import LVIS_NAMES
from mal_train.core.metrics.coco_ap import Scores, ap_input
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.core.metrics.lvis import MAX_DETS_PER_IMAGE, Federation
from tests.mal_train.core.metrics.ground_truths import square, truth_of
from tests.reader_tools import in_tool
from tests.tools import missing

SIDE = 130
SCRIPT = """
import importlib.util, json, sys, types
import numpy as np
found = importlib.util.find_spec("lvis")
if found is None:
    print("null")
    raise SystemExit
package = types.ModuleType("lvis")  # without what it imports for drawing
package.__path__ = list(found.submodule_search_locations)
sys.modules["lvis"] = package
np.float = float  # its name in the NumPy of lvis 0.5
from lvis.eval import LVISEval
from lvis.lvis import LVIS
from lvis.results import LVISResults
truth = LVIS(sys.argv[1])
evaluation = LVISEval(truth, LVISResults(truth, json.load(open(sys.argv[2]))), "segm")
evaluation.run()
print(json.dumps([float(value) for value in evaluation.get_results().values()]))
"""


def federated(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random federated ground truth and results: ties, categories that no image judges, more than 300 detections."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number in range(90):
        ids = {"image_id": int(rng.integers(1, 5)), "category_id": int(rng.integers(1, 8))}
        w, h = (int(side) for side in rng.choice([3, 7, 40, 70, 110], 2))
        x, y = int(rng.integers(0, SIDE - w)), int(rng.integers(0, SIDE - h))
        if ids["category_id"] != 6:
            mask = rle.encode_region(np.ones((h, w), dtype=np.bool_), y, x, (SIDE, SIDE))
            box = [float(x), float(y), float(w), float(h)]
            area = float(w * h)
            annotations.append({**ids, "id": number + 1, "segmentation": mask.to_coco(), "bbox": box, "area": area})
        for _ in range(int(rng.integers(0, 12 if ids["image_id"] == 4 else 4))):
            dx, dy = (int(d) for d in rng.integers(-2, 3, 2))
            x2, y2 = min(max(x + dx, 0), SIDE - w), min(max(y + dy, 0), SIDE - h)
            moved = rle.encode_region(np.ones((h, w), dtype=np.bool_), y2, x2, (SIDE, SIDE))
            other = {**ids, "category_id": int(rng.integers(1, 8))} if rng.random() < 0.3 else ids
            results.append({**other, "segmentation": moved.to_coco(), "score": float(rng.choice([0.1, 0.5, 0.9]))})
    spare = [{**row, "score": float(rng.random())} for row in results if row["image_id"] == 4]
    results += [row for _ in range(3) for row in spare]
    images = [
        {
            "id": n,
            "coco_url": f"http://images.example/val2017/{n}.jpg",
            "height": SIDE,
            "width": SIDE,
            "neg_category_ids": rng.choice(np.arange(1, 9), 2, replace=False).tolist(),
            "not_exhaustive_category_ids": rng.choice(np.arange(1, 9), 2, replace=False).tolist(),
        }
        for n in range(1, 5)
    ]
    frequencies = ["r", "c", "f", "r", "c", "f", "r", "f"]
    categories = [{"id": n, "name": f"c{n}", "frequency": frequencies[n - 1]} for n in range(1, 9)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scores", ["one", "score"])
def test_metrics_equal_those_of_the_package_lvis(seed: int, scores: Scores, tmp_path: Path) -> None:
    truth, results = federated(seed)
    assert sum(row["image_id"] == 4 for row in results) > MAX_DETS_PER_IMAGE
    federation = Federation.of(parse_coco(truth))
    metrics = ap_input(truth, results, federation=federation).lvis_metrics(scores)
    if scores == "one":
        results = [{**row, "score": 1.0} for row in results]
    for name, content in (("truth.json", truth), ("results.json", results)):
        (tmp_path / name).write_text(json.dumps(content))
    expected = in_tool("pycocotools", SCRIPT, tmp_path / "truth.json", tmp_path / "results.json")
    if expected is None:
        missing("lvis", "`make tools` installs it into .venv-readers")
    assert [-1.0 if metrics[name] is None else metrics[name] for name in LVIS_NAMES] == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("scores", ["one", "score"])
def test_metrics_of_coco_are_the_same_beside_those_of_lvis(scores: Scores) -> None:
    truth, results = federated(5)
    everywhere = rle.encode_region(np.ones((SIDE, SIDE), dtype=np.bool_), 0, 0, (SIDE, SIDE)).to_coco()
    crowds = [
        {**row, "id": 1000 + n, "iscrowd": 1, "segmentation": everywhere} for n, row in enumerate(truth["annotations"])
    ]
    with_crowd = {**truth, "annotations": [*truth["annotations"], *crowds]}
    both = ap_input(with_crowd, results, federation=Federation.of(parse_coco(with_crowd)))
    assert both.metrics(scores) == ap_input(with_crowd, results).metrics(scores)
    objects = ap_input(truth, results, federation=Federation.of(parse_coco(truth)))
    assert both.lvis_metrics(scores) == objects.lvis_metrics(scores)
    assert both.metrics(scores) != objects.metrics(scores)


def one_image(**judged: Any) -> Federation | None:
    row = {"id": 1, "file_name": "a.png", "width": 60, "height": 40, **judged}
    categories = [{"id": 1, "name": "a", "frequency": "r"}]
    return Federation.of(parse_coco({"images": [row], "annotations": [], "categories": categories}))


def found(federation: Federation | None, *detections: tuple[int, int]) -> dict[str, float | None]:
    """Returns the metrics of squares at (row, category) of which the ground truth has that at row 0, category 1."""
    truth = {"images": [{"id": 1}], "annotations": [{**detection(0, 1), "id": 1}]}
    return ap_input(truth, [detection(*one) for one in detections], federation=federation).lvis_metrics()


def detection(row: int, category: int) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "segmentation": square(row, 0, 8), "score": 1.0 - row / 100}


def test_a_detection_without_an_object_counts_unless_its_category_is_not_exhaustive() -> None:
    wrong_first = ((20, 1), (30, 1), (0, 1))
    judged = one_image(neg_category_ids=[], not_exhaustive_category_ids=[])
    assert found(judged, (0, 1))["AP"] == pytest.approx(1.0)
    before = found(judged, *((row, 1) for row in (0, 20)))["AP"]
    assert before == pytest.approx(1.0)
    truth = {"images": [{"id": 1}], "annotations": [{**detection(30, 1), "id": 1}]}
    results = [detection(row, category) for row, category in wrong_first]
    assert ap_input(truth, results, federation=judged).lvis_metrics()["AP"] == pytest.approx(1 / 3)
    partly = one_image(neg_category_ids=[], not_exhaustive_category_ids=[1])
    assert ap_input(truth, results, federation=partly).lvis_metrics()["AP"] == pytest.approx(1.0)


def test_a_file_is_federated_only_if_its_images_say_what_is_judged() -> None:
    assert one_image() is None
    assert one_image(neg_category_ids=[3]) is not None


def test_the_evaluator_reports_by_frequency_and_only_for_federated_files() -> None:
    federation = one_image(neg_category_ids=[], not_exhaustive_category_ids=[])
    for judged in (federation, None):
        evaluator = Evaluator({1: "a"}, judged)
        row: Annotation = truth_of(1, square(0, 0, 8))
        evaluator.add(row, square(0, 0, 8), 0.5)
        report = evaluator.report()
        if judged is None:
            assert report.lvis_at_score == {}
            assert "LVIS@score" not in report.to_dict()
        else:
            assert report.lvis_at_score["APr"] == pytest.approx(1.0)
            assert report.lvis_at_score["APf"] is None
            assert "APr" in report.table()
