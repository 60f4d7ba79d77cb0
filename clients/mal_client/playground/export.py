"""Builds the COCO file of the page: boxes as the user drew them, masks as the server encoded them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mal_client.dataset.provenance import provenance_of
from mal_client.playground.schema import BadRequest, Json, member, read_box, read_points
from mal_client.types import LabelOptions, ServerInfo
from mal_train.core.coco.annotations import JsonId, parse_coco
from mal_train.core.coco.output import error_fields, label_fields, labeled_file
from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import Rle, area, to_box
from mal_train.core.numbers import finite_number

NO_CATEGORY = "object"


def coco_file(body: Any, info: ServerInfo, options: LabelOptions) -> bytes:
    """Returns the file that `mal-client label` would write, as JSON text.

    `body` is `{"images": [{"file_name", "width", "height"}], "annotations": [{"image", "box", "category", "threshold",
    "points"?, "result"}], "tight_boxes"}`, where `image` is an index in `images` and `result` a line that this server
    wrote for the box, or null. A row with a mask and a point in its box is marked as corrected. With `tight_boxes`, the
    box of a row is the tight box of its mask, if that has pixels. Boxes without a mask keep their row, with an error. A
    box that was labeled with another threshold or other weights than the provenance of the file states has its own
    `threshold` or `checkpoint_sha256`.

    Args:
        body: the request of the page.
        info: information about the labeling server, for the provenance.
        options: options of the page, for the provenance.

    Raises:
        BadRequest: the body has another shape, or a mask is not a valid run-length code of its image.
    """
    images = [_image(row, image_id) for image_id, row in enumerate(member(body, "images", list), start=1)]
    annotations = member(body, "annotations", list)
    categories = _categories(annotations, info)
    tight_boxes = body.get("tight_boxes") is True
    rows: list[Json] = []
    results: dict[JsonId, Json] = {}
    for annotation_id, annotation in enumerate(annotations, start=1):
        index = member(annotation, "image", int)
        if not 0 <= index < len(images):
            raise BadRequest(f"annotation {annotation_id}: image {index}; expected an index below {len(images)}")
        row = {
            "id": annotation_id,
            "image_id": images[index]["id"],
            "category_id": categories[_category(annotation)],
            "bbox": [_json_number(v) for v in read_box(member(annotation, "box", list))],
            "iscrowd": 0,
            **_points(annotation),
        }
        result = annotation.get("result")
        if isinstance(result, dict):
            results[annotation_id] = _result_fields(result, images[index], f"annotation {annotation_id}")
            row |= _differences(annotation, result, info)
        rows.append(row)
    raw = {
        "images": images,
        "annotations": rows,
        "categories": [{"id": category_id, "name": name} for name, category_id in categories.items()],
    }
    labeled = labeled_file(parse_coco(raw), results, provenance_of(info, options))
    if tight_boxes:
        # Afterwards: points lie in the drawn boxes.
        labeled["annotations"] = [{**row, **_tight_box(row)} for row in labeled["annotations"]]
    return json.dumps(labeled).encode() + b"\n"


def _image(row: Any, image_id: int) -> Json:
    width, height = (member(row, side, int) for side in ("width", "height"))
    return {"id": image_id, "file_name": member(row, "file_name", str), "width": width, "height": height}


def _category(annotation: Any) -> str:
    name: str = member(annotation, "category", str).strip()
    return name or NO_CATEGORY


def _categories(annotations: list[Any], info: ServerInfo) -> dict[str, int]:
    """Returns category IDs by name: classes of the model keep their IDs; others follow in order of occurrence."""
    used = dict.fromkeys(_category(row) for row in annotations)
    known = {name: category_id for category_id, name in info.categories.items() if name in used}
    first_free = max(1, max(info.categories, default=0) + 1)
    new = [name for name in used if name not in known]
    return known | {name: category_id for category_id, name in enumerate(new, start=first_free)}


def _result_fields(result: Mapping[str, Any], image: Json, name: str) -> dict[str, Any]:
    error = result.get("error")
    if isinstance(error, dict):
        return error_fields(
            str(error.get("reason") or error.get("code") or "INTERNAL"),
            str(error.get("message") or "no label was made"),
        )
    try:
        rle = Rle.from_coco(result.get("rle"), name)
    except BadDataset as bad_rle:
        raise BadRequest(str(bad_rle)) from None
    if (rle.height, rle.width) != (image["height"], image["width"]):
        raise BadRequest(f"{name}: mask has {rle.width}x{rle.height} px, image {image['width']}x{image['height']} px")
    agreement = result.get("agreement")
    return label_fields(
        rle.to_coco(),
        area(rle),
        _fraction(result, "score", name),
        [str(flag) for flag in member(result, "flags", list)],
        None if agreement is None else _fraction(result, "agreement", name),
    )


def _points(annotation: Mapping[str, Any]) -> Json:
    """Returns the points of a row, if it has any."""
    points = [[_json_number(p.x), _json_number(p.y), int(p.is_positive)] for p in read_points(annotation)]
    return {"points": points} if points else {}


def _tight_box(fields: Mapping[str, Any]) -> Json:
    """Returns the box of a row whose mask has pixels."""
    box = to_box(Rle.from_coco(fields["segmentation"])) if fields.get("segmentation") else None
    return {} if box is None else {"bbox": [_json_number(value) for value in box]}


def _differences(annotation: Mapping[str, Any], result: Mapping[str, Any], info: ServerInfo) -> Json:
    """Returns the fields of a row that differ from the provenance of the file."""
    fields: Json = {}
    threshold, model = finite_number(annotation.get("threshold")), result.get("model")
    if threshold is not None:
        fields["threshold"] = threshold
    if isinstance(model, dict) and model.get("checkpoint_sha256") != info.model.checkpoint_sha256:
        fields["checkpoint_sha256"] = str(model.get("checkpoint_sha256"))
    return fields


def _fraction(result: Mapping[str, Any], field: str, name: str) -> float:
    value = result.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise BadRequest(f"{name}: {field} is {value!r}; expected a number from 0 to 1")
    return float(value)


def _json_number(value: float) -> float | int | None:
    """Returns integers as int, and None for NaN, which remains an error of its row."""
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else value
