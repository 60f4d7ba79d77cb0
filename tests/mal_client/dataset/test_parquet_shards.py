"""Claims about jobs from parquet to parquet: shards read their own row groups and write parts that need no merge."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from mal_client.cli.main import main
from mal_client.dataset.shards import Shard

from mal_train.core.coco import parquet_reader
from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.stream import copy_coco
from mal_train.core.errors import BadDataset
from tests.mal_client.dataset.test_resume import started
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, Limits, serving

SHARDS = 3


def make(folder: Path, images: int) -> tuple[Dataset, Path]:
    """Makes images and boxes in mixed order, with rows that cannot be labeled; returns the parquet file, too."""
    dataset = make_dataset(folder, images=images)
    rows = dataset.coco["annotations"]
    (dataset.images_dir / "image_2.png").unlink()
    rows[0]["iscrowd"] = 1
    rows[7]["bbox"] = "none"
    rows[9]["image_id"] = 99
    rows[11]["bbox"] = [500, 2, 5, 5]
    random.Random(1).shuffle(rows)
    dataset.save()
    packed = folder / "in.parquet"
    copy_coco(dataset.json_path, packed, row_group_boxes=4)
    return dataset, packed


@pytest.fixture
def job(tmp_path: Path) -> tuple[Dataset, Path]:
    return make(tmp_path, 12)


def arguments(address: str, job: tuple[Dataset, Path], output: Path, *more: str) -> list[str]:
    dataset, packed = job
    given = ["--annotations", str(packed), "--images", str(dataset.images_dir), "--output", str(output)]
    return ["label", "--server", address, *given, *more]


def label_shards(address: str, job: tuple[Dataset, Path], output: Path, *more: str, shards: int = SHARDS) -> None:
    for shard in range(shards):
        assert main(arguments(address, job, output, "--shard", f"{shard}/{shards}", *more)) in (0, 3)


@pytest.mark.parametrize("form", [[], ["--format", "polygons", "--update-bbox"]])
def test_the_parts_are_the_file_that_a_single_run_writes(job: tuple[Dataset, Path], form: list[str]) -> None:
    dataset, _ = job
    parts, single = dataset.folder / "parts.parquet", dataset.folder / "single.parquet"
    with serving(FakeServer()) as address:
        label_shards(address, job, parts, *form)
        assert main(arguments(address, job, single, *form)) == 3
        assert main(arguments(address, job, dataset.output, *form)) == 3
    expected = json.loads(dataset.output.read_text())
    assert json.dumps(read_coco(parts).raw) == json.dumps(expected)
    assert json.dumps(read_coco(single).raw) == json.dumps(expected)
    assert len(ParquetDataset(single).row_groups) == len(ParquetDataset(job[1]).row_groups)
    # No journal is left.
    assert [path.suffix for path in parts.iterdir() if "ledger" in path.name] == []
    failures = [json.loads(line) for path in parts.glob("*.errors.jsonl") for line in path.read_text().splitlines()]
    single_failures = (dataset.folder / "single.errors.jsonl").read_text().splitlines()
    assert sorted(map(str, failures)) == sorted(str(json.loads(line)) for line in single_failures)


def test_a_shard_reads_and_labels_its_row_groups_alone(
    job: tuple[Dataset, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_row_group = parquet_reader._read_row_group

    def recorded(file: object, group: parquet_reader.RowGroup, columns: list[str], start: int) -> object:
        read.append(group.index)
        return read_row_group(file, group, columns, start)

    monkeypatch.setattr(parquet_reader, "_read_row_group", recorded)
    fake = FakeServer()
    with serving(fake) as address:
        label_shards(address, job, job[0].folder / "out.parquet")
        groups = len(ParquetDataset(job[1]).row_groups)
        # Each once for the plan, and once to be written.
        assert sorted(read) == sorted([*range(groups), *range(groups)])
        assert read[: len(range(0, groups, SHARDS))] == list(range(0, groups, SHARDS))
        assert max(fake.calls.count(name) for name in ("LabelImages",)) == SHARDS
    sent = [instance.instance_id for request in fake.label_requests for instance in request.instances]
    # The crowd, the row without a box, the one without an image, and two of the missing file.
    assert len(sent) == 2 * 12 - 5


@pytest.mark.promise("jobs", "A killed shard of a job on parquet continues and writes the bytes of an undisturbed one")
def test_a_killed_shard_resumes_and_writes_the_same_bytes(tmp_path: Path) -> None:
    job = make(tmp_path, 60)
    undisturbed, disturbed = tmp_path / "undisturbed.parquet", tmp_path / "disturbed.parquet"
    with serving(FakeServer()) as address:
        label_shards(address, job, undisturbed)
    chance = random.Random(3)
    with serving(FakeServer(Faults(delay_s=0.004), Limits(max_items_in_flight=2))) as address:
        for shard in range(SHARDS):
            command = arguments(address, job, disturbed, "--shard", f"{shard}/{SHARDS}")
            for _ in range(3):
                process = started(command)
                ledger = disturbed / f"{Shard(shard, SHARDS).part_name}.ledger"
                while process.poll() is None and not (ledger.exists() and ledger.stat().st_size > 1200):
                    time.sleep(0.002)
                time.sleep(chance.random() * 0.05)
                process.kill()
                process.communicate()
            assert main(command) in (0, 3)
    names = sorted(path.name for path in undisturbed.iterdir())
    assert sorted(path.name for path in disturbed.iterdir()) == names
    for name in names:
        if name.endswith(".parquet"):
            assert (disturbed / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_a_shard_of_another_job_is_not_resumed(job: tuple[Dataset, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("mal_client.bulk.stream.MAX_BREAKS", 2)
    output = job[0].folder / "out.parquet"
    with serving(FakeServer(Faults(kill_after=1))) as address:
        assert main(arguments(address, job, output, "--shard", "1/3")) == 3
    with serving(FakeServer()) as address:
        assert main(arguments(address, job, output, "--shard", "1/3", "--threshold", "0.4")) == 2
        copy_coco(job[0].json_path, job[1], row_group_boxes=5)
        assert main(arguments(address, job, output, "--shard", "1/3")) == 2
        assert main(arguments(address, job, output, "--shard", "1/3", "--restart")) in (0, 3)


def test_more_shards_than_row_groups_are_refused(job: tuple[Dataset, Path], capsys: pytest.CaptureFixture[str]) -> None:
    groups = len(ParquetDataset(job[1]).row_groups)
    with serving(FakeServer()) as address:
        assert main(arguments(address, job, job[0].folder / "out.parquet", "--shard", f"0/{groups + 1}")) == 2
    assert "--row-group-boxes" in capsys.readouterr().err


def test_ids_of_other_shards_are_no_error(job: tuple[Dataset, Path]) -> None:
    (job[0].folder / "ids").write_text("101\n")
    output, only = job[0].folder / "out.parquet", ["--only", "ids", "--ids", str(job[0].folder / "ids")]
    with serving(FakeServer()) as address:
        label_shards(address, job, output, *only)
        (job[0].folder / "ids").write_text("999999\n")
        assert main(arguments(address, job, job[0].folder / "single.parquet", *only)) == 2
    masks = [row["id"] for row in read_coco(output).raw["annotations"] if "score" in row]
    assert masks == [101]


def test_parts_are_not_merged(job: tuple[Dataset, Path]) -> None:
    given = ["--annotations", str(job[1]), "--output", str(job[0].folder / "out.parquet"), "--shards", "3"]
    assert main(["merge", *given]) == 2


def test_the_input_is_no_folder_of_parts(job: tuple[Dataset, Path]) -> None:
    with serving(FakeServer()) as address:
        assert main(arguments(address, job, job[1], "--shard", "0/3")) == 2
        file = job[0].folder / "file.parquet"
        file.write_text("mine")
        assert main(arguments(address, job, file, "--shard", "0/3")) == 4
    assert file.read_text() == "mine"


def test_missing_parts_are_named(job: tuple[Dataset, Path]) -> None:
    output = job[0].folder / "out.parquet"
    with serving(FakeServer()) as address:
        label_shards(address, job, output)
    (output / Shard(1, SHARDS).part_name).unlink()
    with pytest.raises(BadDataset, match=re.escape(Shard(1, SHARDS).part_name)):
        read_coco(output)
    # Parts of two runs: which are missing is not known.
    (output / Shard(2, SHARDS).part_name).rename(output / Shard(2, 4).part_name)
    with pytest.raises(BadDataset) as caught:
        read_coco(output)
    assert "part-0" not in str(caught.value)


def test_labeled_parts_can_be_labeled_again(job: tuple[Dataset, Path]) -> None:
    dataset, _ = job
    first, second = dataset.folder / "first.parquet", dataset.folder / "second.parquet"
    with serving(FakeServer()) as address:
        label_shards(address, job, first)
        label_shards(address, (dataset, first), second, "--only", "missing", shards=2)
    assert read_coco(second).raw["annotations"] == read_coco(first).raw["annotations"]


def test_a_complete_part_is_not_labeled_again_without_restart(
    job: tuple[Dataset, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = job[0].folder / "out.parquet"
    shard = ["--shard", "1/3"]
    fake = FakeServer()
    with serving(fake) as address:
        code = main(arguments(address, job, output, *shard))
        written, first = (output / Shard(1, 3).part_name).read_bytes(), capsys.readouterr().out
        sent = len(fake.item_ids)
        assert main(arguments(address, job, output, *shard)) == code
        assert (len(fake.item_ids), capsys.readouterr().out) == (sent, first)
        # Another form is another job.
        assert main(arguments(address, job, output, *shard, "--format", "polygons")) == code
        assert len(fake.item_ids) == 2 * sent
        assert main(arguments(address, job, output, *shard)) == code
        assert main(arguments(address, job, output, *shard, "--restart")) == code
        assert len(fake.item_ids) == 4 * sent
    assert (output / Shard(1, 3).part_name).read_bytes() == written


def test_a_part_without_all_results_is_not_complete(job: tuple[Dataset, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("mal_client.bulk.stream.MAX_BREAKS", 2)
    output = job[0].folder / "out.parquet"
    with serving(FakeServer(Faults(kill_after=1))) as address:
        assert main(arguments(address, job, output, "--shard", "0/3")) == 3
    part = output / Shard(0, 3).part_name
    incomplete = part.read_bytes()
    # As for a process whose local journal is lost.
    part.with_name(f"{part.name}.ledger").unlink()
    with serving(FakeServer()) as address:
        assert main(arguments(address, job, output, "--shard", "0/3")) in (0, 3)
    assert part.read_bytes() != incomplete
