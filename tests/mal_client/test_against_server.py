"""Claims about client and server together, with a predictor that needs no network."""

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.client import AsyncClient, Client
from mal_client.errors import ServerUnavailable
from mal_client.types import BoxLabel, DatasetResult, LabelOptions, Progress
from numpy.typing import NDArray
from PIL import Image

from mal_server.config.model_config import ModelPlan
from mal_server.models.loader import LoadedModel
from mal_server.server import MalServer
from mal_train.core.coco.annotations import read_coco
from mal_train.core.errors import BadImage
from mal_train.core.images.files import read_image
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions
from tests.mal_client.datasets import Dataset, make_dataset, with_masks
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, bright_disc, config_of, loaded, queued_items

DISC = bright_disc()
BOXES = [DISC_BOX, (-5.0, 0.0, 40.0, 40.0), (20.0, 10.0, 8.5, 9.25), (0.0, 0.0, 60.0, 40.0)]


@contextmanager
def served(
    predictor: BrightPredictor | None = None,
    load: Callable[[ModelPlan], LoadedModel] | None = None,
    servers: list[MalServer] | None = None,
    **settings: Any,
) -> Iterator[str]:
    """Runs the server in a thread and yields its address; kills it without a grace period at the end.

    Args:
        predictor: makes the masks; a `BrightPredictor` by default.
        load: loads a model; the address is yielded before it is called then.
        servers: receives the server, for tests that read its state.
        settings: of the server.
    """
    model_predictor = predictor or BrightPredictor()
    config = config_of(**settings)
    address: Future[str] = Future()
    over = threading.Event()

    async def serve() -> None:
        server = MalServer(config, load or (lambda plan: loaded(plan, model_predictor)))
        if servers is not None:
            servers.append(server)
        try:
            await server.start()
            if load is not None:
                address.set_result(server.address)
            await server.load()
            if load is None:
                address.set_result(server.address)
            await asyncio.to_thread(over.wait)
        finally:
            await server.stop(0)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield address.result(120)
    finally:
        over.set()
        thread.join(120)


class HoldingPredictor(BrightPredictor):
    """Runs a number of batches after `hold_after`; further ones wait until the server is unreachable."""

    def __init__(self) -> None:
        super().__init__()
        self._max_batches = 10**6
        self._released = threading.Event()

    def hold_after(self, batches: int) -> None:
        """Sets the number of batches from now on, behind those of the warm-up."""
        self._max_batches = len(self.batches) + batches

    def release_when_closed(self, address: str) -> None:
        """Releases the batches once the address accepts no connection."""
        host, _, port = address.rpartition(":")
        while True:
            try:
                socket.create_connection((host, int(port)), 60).close()
            except OSError:
                break
            time.sleep(0.005)
        self._released.set()

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        if len(self.batches) >= self._max_batches:
            self._released.wait(120)
        return super().predict(crops, options)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return with_masks(make_dataset(tmp_path, images=6))


def label(address: str, dataset: Dataset, **more: Any) -> DatasetResult:
    with Client(address, timeout_s=30) as client:
        return client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output, **more)


def test_the_client_returns_exactly_the_masks_of_the_labeler() -> None:
    expected = BrightPredictor().label(DISC, BOXES, PredictOptions(agreement=True))
    with served(max_batch_size=2) as address, Client(address, timeout_s=30) as client:
        results = client.label_image(DISC, BOXES, LabelOptions(agreement=True))
    for ours, theirs in zip(expected, results, strict=True):
        assert isinstance(ours, Label)
        assert ours.rle == theirs.rle
        assert (ours.score, ours.area, ours.mask_box) == (theirs.score, theirs.area, theirs.mask_box)
        assert (ours.flags, ours.agreement) == (theirs.flags, theirs.agreement)


def test_the_asyncio_client_returns_the_same_masks() -> None:
    async def send(address: str) -> list[list[BoxLabel]]:
        async with AsyncClient(address, timeout_s=30) as client:
            return await asyncio.gather(*(client.label_image(DISC, [box]) for box in BOXES))

    with served() as address:
        results = asyncio.run(send(address))
        with Client(address, timeout_s=30) as client:
            assert [labels[0].rle for labels in results] == [label.rle for label in client.label_image(DISC, BOXES)]


