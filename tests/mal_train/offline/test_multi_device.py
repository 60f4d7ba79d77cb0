"""Labeling on several devices (here the CPU, more than once) with one process each."""

import contextlib
import dataclasses
import json
import multiprocessing
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import pytest
import torch

from mal_train.commands.evaluate import evaluate
from mal_train.commands.inference import inference
from mal_train.config.spec import Spec, load_spec
from mal_train.core.coco.annotations import Annotation, ImageInfo, by_image, read_coco
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError, LostProcess
from mal_train.core.images.files import ImageFindings, ImageFolder
from mal_train.core.images.pixels import FormatCounts
from mal_train.core.settings import LabelerConfig, Precision
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.networks.network import MalNetwork
from mal_train.offline import multi_device
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.offline.multi_device import label_on_devices
from mal_train.offline.worker_messages import ROW_REQUEST, decode_rows, encode_results
from tests.networks import spread_network
from tests.scenes import widen, write_scenes

CONFIG = LabelerConfig(crop_size=32, mask_thres=(0.5, 0.5, 0.5))
CPU = torch.device("cpu")
NO_FINDINGS = ImageFindings(respelled={}, stretched=[], dropped=[])


def add_invalid_rows(coco: dict[str, Any]) -> None:
    """Adds a crowd, a box outside its image, missing files, an image without boxes, and an unknown image id."""
    rows = coco["annotations"]
    rows[1]["iscrowd"] = 1
    rows[3]["bbox"] = [1000, 1000, 5, 5]
    coco["images"].append({"id": 50, "file_name": "gone.png", "width": 10, "height": 10})
    rows.append({**rows[0], "id": 500, "image_id": 50})
    coco["images"].append({"id": 51, "file_name": "0.png", "width": 96, "height": 80})
    rows.append({**rows[0], "id": 501, "image_id": 99})


