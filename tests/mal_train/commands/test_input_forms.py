"""`mal-train` reads the forms of COCO files and of specs that users have, or names them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mal_train.cli import main
from mal_train.commands.inference import inference
from mal_train.config.spec import load_spec
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from tests.mal_train.core.images.tiffs import tiff_of
from tests.mal_train.test_cli import checkpoint, inference_spec, labels_of, spec_file
from tests.reference import shared
from tests.scenes import widen, write_scenes

__all__ = ["checkpoint"]

Change = Callable[[dict[str, Any]], None]


def set_rows(**fields: Any) -> Change:
    return lambda coco: [row.update(fields) for row in coco["annotations"]].clear()


def as_lvis(coco: dict[str, Any]) -> None:
    coco["categories"][0]["frequency"] = "f"
    for row in coco["images"]:
        row["coco_url"] = f"http://images.example/val2017/{row.pop('file_name')}"
        row |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}


def respell(coco: dict[str, Any]) -> None:
    coco["images"][0]["file_name"] = f"C:\\images\\{coco['images'][0]['file_name'].upper()}"


FORMS: dict[str, Change] = {
    "LVIS": as_lvis,
    "names of another machine": respell,
    "no class": set_rows(category_id=None),
    "no list of classes": lambda coco: coco.pop("categories"),
    "unknown sizes": lambda coco: [row.update(width=0, height=-1) for row in coco["images"]].clear(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_has_one_meaning_is_labeled(tmp_path: Path, checkpoint: Path, form: str) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2, masks=False, change=FORMS[form])
    compressed = tmp_path / "boxes.json.gz"
    compressed.write_bytes(gzip.compress(scenes[0].read_bytes()))
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, (compressed, scenes[1]))]) == 0
    assert all("counts" in row["segmentation"] for row in labels_of(tmp_path).values())


def evaluate_spec(folder: Path, checkpoint: Path, scenes: tuple[Path, Path], **more: Any) -> str:
    dataset = {"val_ann_path": str(scenes[0]), "val_img_dir": str(scenes[1]), **more}
    return spec_file(folder, dataset=dataset, evaluate={"checkpoint": str(checkpoint), "precision": "float32"})


def test_a_file_of_crowds_measures_and_labels_nothing_unless_they_are_objects(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2, change=set_rows(iscrowd=1))
    assert main(["evaluate", "-e", evaluate_spec(tmp_path, checkpoint, scenes)]) == 3
    printed = capsys.readouterr()
    assert "CROWD" in printed.out
    assert "dataset.crowd_as_objects" in printed.err
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, scenes)]) == 3
    assert "CROWD" in capsys.readouterr().out
    assert main(["evaluate", "-e", evaluate_spec(tmp_path, checkpoint, scenes, crowd_as_objects=True)]) == 0
    spec = inference_spec(tmp_path, checkpoint, scenes, restart=True)
    assert main(["inference", "-e", spec, "dataset.crowd_as_objects=true"]) == 0
    assert {row["iscrowd"] for row in labels_of(tmp_path).values()} == {0}


@pytest.mark.parametrize("segmentation", [[[1, 2, 3]], [[1, 2, 3, 4]], None, "x"])
def test_an_inference_that_is_to_compare_and_compares_nothing_is_no_success(
    tmp_path: Path, checkpoint: Path, segmentation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2, change=set_rows(segmentation=segmentation))
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, scenes, load_mask=True)]) == 3
    assert "inference.load_mask" in capsys.readouterr().out
    assert all("counts" in row["segmentation"] for row in labels_of(tmp_path).values())


def test_an_inference_without_annotations_is_no_success(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2, change=lambda coco: coco["annotations"].clear())
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, scenes)]) == 3
    assert "no annotation was labeled" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inference", "evaluate"])
def test_stretched_images_are_counted_by_every_command(
    tmp_path: Path, checkpoint: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2)
    name = json.loads(scenes[0].read_text())["images"][0]["file_name"]
    widen(scenes[1] / name)
    make = {"inference": inference_spec, "evaluate": evaluate_spec}[command]
    assert main([command, "-e", make(tmp_path, checkpoint, scenes)]) == 0
    assert capsys.readouterr().err.count("1 image with values beyond 8 bits") == 1


@pytest.mark.parametrize("command", ["inference", "evaluate"])
def test_an_image_that_is_refused_is_not_counted_as_stretched(
    tmp_path: Path, checkpoint: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2, change=lambda coco: coco["images"][0].update(width=1))
    widen(scenes[1] / json.loads(scenes[0].read_text())["images"][0]["file_name"])
    make = {"inference": inference_spec, "evaluate": evaluate_spec}[command]
    assert main([command, "-e", make(tmp_path, checkpoint, scenes)]) == 3
    assert "beyond 8 bits" not in capsys.readouterr().err


def test_an_evaluation_reads_large_images_by_windows_with_the_same_result(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2)
    coco = json.loads(scenes[0].read_text())
    for image in coco["images"]:
        path = scenes[1] / image["file_name"]
        with Image.open(path) as pixels:
            path.with_suffix(".tif").write_bytes(tiff_of(np.asarray(pixels.convert("RGB")), tile=16))
        image["file_name"] = path.with_suffix(".tif").name
    scenes[0].write_text(json.dumps(coco))
    side = max(image["width"] for image in coco["images"])
    spec = evaluate_spec(tmp_path, checkpoint, scenes)
    results = []
    for limit in (side, side - 1):
        assert main(["evaluate", "-e", spec, f"limits.max_side={limit}"]) == 0
        (path,) = tmp_path.rglob("results.json")
        results.append(json.loads(path.read_text()))
    assert results[0]["mIoU"] == results[1]["mIoU"]
    assert results[0]["count"] == results[1]["count"] > 0


def test_a_box_of_too_large_a_window_is_named_with_its_file(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=1)
    coco = json.loads(scenes[0].read_text())
    path = scenes[1] / "large.tif"
    path.write_bytes(tiff_of(np.zeros((80, 96, 3), np.uint8), tile=16))
    coco["images"][0]["file_name"] = path.name
    coco["annotations"][0]["bbox"] = [0, 0, 96, 80]
    scenes[0].write_text(json.dumps(coco))
    for command, make in (("inference", inference_spec), ("evaluate", evaluate_spec)):
        assert main([command, "-e", make(tmp_path, checkpoint, scenes), "limits.max_side=90"]) == 3
        lines = capsys.readouterr().err.splitlines()
        assert any(str(path) in line and "limits.max_side" in line for line in lines)


def test_an_output_named_gz_is_compressed_and_read_back(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2)
    output = tmp_path / "labels.json.gz"
    spec = inference_spec(tmp_path, checkpoint, scenes, label_dump_path=str(output))
    assert main(["inference", "-e", spec]) == 0
    labeled = json.loads(gzip.decompress(output.read_bytes()))
    again = evaluate_spec(tmp_path, checkpoint, (output, scenes[1]))
    has_empty_masks = any("EMPTY_MASK" in row["flags"] for row in labeled["annotations"])
    assert main(["evaluate", "-e", again]) == (3 if has_empty_masks else 0)
    assert len(labeled["annotations"]) == len(json.loads(scenes[0].read_text())["annotations"])


def test_an_evaluation_that_compares_nothing_is_no_success(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2, change=set_rows(segmentation=[[1, 2, 3]]))
    assert main(["evaluate", "-e", evaluate_spec(tmp_path, checkpoint, scenes)]) == 3


def test_rotated_boxes_are_refused_or_labeled_upright(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2, masks=False, change=set_rows(attributes={"rotation": 20}))
    spec = inference_spec(tmp_path, checkpoint, scenes)
    assert main(["inference", "-e", spec]) == 3
    assert {row["error"]["reason"] for row in labels_of(tmp_path).values()} == {"BOX_ROTATED"}
    assert main(["inference", "-e", spec, "dataset.rotated_boxes=upright", "inference.restart=true"]) == 0
    assert all("BOX_ROTATED" in row["flags"] for row in labels_of(tmp_path).values())


def test_lvis_is_evaluated_by_its_own_metrics(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2, change=as_lvis)
    assert main(["evaluate", "-e", evaluate_spec(tmp_path, checkpoint, scenes)]) == 0
    results = json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())
    assert results["LVIS@score"]["APf"] is not None
    assert results["LVIS@score"]["APr"] is None


def test_inference_on_lvis_reports_its_own_metrics(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2, change=as_lvis)
    spec = load_spec(Path(inference_spec(tmp_path, checkpoint, scenes, load_mask=True)), [], "inference")
    report = inference(spec, Console.silent()).report
    assert report is not None
    assert report.lvis_at_score["APf"] is not None
    assert report.lvis_at_score["APr"] is None


@pytest.mark.parametrize("verb", ["evaluate", "inference"])
def test_names_that_led_to_files_of_another_spelling_are_reported(
    tmp_path: Path, checkpoint: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(content: dict[str, Any]) -> None:
        for row in content["images"]:
            row["file_name"] = f"old/{row['file_name']}"

    scenes = write_scenes(tmp_path / "scenes", images=2, change=rename)
    made = inference_spec if verb == "inference" else evaluate_spec
    assert main([verb, "-e", made(tmp_path, checkpoint, scenes)]) == 0
    assert "2 images of another spelling" in "".join(capsys.readouterr())


SERVICE = {
    "results_dir": "out",
    "gpu_ids": [0],
    "num_gpus": 1,
    "autolabel_type": "mal",
    "mal": {"checkpoint": "a.malckpt", "model": {"arch": "vit-mae-base/16"}, "inference": {"ann_path": "b.json"}},
}
OLDER = {
    "gpus": [0, 1],
    "strategy": "ddp_sharded",
    "checkpoint": "a.malckpt",
    "train": {"num_epochs": 10, "warmup_epochs": 0},
    "evaluate": {"batch_size": 4},
}


def read(folder: Path, content: dict[str, Any], verb: Any, *overrides: str) -> tuple[Any, list[str]]:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    notes: list[str] = []
    return load_spec(path, list(overrides), verb, notes.append), notes


def test_the_spec_of_the_label_service_is_read_with_a_line_for_each_field(tmp_path: Path) -> None:
    spec, notes = read(tmp_path, SERVICE, "inference")
    assert (spec.inference.checkpoint, spec.inference.ann_path) == ("a.malckpt", "b.json")
    assert (spec.model.arch, spec.inference.gpu_ids, spec.results_dir) == ("vit-mae-base/16", (0,), "out")
    assert [note.partition(":")[0] for note in notes] == ["mal", "num_gpus", "gpu_ids", "checkpoint"]


@pytest.mark.parametrize(
    ("verb", "place"),
    [
        ("train", "train.pretrained_model_path"),
        ("tune", "train.pretrained_model_path"),
        ("evaluate", "evaluate.checkpoint"),
        ("inference", "inference.checkpoint"),
        ("export", "evaluate.checkpoint"),
    ],
)
def test_top_level_fields_belong_to_the_command(tmp_path: Path, verb: str, place: str) -> None:
    spec, notes = read(tmp_path, OLDER, verb)
    section, field = place.split(".")
    assert getattr(getattr(spec, section), field) == "a.malckpt"
    assert (getattr(spec, section).num_gpus, getattr(spec, section).gpu_ids) == (2, (0, 1))
    assert spec.strategy == "auto"
    assert f"checkpoint: a.malckpt; read as {place}" in notes


def test_an_override_of_the_checkpoint_is_that_of_the_command(tmp_path: Path) -> None:
    content = {"inference": {"checkpoint": "a.malckpt"}, "train": {"pretrained_model_path": "a.pth"}}
    assert read(tmp_path, content, "inference", "checkpoint=b.malckpt")[0].inference.checkpoint == "b.malckpt"
    assert read(tmp_path, content, "train", "checkpoint=b.pth")[0].train.pretrained_model_path == "b.pth"


@pytest.mark.parametrize(
    ("content", "override", "field", "value"),
    [
        ({"num_gpus": 2}, "train.num_gpus=1", "num_gpus", 1),
        ({"gpus": 2}, "train.num_gpus=1", "num_gpus", 1),
        ({"train": {"num_gpus": 2}}, "num_gpus=1", "num_gpus", 1),
        ({"train": {"num_gpus": 2}}, "gpus=1", "num_gpus", 1),
        ({"checkpoint": "a"}, "train.pretrained_model_path=b", "pretrained_model_path", "b"),
        ({"gpus": [0, 1]}, "gpus=[3]", "gpu_ids", (3,)),
        ({"mal": {"train": {"num_gpus": 2}}}, "mal.train.num_gpus=1", "num_gpus", 1),
    ],
)
def test_an_override_wins_over_a_field_in_either_place(
    tmp_path: Path, content: dict[str, Any], override: str, field: str, value: object
) -> None:
    spec, _ = read(tmp_path, content, "train", override)
    assert getattr(spec.train, field) == value


def test_top_level_fields_without_a_value_say_nothing(tmp_path: Path) -> None:
    content = {"gpus": None, "gpu_ids": None, "checkpoint": "", "evaluate": {"checkpoint": "a", "num_gpus": 2}}
    spec, notes = read(tmp_path, content, "evaluate")
    assert (spec.evaluate.checkpoint, spec.evaluate.num_gpus, notes) == ("a", 2, [])


def test_the_notes_on_fields_hide_signatures(tmp_path: Path) -> None:
    url = "https://store.example/a.malckpt?X-Amz-Signature=topsecret"
    _, notes = read(tmp_path, {"checkpoint": url}, "inference")
    _, others = read(tmp_path, {}, "inference", f"checkpoint={url}")
    assert len(notes) == len(others) == 1
    assert "topsecret" not in notes[0] + others[0]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {"checkpoint": url, "inference": {"checkpoint": f"{url}2"}}, "inference")
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"autolabel_type": "grounding_dino"}, "autolabel_type"),
        ({"checkpoint": "a", "inference": {"checkpoint": "b"}}, "inference.checkpoint"),
        ({"mal": {"model": {"arch": "x"}}, "model": {"arch": "y"}}, "mal.model"),
        ({"mal": 5}, "mal"),
        ({"inference": 5, "checkpoint": "a"}, "inference"),
        ({"gpus": "all"}, "inference.num_gpus"),
        ({"gpus": [0, 1], "gpu_ids": [2, 3]}, "gpu_ids"),
        ({"strategy": "horovod"}, "strategy"),
    ],
)
def test_what_has_no_clear_meaning_is_refused_by_name(tmp_path: Path, content: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(tmp_path, content, "inference")


@pytest.mark.parametrize("name", ["mal", "gpus", "autolabel_type"])
def test_without_a_command_such_fields_are_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({name: SERVICE.get(name, OLDER.get(name))}))
    with pytest.raises(ConfigError, match=f"{name}: a "):
        load_spec(path, [])


SHARED_ROWS = {
    "backslash_paths.json": [],
    "boxes.json.gz": [],
    "corner_boxes.json": [],
    "cvat_rle_all_iscrowd.json": ["dataset.crowd_as_objects=true"],
    "cvat_rotated_box.json": ["dataset.rotated_boxes=upright"],
    "lvis_rows.json": [],
    "no_categories.json": [],
    "null_category.json": [],
    "zero_sizes.json": [],
}


@pytest.mark.parametrize("name", SHARED_ROWS)
def test_the_collected_files_are_labeled(tmp_path: Path, checkpoint: Path, name: str) -> None:
    files = shared("cases", "coco", name), shared("data", "coco_val_dev", "images")
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, files), *SHARED_ROWS[name]]) == 0
    labeled = labels_of(tmp_path)
    assert len(labeled) == 14
    assert all("counts" in row["segmentation"] for row in labeled.values())


@pytest.mark.parametrize(
    ("name", "verb", "field"),
    [
        ("auto_label.yaml", "inference", "inference.checkpoint"),
        ("root_checkpoint.yaml", "train", "train.pretrained_model_path"),
        ("root_checkpoint.yaml", "evaluate", "evaluate.checkpoint"),
        ("root_checkpoint.yaml", "inference", "inference.checkpoint"),
    ],
)
def test_the_collected_specs_are_read(name: str, verb: Any, field: str) -> None:
    spec = load_spec(shared("cases", "spec", name), [], verb)
    section, _, key = field.partition(".")
    assert getattr(getattr(spec, section), key) == "weights/mal.pth"
