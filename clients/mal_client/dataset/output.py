"""Writes the labeled COCO file: answers laid over the user's rows, masks in the wanted form, failures beside it.

Knows nothing of servers: a single run and a merge of shards write through here, and so write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mal_client.dataset.plan import DatasetPlan, RowAction
from mal_client.errors import ItemError
from mal_client.types import FAILED_LISTED, DatasetOptions, DatasetResult, FailedAnnotation
from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.annotations import Annotation, ImageInfo, Reason
from mal_train.core.coco.output import error_fields, labeled_row
from mal_train.core.coco.stream import write_transformed
from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.masks.encodings import encode_bitmap, to_polygons, to_runs
from mal_train.core.masks.polygons import merge_holes
from mal_train.core.masks.rle import Rle, decode_mask, to_box
from mal_train.core.settings import MaskFormat

if TYPE_CHECKING:
    from mal_client.dataset.journal import Answer

MASK_FILE = "mask_file"
"""Field of a row whose mask is also a PNG file: its path from the folder of the COCO file."""


def errors_path(output_json: Path) -> Path:
    """Where a job's failures are listed: `out.errors.jsonl` beside `out.json`."""
    return output_json.with_name(f"{output_json.stem}.errors.jsonl")


def refuse_same_file(coco_json: Path, output_json: Path) -> None:
    """The file that was handed in is never written to: masks and boxes in it would be gone.

    Raises:
        ConfigError: the output is that very file, by whatever path.
    """
    if output_json.exists() and coco_json.exists() and output_json.samefile(coco_json):
        raise ConfigError(f"output {output_json}: is the annotations' file itself, which stays as it is; name another")


def masks_dir(output_json: Path) -> Path:
    """Where a job's PNG masks go: the folder `out.masks` beside `out.json`."""
    return output_json.with_name(f"{output_json.stem}.masks")


def write_labeled(
    work: DatasetPlan,
    answer_at: Callable[[int], Answer],
    output_json: Path,
    provenance: Mapping[str, Any],
    how: DatasetOptions,
) -> DatasetResult:
    """Writes the labeled file and the list of failures.

    Args:
        work: the rows.
        answer_at: `{"label": fields}` or `{"failed": [code, reason, message]}` for the place of a row to label.
        output_json: the file.
        provenance: what made the masks.
        how: how they are written.

    Raises:
        OutputError: the disk; the old file is intact.
    """
    images, listed = work.head.images, errors_path(output_json)
    masks = _MaskWriter(output_json, how)
    labeled = 0
    with ExitStack() as finish:
        errors = _Errors(listed, finish)

        def change(at: int, row: Any, annotation: Annotation) -> Any:
            nonlocal labeled
            plan = work.plans[at]
            if plan == RowAction.FAULTY:
                fault = ItemError("INVALID_ARGUMENT", str(annotation.reason), annotation.problem or "")
            elif plan != RowAction.ASK:
                return labeled_row(row, annotation, images, None, keep_existing=plan == RowAction.KEEP)
            else:
                answer = answer_at(at)
                if "label" in answer:
                    labeled += 1
                    return masks.labeled(at, labeled_row(row, annotation, images, answer["label"]))
                fault = _about_row(ItemError(*answer["failed"]), annotation)
            errors.add(_failed(annotation, images, fault))
            # The words of a faulty row are found again by whoever reads it.
            fields = None if plan == RowAction.FAULTY else error_fields(fault.reason or fault.code, fault.message)
            return masks.failed(labeled_row(row, annotation, images, fields))

        write_transformed(work.head, output_json, change, {**provenance, **masks.provenance()})
    if not errors.count:
        listed.unlink(missing_ok=True)
    return DatasetResult(
        output=output_json,
        errors_file=listed if errors.count else None,
        labeled=labeled,
        copied=work.head.count - labeled - errors.count,
        failed=tuple(errors.first),
        failed_count=errors.count,
        masks_dir=masks_dir(output_json) if how.mask_format is MaskFormat.PNG else None,
    )


