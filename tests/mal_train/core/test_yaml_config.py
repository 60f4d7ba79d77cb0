"""Retired fields of settings files."""

import pytest

from mal_train.core.errors import ConfigError
from mal_train.core.yaml_config import Strict, renamed, validate


class Entry(Strict):
    gpu_ids: int = 0


class Config(Strict):
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
