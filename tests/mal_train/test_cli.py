"""The commands of `mal-train`, run through `main`."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pycocotools import mask as coco_mask

from mal_train.cli import main
from mal_train.config.spec import Spec, load_spec
from mal_train.core.coco.annotations import read_coco
from mal_train.core.images.container import Container
from mal_train.core.images.decoder import decode_container
from mal_train.core.images.files import read_image
from mal_train.core.settings import Branch, Compat, LabelerConfig
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.convert.tao_import import from_tao
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Label, PredictOptions
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.offline.dataset_labeler import label_boxes
from tests.mal_train.kernel.published import NVLABS, TAO, TAO6_FAN_HYBRID, state_dict
from tests.networks import spread_network
from tests.paths import ROOT
from tests.reference import fixture
from tests.scenes import Change, write_scenes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random network, whose masks are neither empty nor full."""
    network = spread_network()
    network.reset_teacher()
    path = tmp_path_factory.mktemp("model") / "micro.malckpt"
    config = LabelerConfig(crop_size=32, mask_thres=(0.5, 0.5, 0.5))
    save_checkpoint(
        path, Checkpoint(network.config, config, network.state_dict(), [{"id": 1, "name": "ellipse"}]), None
    )
    return path


def spec_file(folder: Path, **sections: Any) -> str:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({"results_dir": str(folder / "results"), **sections}))
    return str(path)


def inference_spec(folder: Path, checkpoint: Path, scenes: tuple[Path, Path], **more: Any) -> str:
    section = {
        "checkpoint": str(checkpoint),
        "ann_path": str(scenes[0]),
        "img_dir": str(scenes[1]),
        "precision": "float32",
        **more,
    }
    return spec_file(folder, inference=section)


def labels_of(folder: Path) -> dict[Any, dict[str, Any]]:
    written = json.loads((folder / "results" / "inference" / "instances_val2017_mal.json").read_text())
    return {row["id"]: row for row in written["annotations"]}


def test_inference_gives_every_box_the_mask_of_the_labeler(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=3, masks=False)
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, scenes, batch_size=4)]) == 0
    labels = labels_of(tmp_path)
    coco = read_coco(scenes[0])
    assert list(labels) == [annotation.id for annotation in coco.annotations]
    labeler, _ = load_labeler(checkpoint, precision="float32")
    for annotation in coco.annotations:
        image = read_image(scenes[1] / f"{annotation.image_id}.png")
        (expected,) = labeler.label(image, [annotation.box_xywh])
        assert isinstance(expected, Label)
        assert labels[annotation.id]["segmentation"] == expected.rle.to_coco()
        assert labels[annotation.id]["score"] == expected.score
        assert labels[annotation.id]["bbox"] == list(annotation.box_xywh)


def test_failed_boxes_are_reported_by_reason_and_the_others_are_labeled(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_rows(coco: dict[str, Any]) -> None:
        rows = coco["annotations"]
        rows[0]["bbox"] = [500, 500, 10, 10]
        rows[1]["bbox"] = [1, 2, "x", 4]
        rows[2]["iscrowd"] = 1
        rows[3]["attributes"] = {"rotation": 30}
        coco["images"][2]["file_name"] = "gone.png"

    scenes = write_scenes(tmp_path / "scenes", images=5, masks=False, change=break_rows)
    (scenes[1] / "3.png").write_bytes((scenes[1] / "3.png").read_bytes()[:100])
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, scenes)]) == 3
    rows = labels_of(tmp_path)
    reasons = {key: row["error"]["reason"] for key, row in rows.items() if "error" in row}
    assert reasons == {
        0: "BAD_BOX",
        1: "BAD_BOX",
        11: "BOX_ROTATED",
        20: "IMAGE_NOT_FOUND",
        21: "IMAGE_NOT_FOUND",
        30: "IMAGE_DECODE_FAILED",
        31: "IMAGE_DECODE_FAILED",
    }
    assert rows[10]["flags"] == ["CROWD"]
    assert all("counts" in rows[key]["segmentation"] for key in (40, 41))
    printed = capsys.readouterr()
    # One line per unreadable image, however many boxes it has.
    assert [printed.err.count(name) for name in ("gone.png", "3.png")] == [1, 1]
    for reason, count in Counter(reasons.values()).items():
        assert re.search(rf"^{count} .*{reason}$", printed.out, re.MULTILINE)
    status = [json.loads(line) for line in (tmp_path / "results/inference/status.json").read_text().splitlines()]
    assert [line["status"] for line in status] == ["STARTED", "RUNNING", "SUCCESS"]


