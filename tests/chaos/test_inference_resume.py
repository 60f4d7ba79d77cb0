"""`mal-train inference` that is killed, runs out of disk space, loses a device or is given another job."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mal_train.cli import main
from mal_train.core.atomic_io import remedy_of
from mal_train.core.coco.journal import journal_path
from mal_train.core.coco.stream import read_list
from mal_train.core.errors import ConfigError, DeviceError, DeviceLost, OutputError, Terminated
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions
from tests.chaos.stand_in_labels import write_boxes
from tests.form import FORM, Form
from tests.mal_client.dataset.test_resume import small_disk
from tests.networks import spread_network
from tests.paths import ROOT
from tests.scenes import write_scenes

Record = Callable[..., None]

OUTPUT = "labels.json"
SOME_FAILED = 3
BOXES_PER_IMAGE = 2
AFTER = 15
"""Boxes after which a run is interrupted; the last of them are not in the journal yet."""
LINE_BYTES = 200
"""Bytes of a result in the journal, about."""
MAX_BYTES_PER_BOX = 1000
"""Memory that a box may take: plan, places in the journal, ids while they are read, and the heap's waste."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = spread_network()
    path = tmp_path_factory.mktemp("checkpoint") / "model.malckpt"
    config = LabelerConfig(crop_size=32, mask_thres=(0.5, 0.5, 0.5))
    save_checkpoint(path, Checkpoint(network.config, config, dict(network.state_dict()), []), None)
    return path


def add_faults(coco: dict[str, Any]) -> None:
    """Adds a crowd, boxes without a mask, a file that is missing, and rows whose images are apart."""
    rows = coco["annotations"]
    rows[1]["iscrowd"] = 1
    rows[3]["bbox"] = [1000, 1000, 5, 5]
    rows[5]["bbox"] = "none"
    coco["images"].append({"id": 500, "file_name": "gone.png", "width": 10, "height": 10})
    rows.append({**rows[0], "id": "gone", "image_id": 500})
    rows.append({**rows[0], "id": "unknown", "image_id": 999})
    rows.insert(0, {**rows[8], "id": "apart"})


class Job:
    """One spec with its output and its journal."""

    def __init__(self, folder: Path, checkpoint: Path, scenes: tuple[Path, Path], **section: Any) -> None:
        self.folder = folder
        self.annotations = scenes[0]
        self.output = folder / OUTPUT
        self.journal = journal_path(self.output)
        self.section = {
            "checkpoint": str(checkpoint),
            "ann_path": str(scenes[0]),
            "img_dir": str(scenes[1]),
            "label_dump_path": str(self.output),
            "precision": "float32",
            "gpu_ids": [],
            **section,
        }

    def command(self, **changes: Any) -> list[str]:
        spec = {"results_dir": str(self.folder / "results"), "inference": {**self.section, **changes}}
        path = self.folder / "spec.yaml"
        path.write_text(yaml.safe_dump(spec))
        return ["inference", "-e", str(path)]

    def run(self, **changes: Any) -> int:
        return main(self.command(**changes))

    def start(self, **changes: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *self.command(**changes)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients"), str(ROOT / "protos")])},
            text=True,
        )

    def uninterrupted(self, **changes: Any) -> bytes:
        assert self.run(**changes) in (0, SOME_FAILED)
        content = self.output.read_bytes()
        self.output.unlink()
        return content

    def kept(self) -> list[tuple[int, bool]]:
        """Returns (row, has a label) of each complete line of the journal but the first."""
        if not self.journal.exists():
            return []
        lines = [line for line in self.journal.read_bytes().split(b"\n")[1:-1] if line]
        entries = [json.loads(line[9:]) for line in lines if line[:8] == b"%08x" % zlib.crc32(line[9:])]
        return [(row, "label" in result) for row, result in entries]

    def size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0


@pytest.fixture
def job(tmp_path: Path, checkpoint: Path) -> Job:
    return Job(tmp_path, checkpoint, write_scenes(tmp_path / "scenes", images=12, change=add_faults))


def interrupted(job: Job, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException, **changes: Any) -> None:
    """Runs a job whose device raises `error` after a number of boxes."""
    predict, left = Labeler.predict, [after]

    def failing(self: Labeler, crops: Sequence[Crop], options: PredictOptions | None = None) -> list[Prediction]:
        left[0] -= len(crops)
        if left[0] < 0:
            raise error
        return predict(self, crops, *([] if options is None else [options]))

    with monkeypatch.context() as patch:
        patch.setattr(Labeler, "predict", failing)
        if isinstance(error, KeyboardInterrupt):
            assert job.run(**changes) == 130
        else:
            assert job.run(**changes) in (getattr(error, "exit_code", 1), SOME_FAILED)