@pytest.fixture(scope="module")
def network() -> MalNetwork:
    return spread_network(2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_scenes(tmp_path_factory.mktemp("scenes"), images=7, change=add_invalid_rows)


@pytest.fixture(scope="module")
def checkpoint(network: MalNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.malckpt"
    weights = dict(network.state_dict())
    save_checkpoint(path, Checkpoint(network.config, CONFIG, weights, [{"id": 1, "name": "ellipse"}], {}), None)
    return path


def spec_of(checkpoint: Path, scenes: tuple[Path, Path], results: Path, processes: int) -> Spec:
    overrides = [f"results_dir='{results}'", f"inference.ann_path='{scenes[0]}'", f"inference.img_dir='{scenes[1]}'"]
    overrides += [f"dataset.val_ann_path='{scenes[0]}'", f"dataset.val_img_dir='{scenes[1]}'"]
    for task in ("evaluate", "inference"):
        overrides += [
            f"{task}.checkpoint='{checkpoint}'",
            f"{task}.num_gpus={processes}",
            f"{task}.gpu_ids=[]",
            f"{task}.precision=float32",
        ]
    return load_spec(None, overrides)


def test_two_processes_write_the_same_file_as_one(checkpoint: Path, scenes: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = (inference(spec_of(checkpoint, scenes, tmp_path / str(n), n), Console.silent()) for n in (1, 2))
    assert one.path.read_bytes() == two.path.read_bytes()
    assert (one.labeled, one.failed) == (two.labeled, two.failed)
    ids = [row["id"] for row in json.loads(two.path.read_text())["annotations"]]
    assert ids == [row["id"] for row in json.loads(scenes[0].read_text())["annotations"]]
    assert one.labeled == 12
    flags = [row.get("flags") for row in json.loads(two.path.read_text())["annotations"]]
    assert flags.count([]) > 6, "the test needs masks that are neither empty nor full"


@pytest.mark.slow  # each process imports torch
def test_two_processes_report_the_same_metrics_as_one(
    checkpoint: Path, scenes: tuple[Path, Path], tmp_path: Path
) -> None:
    reports = [evaluate(spec_of(checkpoint, scenes, tmp_path / str(n), n), Console.silent()) for n in (1, 2)]
    assert reports[0] == reports[1]
    files = [(tmp_path / name / "evaluate/results.json").read_bytes() for name in "12"]
    assert files[0] == files[1]


@pytest.mark.slow
def test_what_processes_found_about_images_is_known_in_the_end(network: MalNetwork, tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path, images=7)
    for name in ("1.png", "4.png", "5.png"):
        widen(scenes[1] / name)
    rows = [
        (dataclasses.replace(image, file_name=f"old/{image.file_name}"), boxes)
        for image, boxes in by_image(read_coco(scenes[0]))
    ]
    labeler = Labeler(network, CONFIG, precision="float32")
    several, single = ImageFolder(scenes[1]), ImageFolder(scenes[1])
    for devices, images in (([CPU] * 2, several), ([CPU], single)):
        assert list(label_on_devices(devices, labeler, rows, images, precision="float32"))
    assert several.respelled == single.respelled == {f"old/{number}.png": f"{number}.png" for number in range(7)}
    assert several.formats == single.formats == FormatCounts({"old/1.png", "old/4.png", "old/5.png"})


@pytest.mark.slow
def test_more_processes_than_images_are_supported(
    network: MalNetwork, scenes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_device, "RESULTS_PER_MESSAGE", 1)
    rows = list(by_image(read_coco(scenes[0])))[:1]
    labeler = Labeler(network, CONFIG, precision="float32")
    several = list(label_on_devices([CPU] * 3, labeler, rows, scenes[1], precision="float32"))
    single = list(label_on_devices([CPU], labeler, rows, scenes[1], precision="float32"))
    assert several == single
    assert len(several) == 1


def test_rows_are_sent_as_they_are_requested(
    network: MalNetwork, scenes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_device, "IMAGES_PER_MESSAGE", 2)
    monkeypatch.setattr(multi_device, "MAX_WAITING_RESULTS", 8)  # else one process may be far ahead on a busy machine
    rows = list(by_image(read_coco(scenes[0]))) * 40
    drawn: list[list[int]] = []

    class Rows(Sequence[Row]):
        """Counts the rows that are read of each share."""

        def __init__(self, rows: Sequence[Row]) -> None:
            self.rows = rows
            self.counter = [0]

        def __len__(self) -> int:
            return len(self.rows)

        @overload
        def __getitem__(self, index: int) -> Row: ...
        @overload
        def __getitem__(self, index: slice) -> Sequence[Row]: ...
        def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
            if isinstance(index, slice):
                share = Rows(self.rows[index])
                drawn.append(share.counter)
                return share
            self.counter[0] += 1
            return self.rows[index]

    labeler = Labeler(network, CONFIG, precision="float32")
    results = label_on_devices([CPU] * 2, labeler, Rows(rows), scenes[1], precision="float32")
    for _ in range(4):
        next(results)
    assert max(share[0] for share in drawn) < 80, "rows are read as they are needed"
    expected = list(label_on_devices([CPU], labeler, rows, scenes[1], precision="float32"))
    assert list(results) == expected[4:]


def test_a_process_ahead_of_the_others_gets_no_rows_until_its_results_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multi_device, "IMAGES_PER_MESSAGE", 2)
    monkeypatch.setattr(multi_device, "MAX_WAITING_RESULTS", 6)
    images, result = 20, (None, LabelFailure("X", "x"))
    row: Row = (ImageInfo(1, "a.png", 9, 9), [Annotation(None, 1, None, (0.0, 0.0, 5.0, 5.0), False, {})])
    is_ahead, gets_more = threading.Event(), threading.Event()
    workers: list[Any] = []

    def label(connection: Any, is_slow: bool) -> None:
        if is_slow:
            is_ahead.wait(60)
            gets_more.wait(0.2)
        labeled = 0
        with contextlib.suppress(EOFError, ConnectionError):  # the test has ended
            while True:
                connection.send_bytes(ROW_REQUEST)
                if labeled == 6 and not is_slow:
                    is_ahead.set()
                rows = decode_rows(connection.recv_bytes())
                if labeled == 6 and not is_slow:
                    gets_more.set()
                connection.send_bytes(encode_results([result] * len(rows), NO_FINDINGS))
                labeled += len(rows)

    for is_slow in (True, False):
        connection, other = multiprocessing.Pipe()
        workers.append(multi_device._Worker(None, connection, "cpu", iter([row] * images)))  # type: ignore[arg-type]
        threading.Thread(target=label, args=(other, is_slow), daemon=True).start()
    inbox = multi_device._Inbox(workers, ImageFolder(Path()))
    inbox.next_result(0)
    assert len(inbox._results[1]) == 6
    assert [inbox.next_result(n % 2) for n in range(1, 2 * images)] == [result] * (2 * images - 1)


def test_a_killed_process_is_an_error_and_the_others_are_ended(
    network: MalNetwork, scenes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    inbox = multi_device._Inbox

    def inbox_of_killed_worker(workers: Any, images: Any) -> Any:
        started.extend(workers)
        workers[1].process.kill()
        return inbox(workers, images)

    monkeypatch.setattr(multi_device, "_Inbox", inbox_of_killed_worker)
    rows = list(by_image(read_coco(scenes[0])))
    with pytest.raises(LostProcess, match=r"cpu.*-9"):
        list(label_on_devices([CPU] * 2, Labeler(network, CONFIG), rows, scenes[1], precision="float32"))
    assert [worker.process.is_alive() for worker in started] == [False, False]


def test_an_unsupported_precision_is_refused_before_any_process_starts(
    checkpoint: Path, scenes: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = spec_of(checkpoint, scenes, tmp_path, 2)
    half = spec.model_copy(update={"inference": spec.inference.model_copy(update={"precision": Precision.FLOAT16})})
    with pytest.raises(ConfigError, match="float16 on a CPU"):
        inference(half, Console.silent())
