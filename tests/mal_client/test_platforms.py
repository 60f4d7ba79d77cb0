"""Claims about the client on systems without the POSIX modules `fcntl` and `resource`, such as Windows."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mal_client.dataset.shards import Shard
from mal_client.web_server import until_interrupted

from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, serving

WITHOUT_POSIX = """
import os, sys
sys.modules.update(fcntl=None, resource=None)
for name in ("pread", "pwrite", "O_CLOEXEC", "O_DIRECTORY"):
    delattr(os, name)
from mal_client.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs mal-client in a process without the POSIX modules."""
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )


def label(address: str, dataset: Dataset, *more: str) -> "subprocess.CompletedProcess[str]":
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    return run("label", "--server", address, *given, "--output", str(dataset.output), *more)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path)


def test_a_coco_file_is_labeled_without_fcntl_and_resource(dataset: Dataset) -> None:
    with serving(FakeServer()) as address:
        done = label(address, dataset)
    assert done.returncode == 0, done.stderr
    assert all(row["area"] for row in dataset.labeled().values())
    assert sorted(path.name for path in dataset.folder.iterdir()) == ["images", "in.json", "out.json"]


def test_an_unfinished_run_resumes_without_fcntl_and_resource(dataset: Dataset) -> None:
    with serving(FakeServer(Faults(kill_after=2))) as address:
        assert label(address, dataset).returncode == 3
    fake = FakeServer()
    with serving(fake) as address:
        done = label(address, dataset)
    assert done.returncode == 0, done.stderr
    assert fake.item_ids == ["2"]


def test_shards_are_merged_without_fcntl_and_resource(dataset: Dataset) -> None:
    with serving(FakeServer()) as address:
        for shard in ("0/2", "1/2"):
            assert label(address, dataset, "--shard", shard).returncode == 0
    given = ["--annotations", str(dataset.json_path), "--output", str(dataset.output)]
    done = run("merge", *given, "--shards", "2")
    assert done.returncode == 0, done.stderr
    assert len(dataset.labeled()) == 6
    assert not Shard(0, 2).journal_path(dataset.output).exists()


def test_boxes_are_converted_checked_and_reviewed_without_fcntl_and_resource(dataset: Dataset) -> None:
    images = str(dataset.images_dir)
    boxes = dataset.folder / "boxes.csv"
    boxes.write_text("filename,xmin,ymin,xmax,ymax,class\nimage_0.png,1,2,11,22,cup\n")
    done = run(
        "convert", "--from", "csv", "--labels", str(boxes), "--images", images, "--output", str(dataset.json_path)
    )
    assert done.returncode == 0, done.stderr
    done = run("check", "--annotations", str(dataset.json_path), "--images", images)
    assert "image_0.png" not in done.stderr
    assert "Traceback" not in done.stderr
    with serving(FakeServer()) as address:
        assert label(address, dataset).returncode == 0
    queue = dataset.folder / "queue.json"
    page = dataset.folder / "queue.html"
    done = run(
        *("review", "--annotations", str(dataset.output), "--images", images),
        *("--output", str(queue), "--report", str(page)),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(queue.read_text())
    assert page.stat().st_size > 0


def test_a_web_page_is_served_where_event_loops_have_no_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError

    async def serve() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", refuse, raising=False)
        await asyncio.wait_for(until_interrupted(), 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(serve())