class _MaskWriter:
    """Puts the mask of a row into the form that was asked for."""

    def __init__(self, output_json: Path, how: DatasetOptions) -> None:
        self._how = how
        self._folder = masks_dir(output_json)

    def provenance(self) -> dict[str, Any]:
        """What a reader of the file must know of its masks."""
        if self._how.mask_format is not MaskFormat.POLYGONS:
            return {}
        return {"polygon_tolerance_px": self._how.polygon_tolerance_px, "polygon_holes": "bridged"}

    def labeled(self, at: int, row: Any) -> Any:
        """A row that was labeled, at its place in the file."""
        code = Rle.from_coco(row["segmentation"])
        changed = {**row, **self._forms(code)}
        if self._how.mask_format is MaskFormat.PNG:
            changed[MASK_FILE] = self._write_png(_file_name(at, row.get("id")), code)
        box = to_box(code) if self._how.update_bbox else None
        # An empty mask has no box; the user's is better than none.
        return changed if box is None else {**changed, "bbox": list(box)}

    def failed(self, row: Any) -> Any:
        """A row that failed; it may hold an empty mask."""
        if not isinstance(row, dict):
            return row
        # A picture that an earlier run wrote is not this run's answer.
        kept = {key: value for key, value in row.items() if key != MASK_FILE}
        code = kept.get("segmentation")
        return {**kept, **self._forms(Rle.from_coco(code))} if isinstance(code, dict) else kept

    def _forms(self, code: Rle) -> dict[str, Any]:
        if self._how.mask_format is MaskFormat.UNCOMPRESSED:
            runs = to_runs(code)
            return {"segmentation": {"size": [runs.height, runs.width], "counts": list(runs.counts)}}
        if self._how.mask_format is MaskFormat.POLYGONS:
            lines = merge_holes(to_polygons(code, self._how.polygon_tolerance_px).rings)
            # No list of polygons says "empty" to COCO's tools; an empty mask stays a run-length code.
            return {"segmentation": [line.ravel().tolist() for line in lines]} if lines else {}
        return {}

    def _write_png(self, name: str, code: Rle) -> str:
        try:
            self._folder.mkdir(exist_ok=True)
            (self._folder / name).write_bytes(encode_bitmap(decode_mask(code)))
        except OSError as error:
            raise OutputError(f"{self._folder / name}: not written ({error.strerror}); free some space") from error
        return f"{self._folder.name}/{name}"


def _file_name(at: int, annotation_id: object) -> str:
    """By the id where that is a number; other ids may not be file names, their rows go by their place."""
    is_number = isinstance(annotation_id, int) and not isinstance(annotation_id, bool)
    return f"{annotation_id}.png" if is_number else f"row_{at}.png"


class _Errors:
    """The list of failures: all into the errors file, which is made with the first one, the first ones in memory."""

    def __init__(self, path: Path, on_success: ExitStack) -> None:
        self.count = 0
        self.first: list[FailedAnnotation] = []
        self._path = path
        self._on_success = on_success
        self._file: BinaryIO | None = None

    def add(self, failed: FailedAnnotation) -> None:
        """Lists one more."""
        self.count += 1
        if len(self.first) < FAILED_LISTED:
            self.first.append(failed)
        if self._file is None:
            self._file = self._on_success.enter_context(atomic_write(self._path))
        self._file.write(json.dumps(failed.to_dict()).encode() + b"\n")


def _failed(annotation: Annotation, images: Mapping[Any, ImageInfo], error: ItemError) -> FailedAnnotation:
    image = None if annotation.image_id is None else images.get(annotation.image_id)
    shown_id = annotation.raw.get("id") if annotation.id is None else annotation.id
    return FailedAnnotation(shown_id, annotation.raw.get("image_id"), None if image is None else image.file_name, error)


def _about_row(error: ItemError, row: Annotation) -> ItemError:
    """Adds the annotation id to the error of a box; the server sends it without a name."""
    if error.reason != Reason.BAD_BOX:
        return error
    return replace(error, message=f"annotation {row.id!r}: {error.message}")
