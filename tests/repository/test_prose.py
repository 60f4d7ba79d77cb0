"""The check of the repository's prose finds what it looks for."""

from pathlib import Path

import pytest

from tests.repository.prose import docstring_openings, findings, listed_words


@pytest.mark.parametrize("opening", ["What it does.", "Whether it is.", "How: so.", "Who calls"])
def test_a_question_word_at_the_start_of_a_docstring_is_found(opening: str) -> None:
    source = f'def call() -> None:\n    """{opening}"""\n'
    assert [line for line, _ in docstring_openings(source)] == [2]


def test_a_question_word_at_the_start_of_an_attributes_docstring_is_found() -> None:
    assert list(docstring_openings('LIMIT = 3\n"""How many."""\n')) == [(2, "How")]


@pytest.mark.parametrize("opening", ["Returns what it does.", "Whatever comes.", "A box."])
def test_other_docstrings_pass(opening: str) -> None:
    assert list(docstring_openings(f'"""{opening}"""\n')) == []


@pytest.mark.parametrize("line", ["# Ask the people.", "picture_hw = 3", "class X: ...  # a Lane"])
def test_a_listed_word_is_found_in_prose_and_in_names(line: str) -> None:
    assert [number for number, _ in listed_words(f"\n{line}\n")] == [2]


@pytest.mark.parametrize("line", ["pictured = 3", "the planet", 'old("--picture-dir")  # former name'])
def test_other_words_and_former_names_pass(line: str) -> None:
    assert list(listed_words(line)) == []


def test_a_finding_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('"""Module."""\n\nlanes = 3\n')
    assert list(findings(path, "a/module.py")) == ["a/module.py:3: lanes; write queues"]
