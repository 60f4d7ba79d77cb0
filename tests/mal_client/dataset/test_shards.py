"""Claims about a job that is split among processes: the shards, and the file that is merged from them."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from mal_client.cli.main import main
from mal_client.dataset.merge import merge_shards
from mal_client.dataset.shards import Shard

from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.locked_file import IN_USE, LockedFile
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, serving


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Seven images: one file is missing, one image has a crowd region, one has a row without a box."""
    dataset = make_dataset(tmp_path, images=7)
    (dataset.images_dir / "image_2.png").unlink()
    dataset.coco["annotations"][0]["iscrowd"] = 1
    dataset.coco["annotations"][7]["bbox"] = "none"
    dataset.coco["annotations"][9]["bbox"] = [500, 2, 5, 5]
    dataset.save()
    return dataset


def label(address: str, dataset: Dataset, *more: str, output: Path | None = None) -> int:
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    return main(["label", "--server", address, *given, "--output", str(output or dataset.output), *more])


def merge(dataset: Dataset, shards: int, *more: str) -> int:
    given = ["--annotations", str(dataset.json_path), "--output", str(dataset.output)]
    return main(["merge", *given, "--shards", str(shards), *more])


def journals(dataset: Dataset) -> list[str]:
    return sorted(path.name for path in dataset.folder.glob("out.json.ledger*"))


@pytest.mark.parametrize("shards", [1, 3, 11])
@pytest.mark.parametrize("form", [[], ["--format", "polygons", "--update-bbox"]])
def test_the_merged_file_has_the_bytes_of_a_single_run(dataset: Dataset, shards: int, form: list[str]) -> None:
    single = dataset.folder / "single.json"
    with serving(FakeServer()) as address:
        assert label(address, dataset, *form, output=single) == 3
        for shard in reversed(range(shards)):
            assert label(address, dataset, "--shard", f"{shard}/{shards}") in (0, 3)
    assert not dataset.output.exists()
    assert merge(dataset, shards, *form) == 3
    assert dataset.output.read_bytes() == single.read_bytes()
    errors = (dataset.folder / "out.errors.jsonl").read_bytes()
    assert errors == (dataset.folder / "single.errors.jsonl").read_bytes()
    assert journals(dataset) == []


def test_every_image_is_sent_by_one_shard(dataset: Dataset) -> None:
    fake = FakeServer()
    with serving(fake) as address:
        for shard in range(3):
            label(address, dataset, "--shard", f"{shard}/3")
    assert sorted(fake.item_ids, key=int) == ["0", "1", "3", "4", "5", "6"]


def test_missing_shards_are_named(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "1/3")
    assert merge(dataset, 3) == 2
    message = capsys.readouterr().err
    assert "0/3, 2/3" in message
    assert "--shard 0/3" in message
    assert not dataset.output.exists()


def test_an_incomplete_shard_is_named_and_can_be_resumed(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("mal_client.bulk.stream.MAX_BREAKS", 2)
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/2")
    with serving(FakeServer(Faults(kill_after=1))) as address:
        assert label(address, dataset, "--shard", "1/2") == 3
    capsys.readouterr()
    assert merge(dataset, 2) == 2
    assert "1/2 (3 boxes)" in capsys.readouterr().err
    fake = FakeServer()
    with serving(fake) as address:
        label(address, dataset, "--shard", "1/2")
        assert len(fake.item_ids) == 2
        single = dataset.folder / "single.json"
        label(address, dataset, output=single)
    assert merge(dataset, 2) == 3
    assert dataset.output.read_bytes() == single.read_bytes()


def test_shards_of_different_jobs_are_not_merged(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/2")
        label(address, dataset, "--shard", "1/2", "--threshold", "0.7")
    assert merge(dataset, 2) == 2
    assert "thresholds [0.7, 0.7, 0.7] instead of [0.1, 0.2, 0.3]" in capsys.readouterr().err


def test_an_annotation_file_that_changed_since_is_refused(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/1")
    dataset.coco["info"] = {"note": "changed"}
    dataset.save()
    assert merge(dataset, 1) == 2
    assert "input_sha256" in capsys.readouterr().err


def test_a_shard_that_is_being_labeled_cannot_be_merged(dataset: Dataset) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/1")
    journal = Shard(0, 1).journal_path(dataset.output)
    with LockedFile(journal), pytest.raises(OutputError, match=re.escape(f"{journal.name}: {IN_USE}")):
        merge_shards(dataset.json_path, dataset.output, 1)


@pytest.mark.parametrize("change", [{"model": 5}, {"branch": "best"}, {"checkpoint_sha256": None}])
def test_shards_that_do_not_name_their_model_are_refused_before_anything_is_written(
    dataset: Dataset, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/1")
    journal = Shard(0, 1).journal_path(dataset.output)
    first, _, rest = journal.read_bytes().partition(b"\n")
    manifest = json.dumps(json.loads(first[9:]) | change).encode()
    journal.write_bytes(b"%08x %s\n" % (zlib.crc32(manifest), manifest) + rest)
    assert merge(dataset, 1) == 2
    assert "model" in capsys.readouterr().err
    assert journal.exists()
    assert not dataset.output.exists()


def test_a_label_without_a_mask_is_refused(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/1")
    journal = Shard(0, 1).journal_path(dataset.output)
    lines = journal.read_bytes().splitlines()
    index = next(number for number, line in enumerate(lines) if b'"segmentation"' in line)
    text = lines[index][9:].replace(b'"segmentation"', b'"mask"')
    lines[index] = b"%08x %s" % (zlib.crc32(text), text)
    journal.write_bytes(b"\n".join(lines) + b"\n")
    assert merge(dataset, 1) == 2
    assert "RLE" in capsys.readouterr().err
    assert not dataset.output.exists()


@pytest.mark.parametrize("failure", ["abc", "no mask", ["INTERNAL", "", "abc"]])
def test_a_failure_of_any_form_that_the_journal_reads_is_written(dataset: Dataset, failure: Any) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/1")
    journal = Shard(0, 1).journal_path(dataset.output)
    *lines, last = journal.read_bytes().splitlines()
    text = json.dumps([json.loads(last[9:])[0], {"failed": failure}]).encode()
    journal.write_bytes(b"\n".join([*lines, last, b"%08x %s" % (zlib.crc32(text), text)]) + b"\n")
    assert merge(dataset, 1) == 3
    errors = [row["error"] for row in json.loads(dataset.output.read_text())["annotations"] if row.get("error")]
    message = failure if isinstance(failure, str) else failure[2]
    assert [message in error["message"] for error in errors if error["reason"] == "INTERNAL"] == [True]


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "a/b", "0/0", "1/2/3"])
def test_an_invalid_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"shard '?{text}"):
        Shard.parse(text)


def test_options_of_the_output_are_refused_for_a_shard(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        assert label(address, dataset, "--shard", "0/2", "--format", "polygons") == 2
    assert {"--format", "mal-client", "merge"} <= set(re.split("[ ,:;\n]+", capsys.readouterr().err))
