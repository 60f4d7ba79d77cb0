"""Outputs of the commands: no name ends one, and no page or print takes the results with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mal_client.cli.main import main

from mal_train.core.report import page
from tests.mal_client.datasets import Dataset
from tests.mal_client.fake_server import FakeServer, serving
from tests.mal_client.review.test_queue import with_scores

LATIN = os.fsdecode("d\u00e9j\u00e0 vu".encode("latin-1"))
"""A name of Latin-1 bytes, which are not UTF-8."""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A labeled file whose folder, images and category have such names."""
    folder = tmp_path / LATIN
    folder.mkdir()
    dataset = with_scores(folder)
    for image, name in zip(
        dataset.coco["images"], (f"{LATIN}.png", "r\u00e9sum\u00e9.png", "re\u0301 日.png"), strict=True
    ):
        (dataset.images_dir / image["file_name"]).rename(dataset.images_dir / name)
        image["file_name"] = name
    dataset.coco["categories"][0]["name"] = "d\u00e9j\u00e0 \udce9"
    dataset.save()
    return dataset


def run(dataset: Dataset, *arguments: str, encoding: str = "ascii") -> "subprocess.CompletedProcess[str]":
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), *arguments[1:]]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    command = [sys.executable, "-m", "mal_client.cli.main", arguments[0], *given]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_no_name_ends_a_command_on_an_ascii_terminal(dataset: Dataset) -> None:
    folder = dataset.folder
    done = run(dataset, "review", "--output", str(folder / "queue.json"), "--report", str(folder / "page.html"))
    assert (done.returncode, done.stdout.isascii()) == (0, True), done.stderr
    assert "r\\xe9sum\\xe9.png" in done.stdout
    assert "d\\udce9j\\udce0 vu" in done.stdout
    assert "r\u00e9sum\u00e9.png" in (folder / "page.html").read_text()
    assert len(json.loads((folder / "queue.json").read_text())["worst"]) == 6
    dataset.coco["images"][1]["file_name"] = "\u00fcber.png"
    dataset.save()
    done = run(dataset, "check", "--report", str(folder / "check.html"), "--output", str(folder / "check.json"))
    assert done.returncode == 3, done.stderr
    assert "\\xfcber.png" in done.stdout
    assert "\u00fcber.png" in (folder / "check.html").read_text()


@pytest.mark.parametrize("to", ["labelme", "yolo-seg", "fiftyone"])
def test_no_name_ends_an_export(dataset: Dataset, to: str) -> None:
    done = run(dataset, "export", "--to", to, "--output", str(dataset.folder / "out"))
    assert done.returncode == 3, done.stderr  # 103 has no mask
    assert " 5 masks" in done.stdout


def failing_page(*_: object) -> str:
    raise RuntimeError("the page cannot be made")


@pytest.mark.parametrize("command", ["check", "review", "evaluate"])
def test_results_outlive_a_page_that_fails(dataset: Dataset, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "build_report", failing_page)
    output = dataset.folder / "result.json"
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--output", str(output)]
    with serving(FakeServer()) as address:
        server = ["--server", address] if command == "evaluate" else []
        with pytest.raises(RuntimeError):
            main([command, *given, *server, "--report", str(dataset.folder / "page.html")])
    assert json.loads(output.read_text())


@pytest.mark.parametrize("command", ["check", "review", "evaluate"])
def test_results_outlive_a_print_that_fails(dataset: Dataset, command: str) -> None:
    output = dataset.folder / "result.json"
    with serving(FakeServer()) as address:
        server = ["--server", address] if command == "evaluate" else []
        given = [sys.executable, "-m", "mal_client.cli.main", command, *server, "--output", str(output)]
        given += ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(given, stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    assert done.returncode == 4
    assert json.loads(output.read_text())
