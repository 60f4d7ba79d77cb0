"""The recipes for photographs, run with the commands in their comments, reduced to a few steps.

Reduced are the data (scenes instead of photographs), the network (vit-micro from random weights), the crop size (32 px)
and the epochs (one). Supervision, losses, frozen blocks, margins, learning rates and files are those of the recipes.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from mal_train.cli import main
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, read_header
from tests.mal_train.training.runs import plain_mean_field
from tests.scenes import write_scenes

SMALL = [
    "model.arch=vit-micro/16",
    "model.mask_head_hidden_channel=8",
    "model.mask_head_out_channel=8",
    "dataset.crop_size=32",
    "dataset.test_crop_size=48",
    "dataset.min_obj_size=100",
    "dataset.num_workers_per_gpu=0",
    "train.num_epochs=1",
    "train.checkpoint_interval=1",
    "train.validation_interval=1",
    "train.crf_num_iter=3",
    "train.use_amp=false",
    "train.gpu_ids=[]",
    "evaluate.gpu_ids=[]",
    "inference.gpu_ids=[]",
    "inference.precision=float32",
]


@pytest.fixture(autouse=True)
def _plain_mean_field(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_mean_field(monkeypatch)


class Rounds:
    """A folder with a recipe for each round and the data for all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train_file, self.train_images = write_scenes(folder / "train", images=12, masks=False, seed=1)
        self.val_file, self.val_images = write_scenes(folder / "val", images=30, seed=2)

    def recipe(self, name: str) -> Path:
        path = self.folder / f"{name}.yaml"
        assert main(["default-spec", name, "-o", str(path)]) == 0
        return path

    def run(
        self, task: str, recipe: Path, *more: str, pretrained: Path | None = None, labels: Path | None = None
    ) -> Path:
        """Runs a task with a recipe; returns its results folder."""
        results = self.folder / recipe.stem
        start = "null" if pretrained is None else f"'{pretrained}'"
        options = [word for word in more if not re.match(r"[a-z_.]+=", word)]
        fields = [word for word in more if re.match(r"[a-z_.]+=", word)]
        data = [
            f"results_dir='{results}'",
            f"dataset.train_ann_path='{labels or self.train_file}'",
            f"dataset.train_img_dir='{self.train_images}'",
            f"dataset.val_ann_path='{self.val_file}'",
            f"dataset.val_img_dir='{self.val_images}'",
            f"train.pretrained_model_path={start}",
        ]
        assert main([task, "-e", str(recipe), *options, *SMALL, *data, *fields]) == 0, task
        return results


def commands_in(recipe: Path) -> list[list[str]]:
    """Returns the words of the `mal-train` commands in a recipe's comments, starting with the task."""
    text = re.sub(r"\\\n#", " ", recipe.read_text(encoding="utf-8"))
    return [shlex.split(line)[1:] for line in re.findall(r"^#.*?(mal-train \S+ -e .*)$", text, re.MULTILINE)]


def filled(words: list[str], values: dict[str, str]) -> list[str]:
    """Returns the words of a command after the recipe, with placeholders replaced and `...` (the data) removed."""
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    return [word for word in words[3:] if word != "..."]


def test_four_rounds_with_the_commands_in_the_recipes_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rounds = Rounds(tmp_path)
    first, second, third, fourth = (rounds.recipe(f"small-cpu{part}") for part in ("", "-round2", "-round3", "-round4"))
    latest = "mal_model_latest.malckpt"
    round1 = rounds.run("train", first) / "train" / latest

    export, inference = commands_in(second)
    assert (export[:3], inference[:2]) == (["export", "-e", "small-cpu.yaml"], ["inference", "-e"])
    rounds.run("export", first, *filled(export, {"ROUND1.malckpt": str(round1)}))
    exported = Path("round1.malckpt")
    assert load_checkpoint(exported, None).provenance["network"] == "teacher"
    values = {"BOXES.json": str(rounds.train_file), "IMAGES": str(rounds.train_images)}
    labeled = rounds.run("inference", second, *filled(inference, values)) / "inference" / "round1.json"
    rows = json.loads(labeled.read_text())["annotations"]
    assert len(rows) == 24
    assert all(row["segmentation"] for row in rows)
    round2 = rounds.run("train", second, labels=labeled) / "train" / latest

    again = filled(inference, {**values, "round1.malckpt": str(round2), "round1.json": "round2.json"})
    labeled = rounds.run("inference", third, *again) / "inference" / "round2.json"
    round3 = rounds.run("train", third, pretrained=round2, labels=labeled) / "train" / latest
    round4 = rounds.run("train", fourth, pretrained=round3, labels=labeled) / "train" / latest

    (mean,) = commands_in(fourth)
    rounds.run("export", fourth, *filled(mean, {"ROUND4.malckpt": str(round4), "ROUND3.malckpt": str(round3)}))
    written = read_header(Path("model.malckpt"), None).content
    assert written is not None
    assert [source["checkpoint"] for source in written.provenance["sources"]] == [latest, latest]
    assert [len(source["lineage"]) for source in written.provenance["sources"]] == [2, 1]
    assert written.provenance["starting_weights_licence"] == "none"
    assert 0.0 < written.provenance["validation"]["mIoU"] < 1.0


@pytest.mark.parametrize("name", ["small-gpu", "coco-scale"])
def test_a_recipe_for_gpus_trains_evaluates_and_labels_scenes_on_the_cpu(tmp_path: Path, name: str) -> None:
    rounds = Rounds(tmp_path)
    recipe = rounds.recipe(name)
    checkpoint = rounds.run("train", recipe) / "train" / "mal_model_latest.malckpt"
    results = rounds.run("evaluate", recipe, f"evaluate.checkpoint='{checkpoint}'")
    metrics = json.loads((results / "evaluate" / "results.json").read_text())
    assert metrics["count"] == 60
    labeled = rounds.run(
        "inference",
        recipe,
        f"inference.checkpoint='{checkpoint}'",
        f"inference.ann_path='{rounds.train_file}'",
        f"inference.img_dir='{rounds.train_images}'",
        "inference.label_dump_path=labels.json",
    )
    rows = json.loads((labeled / "inference" / "labels.json").read_text())["annotations"]
    assert len(rows) == 24
    assert all(row["segmentation"] for row in rows)
