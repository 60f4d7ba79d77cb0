"""Claims about labeling a COCO file."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from mal_client.client import AsyncClient, Client
from mal_client.errors import CallCancelled, CallTimedOut, InvalidRequest, ModelChanged, ServerUnavailable
from mal_client.types import DatasetOptions, DatasetResult, LabelOptions, Progress, RowFilter
from pycocotools.coco import COCO

from mal_train.core.coco.journal import journal_path
from mal_train.core.coco.json_file import errors_path
from mal_train.core.errors import BadDataset, ConfigError, OutputError
from mal_train.core.masks.rle import Rle, area
from mal_train.core.settings import Branch, MaskFormat
from tests.mal_client.cutting import Cut, cutting
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import SHA, FakeServer, Faults, Limits, once, serving


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path)


def label(fake: FakeServer, dataset: Dataset, timeout_s: float = 20, **more: Any) -> DatasetResult:
    with serving(fake) as address, Client(address, timeout_s=timeout_s) as client:
        return client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output, **more)


@pytest.mark.parametrize("cut", Cut)
def test_no_result_is_lost_when_a_proxy_cuts_the_streams_short(dataset: Dataset, cut: Cut) -> None:
    fake = FakeServer(limits=Limits(max_items_in_flight=1))
    with (
        serving(fake) as server,
        cutting(server, cut, 2, after=1) as address,
        Client(address) as client,
    ):
        result = client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output)
    assert fake.calls.count("LabelImages") == 3
    assert (result.labeled, result.failed) == (6, ())


def test_every_annotation_gets_a_mask_and_keeps_its_order_and_fields(dataset: Dataset) -> None:
    result = label(FakeServer(Faults(reverse=True, delay_s=0.01)), dataset)
    written = json.loads(dataset.output.read_text())
    assert [row["id"] for row in written["annotations"]] == [row["id"] for row in dataset.coco["annotations"]]
    for given, row in zip(dataset.coco["annotations"], written["annotations"], strict=True):
        assert (row["bbox"], row["mine"]) == (given["bbox"], given["mine"])
        assert row["area"] == area(Rle.from_coco(row["segmentation"])) == given["bbox"][2] * given["bbox"][3]
        assert (row["score"], row["flags"]) == (0.75, ["FULL_BOX"])
    assert written["info"] == {"note": "kept"}
    assert (result.labeled, result.failed, result.errors_file) == (6, (), None)


def test_pycocotools_loads_the_output(dataset: Dataset) -> None:
    label(FakeServer(), dataset)
    loaded = COCO(str(dataset.output))
    assert len(loaded.getAnnIds()) == 6
    assert loaded.annToMask(loaded.loadAnns([100])[0]).sum() == 80


def test_the_output_records_weights_and_settings(dataset: Dataset) -> None:
    label(FakeServer(), dataset, options=LabelOptions(Branch.TEACHER, threshold=0.4))
    provenance = json.loads(dataset.output.read_text())["mask_auto_labeler"]
    assert provenance["checkpoint_sha256"] == SHA
    assert (provenance["branch"], provenance["thresholds"]) == ("teacher", [0.4, 0.4, 0.4])
    assert (provenance["server_version"], provenance["arch"]) == ("1.2.3", "box-filler")


def test_ids_of_any_json_type_are_kept(dataset: Dataset) -> None:
    for index, row in enumerate(dataset.coco["annotations"]):
        row["id"] = f"box-{index}" if index % 2 else index + 0.5
    dataset.coco["images"][0]["id"] = "first"
    for row in dataset.coco["annotations"][:2]:
        row["image_id"] = "first"
    dataset.save()
    result = label(FakeServer(), dataset)
    assert result.labeled == 6
    assert set(dataset.labeled()) == {row["id"] for row in dataset.coco["annotations"]}


@pytest.mark.parametrize("breaks", [1, 3])
@pytest.mark.parametrize("break_after", [0, 2])
def test_no_result_is_lost_when_the_stream_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: int, break_after: int
) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.01)
    dataset = make_dataset(tmp_path, images=12)
    fake = FakeServer(Faults(break_after=break_after, breaks=breaks))
    result = label(fake, dataset)
    assert (result.labeled, result.failed) == (24, ())
    assert fake.calls.count("LabelImages") == breaks + 1
    assert sorted(fake.item_ids, key=int) == [str(image) for image in range(12)], "labeled items are not sent again"


def test_no_result_is_lost_when_a_closing_server_cancels_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.01)
    fake = FakeServer(Faults(break_after=2, breaks=1, break_code=grpc.StatusCode.CANCELLED))
    result = label(fake, make_dataset(tmp_path, images=6))
    assert (result.labeled, result.failed) == (12, ())
    assert fake.calls.count("LabelImages") == 2


def test_an_item_with_retry_info_is_sent_again(dataset: Dataset) -> None:
    fake = FakeServer(Faults(retry_items={"1": 2}, retry_boxes={4: 1}))
    result = label(fake, dataset)
    assert (result.labeled, result.failed) == (6, ())
    assert sorted(fake.item_ids) == ["0", "1", "1", "1", "2", "2"]
    assert [instance.instance_id for instance in fake.label_requests[-1].instances] in ([4], [2, 3])


def test_the_window_limits_the_items_in_flight(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=12)
    fake = FakeServer(Faults(hold_after=0), Limits(max_items_in_flight=3))
    # The server answers once it has three items; a fourth before the first response would be counted.
    with once(lambda: len(fake.received) >= 3, fake.released.set):
        label(fake, dataset)
    assert fake.max_in_flight == 3


def test_an_image_with_more_boxes_than_the_limit_is_sent_in_parts(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=2, boxes=5)
    fake = FakeServer(limits=Limits(max_boxes=2))
    assert label(fake, dataset).labeled == 10
    assert sorted(len(request.instances) for request in fake.label_requests) == [1, 1, 2, 2, 2, 2]


def test_a_missing_or_broken_image_fails_its_own_boxes_only(dataset: Dataset) -> None:
    (dataset.images_dir / "image_0.png").unlink()
    (dataset.images_dir / "image_1.png").write_text("not an image")
    result = label(FakeServer(), dataset)
    assert result.labeled == 2
    assert [row.error.reason for row in result.failed] == ["IMAGE_NOT_FOUND"] * 2 + ["IMAGE_FORMAT"] * 2
    assert result.errors_file == errors_path(dataset.output)
    lines = [json.loads(line) for line in result.errors_file.read_text().splitlines()]
    assert [line["annotation_id"] for line in lines] == [100, 101, 102, 103]
    assert "image_0.png" in lines[0]["message"]
    assert lines[2]["message"].startswith("image_1.png: ")
    row = dataset.labeled()[100]
    assert row["error"]["reason"] == "IMAGE_NOT_FOUND"
    assert (row["score"], row["mine"]) == (0.0, "note 100")


def test_when_all_images_are_missing_every_box_is_listed(dataset: Dataset) -> None:
    for image in dataset.images_dir.iterdir():
        image.unlink()
    result = label(FakeServer(), dataset)
    assert (result.labeled, len(result.failed)) == (0, 6)


def test_an_image_whose_size_differs_from_the_file_fails(dataset: Dataset) -> None:
    dataset.coco["images"][2]["width"] = 41
    dataset.save()
    result = label(FakeServer(), dataset)
    assert {row.error.reason for row in result.failed} == {"IMAGE_SIZE_MISMATCH"}


@pytest.mark.parametrize("is_0_1_0", [False, True])
def test_a_bad_box_is_named_by_its_annotation(dataset: Dataset, *, is_0_1_0: bool) -> None:
    dataset.coco["annotations"][3]["bbox"] = [500, 500, 5, 5]
    dataset.coco["annotations"][4]["bbox"] = [1, 2, 3]
    dataset.coco["annotations"][5]["image_id"] = 99
    dataset.save()
    result = label(FakeServer(limits=Limits(is_0_1_0=is_0_1_0)), dataset)
    assert result.labeled == 3
    by_id = {row.annotation_id: row.error for row in result.failed}
    assert {key: error.reason for key, error in by_id.items()} == {
        103: "BAD_BOX",
        104: "BAD_BOX",
        105: "IMAGE_UNKNOWN",
    }
    assert by_id[103].message.startswith("annotation 103: ")
    assert "box 3: " not in by_id[103].message


def test_crowd_regions_are_copied_and_flagged(dataset: Dataset) -> None:
    dataset.coco["annotations"][0]["iscrowd"] = 1
    dataset.save()
    result = label(FakeServer(), dataset)
    assert (result.labeled, result.copied, len(result.failed)) == (5, 1, 0)
    assert dataset.labeled()[100]["flags"] == ["CROWD"]


def test_the_filter_missing_keeps_masks_and_retries_failed_rows(dataset: Dataset) -> None:
    kept = {"size": [30, 40], "counts": [100, 20, 1080]}
    dataset.coco["annotations"][0]["segmentation"] = kept
    dataset.coco["annotations"][1] |= {"segmentation": kept, "error": {"reason": "SERVER_LOST"}}
    dataset.save()
    result = label(FakeServer(), dataset, dataset_options=DatasetOptions(only=RowFilter.MISSING))
    assert (result.labeled, result.copied) == (5, 1)
    assert dataset.labeled()[100] == dataset.coco["annotations"][0]
    assert dataset.labeled()[101]["segmentation"] != kept
    assert "error" not in dataset.labeled()[101]
    label(FakeServer(), dataset)
    assert dataset.labeled()[100]["segmentation"] != kept


@pytest.mark.parametrize("rows", ["annotations", "images"])
def test_duplicate_ids_refuse_the_file_before_any_work(dataset: Dataset, rows: str) -> None:
    dataset.coco[rows][1]["id"] = dataset.coco[rows][0]["id"]
    dataset.save()
    fake = FakeServer()
    with pytest.raises(BadDataset, match=str(dataset.coco[rows][0]["id"])):
        label(fake, dataset)
    assert not fake.calls
    assert not dataset.output.exists()


def test_an_unwritable_output_is_refused_before_any_work(dataset: Dataset) -> None:
    fake = FakeServer()
    for output in (dataset.folder / "no" / "out.json", dataset.images_dir):
        with serving(fake) as address, Client(address) as client, pytest.raises(OutputError):
            client.label_dataset(dataset.json_path, dataset.images_dir, output)
    assert not fake.calls


def test_the_filter_flagged_labels_flagged_and_failed_rows(dataset: Dataset) -> None:
    for row, flags in zip(dataset.coco["annotations"], [[], ["MULTI_PART"], [], [], [], []], strict=True):
        row |= {"segmentation": {"size": [30, 40], "counts": [100, 20, 1080]}, "flags": flags}
    dataset.coco["annotations"][2]["error"] = {"reason": "SERVER_LOST"}
    dataset.save()
    fake = FakeServer()
    assert label(fake, dataset, dataset_options=DatasetOptions(only=RowFilter.FLAGGED)).labeled == 2
    assert [instance.instance_id for request in fake.label_requests for instance in request.instances] == [1, 2]
    assert dataset.labeled()[100] == dataset.coco["annotations"][0]


def test_the_filter_ids_labels_the_given_ids(dataset: Dataset) -> None:
    result = label(FakeServer(), dataset, dataset_options=DatasetOptions(RowFilter.IDS, frozenset({105, 101})))
    assert (result.labeled, result.copied) == (2, 4)
    assert "segmentation" not in dataset.labeled()[100]
    with pytest.raises(ConfigError, match="7"):
        label(FakeServer(), dataset, dataset_options=DatasetOptions(RowFilter.IDS, frozenset({105, 7})))


def test_update_bbox_sets_each_box_to_that_of_its_mask(dataset: Dataset) -> None:
    dataset.coco["annotations"][0]["bbox"] = [-4, 2.25, 10, 8.5]
    dataset.save()
    label(FakeServer(), dataset, dataset_options=DatasetOptions(update_bbox=True))
    assert dataset.labeled()[100]["bbox"] == [0, 2, 6, 9]
    label(FakeServer(), dataset)
    assert dataset.labeled()[100]["bbox"] == [-4, 2.25, 10, 8.5]


def test_uncompressed_run_lengths_encode_the_same_masks(dataset: Dataset) -> None:
    dataset.coco["annotations"][5]["bbox"] = [500, 500, 5, 5]
    dataset.save()
    label(FakeServer(), dataset)
    compressed = dataset.labeled()
    label(FakeServer(), dataset, dataset_options=DatasetOptions(mask_format=MaskFormat.UNCOMPRESSED, update_bbox=True))
    for key, row in dataset.labeled().items():
        assert isinstance(row["segmentation"]["counts"], list)
        assert Rle.from_coco(row["segmentation"]) == Rle.from_coco(compressed[key]["segmentation"])


def test_a_file_without_annotations_gives_one_without_annotations(dataset: Dataset) -> None:
    dataset.coco["annotations"] = []
    dataset.save()
    fake = FakeServer()
    assert label(fake, dataset).labeled == 0
    assert json.loads(dataset.output.read_text())["annotations"] == []
    assert "LabelImages" not in fake.calls


def test_when_the_server_is_lost_results_are_kept_and_the_rest_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.001)
    dataset = make_dataset(tmp_path, images=6)
    result = label(FakeServer(Faults(kill_after=4)), dataset)
    assert (result.labeled, len(result.failed)) == (8, 4)
    assert {row.error.reason for row in result.failed} == {"SERVER_LOST"}
    assert not result.is_final
    fake = FakeServer()
    again = label(fake, dataset)
    assert (again.labeled, again.failed, again.is_final) == (12, (), True)
    assert sorted(fake.item_ids) == ["4", "5"], "labeled rows are not sent again"


def test_a_server_that_is_lost_before_any_result_is_an_error_and_leaves_no_file(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.001)
    with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:"):
        label(FakeServer(Faults(unavailable=10**6)), dataset)
    assert not dataset.output.exists()


def test_a_silent_server_counts_as_lost(dataset: Dataset) -> None:
    with pytest.raises(CallTimedOut, match="2 s"):
        label(FakeServer(Faults(hold_after=0)), dataset, timeout_s=2.0)


def test_masks_of_two_checkpoints_are_never_in_one_file(dataset: Dataset) -> None:
    with pytest.raises(ModelChanged, match=r"aaaaaaaaaaaa .*abababababab.*--restart"):
        label(FakeServer(Faults(shas=["aa" * 32, "bb" * 32])), dataset)
    assert not dataset.output.exists()


def test_only_a_finished_run_replaces_an_older_output_and_its_errors_file(dataset: Dataset) -> None:
    dataset.output.write_text("old")
    errors_path(dataset.output).write_text("old errors")

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(FakeServer(), dataset, on_progress=stop)
    assert dataset.output.read_text() == "old"
    assert sorted(path.name for path in dataset.folder.iterdir()) == [
        "images",
        "in.json",
        "out.errors.jsonl",
        "out.json",
        "out.json.ledger",
    ]
    label(FakeServer(), dataset)
    assert not errors_path(dataset.output).exists()
    assert not journal_path(dataset.output).exists()


def test_progress_ends_with_all_boxes_done(dataset: Dataset) -> None:
    seen: list[Progress] = []
    (dataset.images_dir / "image_0.png").unlink()
    label(FakeServer(), dataset, on_progress=seen.append)
    last = seen[-1]
    assert (last.images_done, last.images_total, last.boxes_done, last.boxes_failed) == (3, 3, 6, 2)


def test_invalid_rows_count_as_done_and_failed(dataset: Dataset) -> None:
    seen: list[Progress] = []
    dataset.coco["annotations"][0]["bbox"] = None
    dataset.save()
    result = label(FakeServer(), dataset, on_progress=seen.append)
    last = seen[-1]
    assert (last.boxes_done, last.boxes_failed) == (result.labeled + result.failed_count, 1) == (6, 1)


def test_failures_of_an_unfinished_run_count_until_their_new_result_arrives(dataset: Dataset) -> None:
    seen: list[Progress] = []
    notices: list[str] = []
    first = label(FakeServer(Faults(retry_items={"0": 10**6}, bad_boxes={4})), dataset)
    assert (first.labeled, first.failed_count, first.is_final) == (3, 3, False)
    one_by_one = Limits(max_items_in_flight=1)
    last = label(FakeServer(limits=one_by_one), dataset, on_progress=seen.append, on_notice=notices.append)
    assert "3 of 6 boxes" in notices[0]
    assert "1 failed" in notices[0]
    assert [(row.images_done, row.boxes_done, row.boxes_failed) for row in seen] == [(2, 6, 1), (3, 6, 0)]
    assert [row.images_before for row in seen] == [1, 1]
    assert (last.labeled, last.failed_count) == (6, 0)


def test_the_annotation_file_cannot_be_the_output(dataset: Dataset) -> None:
    before = dataset.json_path.read_bytes()
    dataset.output.symlink_to(dataset.json_path)
    with pytest.raises(ConfigError, match=r"^output .*out\.json: "):
        label(FakeServer(), dataset)
    assert dataset.json_path.read_bytes() == before


def test_the_asyncio_client_labels_a_dataset_while_its_loop_runs(dataset: Dataset) -> None:
    fake, target = FakeServer(Faults(hold_after=0)), 20

    async def work(address: str) -> int:
        ticks = 0
        async with AsyncClient(address, timeout_s=20) as client:
            job = asyncio.ensure_future(client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output))
            while not job.done():
                ticks += bool(fake.received)
                if ticks == target:
                    fake.released.set()
                await asyncio.sleep(0.005)
            assert (await job).labeled == 6
        return ticks

    with serving(fake) as address:
        assert asyncio.run(work(address)) >= target


def test_a_cancelled_asyncio_job_ends_without_output(dataset: Dataset) -> None:
    fake = FakeServer(Faults(hold_after=0))

    async def work(address: str) -> None:
        async with AsyncClient(address, timeout_s=20) as client:
            job = asyncio.ensure_future(client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output))
            while not fake.received:
                await asyncio.sleep(0.005)
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job

    with serving(fake) as address:
        asyncio.run(work(address))
    assert not dataset.output.exists()


def test_closing_the_client_ends_a_job_in_another_thread(dataset: Dataset) -> None:
    fake = FakeServer(Faults(hold_after=0))
    with serving(fake) as address:
        client = Client(address, timeout_s=20)
        with once(lambda: fake.received, client.close), pytest.raises(CallCancelled):
            client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output)
    assert not dataset.output.exists()


def test_a_refused_stream_is_not_retried(dataset: Dataset) -> None:
    class RefusingServer(FakeServer):
        def LabelImages(self, request_iterator: Any, context: Any) -> Any:
            self.calls.append("LabelImages")
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")

    fake = RefusingServer()
    with pytest.raises(InvalidRequest, match="not you"):
        label(fake, dataset)
    assert fake.calls.count("LabelImages") == 1
