"""Claims about the file that keeps a bulk job's answers."""

from pathlib import Path
from typing import Any

import pytest
from mal_client.dataset.journal import Journal, journal_path

from mal_train.core.errors import ConfigError, OutputError

JOB = {"input": "aa", "thresholds": [0.1, 0.2]}
LABEL = {"label": {"score": 0.5, "name": "é"}}
FAILED = {"failed": ["INTERNAL", "OUT_OF_MEMORY", "box 3: too large"]}


def opened(folder: Path, job: dict[str, Any] | None = None, **more: Any) -> Journal:
    return Journal(folder / "out.json.ledger", 5, JOB if job is None else job, **more)


def written(folder: Path) -> bytes:
    with opened(folder) as ledger:
        ledger.append({3: LABEL, 1: FAILED})
        ledger.append({0: LABEL})
    return ledger.path.read_bytes()


def test_the_next_run_finds_the_answers_and_asks_again_what_failed(tmp_path: Path) -> None:
    written(tmp_path)
    with opened(tmp_path) as ledger:
        assert [ledger.answer(at) for at in range(5)] == [LABEL, FAILED, None, LABEL, None]
        assert [ledger.has_label(at) for at in range(5)] == [True, False, False, True, False]
        assert ledger.label_count == 2
        ledger.append({1: LABEL})
        assert (ledger.answer(1), ledger.label_count) == (LABEL, 3)
    with opened(tmp_path) as ledger:
        assert ledger.answer(1) == LABEL


def test_cut_anywhere_it_keeps_all_whole_lines_and_goes_on_after_them(tmp_path: Path) -> None:
    whole = written(tmp_path)
    path = tmp_path / "out.json.ledger"
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        answers = sum(end <= cut for end in ends[1:])
        with opened(tmp_path) as ledger:
            assert [ledger.answer(at) is not None for at in (3, 1, 0)] == [answers > nth for nth in range(3)]
            ledger.append({4: LABEL})
        with opened(tmp_path) as ledger:
            assert ledger.answer(4) == LABEL


@pytest.mark.parametrize("flip", [0, 10, -30, -2])
def test_a_damaged_line_is_not_believed(tmp_path: Path, flip: int) -> None:
    damaged = bytearray(written(tmp_path))
    start = damaged.index(b"\n") + 1
    place = start + flip if flip >= 0 else len(damaged) + flip
    damaged[place] ^= 1
    (tmp_path / "out.json.ledger").write_bytes(damaged)
    with opened(tmp_path) as ledger:
        assert (ledger.answer(3) is None) == (flip >= 0)
        assert ledger.answer(0) is None


def test_another_job_is_refused_by_what_differs_and_left_alone(tmp_path: Path) -> None:
    before = written(tmp_path)
    with pytest.raises(ConfigError, match=r"input 'aa' instead of 'bb'.*--restart"):
        opened(tmp_path, JOB | {"input": "bb"})
    assert journal_path(tmp_path / "out.json").read_bytes() == before
    with opened(tmp_path, JOB | {"input": "bb"}, restart=True) as ledger:
        assert ledger.label_count == 0


def test_only_one_run_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(OutputError, match="another run"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_link_to_the_output_leads_to_the_same_ledger(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "out.json")
    assert journal_path(tmp_path / "link.json") == journal_path(tmp_path / "out.json")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no/out"):
        opened(tmp_path / "no")