@pytest.mark.promise("jobs", "An inference that is killed and repeated gives the bytes of an undisturbed one")
@pytest.mark.parametrize("processes", FORM.pick([1], [1, 2]))
def test_a_killed_inference_loses_no_result_and_repeats_none(
    processes: int, tmp_path: Path, checkpoint: Path, form: Form, record: Record
) -> None:
    images, rng = form.pick(120, 400), random.Random(f"{form.seed} {processes}")
    kills = form.pick(3, 30 if processes == 1 else 10)  # several processes take long to start
    scenes = write_scenes(tmp_path / "scenes", images=images, change=add_faults)
    job = Job(tmp_path, checkpoint, scenes, load_mask=True)
    expected = job.uninterrupted()
    moments: Counter[str] = Counter()
    kept: list[tuple[int, bool]] = []
    for _ in range(kills):
        process = job.start(num_gpus=processes)
        moments[wait_for_moment(job, process, rng, LINE_BYTES * BOXES_PER_IMAGE * images // kills)] += 1
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0, SOME_FAILED)
        if process.returncode != -signal.SIGKILL:
            break
        now = job.kept()
        assert now[: len(kept)] == kept or not job.journal.exists()
        kept = now or kept
        labeled = Counter(row for row, has_label in now if has_label)
        assert set(labeled.values()) <= {1}, "no box is labeled again that has a label"
    assert job.run() in (0, SOME_FAILED)
    assert job.output.read_bytes() == expected
    assert not job.journal.exists()
    record("killed inference", boxes=images * BOXES_PER_IMAGE, kills=moments.total(), kept=len(kept), moments=moments)


# A background job ignores SIGINT, and its children inherit that.
COMMAND = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from mal_train.cli import main; sys.exit(main(sys.argv[1:]))"
)


def wait_for_moment(job: Job, process: subprocess.Popen[str], rng: random.Random, step: int) -> str:
    """Waits for a random moment: during the start, or after up to 1.5 steps of new bytes in the journal; names it."""
    if rng.random() < 0.2:
        time.sleep(rng.random() * 5)
        return "start"
    target = job.size() + rng.randint(1, 3 * step // 2)
    while job.size() < target and process.poll() is None:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.01)
    return "results" if process.poll() is None else "end"


