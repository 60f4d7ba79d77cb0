"""Writes the labeled COCO file of a job with masks in the chosen format, and its failures to a file beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mal_client.errors import ItemError, strip_box_number
from mal_client.types import FAILED_LISTED, DatasetOptions, DatasetResult, FailedAnnotation
from mal_train.core.atomic_io import atomic_write, remedy_of
from mal_train.core.coco.annotations import Annotation, ImageInfo, Reason
from mal_train.core.coco.journal import RowFailure, journal_path
from mal_train.core.coco.json_file import errors_path, side_path
from mal_train.core.coco.labeled_output import RowOutcome, WrittenRows, write_labeled_file
from mal_train.core.coco.parquet_reader import read_note
from mal_train.core.coco.plan import RowAction
from mal_train.core.errors import OutputError
from mal_train.core.masks.encodings import encode_bitmap, to_polygons, to_runs
from mal_train.core.masks.polygons import merge_holes
from mal_train.core.masks.rle import Rle, decode_mask, to_box
from mal_train.core.settings import MaskFormat

if TYPE_CHECKING:
    from mal_train.core.coco.journal import RowResult
    from mal_train.core.coco.plan import DatasetPlan
    from mal_train.core.storage.addresses import Location

MASK_FILE = "mask_file"
"""Field of a row whose mask is also a PNG file: its path relative to the folder of the COCO file."""


def masks_dir(output_json: Path) -> Path:
    """Returns the folder of the PNG masks of a job: `out.masks` beside `out.json`."""
    return side_path(output_json, ".masks")


def write_labeled(
    plan: DatasetPlan,
    result_of: Callable[[int], RowResult],
    output_json: Path,
    provenance: Mapping[str, Any],
    options: DatasetOptions,
    *,
    job_sha256: str | None = None,
) -> DatasetResult:
    """Writes the labeled file and the list of failures.

    Args:
        plan: the rows.
        result_of: `{"label": fields}` or `{"failed": [code, reason, message]}` by the index of a row to label.
        output_json: the file.
        provenance: what made the masks.
        options: how masks and boxes are written.
        job_sha256: identifies the job of a share; noted in its part, for `finished_part`.

    Raises:
        OutputError: the disk is full, for example; the old file is intact.
    """
    failures = errors_path(output_json)
    masks = _MaskWriter(output_json, options)
    with ExitStack() as stack:
        errors = _ErrorsFile(failures, stack)

        def on_failure(annotation: Annotation, failure: RowFailure) -> RowFailure:
            named = _name_row(failure, annotation)
            errors.add(_failed(annotation, plan.head.images, ItemError(*named)))
            return named

        counts = WrittenRows()
        if plan.head.share is not None and job_sha256 is not None:
            plan.head.share.note = lambda: {
                "job_sha256": job_sha256,
                "failed": errors.count,
                "crowds": counts.crowds,
                "flags": dict(counts.flags.most_common()),
            }
        write_labeled_file(
            plan,
            result_of,
            output_json,
            {**provenance, **masks.provenance()},
            finish=masks.finish,
            on_failure=on_failure,
            counts=counts,
        )
    if not errors.count:
        failures.unlink(missing_ok=True)
    return DatasetResult(
        output=output_json,
        errors_file=failures if errors.count else None,
        labeled=counts.labeled,
        copied=plan.head.count - counts.labeled - errors.count,
        crowds=counts.crowds,
        flags=dict(counts.flags.most_common()),
        failed=tuple(errors.first),
        failed_count=errors.count,
        masks_dir=masks_dir(output_json) if options.mask_format is MaskFormat.PNG else None,
    )


def finished_part(
    plan: DatasetPlan, output: Path, published: Location, options: DatasetOptions, job_sha256: str
) -> DatasetResult | None:
    """Returns the result of a share whose part an earlier run of the same job has completed; None if there is none.

    A part with a journal is not complete, and none counts as complete with `options.restart`.

    Args:
        plan: the rows of the share.
        output: the part.
        published: address of the part; `output` if that is local.
        options: how masks and boxes are written.
        job_sha256: identifies the job.
    """
    if options.restart or journal_path(output).exists():
        return None
    match read_note(published):
        case {
            "job_sha256": str() as found,
            "failed": int() as failed,
            "crowds": int() as crowds,
            "flags": dict() as flags,
        } if found == job_sha256:
            selected = sum(action in (RowAction.LABEL, RowAction.REPORT) for action in plan.actions)
            return DatasetResult(
                output=output,
                errors_file=errors_path(output) if failed else None,
                labeled=selected - failed,
                copied=plan.head.count - selected,
                failed_count=failed,
                crowds=crowds,
                flags=flags,
                masks_dir=masks_dir(output) if options.mask_format is MaskFormat.PNG else None,
            )
    return None


class _MaskWriter:
    """Converts the masks of rows to the format of the options."""

    def __init__(self, output_json: Path, options: DatasetOptions) -> None:
        self._options = options
        self._folder = masks_dir(output_json)

    def provenance(self) -> dict[str, Any]:
        """Returns what a reader of the file must know of its masks."""
        if self._options.mask_format is not MaskFormat.POLYGONS:
            return {}
        return {"polygon_tolerance_px": self._options.polygon_tolerance_px, "polygon_holes": "bridged"}

    def finish(self, index: int, row: Any, _: Annotation, outcome: RowOutcome) -> Any:
        """Returns a row with its mask converted; a copied row unchanged."""
        if outcome is RowOutcome.LABELED:
            return self._labeled(index, row)
        return row if outcome is RowOutcome.COPIED else self._failed(row)

    def _labeled(self, index: int, row: Any) -> Any:
        if self._options.mask_format is MaskFormat.RLE and not self._options.update_bbox:
            match row:
                case {"segmentation": {"size": [int(), int()], "counts": str()}}:
                    return row  # its mask was checked when it arrived, and the journal has checksums
        rle = Rle.from_coco(row.get("segmentation"), f"journal: row {index}")
        changed = {**row, **self._converted(rle)}
        if self._options.mask_format is MaskFormat.PNG:
            changed[MASK_FILE] = self._write_png(_file_name(index, row.get("id")), rle)
        box = to_box(rle) if self._options.update_bbox else None
        # An empty mask has no box; the user's is better than none.
        return changed if box is None else {**changed, "bbox": list(box)}

    def _failed(self, row: Any) -> Any:
        """Returns a failed row, which may hold an empty mask, with that mask converted."""
        if not isinstance(row, dict):
            return row
        # The PNG mask of an earlier run is not a result of this one.
        kept = {key: value for key, value in row.items() if key != MASK_FILE}
        segmentation = kept.get("segmentation")
        if not isinstance(segmentation, dict):
            return kept
        return {**kept, **self._converted(Rle.from_coco(segmentation))}

    def _converted(self, rle: Rle) -> dict[str, Any]:
        if self._options.mask_format is MaskFormat.UNCOMPRESSED:
            runs = to_runs(rle)
            return {"segmentation": {"size": [runs.height, runs.width], "counts": list(runs.counts)}}
        if self._options.mask_format is MaskFormat.POLYGONS:
            lines = merge_holes(to_polygons(rle, self._options.polygon_tolerance_px).rings)
            # COCO's tools know no empty list of polygons; an empty mask stays run-length encoded.
            return {"segmentation": [line.ravel().tolist() for line in lines]} if lines else {}
        return {}

    def _write_png(self, name: str, rle: Rle) -> str:
        self._make_folder()
        with atomic_write(self._folder / name) as file:
            file.write(encode_bitmap(decode_mask(rle)))
        return f"{self._folder.name}/{name}"

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self._folder}: not created ({error.strerror}); {remedy_of(error)}") from error
        if self._folder.is_symlink():
            raise OutputError(f"{self._folder}: is a symbolic link, which is not followed; remove it")


def _file_name(index: int, annotation_id: object) -> str:
    """Returns a file name from a numeric id; other ids may not be file names, so their rows go by their index."""
    is_number = isinstance(annotation_id, int) and not isinstance(annotation_id, bool)
    return f"{annotation_id}.png" if is_number else f"row_{index}.png"


class _ErrorsFile:
    """The failures of a job: all of them in a file, and the first `FAILED_LISTED` in memory.

    Args:
        path: the file; created at the first failure.
        stack: closes the file. An exception in its block discards the file, and the previous one stays.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.count = 0
        self.first: list[FailedAnnotation] = []
        self._path = path
        self._stack = stack
        self._file: BinaryIO | None = None

    def add(self, failed: FailedAnnotation) -> None:
        """Writes one failure as a line of JSON."""
        self.count += 1
        if len(self.first) < FAILED_LISTED:
            self.first.append(failed)
        if self._file is None:
            self._file = self._stack.enter_context(atomic_write(self._path))
        self._file.write(json.dumps(failed.to_dict()).encode() + b"\n")


def _failed(annotation: Annotation, images: Mapping[Any, ImageInfo], error: ItemError) -> FailedAnnotation:
    image = None if annotation.image_id is None else images.get(annotation.image_id)
    shown_id = annotation.raw.get("id") if annotation.id is None else annotation.id
    return FailedAnnotation(shown_id, annotation.raw.get("image_id"), None if image is None else image.file_name, error)


def _name_row(failure: RowFailure, row: Annotation) -> RowFailure:
    """Adds the annotation id to the failure of a box; the server sends no name, or the number of the box."""
    message = strip_box_number(failure.message)
    names_no_row = failure.reason in (Reason.BAD_BOX, Reason.BAD_POINT)
    if row.problem is not None or (not names_no_row and message == failure.message):
        return failure
    return failure._replace(message=f"annotation {row.id!r}: {message}")