def test_each_image_is_decoded_once(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counted(container: Container, **options: Any) -> Any:
        decoded.append(options["name"])
        return decode_container(container, **options)

    monkeypatch.setattr("mal_train.offline.dataset_labeler.decode_container", counted)
    scenes = write_scenes(tmp_path / "scenes", images=4, masks=False)
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, scenes)]) == 0
    assert len(decoded) == 4


def test_inference_with_load_mask_reports_the_iou_of_each_label(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=2)
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, scenes, load_mask=True)]) == 0
    assert "4 masks compared" in capsys.readouterr().out
    truth = {row["id"]: row["segmentation"] for row in json.loads(scenes[0].read_text())["annotations"]}
    for key, row in labels_of(tmp_path).items():
        iou = coco_mask.iou([truth[key]], [row["segmentation"]], [0])[0, 0]
        assert row["iou"] == pytest.approx(iou)


def test_evaluate_prints_a_table_and_writes_its_metrics(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, images = write_scenes(tmp_path / "scenes", images=3)
    spec = spec_file(
        tmp_path,
        dataset={"val_ann_path": str(annotations), "val_img_dir": str(images)},
        evaluate={"checkpoint": str(checkpoint), "precision": "float32"},
    )
    results = {}
    for name, overrides in (
        ("student", []),
        ("mixed", ["evaluate.use_mixed_model_test=true", "evaluate.use_teacher_test=true"]),
        ("flip", ["evaluate.use_flip_test=true"]),
    ):
        assert main(["evaluate", "-e", spec, *overrides]) == 0
        results[name] = json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())
    assert "6 masks compared" in capsys.readouterr().out
    assert results["student"]["branch"] == "student"
    assert results["mixed"]["branch"] == "mixed"
    assert results["mixed"]["mIoU"] == pytest.approx(results["student"]["mIoU"], abs=1e-3)
    assert results["flip"]["mIoU"] != results["student"]["mIoU"]
    assert results["student"]["count"] == 6


def drop_masks(coco: dict[str, Any]) -> None:
    for row in coco["annotations"]:
        row["segmentation"] = []


def empty_masks(coco: dict[str, Any]) -> None:
    for row in coco["annotations"]:
        row["segmentation"] = {"size": [80, 96], "counts": [80 * 96]}


def only_crowds(coco: dict[str, Any]) -> None:
    for row in coco["annotations"]:
        row["iscrowd"] = 1


def only_a_number(coco: dict[str, Any]) -> None:
    coco["annotations"] = [5]


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (drop_masks, {"NO_GROUND_TRUTH": 2}),
        (empty_masks, {"EMPTY_GROUND_TRUTH": 2}),
        (only_crowds, {"CROWD": 2}),
        (only_a_number, {"NOT_AN_OBJECT": 1}),
    ],
)
def test_an_evaluation_that_compares_nothing_exits_with_3_whatever_the_reason(
    change: Change, reasons: dict[str, int], tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, images = write_scenes(tmp_path / "scenes", images=1, change=change)
    spec = spec_file(
        tmp_path,
        dataset={"val_ann_path": str(annotations), "val_img_dir": str(images)},
        evaluate={"checkpoint": str(checkpoint), "precision": "float32"},
    )
    detections = tmp_path / "detections.json"
    detections.write_text(json.dumps([{"image_id": 0, "category_id": 1, "bbox": [5, 5, 40, 40], "score": 0.5}]))
    for overrides in ([], [f"evaluate.box_inputs={detections}"]):
        assert main(["evaluate", "-e", spec, *overrides]) == 3
        results = json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())
        is_crowd_of_detections = bool(overrides) and "CROWD" in reasons
        assert results["skipped_by_reason"] == ({} if is_crowd_of_detections else reasons)
        printed = capsys.readouterr()
        assert printed.out.startswith("nothing was measured")
        has_remedy = is_crowd_of_detections or "NO_GROUND_TRUTH" in reasons
        assert ("a file with true masks" in printed.out) == has_remedy
        for reason in reasons.keys() - {"CROWD"}:
            assert f"{reason}: annotation" in printed.err


