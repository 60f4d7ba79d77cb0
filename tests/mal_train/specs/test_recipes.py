"""The recipes in the package are valid specs; their comments give steps, time and machine, and the parts not run."""

import re
from importlib import resources
from pathlib import Path

import pytest

from mal_train.cli import main
from mal_train.commands.common import labeler_config, train_crop_size
from mal_train.commands.default_spec import SPECS
from mal_train.config.spec import load_spec
from mal_train.kernel.networks.backbones import check_crop_size
from tests.paths import ROOT

RECIPES = [name for name in SPECS if name not in {"default", "tao"}]
FOR_GPUS = {"small-gpu", "coco-scale"}
RUN = r"Run for docs/([\w/-]+\.md)\b[^:]*: .*\d steps.* in \d+ min on (one|two) .*core"
"""Page with the results, steps, time and machine of the run of a recipe."""


def comments(text: str) -> str:
    """Joins the lines of the comments of a recipe."""
    return text.replace("\n# ", " ")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_valid_spec(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.yaml"
    assert main(["default-spec", name, "-o", str(path)]) == 0
    spec = load_spec(path, [])
    check_crop_size(spec.model.arch, train_crop_size(spec))
    check_crop_size(spec.model.arch, labeler_config(spec).crop_size)


def test_default_spec_can_print_every_spec_in_the_package_except_the_demo() -> None:
    files = {Path(entry.name).stem for entry in resources.files("mal_train.specs").iterdir() if ".yaml" in entry.name}
    assert files == {*SPECS, "demo"}


@pytest.mark.parametrize("name", [*RECIPES, "demo"])
def test_a_recipe_states_steps_time_and_machine_of_its_run_and_the_parts_not_run(name: str) -> None:
    text = (resources.files("mal_train.specs") / f"{name}.yaml").read_text(encoding="utf-8")
    found = re.search(RUN, comments(text))
    assert found, f"{name}: no comment matches {RUN}"
    page = ROOT / "docs" / found[1]
    assert name.partition("-round")[0] in page.read_text(encoding="utf-8")
    assert ("# NOT RUN: " in text) == (name in FOR_GPUS)


@pytest.mark.parametrize(
    ("name", "boxes", "steps", "peak"),
    [("small-gpu", 3_359, 5_040, 2e-4), ("coco-scale", 467_000, 145_940, 4.8e-5)],
)
def test_the_numbers_of_a_recipe_for_gpus_follow_from_its_steps(
    name: str, boxes: int, steps: int, peak: float, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.yaml"
    assert main(["default-spec", name, "-o", str(path)]) == 0
    spec = load_spec(path, [])
    section = spec.train
    assert -(-boxes // (section.num_gpus * section.batch_size)) * section.num_epochs == steps
    assert section.lr * section.batch_size * section.num_gpus == pytest.approx(peak)
    assert 0.05 <= 1 / (1 - spec.model.teacher_momentum) / steps <= 0.1
    assert 0.1 <= section.loss_crf_step / steps <= 0.15
    assert 0.0499 < section.warmup_epochs / section.num_epochs <= 0.1
