"""The COCO file of what stands on the page: boxes as they were drawn, masks as the server encoded them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mal_client.dataset.provenance import provenance_of
from mal_client.playground.schema import BadRequest, Json, member, read_box
from mal_client.types import LabelOptions, ServerInfo
from mal_train.core.coco.annotations import JsonId, parse_coco
from mal_train.core.coco.output import error_fields, label_fields, labeled_file
from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import Rle, area

NO_CATEGORY = "object"


def coco_file(body: Any, info: ServerInfo, options: LabelOptions) -> bytes:
    """The file as `mal-client label` would write it, JSON text.

    `body`: `{"images": [{"file_name", "width", "height"}], "annotations": [{"image", "box", "category", "threshold",
    "answer"}]}`, where `image` is a place in `images` and `answer` a line that this server wrote for the box, or null.
    Boxes without a mask keep their row and say why. A box that was labeled with another threshold or by other weights
    than the file's provenance says carries its own `threshold` or `checkpoint_sha256`.

    Args:
        body: what the page sent.
        info: the labeling server's word on itself, for the provenance.
        options: the page's options, for the same.

    Raises:
        BadRequest: of another shape, or a mask that is no run-length code of its image.
    """
    images = [_image(row, at) for at, row in enumerate(member(body, "images", list), start=1)]
    asked = member(body, "annotations", list)
    categories = _categories(asked, info)
    rows: list[Json] = []
    answers: dict[JsonId, Json] = {}
    for annotation_id, annotation in enumerate(asked, start=1):
        place = member(annotation, "image", int)
        if not 0 <= place < len(images):
            raise BadRequest(f"annotation {annotation_id}: image {place}; there are {len(images)}")
        row = {
            "id": annotation_id,
            "image_id": images[place]["id"],
            "category_id": categories[_category(annotation)],
            "bbox": [_json_number(v) for v in read_box(member(annotation, "box", list))],
            "iscrowd": 0,
        }
        answer = annotation.get("answer")
        if isinstance(answer, dict):
            answers[annotation_id] = _answer(answer, images[place], f"annotation {annotation_id}")
            row |= _differences(annotation, answer, info)
        rows.append(row)
    raw = {
        "images": images,
        "annotations": rows,
        "categories": [{"id": key, "name": name} for name, key in categories.items()],
    }
    labeled = labeled_file(parse_coco(raw), answers, provenance_of(info, options))
    return json.dumps(labeled).encode() + b"\n"


def _image(row: Any, image_id: int) -> Json:
    width, height = (member(row, side, int) for side in ("width", "height"))
    return {"id": image_id, "file_name": member(row, "file_name", str), "width": width, "height": height}


def _category(annotation: Any) -> str:
    name: str = member(annotation, "category", str).strip()
    return name or NO_CATEGORY


def _categories(annotations: list[Any], info: ServerInfo) -> dict[str, int]:
    """Ids by name: the model's own classes keep theirs, in its order; the others follow as they come."""
    used = dict.fromkeys(_category(row) for row in annotations)
    known = {name: key for key, name in info.categories.items() if name in used}
    free = max(info.categories, default=0) + 1
    new = [name for name in used if name not in known]
    return known | {name: key for key, name in enumerate(new, start=max(free, 1))}


def _answer(answer: Mapping[str, Any], image: Json, name: str) -> dict[str, Any]:
    error = answer.get("error")
    if isinstance(error, dict):
        return error_fields(
            str(error.get("reason") or error.get("code") or "INTERNAL"),
            str(error.get("message") or "no label was made"),
        )
    try:
        rle = Rle.from_coco(answer.get("rle"), name)
    except BadDataset as fault:
        raise BadRequest(str(fault)) from None
    if (rle.height, rle.width) != (image["height"], image["width"]):
        raise BadRequest(f"{name}: a mask of {rle.width}x{rle.height} px on {image['width']}x{image['height']} px")
    agreement = answer.get("agreement")
    return label_fields(
        rle.to_coco(),
        area(rle),
        _share(answer, "score", name),
        [str(flag) for flag in member(answer, "flags", list)],
        None if agreement is None else _share(answer, "agreement", name),
    )


def _differences(annotation: Mapping[str, Any], answer: Mapping[str, Any], info: ServerInfo) -> Json:
    found: Json = {}
    threshold, model = annotation.get("threshold"), answer.get("model")
    if isinstance(threshold, int | float):
        found["threshold"] = float(threshold)
    if isinstance(model, dict) and model.get("checkpoint_sha256") != info.model.checkpoint_sha256:
        found["checkpoint_sha256"] = str(model.get("checkpoint_sha256"))
    return found


def _share(answer: Mapping[str, Any], field: str, name: str) -> float:
    value = answer.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise BadRequest(f"{name}: {field} is {value!r}; a number from 0 to 1 is needed")
    return float(value)


def _json_number(value: float) -> float | int | None:
    """Whole numbers as such, as they were drawn; null for none, which stays a fault of its row."""
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else value