def test_evaluate_names_the_rows_that_it_leaves_out(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(coco: dict[str, Any]) -> None:
        rows = coco["annotations"]
        rows[0]["image_id"] = 99
        rows[1]["bbox"] = [0, 0, 0, 3]
        rows[2]["segmentation"] = [[1, 2]]
        coco["images"][2]["file_name"] = "gone.png"
        rows.append(5)

    annotations, images = write_scenes(tmp_path / "scenes", images=3, change=damage)
    paths = [f"dataset.val_ann_path={annotations}", f"dataset.val_img_dir={images}"]
    assert main(["evaluate", *paths, f"evaluate.checkpoint={checkpoint}", f"results_dir={tmp_path}"]) == 3
    printed = capsys.readouterr().err
    for reason, name in {
        "IMAGE_UNKNOWN": "annotation 0",
        "BAD_BOX": "annotation 1",
        "BAD_GROUND_TRUTH": "annotation 10",
        "IMAGE_NOT_FOUND": f"annotation 20: {images / 'gone.png'}",
        "NOT_AN_OBJECT": "annotations[6]",
    }.items():
        assert f"{reason}: {name}: " in printed
    assert f"{annotations}: not measured" in printed


def test_the_builtin_model_labels_and_evaluates_without_a_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    annotations, images = write_scenes(tmp_path / "scenes", images=2)
    paths = [f"inference.ann_path={annotations}", f"inference.img_dir={images}"]
    assert main(["inference", "checkpoint=builtin", *paths]) == 0
    assert [row["segmentation"].keys() for row in labels_of(tmp_path).values()] == [{"size", "counts"}] * 4
    paths = [f"dataset.val_ann_path={annotations}", f"dataset.val_img_dir={images}"]
    assert main(["evaluate", *paths, "evaluate.checkpoint=builtin"]) == 0
    results = json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())
    assert results["checkpoint"] == builtin.resolve("builtin").name
    assert results["count"] == 4
    capsys.readouterr()
    assert main(["inference", *paths]) == 2
    assert main(["evaluate", *paths]) == 2
    assert "evaluate.checkpoint" in capsys.readouterr().err


def test_an_imported_checkpoint_labels_as_the_published_code(tmp_path: Path) -> None:
    torch.save({"state_dict": state_dict(TAO), "tao_model": "mal"}, tmp_path / "published.pth")
    ours = tmp_path / "ours.malckpt"
    overrides = ["dataset.crop_size=224", "compat=tao", "train.mask_thres=[0.1]", "train.test_margin_rate=[0.6,0.6]"]
    assert main(["import", str(tmp_path / "published.pth"), "-o", str(ours), *overrides]) == 0
    scenes = (fixture("k_e2e_boxes.json"), fixture("k_e2e_images"))
    assert main(["inference", "-e", inference_spec(tmp_path, ours, scenes)]) == 0
    labels = labels_of(tmp_path)
    published = json.loads(fixture("k_e2e_labels.json").read_text())
    rows = published["annotations"] if isinstance(published, dict) else published
    assert len(rows) == 20
    for row in rows:
        a, b = (
            coco_mask.decode(code).astype(bool) for code in (row["segmentation"], labels[row["id"]]["segmentation"])
        )
        assert np.count_nonzero(a != b) <= 4


@pytest.mark.parametrize(
    ("layout", "arch"), [(NVLABS, "vit-deit-tiny/16-convstem"), (TAO6_FAN_HYBRID, "fan_tiny_8_p4_hybrid")]
)
def test_import_reads_older_layouts_and_detects_their_backbone(tmp_path: Path, layout: str, arch: str) -> None:
    torch.save({"state_dict": state_dict(layout)}, tmp_path / "published.pth")
    assert main(["import", str(tmp_path / "published.pth"), "-o", str(tmp_path / "ours.malckpt")]) == 0
    assert load_checkpoint(tmp_path / "ours.malckpt", None).model == ModelConfig(arch)


def test_import_refuses_overrides_without_effect_or_with_wrong_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": state_dict(TAO)}, tmp_path / "published.pth")
    for override, named in (
        ("train.lr=1", "train.lr"),
        ("model.arch=vit-deit-base/16", "does not match"),
        ("dataset.crop_size=100", "crop_size: 100"),
    ):
        target = tmp_path / "out.malckpt"
        assert main(["import", str(tmp_path / "published.pth"), override, "-o", str(target)]) == 2
        assert named in capsys.readouterr().err
        assert not target.exists()


