"""Claims about YAML text, which may come from anywhere."""

from pathlib import Path

import pytest
import yaml

from mal_train.core.errors import ConfigError
from mal_train.core.yaml_config import MAX_EXPLAINED, MAX_YAML_BYTES, Strict, apply_overrides, load_yaml, validate
from mal_train.core.yaml_text import MAX_DEPTH, MAX_NODES, parse_yaml

LEVELS = 12
ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, LEVELS)
)


@pytest.mark.parametrize(
    "text",
    [
        ALIASES,
        "a: &a 1",
        "a: &a {b: *a}",
        "<<: *a",
        "a: !!python/object:os.system x",
        "a: !!bool no bool",
        "a: !!timestamp none",
        "a: !!int none",
        "a: !!binary ~",
        "a: !x 1",
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "- " * 100_000,
        "{" * 10_000,
        f"[{'1,' * MAX_NODES}]",
        "a: 1\na: 2",
        "[a]: 1",
        "a: 'open",
        "\x00",
        "a: 1\n---\nb: 2",
    ],
    ids=range(19),
)
def test_yaml_that_settings_do_not_need_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(yaml.YAMLError) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value).strip()
    assert len(str(raised.value)) < 200


def test_a_message_repeats_no_text_of_the_file() -> None:
    with pytest.raises(yaml.YAMLError) as raised:
        parse_yaml('encryption_key: "correct horse battery')
    assert "horse" not in str(raised.value)


@pytest.mark.parametrize("value", ["9" * 100_000, "1:" * 100_000 + "1", "0x" + "f" * 100_000])
def test_a_number_without_end_is_text(value: str) -> None:
    assert parse_yaml(f"a: {value}") == {"a": value}


def test_numbers_are_read_as_before() -> None:
    assert parse_yaml("[0, -12, +3, 1_000, 0x1F, 0b11, 010]") == [0, -12, 3, 1000, 31, 3, 8]


def test_no_more_of_a_file_is_read_than_its_limit() -> None:
    with pytest.raises(ConfigError, match=str(MAX_YAML_BYTES)):
        load_yaml(Path("/dev/zero"))


class Section(Strict):
    known: int = 0


def test_a_message_about_many_fields_lists_the_first() -> None:
    with pytest.raises(ConfigError) as raised:
        validate(Section, {f"{i}{'x' * 10_000}": i for i in range(1000)})
    assert f"and {1000 - MAX_EXPLAINED} more" in str(raised.value)
    assert len(str(raised.value)) < 20_000


def test_an_override_may_not_nest_without_end() -> None:
    with pytest.raises(ConfigError):
        apply_overrides({}, ["a." * 10_000 + "b=1"])
