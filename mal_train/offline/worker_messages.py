"""Encodes the messages between `multi_device` and its worker processes as JSON.

A worker decodes untrusted images. Its messages are therefore data only: nothing that it sends is unpickled. Numbers
keep their exact value: JSON text holds the shortest form of a float that reads back equal.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from mal_train.core import errors
from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId, Reason
from mal_train.core.errors import MalError
from mal_train.core.images.files import ImageFindings, ImageFolder, Images, UrlImages
from mal_train.core.images.folder_names import RepeatedNames
from mal_train.core.images.header import ImageLimits
from mal_train.core.masks.flags import Flag
from mal_train.core.masks.points import Point
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Branch, LabelerConfig
from mal_train.core.storage.hosts import AllowedHosts
from mal_train.kernel.labeler.types import Label, PredictOptions
from mal_train.kernel.networks.network import ModelConfig
from mal_train.kernel.networks.quantization import Int8Calibration
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.offline.tta import TtaOptions

Result = tuple[JsonId | None, Label | LabelFailure]
"""An annotation's id and its label, or the reason why there is none."""

ROW_REQUEST = b'{"request": "rows"}'
"""Message of a worker that needs more rows; the answer is a message of `encode_rows`, without rows at the end."""


@dataclass(frozen=True)
class WorkerJob:
    """The settings of one process, except for the network's weights. It requests its rows one message at a time.

    Attributes:
        model: architecture of the network.
        labeler: settings of the labeler.
        device: torch device.
        precision: see `Labeler`.
        network_engine: what runs the network.
        int8: its calibration; for precision int8 alone.
        image_dir: images by the file names of the rows.
        tta: test-time augmentation and post-processing.
        batch_size: crops in a batch.
        threads: worker threads of `label_images`.
        torch_threads: threads of a torch operator.
    """

    model: ModelConfig
    labeler: LabelerConfig
    device: str
    precision: str
    network_engine: str
    int8: Int8Calibration | None
    image_dir: Images
    tta: TtaOptions
    batch_size: int
    threads: int
    torch_threads: int


def encode_job(job: WorkerJob) -> bytes:
    """Encodes a job."""
    message = {field.name: getattr(job, field.name) for field in fields(job)}
    message |= {
        "model": job.model.to_dict(),
        "labeler": job.labeler.to_dict(),
        "int8": None if job.int8 is None else job.int8.to_dict(),
        "image_dir": _images_to_json(job.image_dir),
        "tta": asdict(job.tta),
    }
    return json.dumps(message).encode()


def decode_job(data: bytes) -> WorkerJob:
    """Inverse of `encode_job`."""
    message = json.loads(data)
    tta = message["tta"]
    options = PredictOptions(**{**tta["options"], "branch": Branch(tta["options"]["branch"])})
    message |= {
        "model": ModelConfig.from_dict(message["model"]),
        "labeler": LabelerConfig.from_dict(message["labeler"]),
        "int8": None if message["int8"] is None else Int8Calibration.from_dict(message["int8"]),
        "image_dir": _images_from_json(message["image_dir"]),
        "tta": TtaOptions(**{**tta, "options": options, "margins": tuple(tta["margins"])}),
    }
    return WorkerJob(**message)


def encode_rows(rows: Iterable[Row]) -> bytes:
    """Encodes images with their annotations; crowds, judged categories, unknown fields and raw rows are not sent."""
    sent = [(_bare(image), [_to_json(one) for one in boxes if not one.iscrowd]) for image, boxes in rows]
    return json.dumps(sent).encode()


def _bare(image: ImageInfo) -> dict[str, Any]:
    return asdict(replace(image, negative_category_ids=None, not_exhaustive_category_ids=None))


def decode_rows(data: bytes) -> list[Row]:
    """Inverse of `encode_rows`."""
    return [(ImageInfo(**image), [_from_json(row) for row in rows]) for image, rows in json.loads(data)]


def encode_results(results: Sequence[Result], findings: ImageFindings) -> bytes:
    """Encodes results, whose order is kept, and what was found about images."""
    coded = [[name, _result_to_json(result)] for name, result in results]
    return json.dumps({"results": coded, "findings": findings}).encode()


def encode_error(error: MalError) -> bytes:
    """Encodes an error that ends a worker."""
    return json.dumps({"error": type(error).__name__, "message": str(error)}).encode()


def decode_results(data: bytes) -> tuple[list[Result], ImageFindings]:
    """Inverse of `encode_results`; raises the error of `encode_error`."""
    message = json.loads(data)
    if "error" in message:
        error = getattr(errors, message["error"], MalError)
        raise error(message["message"])
    return [(name, _result_from_json(result)) for name, result in message["results"]], message["findings"]


def _images_to_json(images: Images) -> dict[str, Any]:
    if isinstance(images, UrlImages):
        return {"urls": dict(images.urls), "hosts": images.hosts.listed(), "limits": asdict(images.limits)}
    base = {"base": str(images.base), "is_path": isinstance(images.base, Path)}
    return {**base, "repeated": images.repeated.listed, "limits": asdict(images.limits)}


def _images_from_json(message: dict[str, Any]) -> Images:
    limits = ImageLimits(**message["limits"])
    if "urls" in message:
        return UrlImages(message["urls"], AllowedHosts.parse(message["hosts"], "hosts"), limits)
    base = Path(message["base"]) if message["is_path"] else message["base"]
    return ImageFolder(base, RepeatedNames(partial(tuple, message["repeated"])), limits=limits)


def _to_json(annotation: Annotation) -> dict[str, Any]:
    names = ("id", "image_id", "category_id", "box_xywh", "iscrowd", "problem", "reason", "points")
    return {name: getattr(annotation, name) for name in names}


def _from_json(message: dict[str, Any]) -> Annotation:
    reason = None if message["reason"] is None else Reason(message["reason"])
    points = tuple(Point(*point) for point in message["points"])
    changed: dict[str, Any] = {"box_xywh": tuple(message["box_xywh"]), "reason": reason, "raw": {}, "points": points}
    return Annotation(**{**message, **changed})


def _result_to_json(result: Label | LabelFailure) -> dict[str, Any]:
    if isinstance(result, LabelFailure):
        return asdict(result)
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return {**values, "rle": result.rle.to_coco()}


def _result_from_json(message: dict[str, Any]) -> Label | LabelFailure:
    if "rle" not in message:
        return LabelFailure(**message)
    height, width = message["rle"]["size"]
    mask_box = None if message["mask_box"] is None else tuple(message["mask_box"])
    code = Rle(height, width, message["rle"]["counts"].encode("ascii"))
    return Label(**{**message, "rle": code, "mask_box": mask_box, "flags": tuple(map(Flag, message["flags"]))})
