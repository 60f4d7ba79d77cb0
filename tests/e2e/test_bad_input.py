"""Invalid input to the commands: one line names each invalid item, and the others are processed."""

import errno
import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mal_client.cli import main as client_cli
from mal_client.images.image_files import ImageFiles
from PIL import Image
from pycocotools.coco import COCO

from mal_train import cli as train_cli
from mal_train.core import atomic_io
from mal_train.core.addresses import check_address
from mal_train.core.errors import BadDataset, ConfigError, OutputError
from mal_train.core.settings import Compat, LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key
from mal_train.kernel.networks.network import MalNetwork, ModelConfig

WIDTH, HEIGHT = 160, 120
SECRET = "correct-horse-battery"

VALID = {"good.jpg", "cmyk.jpg", "gray16.png", "alpha.png", "animated.webp", "exif_as_stored.jpg"}
REFUSED = {
    "truncated.jpg": "IMAGE_DECODE_FAILED",
    "zero.jpg": "IMAGE_DECODE_FAILED",
    "text.jpg": "IMAGE_FORMAT",
    "animated.gif": "IMAGE_FORMAT",
    "bomb.png": "IMAGE_TOO_LARGE",
    "exif_turned.jpg": "IMAGE_SIZE_MISMATCH",
    "missing.jpg": "IMAGE_NOT_FOUND",
    "folder.jpg": "IMAGE_NOT_FOUND",
}
BOXES: dict[str, tuple[Any, bool]] = {
    "nan": ([math.nan, 1, 5, 5], False),
    "infinite": ([1, 1, math.inf, 5], False),
    "zero": ([5, 5, 0, 10], False),
    "negative": ([5, 5, -3, 10], False),
    "far away": ([1e9, 1e9, 10, 10], False),
    "speck": ([10, 10, 0.5, 0.5], False),
    "words": (["a", "b", "c", "d"], False),
    "three": ([1, 2, 3], False),
    "none": (None, False),
    "huge": ([0, 0, 1e9, 1e9], True),
    "left": ([0, 30, 40, 40], True),
    "top": ([30, 0, 40, 40], True),
    "right": ([120, 30, 40, 40], True),
    "bottom": ([30, 80, 40, 40], True),
    "over the corner": ([-5, -5, 30, 30], True),
    "32²": ([10, 10, 32, 32], True),
    "96²": ([10, 10, 96, 96], True),
}


