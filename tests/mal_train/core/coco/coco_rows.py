"""Small COCO files for tests."""

from typing import Any

from mal_train.core.coco.annotations import Annotation, parse_coco


def row(annotation_id: Any = 1, **fields: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 20], **fields}


def dataset(*rows: Any, **fields: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "categories": [{"id": 3, "name": "cup"}],
        "annotations": list(rows),
        **fields,
    }


def only(raw: dict[str, Any]) -> Annotation:
    (annotation,) = parse_coco(raw).annotations
    return annotation
