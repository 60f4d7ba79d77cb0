"""docs/admin.md: its table of knobs knows every number that the settings hold, and figures that the server shows."""

import re
from collections.abc import Iterator

from pydantic import BaseModel

from mal_server.config.server import ServerConfig
from tests.deploy.test_deploy import exported, used
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "admin.md").read_text(encoding="utf-8")
PORT = "listen.port"
"""A number that nobody turns by a figure."""


def settings(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, type) of every setting."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings(kind, f"{before}{name}.")
        else:
            yield before + name, kind


def knobs() -> dict[str, str]:
    """Setting → the column that tells by which figure it is turned."""
    table = PAGE.partition("## Which knob")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    for row in re.findall(r"^\|(.*)\|$", table, re.MULTILINE):
        # A "|" between backticks belongs to an expression.
        first, *_, figure = re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", row)
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", first), figure)
    return found


def test_every_number_of_the_settings_is_a_knob_of_the_table() -> None:
    numbers = {name for name, kind in settings(ServerConfig) if kind in (int, float)}
    assert len(numbers) > 15
    assert numbers - {PORT} <= knobs().keys()


def test_the_table_names_settings_that_exist() -> None:
    assert knobs().keys() <= {name for name, _ in settings(ServerConfig)}


def test_each_knob_has_a_figure_and_those_of_the_server_exist() -> None:
    named = {setting: set().union(*map(used, re.findall(r"`([^`]+)`", figure))) for setting, figure in knobs().items()}
    assert all(figure.strip() for figure in knobs().values())
    shown = exported() | {"mal_batch_crops", "mal_queue_seconds", "mal_stage_seconds", "grpc_server_handling_seconds"}
    assert set().union(*named.values()) <= shown
    assert len([setting for setting, figures in named.items() if figures]) > 15