def draw(folder: Path) -> None:
    """Writes one valid or invalid image of each type."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    image.save(folder / "good.jpg")
    data = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is not an image\n" * 20)
    (folder / "folder.jpg").mkdir()
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(folder / "gray16.png")
    image.convert("RGBA").save(folder / "alpha.png")
    for name in ("animated.gif", "animated.webp"):
        image.save(folder / name, save_all=True, append_images=[other])
    turned = Image.Exif()
    turned[0x112] = 6
    for name in ("exif_as_stored.jpg", "exif_turned.jpg"):
        image.save(folder / name, exif=turned)
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 999)), (b"IEND", b""))
    )
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def dataset() -> dict[str, Any]:
    """Returns a COCO file with every error that concerns one row, and an unknown field at every level."""
    images: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for index, name in enumerate([*sorted(VALID), *REFUSED]):
        size = (HEIGHT, WIDTH) if name == "exif_turned.jpg" else (WIDTH, HEIGHT)
        images.append({"id": index, "file_name": name, "width": size[0], "height": size[1], "weather": "fog"})
        rows.append({"id": index, "image_id": index, "category_id": 1, "bbox": [10, 10, 60, 50], "note": name})
    images.append({"id": "boxes", "file_name": "good.jpg", "width": WIDTH, "height": HEIGHT})
    images.append({"id": "no boxes", "file_name": "good.jpg", "width": WIDTH, "height": HEIGHT})
    rows += [
        {"id": name, "image_id": "boxes", "category_id": 1, "bbox": box, "note": name}
        for name, (box, _) in BOXES.items()
    ]
    good = {"image_id": "boxes", "category_id": 1, "bbox": [10, 10, 40, 40]}
    crowd = {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 10, HEIGHT * WIDTH - 10]}}
    rows += [
        {**good, "id": 2.5},
        {**good, "id": 10**30},
        {**good, "id": "category", "category_id": 77},
        {**good, "id": "image", "image_id": 999},
        {**good, "id": "crowd", **crowd},
    ]
    categories = [{"id": 1, "name": "thing", "color": "red"}]
    return {"images": images, "annotations": rows, "categories": categories, "project": {"owner": "us"}}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    draw(folder / "images")
    (folder / "bad.json").write_text(json.dumps(dataset()))
    torch.manual_seed(1)
    network = MalNetwork(
        ModelConfig("vit-micro/16", mask_head_num_convs=1, mask_head_hidden_channel=8, mask_head_out_channel=8)
    )
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    for compat in Compat:
        content = Checkpoint(network.config, LabelerConfig(crop_size=32, compat=compat), weights, [])
        save_checkpoint(folder / f"{compat}.malckpt", content, None)
    spec = {
        "results_dir": str(folder / "results"),
        "inference": {
            "checkpoint": str(folder / "none.malckpt"),
            "ann_path": str(folder / "bad.json"),
            "img_dir": str(folder / "images"),
            "label_dump_path": str(folder / "out.json"),
            "precision": "float32",
        },
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder


def infer(workspace: Path, *overrides: str) -> int:
    return train_cli.main(["inference", "-e", str(workspace / "spec.yaml"), *overrides])


@pytest.mark.parametrize("compat", list(Compat))
def test_every_row_has_a_mask_or_an_error(workspace: Path, compat: Compat, capsys: pytest.CaptureFixture[str]) -> None:
    output = workspace / f"{compat}.json"
    code = infer(
        workspace, f"inference.checkpoint={workspace / f'{compat}.malckpt'}", f"inference.label_dump_path={output}"
    )
    assert code == train_cli.SOME_FAILED
    printed = capsys.readouterr().err
    given, labeled = dataset(), json.loads(output.read_text())
    assert {key: labeled[key] for key in given if key != "annotations"} == {
        key: given[key] for key in given if key != "annotations"
    }
    assert [row["id"] for row in labeled["annotations"]] == [row["id"] for row in given["annotations"]]
    rows = {row["id"]: row for row in labeled["annotations"]}
    for before in given["annotations"]:
        after = rows[before["id"]]
        assert (after.get("note"), repr(after["bbox"])) == (before.get("note"), repr(before["bbox"]))
    files = {image["id"]: image["file_name"] for image in given["images"]}
    for row in rows.values():
        name = files.get(row["image_id"])
        if name in REFUSED:
            assert row["error"]["reason"] == REFUSED[name]
            assert name in row["error"]["message"]
            assert row["error"]["message"] in printed
        elif row["id"] in BOXES:
            assert ("error" in row) is not BOXES[row["id"]][1], row
        elif row["id"] == "image":
            assert row["error"]["reason"].endswith("_UNKNOWN")
        else:
            assert "error" not in row
    assert rows["huge"]["area"] <= WIDTH * HEIGHT
    assert rows["huge"]["flags"][0] == "BOX_CLIPPED"
    assert rows["crowd"]["flags"] == ["CROWD"]
    loaded = COCO(str(output))
    assert loaded.annToMask(rows["left"]).shape == (HEIGHT, WIDTH)
    assert "Traceback" not in printed


def test_a_missing_image_is_reported_once_for_all_its_boxes(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = dataset()
    content["images"] = [{"id": 1, "file_name": "nowhere.jpg"}]
    content["annotations"] = [{"id": i, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in range(5)]
    (workspace / "missing.json").write_text(json.dumps(content))
    assert infer(workspace, f"inference.ann_path={workspace / 'missing.json'}") == train_cli.SOME_FAILED
    lines = [line for line in capsys.readouterr().err.splitlines() if "nowhere.jpg" in line]
    assert len(lines) == 1
    assert "5 boxes" in lines[0]


@pytest.mark.parametrize("name", ["there/is/no/folder.json", "images"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    workspace: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("the work was started")

    monkeypatch.setattr("mal_train.commands.inference.open_labeling_job", start)
    assert infer(workspace, f"inference.label_dump_path={workspace / name}") == OutputError.exit_code
    assert str(workspace / name) in capsys.readouterr().err


def test_a_folder_without_permission_is_refused_before_the_work(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match=r"out\.json"):
        atomic_io.check_writable(workspace / "out.json")


@pytest.mark.parametrize("key", ["annotations", "images"])
def test_a_file_with_a_repeated_id_is_refused_before_the_work(
    workspace: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = dataset()
    content[key].append(content[key][0])
    (workspace / "repeated.json").write_text(json.dumps(content))
    out = workspace / "untouched.json"
    overrides = [f"inference.ann_path={workspace / 'repeated.json'}", f"inference.label_dump_path={out}"]
    assert infer(workspace, *overrides) == BadDataset.exit_code
    assert "repeated.json" in capsys.readouterr().err
    assert not out.exists()


def test_a_file_without_annotations_is_written_without_annotations(workspace: Path) -> None:
    content = {**dataset(), "annotations": []}
    (workspace / "empty.json").write_text(json.dumps(content))
    out = workspace / "empty_out.json"
    assert infer(workspace, f"inference.ann_path={workspace / 'empty.json'}", f"inference.label_dump_path={out}") == 3
    found = json.loads(out.read_text())
    assert (found["annotations"], found["images"]) == ([], content["images"])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("inference.batch_size=many", "inference.batch_size"),
        ("inference.batch_size=0", "inference.batch_size"),
        ("inference.bach_size=4", "inference.batch_size"),
        ("compat=taoo", "compat"),
        ("train.lr=.inf", "train.lr"),
        ("encryption_key=" + SECRET, "encryption_key"),
    ],
)
def test_the_error_of_an_invalid_setting_names_the_field(
    workspace: Path, override: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(workspace, override) == ConfigError.exit_code
    printed = capsys.readouterr().err
    assert named in printed
    assert SECRET not in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "random", "pickle", "altered", "no key", "wrong key"])
def test_an_unusable_checkpoint_is_one_line_that_names_it(
    workspace: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace / "broken.malckpt"
    plain = (workspace / "none.malckpt").read_bytes()
    overrides = [f"inference.checkpoint={path}"]
    if damage in ("altered", "no key", "wrong key"):
        encrypted = _encrypted(workspace, monkeypatch)
        path.write_bytes(
            encrypted if damage != "altered" else encrypted[:-500] + bytes([encrypted[-500] ^ 1]) + encrypted[-499:]
        )
        if damage != "no key":
            overrides.append("decryption_key=env:MAL_TEST_KEY")
        if damage == "wrong key":
            monkeypatch.setenv("MAL_TEST_KEY", "another " + SECRET)
    else:
        noise = np.random.default_rng(0).bytes(1000)
        path.write_bytes(
            {"empty": b"", "cut": plain[: len(plain) // 2], "random": noise, "pickle": b"\x80\x04N."}[damage]
        )
    assert infer(workspace, *overrides) == 2
    printed = capsys.readouterr().err
    assert str(path) in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert SECRET not in printed
    records = "".join(file.read_text() for file in (workspace / "results" / "inference").iterdir())
    assert SECRET not in records


def _encrypted(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Returns the bytes of a checkpoint that is encrypted with SECRET; it is written once."""
    monkeypatch.setenv("MAL_TEST_KEY", SECRET)
    path = workspace / "encrypted.malckpt"
    if not path.exists():
        config = ModelConfig("vit-micro/16", mask_head_num_convs=1, mask_head_hidden_channel=8, mask_head_out_channel=8)
        weights = {name: tensor.detach() for name, tensor in MalNetwork(config).state_dict().items()}
        key = parse_key("env:MAL_TEST_KEY", purpose="encryption", source="yaml")
        assert SECRET not in repr(key)
        save_checkpoint(path, Checkpoint(config, LabelerConfig(crop_size=32), weights, []), key)
    return path.read_bytes()


