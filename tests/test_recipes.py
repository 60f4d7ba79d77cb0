"""The recipes in the package are valid specs, and each says whether it was run."""

from importlib import resources
from pathlib import Path

import pytest

from mal_train.cli import SPECS, main
from mal_train.config import load_spec
from mal_train.model.backbones import check_crop_size
from mal_train.tasks.common import labeler_config, train_crop_size

RECIPES = [name for name in SPECS if name not in {"default", "tao"}]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_valid_spec_that_says_whether_it_was_run(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.yaml"
    assert main(["default-spec", name, "-o", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert ("# Run for docs/" in text) != ("# NOT RUN: " in text)
    spec = load_spec(path, [])
    check_crop_size(spec.model.arch, train_crop_size(spec))
    check_crop_size(spec.model.arch, labeler_config(spec).crop_size)


def test_every_spec_in_the_package_has_a_name_to_print_it_by_but_the_demos() -> None:
    files = {Path(entry.name).stem for entry in resources.files("mal_train.specs").iterdir() if ".yaml" in entry.name}
    assert files == {*SPECS, "demo"}
