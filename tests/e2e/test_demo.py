"""The demo with --quick: the real commands in order, on a few scenes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from deploy.demo.__main__ import MARGIN_UNCHECKED, TRAINED
from tests.paths import ROOT

pytestmark = pytest.mark.timeout(1200)  # the first test runs the complete demo


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.demo", *arguments],
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (Path(sys.executable).parent / "mal-server").exists():
        pytest.skip("the commands are not installed in this environment; run `make test`")
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = run_demo("--quick", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert TRAINED in done.stdout
    assert MARGIN_UNCHECKED in done.stdout
    return folder


def test_training_and_labeling_have_no_masks(out: Path) -> None:
    for name in ("train.json", "heldout_boxes.json"):
        assert "segmentation" not in (out / "data" / name).read_text()


def test_the_built_in_model_labels_photographs(out: Path) -> None:
    given = json.loads((out / "data" / "photographs.json").read_text())["annotations"]
    labels = json.loads((out / "photographs.json").read_text())["annotations"]
    assert [row["id"] for row in labels] == [row["id"] for row in given]
    # An untrained model would fill the boxes or leave them empty.
    fills = [row["area"] / (row["bbox"][2] * row["bbox"][3]) for row in labels]
    assert all(0.2 < fill < 0.97 for fill in fills), fills
    assert all(row["score"] > 0.3 for row in labels)
    assert "serving builtin" in (out / "builtin.log").read_text()
    assert "Photographs" in (out / "report.html").read_text()


def test_every_held_out_box_is_labeled_in_a_file_that_pycocotools_loads(out: Path) -> None:
    given = json.loads((out / "data" / "heldout_boxes.json").read_text())["annotations"]
    labels = COCO(str(out / "labels.json"))
    assert sorted(labels.anns) == sorted(row["id"] for row in given)
    assert all(labels.annToMask(row).shape == (240, 320) for row in labels.anns.values())


def test_the_checkpoint_is_encrypted_and_its_identity_is_private(out: Path) -> None:
    assert (out / "train" / "mal_model_latest.malckpt").read_bytes().startswith(b"age-encryption.org/v1")
    assert (out / "identity.txt").stat().st_mode & 0o777 == 0o600


def test_the_report_is_a_single_file(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "Training" in page
    assert "ellipse in the box" in page
    assert page.count("data:image/png;base64,") >= 4
    assert 'src="http' not in page
    assert {path.suffix for path in (out / "overlays").iterdir()} == {".png"}


def test_the_demo_stops_its_server(out: Path) -> None:
    assert not (out / "server.address").exists()
    log = (out / "server.log").read_text()
    assert "Traceback" not in log
    assert "serving" in log


def test_a_folder_that_the_demo_did_not_create_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not delete")
    done = run_demo("--quick", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "--out" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "do not delete"
