"""docs/admin.md: its table of settings has every number in the settings and names metrics that exist."""

import re
from collections.abc import Iterator

from pydantic import BaseModel

from mal_server.config.server import ServerConfig
from tests.deploy.test_deploy import exported, used
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "admin.md").read_text(encoding="utf-8")
PORT = "listen.port"
"""A number without a metric."""


def settings(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted name, type) of every setting."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from settings(annotation, f"{before}{name}.")
        else:
            yield before + name, annotation


def table() -> dict[str, str]:
    """Returns setting → the column with the metric to tune it by."""
    text = PAGE.partition("## Settings to tune")[2].partition("\n## ")[0]
    metrics: dict[str, str] = {}
    for row in re.findall(r"^\|(.*)\|$", text, re.MULTILINE):
        # A "|" between backticks belongs to an expression.
        first, *_, metric = re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", row)
        metrics |= dict.fromkeys(re.findall(r"`([^`]+)`", first), metric)
    return metrics


def test_every_number_in_the_settings_is_in_the_table() -> None:
    numbers = {name for name, annotation in settings(ServerConfig) if annotation in (int, float)}
    assert len(numbers) > 15
    assert numbers - {PORT} <= table().keys()


def test_the_table_names_settings_that_exist() -> None:
    assert table().keys() <= {name for name, _ in settings(ServerConfig)}


def test_each_setting_in_the_table_has_a_metric_and_those_of_the_server_exist() -> None:
    named = {setting: set().union(*map(used, re.findall(r"`([^`]+)`", metric))) for setting, metric in table().items()}
    assert all(metric.strip() for metric in table().values())
    shown = exported() | {"mal_batch_crops", "mal_queue_seconds", "mal_stage_seconds", "grpc_server_handling_seconds"}
    assert set().union(*named.values()) <= shown
    assert len([setting for setting, metrics in named.items() if metrics]) > 15
