"""A dataset job whose annotations, images and output lie in a store that fails at random, killed at random moments."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mal_client.cli.main import main

from tests.form import Form
from tests.mal_client.datasets import make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, Limits, serving
from tests.object_store import S3

RATE = 0.2
"""Share of the requests to the store that fail or are late."""
CODE = (
    "import sys; from mal_train.core.storage import retry; retry.FIRST_PAUSE_S = 0.01; "
    "from mal_client.cli.main import main; sys.exit(main(sys.argv[1:]))"
)
END_S = 600.0


def started(arguments: list[str], temporary: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )


@pytest.mark.promise("jobs", "A job in a store that fails at random gives the bytes of a local one, killed or not")
def test_job_in_a_failing_store_that_is_killed_gives_the_bytes_of_a_local_one(
    s3: S3, tmp_path: Path, form: Form, record: Callable[..., None]
) -> None:
    images, kills = form.pick((40, 3), (400, 30))
    rng = random.Random(form.seed)
    dataset = make_dataset(tmp_path, images=images)
    local = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    fake = FakeServer(Faults(delay_s=0.01), Limits(max_items_in_flight=4))
    for name in ("work", "tmp"):
        (tmp_path / name).mkdir()
    s3.put("in.json", dataset.json_path.read_bytes())
    remote = ["--annotations", s3.address("in.json"), "--images", s3.put_folder(dataset.images_dir, "images")]
    remote += ["--output", s3.address("out.json"), "--work-dir", str(tmp_path / "work")]
    with serving(fake) as address:
        assert main(["label", "--server", address, *local, "--output", str(dataset.output)]) == 0
        s3.disturb(rng, RATE)
        fake.item_ids.clear()
        killed = 0
        while killed < kills:
            target = len(fake.item_ids) + rng.randint(1, max(1, images // (2 * kills)))
            process = started(["label", "--server", address, *remote], tmp_path / "tmp")
            until = time.monotonic() + END_S
            while len(fake.item_ids) < target and process.poll() is None and time.monotonic() < until:
                time.sleep(0.001)
            process.kill()
            _, error = process.communicate()
            # 1: the store failed on every attempt; the next run goes on.
            assert process.returncode in (-9, 0, 1), error.decode()
            if process.returncode == 0:
                break
            killed += process.returncode == -9
            assert s3.get("out.json") is None
        last = started(["label", "--server", address, *remote], tmp_path / "tmp")
        _, error = last.communicate(timeout=END_S)
        assert last.returncode == 0, error.decode()
    record("remote job", images=images, kills=killed, requests=len(s3.requests), sent_again=len(fake.item_ids) - images)
    assert s3.get("out.json") == dataset.output.read_bytes()
    # Of the check whether the output is writable, which begins an upload and ends it.
    assert s3.unfinished_uploads() <= killed
    assert list((tmp_path / "work").iterdir()) == []
    assert [path for path in (tmp_path / "tmp").iterdir() if path.name.endswith(".mal-tmp")] == []
