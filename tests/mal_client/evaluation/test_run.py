"""Evaluations of a served model by the client."""

import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.client import Client
from mal_client.errors import CallTimedOut, ServerUnavailable
from mal_client.evaluation.report_page import evaluation_sections
from mal_client.evaluation.sources import LocalDataset
from mal_client.evaluation.stream import MAX_ATTEMPTS, RetryBudget
from mal_client.images.image_files import ImageFiles
from mal_client.review.pages import worst_cards
from mal_client.types import SERVER_DEFAULTS, Evaluation, LabelOptions, Progress

from mal_train.core.coco.annotations import read_coco
from mal_train.core.errors import BadImage
from mal_train.core.report.page import build_report
from tests.mal_client.cutting import Cut, cutting
from tests.mal_client.datasets import Dataset, make_dataset, with_masks
from tests.mal_client.fake_server import SHA, FakeServer, Faults, Limits, serving


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return with_masks(make_dataset(tmp_path))


def evaluate(fake: FakeServer, dataset: Dataset, timeout_s: float = 20, **more: Any) -> Evaluation:
    with serving(fake) as address, Client(address, timeout_s=timeout_s) as client:
        return client.evaluate(dataset.json_path, dataset.images_dir, **more)


def test_the_metrics_of_the_server_come_with_the_ids_of_the_file(dataset: Dataset) -> None:
    evaluation = evaluate(FakeServer(), dataset)
    assert (evaluation.images, evaluation.overall.count) == (3, 6)
    assert evaluation.overall.miou == pytest.approx(0.5)
    assert evaluation.ap_at_1["AP"] == 0.25
    assert evaluation.ap_at_score["AP"] is None
    assert evaluation.score.bias == pytest.approx(0.4)
    assert {row.annotation_id for row in evaluation.worst} == {100, 101, 102, 103, 104, 105}
    assert evaluation.worst[0].file_name == "image_0.png"
    assert evaluation.model.checkpoint_sha256 == SHA
    json.dumps(evaluation.to_dict())
    assert "mIoU" in evaluation.table()


@pytest.mark.parametrize("cut", Cut)
def test_a_stream_that_a_proxy_truncates_is_started_again(dataset: Dataset, cut: Cut) -> None:
    fake = FakeServer()
    with serving(fake) as server, cutting(server, cut, 1, after=1) as address, Client(address) as client:
        evaluation = client.evaluate(dataset.json_path, dataset.images_dir)
    assert fake.calls.count("Evaluate") == 2
    assert (evaluation.images, evaluation.overall.count) == (3, 6)