def test_no_command_replaces_the_file_that_it_reads(tmp_path: Path, checkpoint: Path) -> None:
    published, (annotations, images) = tmp_path / "published.pth", write_scenes(tmp_path / "scenes", images=1)
    torch.save({"state_dict": state_dict(TAO)}, published)
    before = [path.read_bytes() for path in (published, checkpoint, annotations)]
    spec = inference_spec(tmp_path, checkpoint, (annotations, images))
    assert main(["import", str(published), "-o", str(published)]) == 2
    assert main(["export", "-o", str(checkpoint), f"evaluate.checkpoint={checkpoint}"]) == 2
    assert main(["inference", "-e", spec, f"inference.label_dump_path={annotations}"]) == 2
    assert [path.read_bytes() for path in (published, checkpoint, annotations)] == before


def test_import_encrypts_to_a_recipient_and_inspect_needs_the_identity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": state_dict(TAO)}, tmp_path / "published.pth")
    identity, target = tmp_path / "key.txt", tmp_path / "out.malckpt"
    assert main(["keygen", "-o", str(identity)]) == 0
    recipient = capsys.readouterr().out.splitlines()[-1]
    assert main(["import", str(tmp_path / "published.pth"), "-o", str(target), f"encryption_key={recipient}"]) == 0
    assert main(["inspect", str(target)]) == 0
    assert "vit-deit-tiny/16" not in capsys.readouterr().out
    assert main(["inspect", str(target), "--key", f"file:{identity}"]) == 0
    assert "vit-deit-tiny/16" in capsys.readouterr().out
    assert main(["inspect", str(target), "--key", identity.read_text().splitlines()[-1]]) == 2
    assert main(["keygen", "-o", str(identity)]) == 4


def test_inspect_names_its_option_for_the_key_of_a_spec(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "mine.malckpt", "decryption_key=file:identity.txt"])
    assert "--key file:PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "-e", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "-e", "SPEC", "train.batchsize=2"], "train.batch_size"),
        (["train", "-e", "SPEC"], "dataset.train_ann_path: not given"),
        (["train", "-e", "SPEC", "train.num_nodes=2"], "train.num_nodes: 2"),
        (["evaluate", "-e", "SPEC"], "dataset.val_ann_path: not given"),
        (["evaluate"], "dataset.val_ann_path: not given"),
        (["inference", "-e", "SPEC", "inference.ann_path=gone.json"], "gone.json"),
        (["inspect", "gone.malckpt"], "gone.malckpt"),
    ],
)
def test_an_invalid_setting_gives_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = spec_file(tmp_path)
    assert main([spec if argument == "SPEC" else argument for argument in arguments]) == 2
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1]
    assert line.startswith("mal-train: ")
    assert named in line
    assert "Traceback" not in printed.err


def test_a_malformed_rank_does_not_hide_an_error_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "first")
    assert main(["train", "-e", spec_file(tmp_path)]) == 2
    assert "dataset.train_ann_path: not given" in capsys.readouterr().err


def test_a_failed_command_records_the_error_in_its_status(tmp_path: Path) -> None:
    assert main(["evaluate", "-e", spec_file(tmp_path)]) == 2
    status = (tmp_path / "results" / "evaluate" / "status.json").read_text().splitlines()
    assert json.loads(status[-1])["status"] == "FAILURE"
    assert "dataset.val_ann_path" in json.loads(status[-1])["message"]


def test_an_output_folder_that_cannot_be_created_gives_exit_code_4(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    assert main(["inference", "-e", spec_file(tmp_path)]) == 4


def test_usage_errors_give_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train"], ["traain"], ["default-spec", "--turbo"], ["train", "-e", "a.yaml", "--turbo"], []):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "--turbo" in capsys.readouterr().err


def test_the_default_spec_has_every_field_and_starts_from_free_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["default-spec"]) == 0
    text = capsys.readouterr().out
    written = yaml.safe_load(text)
    changed = ["model.arch=vit-deit-small/16", "train.pretrained_model_path=deit_small_patch16_224.fb_in1k"]
    assert written == yaml.safe_load(yaml.safe_dump(load_spec(None, changed).model_dump(mode="json")))
    for name, field in Spec.model_fields.items():
        assert name in written
        assert field.description is None or f"# {field.description.splitlines()[0]}" in text