def test_small_requests_of_several_clients_share_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boxes of eight clients that arrive while the device is busy form one batch."""
    gate, queued = threading.Event(), queued_items(monkeypatch)

    def send(address: str) -> int:
        with Client(address, timeout_s=30) as client:
            timing = client.label_image(DISC, [DISC_BOX])[0].timing
        return 0 if timing is None else timing.batch_size

    predictor = BrightPredictor(gate=gate)
    gate.set()  # for the warm-up
    with served(predictor, max_batch_size=8) as address, ThreadPoolExecutor(9) as pool:
        gate.clear()
        predictor.batches.clear()
        first = pool.submit(send, address)
        wait_until(lambda: bool(predictor.batches))
        others = [pool.submit(send, address) for _ in range(8)]
        wait_until(lambda: sum(queued) == 9)
        gate.set()
        assert (first.result(), [other.result() for other in others]) == (1, [8] * 8)


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def test_a_dataset_gets_the_masks_of_the_labeler_in_its_own_order(dataset: Dataset) -> None:
    with served(limits={"max_items_in_flight": 3}) as address:
        result = label(address, dataset)
    assert (result.labeled, result.failed) == (12, ())
    kernel = BrightPredictor()
    files = {row["id"]: row["file_name"] for row in dataset.coco["images"]}
    written = json.loads(dataset.output.read_text())["annotations"]
    assert [row["id"] for row in written] == [row["id"] for row in dataset.coco["annotations"]]
    for row in written:
        expected = kernel.label(read_image(dataset.images_dir / files[row["image_id"]]), [row["bbox"]])[0]
        assert isinstance(expected, Label)
        assert row["segmentation"] == expected.rle.to_coco()


def test_each_bad_input_fails_alone_with_its_own_reason(dataset: Dataset) -> None:
    folder = dataset.images_dir
    (folder / "image_0.png").unlink()
    (folder / "image_1.png").write_bytes((folder / "image_1.png").read_bytes()[:200])
    (folder / "image_2.png").write_bytes(b"")
    (folder / "image_3.png").write_text("not an image")
    rows = dataset.coco["annotations"]
    rows[8]["bbox"] = [0, 0, 0, 5]
    rows[9]["bbox"] = [1e9, 0, 5, 5]
    rows[10]["bbox"] = [-5, -5, 20, 20]
    rows[11]["attributes"] = {"rotation": 30}
    dataset.save()
    with served() as address:
        result = label(address, dataset)
    assert result.labeled == 1
    reasons = {row.annotation_id: row.error.reason for row in result.failed}
    assert reasons == {
        **dict.fromkeys((100, 101), "IMAGE_NOT_FOUND"),
        **dict.fromkeys((102, 103, 104, 105), "IMAGE_DECODE_FAILED"),
        **dict.fromkeys((106, 107), "IMAGE_FORMAT"),
        **dict.fromkeys((108, 109), "BAD_BOX"),
        111: "BOX_ROTATED",
    }
    assert "BOX_CLIPPED" in dataset.labeled()[110]["flags"]
    messages = {row.annotation_id: row.error.message for row in result.failed}
    assert messages[106].startswith("image_3.png: ")
    assert messages[108].startswith("annotation 108: ")


def test_no_result_is_lost_when_the_server_is_killed_and_restarted(dataset: Dataset) -> None:
    port = 0
    done = threading.Event()
    results: list[DatasetResult] = []
    seen = threading.Event()

    def work(address: str) -> None:
        results.append(label(address, dataset, on_progress=lambda _: seen.set()))
        done.set()

    predictor = HoldingPredictor()
    with served(predictor, max_batch_size=1) as address:
        port = int(address.rpartition(":")[2])
        predictor.hold_after(11)
        job = threading.Thread(target=work, args=(address,))
        job.start()
        assert seen.wait(120)
        threading.Thread(target=predictor.release_when_closed, args=(address,)).start()
    assert not done.is_set(), "the job ended before the server was killed"
    with served(listen={"port": port}):
        job.join(120)
    assert results
    assert (results[0].labeled, results[0].failed) == (12, ())


def test_results_are_kept_when_the_server_is_killed_for_good(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.01)
    results: list[DatasetResult] = []
    seen = threading.Event()
    predictor = HoldingPredictor()
    with served(predictor, max_batch_size=1) as address:
        predictor.hold_after(11)
        job = threading.Thread(target=lambda: results.append(label(address, dataset, on_progress=lambda _: seen.set())))
        job.start()
        assert seen.wait(120)
        threading.Thread(target=predictor.release_when_closed, args=(address,)).start()
    job.join(120)
    assert results[0].labeled >= 2
    assert results[0].labeled + len(results[0].failed) == 12
    assert {row.error.reason for row in results[0].failed} == {"SERVER_LOST"}
    assert len(dataset.labeled()) == 12


def test_the_client_waits_while_the_server_loads(dataset: Dataset) -> None:
    started = threading.Event()

    def load(plan: ModelPlan) -> LoadedModel:
        started.wait(20)
        return loaded(plan, BrightPredictor())

    with served(load=load) as address:
        threading.Timer(2.5, started.set).start()
        assert label(address, dataset).labeled == 12


def test_the_client_waits_while_the_queue_is_full(dataset: Dataset) -> None:
    with served(BrightPredictor(wait_s=0.02), max_batch_size=1, max_queue_crops=4, limits={"max_boxes": 2}) as address:
        result = label(address, dataset)
    assert (result.labeled, result.failed) == (12, ())


def test_the_limits_of_the_server_are_checked_before_sending(dataset: Dataset) -> None:
    noise: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    with served(limits={"max_request_bytes": 1024 * 1024}) as address, Client(address, timeout_s=30) as client:
        with pytest.raises(BadImage) as caught:
            client.label_image(noise, BOXES)
        assert caught.value.reason == "IMAGE_TOO_LARGE"
        Image.fromarray(noise).save(dataset.images_dir / "image_0.png")
        result = client.label_dataset(dataset.json_path, dataset.images_dir, dataset.output)
    assert {row.error.reason for row in result.failed} == {"IMAGE_TOO_LARGE"}
    assert result.labeled == 10


def test_images_below_and_above_the_default_message_limit_of_grpc_are_labeled() -> None:
    with served() as address, Client(address, timeout_s=30) as client:
        for side in (400, 1400):
            noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
            assert client.label_image(buffer.getvalue(), [(10, 10, 50, 50)])[0].ok


def test_an_evaluation_returns_the_metrics_of_the_evaluator(dataset: Dataset) -> None:
    dataset.coco["annotations"][0]["iscrowd"] = 1
    dataset.save()
    coco = read_coco(dataset.json_path)
    evaluator, kernel = Evaluator(coco.category_names), BrightPredictor()
    for row in coco.annotations:
        image = read_image(dataset.images_dir / coco.images[row.image_id].file_name)  # type: ignore[index]
        expected_label = kernel.label(image, [row.box_xywh])[0]
        assert isinstance(expected_label, Label)
        evaluator.add(row, expected_label.rle, expected_label.score)
    expected = evaluator.report()
    seen: list[Progress] = []
    with served() as address, Client(address, timeout_s=30) as client:
        evaluation = client.evaluate(dataset.json_path, dataset.images_dir, on_progress=seen.append)
    assert evaluation.overall.miou == pytest.approx(expected.overall.miou, abs=1e-12)
    assert evaluation.ap_at_1 == pytest.approx(expected.ap_at_1)
    assert evaluation.ap_at_score == pytest.approx(expected.ap_at_score)
    assert evaluation.score == expected.score
    assert evaluation.categories == expected.categories
    assert evaluation.skipped == expected.skipped
    assert sorted(row.annotation_id for row in evaluation.worst) == list(range(101, 112))
    assert seen[-1].images_done == 6


def test_a_reason_of_the_server_has_an_example_beside_many_of_the_client(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = dataset.coco["annotations"]
    rows[0]["bbox"] = [5, 5, 0, 5]
    rows[1]["segmentation"] = []
    rows[2]["segmentation"] = [[1, 2, 3]]
    rows[3]["segmentation"] = [[900, 900, 910, 900, 910, 910]]
    rows[4]["image_id"] = 99
    dataset.coco["images"][-1]["file_name"] = "gone.png"
    dataset.save()
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    with served() as address:
        assert main(["evaluate", "--server", address, *given]) == 3
    err = capsys.readouterr().err
    reasons = [
        "NO_GROUND_TRUTH",
        "BAD_GROUND_TRUTH",
        "EMPTY_GROUND_TRUTH",
        "IMAGE_UNKNOWN",
        "IMAGE_NOT_FOUND",
        "BAD_BOX",
    ]
    assert [reason for reason in reasons if f"  {reason}: " not in err] == []
    assert "BAD_BOX: annotation 100: " in err, "the server refuses a box without an area"


def test_an_unreachable_server_is_reported_with_its_address(dataset: Dataset) -> None:
    with served() as address:
        pass
    with pytest.raises(ServerUnavailable, match=address):
        label(address, dataset)
