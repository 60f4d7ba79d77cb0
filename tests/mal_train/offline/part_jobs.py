"""A small job on the parts of a dataset with rows of every kind, for the tests of the engine on Ray."""

import json
from pathlib import Path
from typing import Any

from mal_train.commands.inference import inference
from mal_train.config.spec import Spec, load_spec
from mal_train.core.coco.stream import copy_coco
from mal_train.core.console import Console
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import EncryptionKey
from tests.networks import spread_network
from tests.scenes import write_scenes

FAILED = {"BAD_BOX": 2, "IMAGE_NOT_FOUND": 1, "IMAGE_UNKNOWN": 1}
"""Boxes without a mask that `add_faults` makes."""


def add_faults(coco: dict[str, Any]) -> None:
    """Adds a crowd, boxes without a mask, a file that is missing, and rows whose images are apart or unknown."""
    rows = coco["annotations"]
    rows[1]["iscrowd"] = 1
    rows[3]["bbox"] = [1000, 1000, 5, 5]
    rows[5]["bbox"] = "none"
    coco["images"].append({"id": 5000, "file_name": "gone.png", "width": 10, "height": 10})
    coco["images"].append({"id": 5001, "file_name": "0.png", "width": 96, "height": 80})
    rows.append({**rows[0], "id": 70_000, "image_id": 5000})
    rows.append({**rows[0], "id": "unknown", "image_id": 9999})
    rows.insert(0, {**rows[8], "id": "apart", "note": {"of": "the user"}})


def write_job(folder: Path, images: int, key: EncryptionKey | None = None) -> None:
    """Writes `boxes.json`, `boxes.parquet` in row groups of 20 boxes, their images, and `model.malckpt`."""
    annotations, _ = write_scenes(folder, images=images, masks=False, change=add_faults)
    annotations.rename(folder / "boxes.json")
    copy_coco(folder / "boxes.json", folder / "boxes.parquet", row_group_boxes=20)
    network = spread_network()
    config = LabelerConfig(crop_size=32, mask_thres=(0.5, 0.5, 0.5))
    content = Checkpoint(network.config, config, dict(network.state_dict()), [{"id": 1, "name": "ellipse"}])
    save_checkpoint(folder / "model.malckpt", content, key)


def overrides(folder: Path, results: Path, form: str, **section: Any) -> list[str]:
    """Returns the arguments of `mal-train inference` for the files of `write_job`, in the form json or parquet."""
    fields = {
        "ann_path": str(folder / f"boxes.{form}"),
        "img_dir": str(folder / "images"),
        "checkpoint": str(folder / "model.malckpt"),
        "label_dump_path": f"labels.{form}",
        "gpu_ids": [],
        "precision": "float32",
        **section,
    }
    return [f"results_dir={results}", *(f"inference.{name}={json.dumps(value)}" for name, value in fields.items())]


def spec_of(folder: Path, results: Path, form: str, **section: Any) -> Spec:
    """Returns the spec of `overrides`."""
    return load_spec(None, overrides(folder, results, form, **section))


def local_labels(folder: Path, results: Path, **section: Any) -> bytes:
    """Returns the output of the local engine, in JSON."""
    return inference(spec_of(folder, results, "json", **section), Console.silent()).path.read_bytes()


def as_json(parts: Path) -> bytes:
    """Returns a folder of parts, converted to JSON."""
    path = parts.with_suffix(".back.json")
    copy_coco(parts, path)
    return path.read_bytes()