@pytest.mark.parametrize("name", [[], ["tao"]])
def test_a_changed_spec_has_every_field_and_lists_the_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: list[str]
) -> None:
    changes = ["train.lr=3e-5", "dataset.crop_size=224", "train.margin_rate=[0,1]", "encryption_key=env:MAL_KEY"]
    assert main(["default-spec", *name, *changes]) == 0
    text = capsys.readouterr().out
    plain = tmp_path / "plain.yaml"
    assert main(["default-spec", *name, "-o", str(plain)]) == 0
    path = tmp_path / "changed.yaml"
    path.write_text(text)
    assert load_spec(path, []) == load_spec(plain, changes)
    assert yaml.safe_load(text).keys() == yaml.safe_load(plain.read_text()).keys()
    assert text.startswith(f"# mal-train default-spec {(name or ['default'])[0]} train.lr=3e-5 ")
    assert text.count("# ") > 70


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train.lr=fast"], "train.lr"),
        (["train.batchsize=2"], "train.batch_size"),
        (["train.num_epochs=1", "train.validation_interval=2"], "validation_interval 2"),
        (["encryption_key=hunter2"], "encryption_key"),
        (["tao", "demo2"], "tao demo2"),
    ],
)
def test_invalid_changes_print_no_spec(capsys: pytest.CaptureFixture[str], words: list[str], named: str) -> None:
    assert main(["default-spec", *words]) == 2
    printed = capsys.readouterr()
    assert named in printed.err
    assert printed.out == ""


def test_the_json_schema_of_the_spec_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["default-spec", "--json-schema"]) == 0
    text = capsys.readouterr().out
    schema = json.loads(text)
    assert schema == Spec.model_json_schema()
    train = schema["$defs"]["TrainConfig"]
    assert train["additionalProperties"] is False
    assert train["properties"]["num_epochs"].items() >= {"type": "integer", "minimum": 1, "default": 10}.items()
    path = tmp_path / "schema.json"
    assert main(["default-spec", "--json-schema", "-o", str(path)]) == 0
    assert path.read_text() == text
    assert main(["default-spec", "--json-schema", "train.lr=1"]) == 2
    assert "train.lr=1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["default-spec", "--help"])
    assert "# yaml-language-server: $schema=FILE" in " ".join(capsys.readouterr().out.split())


def test_the_tao_spec_has_the_documented_defaults_and_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    assert main(["default-spec", "tao", "-o", str(path)]) == 0
    spec = load_spec(path, [])
    assert (spec.compat, spec.model.arch, spec.train.lr) == ("tao", "vit-mae-base/16", 1.5e-6)
    assert main(["default-spec", "-o", str(path)]) == 4


def test_without_torch_one_line_names_the_package_to_install(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    paths = f"{tmp_path}{os.pathsep}{ROOT}"
    result = subprocess.run(
        [sys.executable, "-m", "mal_train.cli", "inference", "-e", spec_file(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "pip install 'mask-auto-labeler[train]'" in line


def test_inference_accepts_a_resume_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    stored = load_checkpoint(checkpoint, None)
    resume = tmp_path / "resume.malckpt"
    save_checkpoint(
        resume, Checkpoint(stored.model, stored.labeler, stored.weights, kind="resume", training={"epoch": 1}), None
    )
    scenes = write_scenes(tmp_path / "scenes", images=1, masks=False)
    assert main(["inference", "-e", inference_spec(tmp_path, resume, scenes)]) == 0
    assert len(labels_of(tmp_path)) == 2


def test_teacher_mixed_and_flip_label_as_the_published_code(tmp_path: Path) -> None:
    foreign = from_tao(state_dict(TAO), "published")
    network = MalNetwork(foreign.model)
    network.load_state_dict(foreign.weights)
    config = LabelerConfig(crop_size=224, margin_rate=0.6, compat=Compat.TAO)
    labeler = Labeler(network, config, precision="float32")
    coco = read_coco(fixture("k_e2e_boxes.json"))
    first = coco.annotations[:4]
    image_dir = fixture("k_e2e_images")
    published = json.loads(fixture("k_e2e_variants.json").read_text())
    for name, options in (
        ("teacher", PredictOptions(branch=Branch.TEACHER)),
        ("mixed", PredictOptions(branch=Branch.MIXED)),
        ("flip", PredictOptions(flip=True)),
        ("flip_mixed", PredictOptions(branch=Branch.MIXED, flip=True)),
    ):
        labels = label_boxes(
            labeler,
            [(coco.images[100], first)],
            image_dir,
            lambda _annotation, crop, probability: labeler.finish(crop, probability),
            options=options,
        )
        for (_, label), row in zip(labels, published[name], strict=True):
            assert isinstance(label, Label)
            a, b = (coco_mask.decode(code).astype(bool) for code in (label.rle.to_coco(), row))
            assert np.count_nonzero(a != b) <= 4
