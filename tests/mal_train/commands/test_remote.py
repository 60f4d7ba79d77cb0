"""Training, evaluation and inference on files in a real S3 server and on images at their URLs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mal_train.cli import main
from tests.mal_train.core.storage.test_web import serving as serving_web
from tests.mal_train.test_cli import checkpoint, inference_spec, spec_file
from tests.mal_train.training.runs import assert_same, overrides_of, plain_mean_field, weights
from tests.object_store import S3, SECRET_KEY, private_temporary_files
from tests.scenes import write_scenes

__all__ = ["checkpoint"]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with private_temporary_files(tmp_path / "tmp", monkeypatch):
        yield


@pytest.fixture
def scenes(tmp_path: Path) -> tuple[Path, Path]:
    return write_scenes(tmp_path / "scenes", images=4)


def stored(scenes: tuple[Path, Path], s3: S3) -> tuple[str, str]:
    s3.put("in.json", scenes[0].read_bytes())
    return s3.address("in.json"), s3.put_folder(scenes[1], "images")


def inference(folder: Path, checkpoint: Path, places: tuple[str, str], **more: Any) -> str:
    folder.mkdir(exist_ok=True)
    return inference_spec(folder, checkpoint, (Path("x"), Path("x")), ann_path=places[0], img_dir=places[1], **more)


def output_of(folder: Path) -> bytes:
    return (folder / "results" / "inference" / "instances_val2017_mal.json").read_bytes()


def test_inference_by_address_gives_the_bytes_of_a_local_run(
    s3: S3, tmp_path: Path, scenes: tuple[Path, Path], checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = stored(scenes, s3)
    assert main(["inference", "-e", inference(tmp_path / "a", checkpoint, (str(scenes[0]), str(scenes[1])))]) == 0
    output = s3.address("out/masks.json")
    assert main(["inference", "-e", inference(tmp_path / "b", checkpoint, places, label_dump_path=output)]) == 0
    assert s3.get("out/masks.json") == output_of(tmp_path / "a")
    assert [path.name for path in (tmp_path / "b" / "results" / "inference").glob("masks.json*")] == []
    captured = capfd.readouterr()
    assert output in captured.out + captured.err
    assert SECRET_KEY not in captured.out + captured.err
    assert sorted(line for line in s3.requests if "images/" in line) == [f"GET images/{n}.png" for n in range(4)]


def test_inference_in_several_processes_reads_by_address(
    s3: S3, tmp_path: Path, scenes: tuple[Path, Path], checkpoint: Path
) -> None:
    assert main(["inference", "-e", inference(tmp_path / "a", checkpoint, (str(scenes[0]), str(scenes[1])))]) == 0
    spec = inference(tmp_path / "b", checkpoint, stored(scenes, s3), num_gpus=2, gpu_ids=[])
    assert main(["inference", "-e", spec]) == 0
    assert output_of(tmp_path / "b") == output_of(tmp_path / "a")


def test_missing_image_fails_its_boxes_alone(
    s3: S3, tmp_path: Path, scenes: tuple[Path, Path], checkpoint: Path
) -> None:
    places = stored(scenes, s3)
    s3.fail("images/1.png", status=404, code="NoSuchKey")
    assert main(["inference", "-e", inference(tmp_path / "a", checkpoint, places)]) == 3
    rows = json.loads(output_of(tmp_path / "a"))["annotations"]
    assert [row.get("error", {}).get("reason") for row in rows] == [None] * 2 + ["IMAGE_NOT_FOUND"] * 2 + [None] * 4


def test_upload_that_failed_is_repeated_from_the_journal(
    s3: S3, tmp_path: Path, scenes: tuple[Path, Path], checkpoint: Path
) -> None:
    spec = inference(tmp_path / "a", checkpoint, stored(scenes, s3), label_dump_path=s3.address("out.json"))
    s3.fail("out.json", status=403, code="AccessDenied", method="PUT", times=1)
    assert main(["inference", "-e", spec]) == 4
    assert (tmp_path / "a" / "results" / "inference" / "out.json.ledger").exists()
    s3.requests.clear()
    assert main(["inference", "-e", spec]) == 0
    assert "GET images/0.png" not in s3.requests
    assert len(json.loads(s3.get("out.json") or b"")["annotations"]) == 8


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"label_dump_path": "s3://no-such-bucket/out.json"}, 4),
        ({"label_dump_path": "https://example.org/out.json"}, 4),
        ({"label_dump_path": "s3://photos/in.json"}, 2),
        ({"ann_path": "s3://photos/nothing.json"}, 2),
        ({"ann_path": "ftp://photos/in.json"}, 2),
        ({"results_dir": "s3://photos/results"}, 2),
    ],
)
def test_unusable_address_is_one_error(
    s3: S3, tmp_path: Path, scenes: tuple[Path, Path], more: dict[str, str], code: int
) -> None:
    section = {"checkpoint": "builtin", "ann_path": "", "img_dir": "", "precision": "float32"}
    section["ann_path"], section["img_dir"] = stored(scenes, s3)
    assert main(["inference", "-e", spec_file(tmp_path, inference={**section, **more})]) == code
    assert "GET images/0.png" not in s3.requests


@pytest.mark.parametrize("field", ["ann_path", "box_inputs"])
def test_input_in_the_place_where_a_remote_output_is_prepared_is_kept(
    s3: S3, tmp_path: Path, scenes: tuple[Path, Path], checkpoint: Path, field: str
) -> None:
    coco = json.loads(scenes[0].read_text())
    boxes = [{name: row[name] for name in ("image_id", "category_id", "bbox")} for row in coco["annotations"]]
    content = json.dumps(coco if field == "ann_path" else [{**box, "score": 1.0} for box in boxes])
    path = tmp_path / "results" / "inference" / "boxes.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    places = {"ann_path": str(scenes[0]), "img_dir": str(scenes[1]), field: str(path)}
    output = s3.address("boxes.json")
    section = {"checkpoint": str(checkpoint), "precision": "float32", **places, "label_dump_path": output}
    assert main(["inference", "-e", spec_file(tmp_path, inference=section)]) == 2
    assert path.read_text() == content
    assert s3.names() == []


def test_evaluation_by_address_is_that_of_a_local_run(
    s3: S3, tmp_path: Path, scenes: tuple[Path, Path], checkpoint: Path
) -> None:
    results = []
    for name, places in (("a", (str(scenes[0]), str(scenes[1]))), ("b", stored(scenes, s3))):
        (tmp_path / name).mkdir()
        sections: dict[str, Any] = {
            "dataset": {"val_ann_path": places[0], "val_img_dir": places[1]},
            "evaluate": {"checkpoint": str(checkpoint), "precision": "float32"},
            "publish_to": "" if name == "a" else s3.address("runs/7"),
        }
        assert main(["evaluate", "-e", spec_file(tmp_path / name, **sections)]) == 0
        results.append(json.loads((tmp_path / name / "results" / "evaluate" / "results.json").read_text()))
    assert results[1].pop("annotations") == s3.address("in.json")
    results[0].pop("annotations")
    assert results[0] == results[1]
    assert json.loads(s3.get("runs/7/evaluate/results.json") or b"")["precision"] == "float32"
    puts = [line for line in s3.requests if line.startswith("PUT runs/7")]
    assert puts[-1] == "PUT runs/7/evaluate/status.json"
    assert b"SUCCESS" in (s3.get("runs/7/evaluate/status.json") or b"")


@pytest.mark.parametrize("name", ["results.json", "status.json"])
def test_publishing_that_failed_is_a_failure_in_the_status(
    s3: S3, tmp_path: Path, scenes: tuple[Path, Path], checkpoint: Path, name: str
) -> None:
    sections = {
        "dataset": {"val_ann_path": str(scenes[0]), "val_img_dir": str(scenes[1])},
        "evaluate": {"checkpoint": str(checkpoint), "precision": "float32"},
        "publish_to": s3.address("runs"),
    }
    s3.fail(f"runs/evaluate/{name}", status=403, code="AccessDenied", method="PUT")
    assert main(["evaluate", "-e", spec_file(tmp_path, **sections)]) == 4
    lines = (tmp_path / "results" / "evaluate" / "status.json").read_text().splitlines()
    assert json.loads(lines[-1])["status"] == "FAILURE"
    assert "runs/evaluate/status.json" not in s3.names()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_by_address_gives_the_weights_of_a_local_run(
    s3: S3, tmp_path: Path, scenes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    plain_mean_field(monkeypatch)
    annotations, images = stored(scenes, s3)
    finished = []
    for name, places in (("a", scenes), ("b", (annotations, images))):
        parts: dict[str, Any] = {"train": places, "val": places}
        more = ["train.num_epochs=1", "train.gpu_ids=[]", f"dataset.num_workers_per_gpu={workers}"]
        assert (
            main(["train", "-e", spec_file(tmp_path), *overrides_of(parts, tmp_path / name, *more, validate=True)]) == 0
        )
        (path,) = (tmp_path / name / "train").glob("model_epoch_*.malckpt")
        finished.append(weights(path))
    assert_same(*finished)


def test_images_at_their_urls_are_labeled_and_signatures_reach_no_file(
    tmp_path: Path, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving_web() as web:

        def with_urls(coco: dict[str, Any]) -> None:
            for row in coco["images"]:
                row["coco_url"] = web.url(f"/{row['file_name']}?sig=0f3c9a")

        annotations, images = write_scenes(tmp_path / "scenes", images=3, change=with_urls)
        for path in images.iterdir():
            web.files[f"/{path.name}"] = path.read_bytes()
        web.files["/in.json"] = annotations.read_bytes()
        section = {
            "checkpoint": str(checkpoint),
            "ann_path": web.url("/in.json?sig=0f3c9a"),
            "precision": "float32",
            "label_dump_path": str(tmp_path / "out.json"),
        }
        spec = spec_file(tmp_path, inference=section, dataset={"coco_url_hosts": ["127.0.0.1"]})
        assert main(["inference", "-e", spec]) == 0
        assert len(json.loads((tmp_path / "out.json").read_text())["annotations"]) == 6
        for hosts in (["images.example"], ["*"]):
            spec = spec_file(tmp_path, inference=section, dataset={"coco_url_hosts": hosts})
            assert main(["inference", "-e", spec]) == 3
        spec = spec_file(tmp_path, inference={**section, "img_dir": str(images)}, dataset={"coco_url_hosts": ["*"]})
        assert main(["inference", "-e", spec]) == 2
    captured = capfd.readouterr()
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    texts = [path.read_text(errors="replace") for path in files]
    assert any("in.json?[redacted]" in text for text in texts)
    assert [text for text in [*texts, captured.out, captured.err] if "0f3c9a" in text] == []


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("inference", "inference.checkpoint"),
        ("evaluate", "evaluate.checkpoint"),
        ("train", "train.pretrained_model_path"),
        ("train", "train.resume_training_checkpoint_path"),
        ("export", "evaluate.checkpoint"),
    ],
)
def test_address_in_the_place_of_a_local_file_shows_no_secret(
    tmp_path: Path, scenes: tuple[Path, Path], capfd: pytest.CaptureFixture[str], command: str, field: str
) -> None:
    section, name = field.split(".")
    annotations, images = map(str, scenes)
    sections: dict[str, dict[str, str]] = {
        "dataset": {"val_ann_path": annotations, "val_img_dir": images},
        "inference": {"ann_path": annotations, "img_dir": images},
    }
    sections.setdefault(section, {})[name] = "https://me:0f3c9a@host/x.malckpt?sig=0f3c9a"
    parts: dict[str, Any] = {"train": scenes, "val": scenes}
    more = overrides_of(parts, tmp_path / "results", "train.gpu_ids=[]") if command == "train" else []
    output = ["-o", str(tmp_path / "out.malckpt")] if command == "export" else []
    assert main([command, "-e", spec_file(tmp_path, **sections), *output, *more]) == 2
    assert_nowhere("0f3c9a", tmp_path / "results", capfd)


def test_address_of_a_checkpoint_to_average_shows_no_secret(
    tmp_path: Path, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = spec_file(tmp_path, evaluate={"checkpoint": str(checkpoint)})
    average = ["--average", "https://me:0f3c9a@host/x.malckpt"]
    assert main(["export", "-e", spec, "-o", str(tmp_path / "out.malckpt"), *average]) == 2
    assert_nowhere("0f3c9a", tmp_path / "results", capfd)


def assert_nowhere(secret: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    captured = capfd.readouterr()
    texts = [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]
    assert [text for text in [*texts, captured.out, captured.err] if secret in text] == []


def test_public_form_of_a_spec_has_no_signature(tmp_path: Path) -> None:
    from mal_train.config.spec import load_spec
    from mal_train.core.yaml_config import dump

    signed = "https://me:word@host/x?sig=0f3c9a"
    fields = ("dataset.train_ann_path", "dataset.val_img_dir", "inference.ann_path", "evaluate.box_inputs")
    path = tmp_path / "spec.yaml"
    sections: dict[str, dict[str, str]] = {}
    for field in fields:
        section, name = field.split(".")
        sections.setdefault(section, {})[name] = signed
    path.write_text(yaml.safe_dump({**sections, "publish_to": "s3://key:0f3c9a@bucket/x"}))
    text = dump(load_spec(path, []).without_secrets())
    assert "0f3c9a" not in text
    assert "word" not in text
    assert text.count("https://host/x?[redacted]") == len(fields)