def test_a_resumed_run_labels_only_what_is_missing_and_says_so(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = job.uninterrupted()
    interrupted(job, monkeypatch, AFTER, KeyboardInterrupt())
    kept = [row for row, has_label in job.kept() if has_label]
    assert 0 < len(kept) <= AFTER
    assert f"{len(kept)} boxes" in capsys.readouterr().err
    predicted: list[int] = []
    predict = Labeler.predict

    def counted(self: Labeler, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction]:
        predicted.append(len(crops))
        return predict(self, crops, options)

    monkeypatch.setattr(Labeler, "predict", counted)
    assert job.run() == SOME_FAILED
    assert str(job.journal) in capsys.readouterr().err
    labeled = [row for row in json.loads(expected)["annotations"] if "error" not in row and row["flags"] != ["CROWD"]]
    assert sum(predicted) == len(labeled) - len(kept)
    assert job.output.read_bytes() == expected
    assert not job.journal.exists()


@pytest.mark.parametrize(
    ("changes", "after"),
    [({"box_inputs": True}, AFTER), ({"resolve_overlaps": True}, AFTER), ({"margins": [0.3, 0.6]}, 2 * AFTER)],
)
def test_a_resumed_run_gives_the_same_bytes_with_every_option(
    job: Job, changes: dict[str, Any], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "box_inputs" in changes:
        rows = json.loads(job.annotations.read_text())["annotations"]
        detections = [{**row, "score": 0.5 + 0.01 * n} for n, row in enumerate(rows) if row["bbox"] != "none"]
        path = job.folder / "detections.json"
        path.write_text(json.dumps([{key: row[key] for key in row if key != "id"} for row in detections]))
        changes = {"box_inputs": str(path)}
    expected = job.uninterrupted(**changes)
    interrupted(job, monkeypatch, after, KeyboardInterrupt(), **changes)
    assert job.kept()
    assert job.run(**changes) == SOME_FAILED
    assert job.output.read_bytes() == expected


def test_two_processes_resume_the_run_of_one(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = job.uninterrupted()
    interrupted(job, monkeypatch, AFTER, KeyboardInterrupt())
    assert job.run(num_gpus=2) == SOME_FAILED
    assert job.output.read_bytes() == expected


def test_a_box_that_failed_is_tried_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = job.uninterrupted()
    image = Path(job.section["img_dir"]) / "0.png"
    content = image.read_bytes()
    image.unlink()
    interrupted(job, monkeypatch, AFTER, KeyboardInterrupt())
    assert not all(has_label for _, has_label in job.kept())
    image.write_bytes(content)
    assert job.run() == SOME_FAILED
    assert job.output.read_bytes() == expected


def test_boxes_that_the_device_failed_on_are_labeled_by_the_next_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = job.uninterrupted()
    interrupted(job, monkeypatch, AFTER, DeviceError("lost"))
    rows = json.loads(job.output.read_text())["annotations"]
    assert "DEVICE_FAILED" in {row["error"]["reason"] for row in rows if "error" in row}
    assert job.journal.exists()
    assert job.run() == SOME_FAILED
    assert job.output.read_bytes() == expected
    assert not job.journal.exists()


def test_a_lost_device_ends_the_run_with_its_results_kept(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = job.uninterrupted()
    interrupted(job, monkeypatch, AFTER, DeviceLost("unplugged"))
    assert "unplugged" in capsys.readouterr().err
    assert not job.output.exists()
    assert job.kept()
    assert job.run() == SOME_FAILED
    assert job.output.read_bytes() == expected


def test_another_job_is_refused_with_the_differences_and_restart_discards_it(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = job.uninterrupted()
    interrupted(job, monkeypatch, AFTER, KeyboardInterrupt())
    before = job.journal.read_bytes()
    original = job.annotations.read_bytes()
    capsys.readouterr()

    def refused(named: str, **changes: Any) -> None:
        assert job.run(**changes) == ConfigError.exit_code
        line = capsys.readouterr().err.splitlines()[-1]
        assert named in line
        assert "inference.restart=true" in line
        assert job.journal.read_bytes() == before

    refused("flip", use_flip_test=True)
    other_images = job.folder / "other"
    shutil.copytree(job.section["img_dir"], other_images)
    refused("images", img_dir=str(other_images))
    copy = job.folder / "other.malckpt"
    stored = Path(job.section["checkpoint"]).read_bytes()
    copy.write_bytes(stored)
    refused("checkpoint", checkpoint=str(copy))
    job.annotations.write_bytes(original + b"\n")
    refused("input_sha256")
    job.annotations.write_bytes(original)
    assert job.run(restart=True) == SOME_FAILED
    assert job.output.read_bytes() == expected
    assert not job.journal.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_its_results_kept(number: signal.Signals, tmp_path: Path, checkpoint: Path) -> None:
    job = Job(tmp_path, checkpoint, write_scenes(tmp_path / "scenes", images=200))
    process = job.start()
    while job.size() < 2000:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == (Terminated.exit_code if number is signal.SIGTERM else 130), printed
    assert "Traceback" not in printed
    kept = len(job.kept())
    assert f"{job.journal}: labels of {kept} boxes" in printed
    status = (tmp_path / "results" / "inference" / "status.json").read_text().splitlines()
    assert json.loads(status[-1])["status"] == "FAILURE"
    assert not job.output.exists()


@pytest.mark.promise("jobs", "A full disk keeps the old output of an inference and its results so far")
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
@pytest.mark.parametrize("kib", [12, 72])
def test_a_full_disk_keeps_the_old_output_and_the_results_so_far(
    kib: int, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], record: Record
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=100, masks=False)
    job = Job(tmp_path, checkpoint, scenes)
    expected = job.uninterrupted()
    with small_disk(tmp_path / "disk", kib) as disk:
        output = disk / OUTPUT
        job.output, job.journal = output, journal_path(output)
        output.write_text("old")
        assert job.run(label_dump_path=str(output)) == OutputError.exit_code
        printed = capsys.readouterr().err
        assert os.strerror(errno.ENOSPC) in printed
        assert remedy_of(OSError(errno.ENOSPC, "")) in printed
        assert "Traceback" not in printed
        assert output.read_text() == "old"
        assert sorted(path.name for path in disk.iterdir()) == [OUTPUT, job.journal.name]
        kept = len(job.kept())
        assert kept > 0
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert job.run(label_dump_path=str(output)) == 0
        assert output.read_bytes() == expected
    record("full disk", boxes=100 * BOXES_PER_IMAGE, kept=kept)


@pytest.mark.promise("jobs", "The memory of an inference hardly grows with the number of boxes")
def test_memory_hardly_grows_with_the_boxes(tmp_path: Path, checkpoint: Path, form: Form, record: Record) -> None:
    peaks = {}
    counts = form.pick((4_000, 34_000), (100_000, 1_000_000))
    for count in counts:
        folder = tmp_path / str(count)
        job = Job(folder, checkpoint, write_boxes(folder, count), batch_size=64)
        finished = subprocess.run(
            [sys.executable, "-m", "tests.chaos.stand_in_labels", job.command()[-1]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        peaks[count] = float(finished.stdout.splitlines()[-1])
        assert sum(1 for _ in read_list(job.output, "annotations")) == count
    bytes_per_box = (peaks[counts[1]] - peaks[counts[0]]) * 2**20 / (counts[1] - counts[0])
    record("inference", boxes=counts[1], peak_mib=peaks[counts[1]], bytes_per_box=bytes_per_box)
    assert bytes_per_box < MAX_BYTES_PER_BOX
