"""The recipes in the package are valid specs, and each says how long it took where, and what of it was not run."""

import re
from importlib import resources
from pathlib import Path

import pytest

from mal_train.cli import SPECS, main
from mal_train.commands.common import labeler_config, train_crop_size
from mal_train.config.spec import load_spec
from mal_train.kernel.networks.backbones import check_crop_size
from tests.paths import ROOT

RECIPES = [name for name in SPECS if name not in {"default", "tao"}]
FOR_GPUS = {"small-gpu", "coco-scale"}
RUN = r"Run for docs/(\w+\.md)\b[^:]*: .*\d steps.* in \d+ min on (one|two) .*core"
"""Which page has the figures, how many steps, how long, where."""


def comments(text: str) -> str:
    """A recipe's comments with their lines joined."""
    return text.replace("\n# ", " ")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_valid_spec(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.yaml"
    assert main(["default-spec", name, "-o", str(path)]) == 0
    spec = load_spec(path, [])
    check_crop_size(spec.model.arch, train_crop_size(spec))
    check_crop_size(spec.model.arch, labeler_config(spec).crop_size)


def test_every_spec_in_the_package_has_a_name_to_print_it_by_but_the_demos() -> None:
    files = {Path(entry.name).stem for entry in resources.files("mal_train.specs").iterdir() if ".yaml" in entry.name}
    assert files == {*SPECS, "demo"}


@pytest.mark.parametrize("name", [*RECIPES, "demo"])
def test_a_recipe_says_how_long_it_took_where_and_what_of_it_was_not_run(name: str) -> None:
    text = (resources.files("mal_train.specs") / f"{name}.yaml").read_text(encoding="utf-8")
    found = re.search(RUN, comments(text))
    assert found, f"{name} does not say how long it took where"
    page = ROOT / "docs" / found[1]
    assert name.partition("-round")[0] in page.read_text(encoding="utf-8")
    assert ("# NOT RUN: " in text) == (name in FOR_GPUS)
