"""A labeling job of the former release that was interrupted: the current client completes it with the same output."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
from mal_client.cli.main import main

from tests.mal_client.fake_server import FakeServer, serving

JOB = Path(__file__).parent / "job"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A copy of the job. Its journal names the image folder by its absolute path, which is that of the copy."""
    shutil.copytree(JOB, tmp_path, dirs_exist_ok=True)
    journal = tmp_path / "out.json.ledger"
    first, *rest = journal.read_text().splitlines(keepends=True)
    manifest = json.loads(first.partition(" ")[2])
    manifest["images"] = str(tmp_path / "images")
    text = json.dumps(manifest, separators=(",", ":"))
    journal.write_text(f"{zlib.crc32(text.encode()):08x} {text}\n" + "".join(rest))
    return tmp_path


def test_an_interrupted_job_is_completed_with_the_same_output(job: Path) -> None:
    fake = FakeServer()
    paths = ["--annotations", str(job / "in.json"), "--images", str(job / "images"), "--output", str(job / "out.json")]
    with serving(fake) as address:
        assert main(["label", "--server", address, *paths]) == 0
    labeled_ids = sorted(box.instance_id for request in fake.label_requests for box in request.instances)
    assert len(labeled_ids) == 4, "the first half is in the journal"
    output, expected = (json.loads((job / name).read_text()) for name in ("out.json", "expected.json"))
    # Both describe the score in words, which may be rephrased.
    for content in (output, expected):
        assert content["mask_auto_labeler"].pop("score")
    assert output["mask_auto_labeler"].pop("network_engine") == "torch"  # not recorded by the former release
    assert output == expected
