"""Retired fields of settings files."""

from pathlib import Path

import pytest

from mal_train.core.errors import ConfigError
from mal_train.core.yaml_config import Strict, load_yaml, renamed, validate


class Entry(Strict):
    gpu_ids: int = 0


class Config(Strict):
    path: str = ""
    max_wait_ms: float = 5.0
    models: tuple[Entry, ...] = ()


RETIRED = {"wait_ms": renamed("max_wait_ms"), "models[].gpu": renamed("models[].gpu_ids")}


@pytest.mark.parametrize(
    ("data", "former", "new"),
    [
        ({"wait_ms": 3.0}, "wait_ms", "max_wait_ms"),
        ({"models": [{}, {"gpu": 1}]}, "models[1].gpu", "models[].gpu_ids"),
    ],
)
def test_a_renamed_field_is_refused_with_its_new_name(data: dict[str, object], former: str, new: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(Config, data, source="config.yaml", retired=RETIRED)
    assert str(raised.value) == f"config.yaml: {former}: {renamed(new)}"
    assert new in renamed(new)


def test_other_unknown_fields_still_get_the_nearest_valid_name() -> None:
    with pytest.raises(ConfigError) as raised:
        validate(Config, {"max_wait": 3.0}, retired=RETIRED)
    assert "max_wait_ms" in str(raised.value)


def test_an_empty_field_of_text_is_refused_with_the_ways_to_leave_it_empty() -> None:
    with pytest.raises(ConfigError) as raised:
        validate(Config, {"path": None})
    assert all(text in str(raised.value) for text in ("path: null", "''", "omit"))


def test_a_file_in_another_encoding_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes("results_dir: r\xe9s".encode("latin-1"))
    with pytest.raises(ConfigError) as raised:
        load_yaml(path)
    assert "save it as UTF-8" in str(raised.value)