def test_exit_codes_of_a_full_disk_and_a_closed_pipe_at_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with (tmp_path / "stdout").open("w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        for number, code in ((errno.ENOSPC, OutputError.exit_code), (errno.EPIPE, atomic_io.PIPE_CLOSED)):

            def fail(_: Any, number: int = number) -> int:
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(train_cli, "_default_spec", fail)
            assert train_cli.main(["default-spec"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_command_works_without_standard_output(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    monkeypatch.setattr("sys.stdout", None)
    assert infer(workspace) == train_cli.SOME_FAILED


@pytest.mark.parametrize("address", ["127.0.0.1:99999999", "127.0.0.1:0", "http://127.0.0.1:50051", "nowhere", ""])
def test_an_invalid_server_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="server address"):
        check_address(address, "server address")


def test_a_missing_image_folder_is_one_error(workspace: Path) -> None:
    with pytest.raises(BadDataset, match="nowhere"):
        ImageFiles(workspace / "nowhere")


@pytest.mark.parametrize(
    "arguments", [["--worst", "-3"], ["--timeout", "soon"], ["--report", "no/such/folder/page.html"]]
)
def test_evaluate_refuses_before_it_calls_the_server(
    workspace: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--annotations", str(workspace / "bad.json"), "--images", str(workspace / "images")]
    try:
        code = client_cli.main(["evaluate", "--server", "127.0.0.1:1", *data, *arguments])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    assert code in (2, 4)
    assert arguments[1] in capsys.readouterr().err
