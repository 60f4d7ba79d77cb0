"""Claims about bulk jobs that are killed, run out of disk space or are started twice."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mal_client.cli.label import RESUME_HINT
from mal_client.cli.main import main

from mal_train.core.atomic_io import remedy_of
from mal_train.core.coco.journal import Journal, journal_path
from mal_train.core.locked_file import IN_USE
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, Limits, serving

WINDOW = 4


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.001)


def command(address: str, dataset: Dataset, *more: str) -> list[str]:
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    return ["label", "--server", address, *given, "--output", str(dataset.output), *more]


def started(arguments: list[str], file_bytes: int = -1) -> subprocess.Popen[str]:
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes}))\n"
        "from mal_client.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    )


def uninterrupted(dataset: Dataset) -> bytes:
    with serving(FakeServer()) as address:
        assert main(command(address, dataset)) in (0, 3)
    content = dataset.output.read_bytes()
    dataset.output.unlink()
    return content


def killed_until_done(fake: FakeServer, dataset: Dataset, kills: int, seed: int) -> Counter[int]:
    """Kills runs after a random number of results, `kills` times; returns how often each box was sent."""
    rng = random.Random(seed)
    images = len(dataset.coco["images"])
    with serving(fake) as address:
        for kill in range(kills):
            target = len(fake.item_ids) + rng.randint(1, max(1, images // kills))
            process = started(command(address, dataset))
            while len(fake.item_ids) < target and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.01)
            process.kill()
            process.communicate()
            assert process.returncode in (-9, 0, 3), f"kill {kill}, seed {seed}"
            if process.returncode != -9:
                return _sent(fake)
        assert main(command(address, dataset)) in (0, 3)
    return _sent(fake)


def _sent(fake: FakeServer) -> Counter[int]:
    return Counter(instance.instance_id for request in fake.label_requests for instance in request.instances)


@pytest.mark.promise("jobs", "A dataset job that is killed and repeated gives the bytes of an undisturbed one")
@pytest.mark.parametrize(
    ("images", "kills"), [(80, 5), pytest.param(2000, 100, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_a_killed_run_loses_no_result_and_repeats_at_most_its_window(
    tmp_path: Path, images: int, kills: int, record: Callable[..., None]
) -> None:
    dataset = make_dataset(tmp_path, images=images)
    (dataset.images_dir / "image_3.png").unlink()
    expected = uninterrupted(dataset)
    sent = killed_until_done(FakeServer(Faults(delay_s=0.004), Limits(max_items_in_flight=WINDOW)), dataset, kills, 11)
    assert dataset.output.read_bytes() == expected
    assert not journal_path(dataset.output).exists()
    record("killed job", images=images, kills=kills, boxes_sent_again=sent.total() - len(sent))
    assert len(sent) == 2 * (images - 1)
    # Two boxes an image; a second window for results that the client has not written.
    assert sent.total() - len(sent) <= 2 * 2 * WINDOW * kills


def test_another_input_or_other_options_are_refused_without_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path)
    expected = uninterrupted(dataset)
    with serving(FakeServer(Faults(kill_after=2))) as address:
        assert main(command(address, dataset)) == 3
    fake = FakeServer()
    with serving(fake) as address:
        assert main(command(address, dataset, "--threshold", "0.4")) == 2
        assert "thresholds [0.1, 0.2, 0.3] instead of [0.4, 0.4, 0.4]" in capsys.readouterr().err
        unchanged = dataset.json_path.read_bytes()
        dataset.coco["annotations"][0]["mine"] = "changed"
        dataset.save()
        assert main(command(address, dataset)) == 2
        assert "input_sha256" in capsys.readouterr().err
        assert "LabelImages" not in fake.calls
        dataset.json_path.write_bytes(unchanged)
        assert main(command(address, dataset, "--restart")) == 0
        assert "out.json.ledger" not in capsys.readouterr().err
    assert len(fake.item_ids) == 3
    assert dataset.output.read_bytes() == expected


def test_another_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path)
    with serving(FakeServer(Faults(kill_after=2))) as address:
        assert main(command(address, dataset)) == 3
    with serving(FakeServer(limits=Limits(precision="bfloat16"))) as address:
        assert main(command(address, dataset)) == 2
    assert "precision 'float32' instead of 'bfloat16'" in capsys.readouterr().err


def test_other_weights_are_refused_by_their_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path)
    with serving(FakeServer(Faults(kill_after=2))) as address:
        assert main(command(address, dataset)) == 3
    monkeypatch.setattr("tests.mal_client.fake_server.SHA", "cd" * 32)
    fake = FakeServer()
    with serving(fake) as address:
        assert main(command(address, dataset)) == 2
    message = capsys.readouterr().err
    assert "ab" * 32 in message
    assert "cd" * 32 in message
    assert "LabelImages" not in fake.calls


def test_the_next_run_reports_that_it_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path)
    with serving(FakeServer(Faults(kill_after=2))) as address:
        assert main(command(address, dataset)) == 3
    assert RESUME_HINT in capsys.readouterr().err
    with serving(FakeServer()) as address:
        assert main(command(address, dataset)) == 0
    error = capsys.readouterr().err
    assert "4 of 6 boxes" in error
    assert RESUME_HINT not in error


def test_an_unfinished_shard_reports_how_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path)
    with serving(FakeServer(Faults(kill_after=2))) as address:
        assert main(command(address, dataset, "--shard", "0/1")) == 3
    assert RESUME_HINT in capsys.readouterr().err


@pytest.mark.parametrize("file_bytes", [100, 1500, 3000])
def test_a_file_size_limit_keeps_the_old_output_and_the_results_so_far(tmp_path: Path, file_bytes: int) -> None:
    dataset = make_dataset(tmp_path, images=8)
    expected = uninterrupted(dataset)
    dataset.output.write_text("old")
    with serving(FakeServer()) as address:
        process = started(command(address, dataset), file_bytes)
        _, printed = process.communicate(timeout=60)
        assert process.returncode == 4, printed
        assert "Traceback" not in printed
        assert os.strerror(errno.EFBIG) in printed
        assert remedy_of(OSError(errno.EFBIG, "")) in printed
        assert dataset.output.read_text() == "old"
        assert [path.name for path in dataset.folder.iterdir() if path.suffix == ".tmp"] == []
        assert main(command(address, dataset)) == 0
    assert dataset.output.read_bytes() == expected


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """Mounts a file system of `kib` KiB; skips the test where mounting is not allowed."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.promise("jobs", "A full disk keeps the old output of a dataset job and its results so far")
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
@pytest.mark.parametrize("kib", [16, 160])
def test_a_full_disk_keeps_the_old_output_and_the_results_so_far(tmp_path: Path, kib: int) -> None:
    dataset = make_dataset(tmp_path, images=250)
    expected = uninterrupted(dataset)
    fake = FakeServer()
    with small_disk(tmp_path / "disk", kib) as disk, serving(fake) as address:
        output = disk / "out.json"
        output.write_text("old")
        again = [*command(address, dataset)[:-1], str(output)]
        process = started(again)
        _, printed = process.communicate(timeout=60)
        assert process.returncode == 4, printed
        assert os.strerror(errno.ENOSPC) in printed
        assert remedy_of(OSError(errno.ENOSPC, "")) in printed
        assert "Traceback" not in printed
        assert output.read_text() == "old"
        assert sorted(path.name for path in disk.iterdir()) == ["out.json", "out.json.ledger"]
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        kept = (disk / "out.json.ledger").read_bytes().count(b"\n") - 1  # the first line describes the job
        before = _sent(fake).total()
        assert main(again) == 0
        assert 0 < kept == 2 * 250 - (_sent(fake).total() - before)
        assert output.read_bytes() == expected


def test_two_runs_in_one_folder_are_independent(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=40)
    expected = uninterrupted(dataset)
    with serving(FakeServer(Faults(delay_s=0.002))) as address:
        one, other = (
            started([*command(address, dataset)[:-1], str(dataset.folder / name)])
            for name in ("one.json", "other.json")
        )
        printed = [process.communicate(timeout=60)[1] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), printed
    assert (dataset.folder / "one.json").read_bytes() == (dataset.folder / "other.json").read_bytes() == expected


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path)
    with serving(FakeServer()) as address, Journal(journal_path(dataset.output), 6, {}):
        assert main(command(address, dataset)) == 4
    assert f"out.json.ledger: {IN_USE}" in capsys.readouterr().err