def test_images_keep_to_the_limits_of_the_server_that_evaluates_them(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of a client of several servers go to one after another; an evaluation goes to one of them."""
    low, high = FakeServer(limits=Limits(max_image_bytes=10)), FakeServer()
    skipped = []
    with serving(low) as first, serving(high) as second, Client(f"{first},{second}") as client:
        for chosen in (0, 0, 1, 1):
            monkeypatch.setattr("mal_client.evaluation.stream.random.randrange", lambda _, chosen=chosen: chosen)
            skipped.append(client.evaluate(dataset.json_path, dataset.images_dir).images_skipped)
    assert skipped == [3, 3, 0, 0]
    assert (low.calls.count("Evaluate"), high.calls.count("Evaluate")) == (2, 2)


@pytest.mark.parametrize("is_lost_first", [False, True])
def test_a_server_that_does_not_state_its_limits_leaves_the_evaluation_to_another(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, is_lost_first: bool
) -> None:
    monkeypatch.setattr("mal_client.evaluation.stream.RETRY_PAUSE_S", 0.01)
    monkeypatch.setattr("mal_client.evaluation.stream.random.randrange", lambda _: int(not is_lost_first))
    with serving(FakeServer()) as gone:
        pass
    with serving(FakeServer()) as address, Client(f"{gone},{address}") as client:
        assert client.evaluate(dataset.json_path, dataset.images_dir).images == 3


class FailsAfterResult(FakeServer):
    """Ends each evaluation with an error after its result, as a proxy does that loses the connection then."""

    def Evaluate(self, request_iterator: Any, context: Any) -> Any:
        """Yields the responses, then fails."""
        yield from super().Evaluate(request_iterator, context)
        context.abort(self.code, "lost after the result")

    code = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
def test_a_result_that_an_error_follows_is_kept(dataset: Dataset, code: grpc.StatusCode) -> None:
    fake = FailsAfterResult()
    fake.code = code
    evaluation = evaluate(fake, dataset)
    assert (evaluation.images, evaluation.overall.count) == (3, 6)
    assert fake.calls.count("Evaluate") == 1


def test_the_first_message_has_the_options_and_the_number_of_images(dataset: Dataset) -> None:
    fake = FakeServer()
    evaluate(fake, dataset, options=LabelOptions(threshold=0.4), worst_count=2)
    options = fake.evaluate_options
    assert options is not None
    assert (options.images_total, options.worst_count, options.label.threshold) == (3, 2, 0.4)
    assert [(row.category_id, row.name) for row in options.categories] == [(1, "cup")]


def test_images_are_sent_in_the_order_of_their_ids(dataset: Dataset) -> None:
    # AP@1 breaks the ties of its equal scores in this order, as pycocotools does.
    dataset.coco["images"].reverse()
    dataset.coco["annotations"].reverse()
    dataset.save()
    fake = FakeServer()
    evaluation = evaluate(fake, dataset)
    ids = [row["id"] for row in dataset.coco["annotations"]]
    sent = [[ids[truth.instance.instance_id] for truth in image.ground_truth] for image in fake.evaluated]
    assert sent == [[101, 100], [103, 102], [105, 104]]
    names = {row.annotation_id: row.file_name for row in evaluation.worst}
    assert (names[100], names[105]) == ("image_0.png", "image_2.png")


def test_ids_that_are_not_integers_are_mapped_to_the_wire_and_back(dataset: Dataset) -> None:
    dataset.coco["categories"] = [{"id": "cup", "name": "cup"}, {"id": 1, "name": "pot"}]
    for index, row in enumerate(dataset.coco["annotations"]):
        row["id"] = f"box-{index}"
        row["category_id"] = "cup" if index % 2 else 1
    dataset.save()
    fake = FakeServer()
    evaluation = evaluate(fake, dataset)
    assert fake.evaluate_options is not None
    assert [row.category_id for row in fake.evaluate_options.categories] == [1, 2]
    sent = [truth.category_id for image in fake.evaluated for truth in image.ground_truth]
    assert sent == [2, 1, 2, 1, 2, 1]
    assert {row.annotation_id for row in evaluation.worst} == {f"box-{index}" for index in range(6)}


def test_rows_that_cannot_be_measured_are_counted_by_reason(dataset: Dataset) -> None:
    (dataset.images_dir / "image_0.png").unlink()
    rows = dataset.coco["annotations"]
    rows[2]["segmentation"] = []
    rows[3]["segmentation"] = [[1, 2, 3]]
    rows[4]["iscrowd"] = 1
    rows[5]["bbox"] = "broken"
    dataset.coco["images"].append({"id": 9, "file_name": "image_1.png", "width": 40, "height": 30})
    rows.append(rows[1] | {"id": 200, "image_id": 9})
    dataset.save()
    evaluation = evaluate(FakeServer(), dataset)
    assert evaluation.skipped == {
        "IMAGE_NOT_FOUND": 2,
        "NO_GROUND_TRUTH": 1,
        "BAD_GROUND_TRUTH": 1,
        "BAD_BOX": 1,
        "CROWD": 1,
    }
    assert (evaluation.overall.count, evaluation.images_skipped, evaluation.failed_count) == (1, 1, 5)


def test_masks_without_a_pixel_are_named_and_not_sent(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    for row in dataset.coco["annotations"]:
        row["segmentation"] = [[900, 900, 910, 900, 910, 910]]
    dataset.coco["annotations"][5]["iscrowd"] = 1
    dataset.save()
    fake = FakeServer()
    with serving(fake) as address:
        arguments = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
        metrics = dataset.json_path.with_name("metrics.json")
        assert main(["evaluate", "--server", address, *arguments, "--output", str(metrics)]) == 3
    assert fake.evaluated == []
    written = json.loads(metrics.read_text())
    assert written["skipped_by_reason"] == {"EMPTY_GROUND_TRUTH": 5, "CROWD": 1}
    assert (written["count"], written["empty_ground_truth"]) == (0, 5)
    printed = capsys.readouterr().err
    assert all(f"EMPTY_GROUND_TRUTH: annotation {row['id']}: " in printed for row in dataset.coco["annotations"][:5])


def test_messages_of_the_server_name_the_rows_and_images_of_the_file(dataset: Dataset) -> None:
    files = ImageFiles.of(dataset.images_dir)
    source = LocalDataset(read_coco(dataset.json_path), files, options=SERVER_DEFAULTS, worst_count=0)
    assert source.message("annotation 2: 0 x 5 px") == "annotation 102: 0 x 5 px"
    assert source.message("image '1': 0 bytes") == "image_1.png: 0 bytes"
    for other in ("annotation 6: not of the file", "annotation x: no index", "of another kind"):
        assert source.message(other) == other


@pytest.mark.parametrize("points", [[[3, 4, 1]], [[3, 4]], "of another meaning"])
def test_points_are_not_read(dataset: Dataset, points: object) -> None:
    for row in dataset.coco["annotations"][:4]:
        row["points"] = points
    dataset.save()
    evaluation = evaluate(FakeServer(), dataset)
    assert (evaluation.overall.count, evaluation.failed_count, evaluation.skipped) == (6, 0, {})


def test_rows_of_images_without_a_ground_truth_mask_are_counted_but_not_sent(dataset: Dataset) -> None:
    for row in dataset.coco["annotations"]:
        row["segmentation"] = []
    dataset.coco["annotations"][0]["iscrowd"] = 1
    dataset.save()
    fake = FakeServer()
    evaluation = evaluate(fake, dataset)
    assert fake.evaluated == []
    assert evaluation.skipped == {"NO_GROUND_TRUTH": 5, "CROWD": 1}
    assert (evaluation.overall.count, evaluation.failed_count) == (0, 5)


def test_crowd_regions_are_sent_and_are_not_failures(dataset: Dataset) -> None:
    dataset.coco["annotations"][0]["iscrowd"] = 1
    dataset.save()
    fake = FakeServer()
    evaluation = evaluate(fake, dataset)
    assert [truth.is_crowd for truth in fake.evaluated[0].ground_truth] == [True, False]
    assert (evaluation.skipped, evaluation.failed_count) == ({"CROWD": 1}, 0)


@pytest.mark.parametrize("is_crowd", [0, 1])
def test_polygons_on_an_image_without_a_stated_size_are_sent_in_the_size_of_its_file(
    dataset: Dataset, is_crowd: int
) -> None:
    masks = []
    for is_stated in (True, False):
        dataset.coco["annotations"][0] |= {"iscrowd": is_crowd, "segmentation": [[2, 2, 9, 2, 9, 9]]}
        if not is_stated:
            del dataset.coco["images"][0]["width"], dataset.coco["images"][0]["height"]
        dataset.save()
        fake = FakeServer()
        evaluate(fake, dataset)
        masks.append(fake.evaluated[0].ground_truth[0].mask)
    assert masks[0] == masks[1]


def test_a_broken_stream_is_started_again(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.evaluation.stream.RETRY_PAUSE_S", 0.01)
    evaluation = evaluate(FakeServer(Faults(break_after=1, breaks=2)), dataset)
    assert (evaluation.images, evaluation.overall.count) == (3, 6)
    with pytest.raises(ServerUnavailable):
        evaluate(FakeServer(Faults(break_after=1, breaks=5)), dataset)


def test_retries_that_the_server_asks_for_do_not_count_as_attempts(dataset: Dataset) -> None:
    fake = FakeServer(Faults(unavailable=2 * MAX_ATTEMPTS, pushback_ms=1))
    assert evaluate(fake, dataset).images == 3
    assert fake.calls.count("Evaluate") == 2 * MAX_ATTEMPTS + 1


def test_a_busy_server_fails_the_evaluation_once_the_retry_budget_is_exhausted(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.evaluation.run.RetryBudget", lambda _: RetryBudget(0.0))
    with pytest.raises(ServerUnavailable, match=r"0\.001 s"):
        evaluate(FakeServer(Faults(unavailable=10**6, pushback_ms=1)), dataset)


def test_retries_that_the_server_asks_for_exhaust_the_budget_only_by_time() -> None:
    now = [0.0]
    budget = RetryBudget(60.0, lambda: now[0])

    def may_retry_at(time_s: float, *, has_progress: bool = False) -> bool:
        now[0] = time_s
        return budget.spend(5.0, has_progress=has_progress)

    assert all(may_retry_at(time_s) for time_s in range(0, 61, 5))
    assert may_retry_at(61, has_progress=True)
    assert may_retry_at(121)
    assert not may_retry_at(122)


def test_failures_without_progress_exhaust_the_budget_after_the_last_attempt() -> None:
    budget = RetryBudget(60.0)
    assert all(budget.spend(None, has_progress=False) for _ in range(MAX_ATTEMPTS - 1))
    assert budget.spend(None, has_progress=True)
    assert all(budget.spend(None, has_progress=False) for _ in range(MAX_ATTEMPTS - 2))
    assert not budget.spend(None, has_progress=False)


def test_a_server_that_sends_nothing_ends_the_evaluation(dataset: Dataset) -> None:
    class Silent(FakeServer):
        def Evaluate(self, request_iterator: Any, context: Any) -> Any:
            self.released.wait()
            yield from ()

    with pytest.raises(CallTimedOut, match="2 s"):
        evaluate(Silent(), dataset, timeout_s=2.0)


def test_a_crowd_region_is_not_a_failure_in_the_progress(dataset: Dataset) -> None:
    for row in dataset.coco["annotations"][
        :2
    ]:  # the first image: a crowd region, and an object without a ground-truth mask
        row["segmentation"] = []
    dataset.coco["annotations"][0]["iscrowd"] = 1
    dataset.save()
    seen: list[Progress] = []
    evaluation = evaluate(FakeServer(), dataset, on_progress=seen.append)
    assert seen[-1].boxes_failed == evaluation.failed_count == 1


def test_progress_is_reported_after_each_image(dataset: Dataset) -> None:
    seen: list[Progress] = []
    evaluate(FakeServer(), dataset, on_progress=seen.append)
    assert [(row.images_done, row.images_total) for row in seen] == [(1, 3), (2, 3), (3, 3)]


def test_an_image_in_several_messages_is_one_image_of_the_progress(dataset: Dataset) -> None:
    seen: list[Progress] = []
    fake = FakeServer(limits=Limits(max_boxes=1))
    evaluate(fake, dataset, on_progress=seen.append)
    assert len(fake.evaluated) == 6
    assert [(row.images_done, row.images_total) for row in seen] == [(n, 3) for n in (1, 1, 2, 2, 3, 3)]
    assert fake.evaluate_options is not None
    assert fake.evaluate_options.images_total == 3


def test_rows_of_an_image_of_too_many_boxes_are_counted_once_and_crowds_not(dataset: Dataset) -> None:
    image_0 = [row for row in dataset.coco["annotations"] if row["image_id"] == 1]
    more = [image_0[0] | {"id": 200 + n} for n in range(3)]
    more[1]["iscrowd"] = 1
    more[2]["segmentation"] = [[1, 2, 3]]
    dataset.coco["annotations"] += more
    dataset.save()
    fake = FakeServer(limits=Limits(max_boxes=3))
    evaluation = evaluate(fake, dataset, options=LabelOptions(resolve_overlaps=True))
    assert evaluation.skipped == {"TOO_MANY_BOXES": 3, "BAD_GROUND_TRUTH": 1}
    assert evaluation.failed_count == 4


def test_the_report_is_one_file_and_shows_the_worst_masks_first(dataset: Dataset) -> None:
    with serving(FakeServer()) as address, Client(address, timeout_s=20) as client:
        evaluation = client.evaluate(dataset.json_path, dataset.images_dir)
        cards = worst_cards(
            client, evaluation, read_coco(dataset.json_path), dataset.images_dir, SERVER_DEFAULTS, count=4
        )
    assert [card.title for card in cards] == [f"IoU {row.iou:.2f} · score 0.90" for row in evaluation.worst[:4]]
    assert sorted(row.iou for row in evaluation.worst) == [row.iou for row in evaluation.worst]
    page = build_report("Evaluation", evaluation_sections(evaluation, cards))
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert np.mean([row.iou for row in evaluation.worst]) == pytest.approx(evaluation.overall.miou)


def test_the_report_counts_the_masks_that_it_cannot_show(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BadImage("above the limit", "IMAGE_TOO_LARGE")

    monkeypatch.setattr("mal_client.review.pages.decode_image", refused)
    page = dataset.folder / "page.html"
    with serving(FakeServer()) as address:
        files = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
        assert main(["evaluate", "--server", address, *files, "--report", str(page), "--worst", "4"]) == 0
    assert "data:image/png" not in page.read_text()
    assert "4 masks, whose images" in page.read_text()
