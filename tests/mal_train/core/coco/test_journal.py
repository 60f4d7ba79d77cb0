"""Claims about the file that keeps the results of a bulk job."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco.journal import SYNC_EVERY_S, Journal, journal_path
from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.locked_file import IN_USE, LockedFile

JOB = {"input": "aa", "thresholds": [0.1, 0.2]}
LABEL = {"label": {"score": 0.5, "name": "é"}}
FAILED = {"failed": ["INTERNAL", "OUT_OF_MEMORY", "box 3: too large"]}


def opened(folder: Path, job: dict[str, Any] | None = None, **more: Any) -> Journal:
    return Journal(folder / "out.json.ledger", 5, JOB if job is None else job, **more)


def written(folder: Path) -> bytes:
    with opened(folder) as journal:
        journal.append({3: LABEL, 1: FAILED})
        journal.append({0: LABEL})
    return journal.path.read_bytes()


def test_the_next_run_reads_the_results_and_retries_failures(tmp_path: Path) -> None:
    written(tmp_path)
    with opened(tmp_path) as journal:
        assert [journal.result(index) for index in range(5)] == [LABEL, FAILED, None, LABEL, None]
        assert [journal.has_label(index) for index in range(5)] == [True, False, False, True, False]
        assert journal.label_count == 2
        journal.append({1: LABEL})
        assert (journal.result(1), journal.label_count) == (LABEL, 3)
    with opened(tmp_path) as journal:
        assert journal.result(1) == LABEL


@pytest.mark.parametrize("notes", range(3))
def test_rows_that_an_interrupted_append_has_written_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: int
) -> None:
    note, remaining = Journal._note, iter(range(notes))

    def interrupted(journal: Journal, *arguments: Any, **more: Any) -> None:
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        note(journal, *arguments, **more)

    with opened(tmp_path) as journal:
        journal.append({4: LABEL})
        monkeypatch.setattr(Journal, "_note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.append({3: LABEL, 1: FAILED, 0: LABEL})
        monkeypatch.undo()
        journal.note_interrupted()
        assert [journal.result(index) for index in range(5)] == [LABEL, FAILED, None, LABEL, LABEL]
        assert journal.label_count == 3
        journal.note_interrupted()
        assert journal.label_count == 3


@pytest.mark.parametrize(("result", "stays"), [(LABEL, True), (FAILED, False)])
def test_a_journal_is_empty_only_if_it_holds_no_label_of_an_interrupted_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any], stays: bool
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with opened(tmp_path) as journal:
        monkeypatch.setattr(Journal, "_note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.append({0: result})
        monkeypatch.undo()
        journal.remove_if_empty()
    assert journal.path.exists() is stays


def test_a_journal_cut_at_any_byte_keeps_its_complete_lines(tmp_path: Path) -> None:
    complete = written(tmp_path)
    path = tmp_path / "out.json.ledger"
    ends = [offset + 1 for offset, byte in enumerate(complete) if byte == ord("\n")]
    for cut in range(len(complete)):
        path.write_bytes(complete[:cut])
        kept = sum(end <= cut for end in ends[1:])
        with opened(tmp_path) as journal:
            assert [journal.result(index) is not None for index in (3, 1, 0)] == [kept > number for number in range(3)]
            journal.append({4: LABEL})
        with opened(tmp_path) as journal:
            assert journal.result(4) == LABEL


@pytest.mark.parametrize("flip", [0, 10, -30, -2])
def test_a_damaged_line_and_those_behind_it_are_ignored(tmp_path: Path, flip: int) -> None:
    damaged = bytearray(written(tmp_path))
    start = damaged.index(b"\n") + 1
    offset = start + flip if flip >= 0 else len(damaged) + flip
    damaged[offset] ^= 1
    (tmp_path / "out.json.ledger").write_bytes(damaged)
    with opened(tmp_path) as journal:
        assert (journal.result(3) is None) == (flip >= 0)
        assert journal.result(0) is None


def test_the_manifest_survives_a_power_cut_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(LockedFile, "sync", lambda file: synced.append(file.path.read_bytes()))
    now = 0.0
    with opened(tmp_path, clock=lambda: now) as journal:
        assert synced == [journal.path.read_bytes()]
        journal.append({0: LABEL})
        assert len(synced) == 1
        now += 2 * SYNC_EVERY_S
        journal.append({1: LABEL})
        assert synced[1:] == [journal.path.read_bytes()]


def test_a_disk_that_fills_up_at_the_sync_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: LockedFile) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LockedFile, "sync", full)
    with pytest.raises(OutputError):
        opened(tmp_path)


def test_the_journal_of_another_job_is_refused_with_the_differences_and_unchanged(tmp_path: Path) -> None:
    before = written(tmp_path)
    with pytest.raises(ConfigError, match=r"input 'aa' .*'bb'.*--restart"):
        opened(tmp_path, JOB | {"input": "bb"})
    assert journal_path(tmp_path / "out.json").read_bytes() == before
    with opened(tmp_path, JOB | {"input": "bb"}, restart=True) as journal:
        assert journal.label_count == 0


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "content", [b"precious\n" * 100, b"precious", b"\0" * 100, b"deadbeef", b"{}\n", b"deadbeef {}\n", b'deadbeef {"a']
)
def test_a_file_that_is_no_journal_is_refused_and_unchanged(tmp_path: Path, content: bytes, restart: bool) -> None:
    path = tmp_path / "out.json.ledger"
    path.write_bytes(content)
    if content in (b"deadbeef", b'deadbeef {"a'):  # what a killed process may leave of its first line
        opened(tmp_path, restart=restart).close()
        return
    with pytest.raises(ConfigError):
        opened(tmp_path, restart=restart)
    assert path.read_bytes() == content


@pytest.mark.parametrize("restart", [False, True])
def test_a_damaged_first_line_drops_no_results_in_silence(tmp_path: Path, restart: bool) -> None:
    for position in (0, 8, 9, 20):
        damaged = bytearray(written(tmp_path))
        damaged[position] ^= 1
        (tmp_path / "out.json.ledger").write_bytes(damaged)
        with pytest.raises(ConfigError):
            opened(tmp_path, restart=restart)
        assert (tmp_path / "out.json.ledger").read_bytes() == damaged
        (tmp_path / "out.json.ledger").unlink()


def test_a_huge_file_that_is_no_journal_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "out.json.ledger").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError):
        opened(tmp_path)


def test_a_link_is_refused_and_what_it_names_is_unchanged(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for content in (b"precious\n", b""):
        victim.write_bytes(content)
        (tmp_path / "out.json.ledger").symlink_to(victim)
        with pytest.raises(OutputError):
            opened(tmp_path)
        assert victim.read_bytes() == content
        (tmp_path / "out.json.ledger").unlink()


@pytest.mark.parametrize(
    "row",
    [
        *([5, LABEL], [-1, LABEL], [True, LABEL], [0, "label"], [0], {"0": LABEL}),
        *(
            [0, result]
            for result in ({}, {"label": 5}, {"failed": 5}, {"failed": ["A", "B"]}, {"failed": ["A", "B", 3]})
        ),
    ],
)
def test_a_line_that_is_no_result_of_the_job_is_an_error(tmp_path: Path, row: Any) -> None:
    text = json.dumps(row).encode()
    (tmp_path / "out.json.ledger").write_bytes(written(tmp_path) + b"%08x %s\n" % (zlib.crc32(text), text))
    with pytest.raises(ConfigError):
        opened(tmp_path)


def test_two_runs_cannot_open_one_journal(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(OutputError, match=rf"out\.json\.ledger: {re.escape(IN_USE)}"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_link_to_the_output_has_the_same_journal(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "out.json")
    assert journal_path(tmp_path / "link.json") == journal_path(tmp_path / "out.json")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no/out"):
        opened(tmp_path / "no")
