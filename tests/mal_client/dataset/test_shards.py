"""Claims about a job that is shared among processes: the parts, and the file that is made of them."""

import fcntl
from pathlib import Path

import pytest
from mal_client.cli.main import main
from mal_client.dataset.merge import merge_shards
from mal_client.dataset.shards import Shard

from mal_train.core.errors import ConfigError, OutputError
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, serving


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Seven images, of which one is missing, one has a crowd region and one a row that is faulty."""
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


def merge(dataset: Dataset, parts: int, *more: str) -> int:
    given = ["--annotations", str(dataset.json_path), "--output", str(dataset.output)]
    return main(["merge", *given, "--shards", str(parts), *more])


def ledgers(dataset: Dataset) -> list[str]:
    return sorted(path.name for path in dataset.folder.glob("out.json.ledger*"))


@pytest.mark.parametrize("parts", [1, 3, 11])
@pytest.mark.parametrize("form", [[], ["--format", "polygons", "--update-bbox"]])
def test_the_merged_file_has_the_bytes_of_a_single_run(dataset: Dataset, parts: int, form: list[str]) -> None:
    whole = dataset.folder / "whole.json"
    with serving(FakeServer()) as address:
        assert label(address, dataset, *form, output=whole) == 3
        for part in reversed(range(parts)):
            assert label(address, dataset, "--shard", f"{part}/{parts}") in (0, 3)
    assert not dataset.output.exists()
    assert merge(dataset, parts, *form) == 3
    assert dataset.output.read_bytes() == whole.read_bytes()
    errors = (dataset.folder / "out.errors.jsonl").read_bytes()
    assert errors == (dataset.folder / "whole.errors.jsonl").read_bytes()
    assert ledgers(dataset) == []


def test_every_image_is_sent_by_one_part(dataset: Dataset) -> None:
    fake = FakeServer()
    with serving(fake) as address:
        for part in range(3):
            label(address, dataset, "--shard", f"{part}/3")
    assert sorted(fake.item_ids, key=int) == ["0", "1", "3", "4", "5", "6"]


def test_a_missing_part_is_named(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "1/3")
    assert merge(dataset, 3) == 2
    said = capsys.readouterr().err
    assert "parts 0/3, 2/3 not labeled yet" in said
    assert "--shard 0/3, and so for the others" in said
    assert not dataset.output.exists()


def test_a_part_that_was_cut_short_is_named_and_can_be_taken_up(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("mal_client.bulk.stream.MAX_BREAKS", 2)
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/2")
    with serving(FakeServer(Faults(kill_after=1))) as address:
        assert label(address, dataset, "--shard", "1/2") == 3
    assert "run the same command again" in capsys.readouterr().err
    assert merge(dataset, 2) == 2
    assert "part 1/2 (3 boxes) not complete" in capsys.readouterr().err
    fake = FakeServer()
    with serving(fake) as address:
        label(address, dataset, "--shard", "1/2")
        assert len(fake.item_ids) == 2
        whole = dataset.folder / "whole.json"
        label(address, dataset, output=whole)
    assert merge(dataset, 2) == 3
    assert dataset.output.read_bytes() == whole.read_bytes()


def test_parts_of_different_jobs_are_not_joined(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/2")
        label(address, dataset, "--shard", "1/2", "--threshold", "0.7")
    assert merge(dataset, 2) == 2
    assert "thresholds [0.7, 0.7, 0.7] instead of [0.1, 0.2, 0.3]" in capsys.readouterr().err


def test_a_file_that_was_changed_since_is_refused(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/1")
    dataset.coco["info"] = {"note": "changed"}
    dataset.save()
    assert merge(dataset, 1) == 2
    assert "input_sha256" in capsys.readouterr().err


def test_a_part_that_is_still_being_labeled_is_waited_for(dataset: Dataset) -> None:
    with serving(FakeServer()) as address:
        label(address, dataset, "--shard", "0/1")
    with Shard(0, 1).journal_path(dataset.output).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is writing this output"):
            merge_shards(dataset.json_path, dataset.output, 1)


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "a/b", "0/0", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="shard"):
        Shard.parse(text)


def test_how_the_file_is_written_is_for_the_merge_to_say(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        assert label(address, dataset, "--shard", "0/2", "--format", "polygons") == 2
    assert "give them to mal-client merge" in capsys.readouterr().err
