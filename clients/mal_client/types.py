"""What the client takes and gives: plain frozen values. Knows nothing of gRPC; a mask stays encoded until asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mal_client.errors import ItemError, RequestRefused
from mal_train.errors import ConfigError
from mal_train.labeling.settings import Branch, Manner, MaskFormat, score_meaning
from mal_train.report.evaluation import Measured

if TYPE_CHECKING:
    from PIL import Image

    from mal_train.labeling.coco import JsonId
    from mal_train.labeling.encodings import PngCrop
    from mal_train.labeling.evaluation_report import CategoryRow
    from mal_train.labeling.polygons import Ring
    from mal_train.labeling.rle import Rle
    from mal_train.labeling.score_quality import ScoreQuality

    ImageInput = NDArray[np.uint8] | Image.Image | Path | str | bytes

BoxXywh = tuple[float, float, float, float]
"""x, y, width, height in px of the stored image."""


@dataclass(frozen=True)
class LabelOptions:
    """How boxes become masks; the defaults are the server's and the checkpoint's own settings.

    Attributes:
        branch: which network answers; None = the server's branch.
        threshold: probability in (0, 1) above which a pixel is mask, for boxes of every size; None = the checkpoint's
            three thresholds by size.
        agreement: also measure the IoU of the two networks' masks. Doubles the work on the device.
        flip: average each map with that of the mirrored crop. Doubles the work on the device.
        min_component_area_px: connected parts of fewer pixels are taken out of each mask, the largest excepted, before
            score, area, box, flags and agreement are made; 0 = none.
        model: name of the model that answers; None = the server's default.
        resolve_overlaps: give each pixel that several boxes of an image claim to one, the smaller and surer one.
            Done among the boxes of one request: give all boxes of an image together.
    """

    branch: Branch | None = None
    threshold: float | None = None
    agreement: bool = False
    flip: bool = False
    min_component_area_px: int = 0
    model: str | None = None
    resolve_overlaps: bool = False

    def __post_init__(self) -> None:
        if self.min_component_area_px < 0:
            raise ConfigError(
                f"min_component_area_px: {self.min_component_area_px}; it must be 0 (none) or more pixels"
            )
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ConfigError(f"threshold: {self.threshold}; a probability between 0 and 1 is needed, both excluded")


FAILED_LISTED = 1000
"""Failed annotations that a result holds; a million of them would fill the memory."""

AS_SERVED = LabelOptions()
"""Everything as the server and its checkpoint set it."""


class Only(StrEnum):
    """Which annotations of a file are labelled; the others are copied as they are."""

    ALL = "all"
    """Every one; masks that the input holds stay in the input alone."""
    MISSING = "missing"
    """Those without a mask, and those that failed before."""
    FLAGGED = "flagged"
    """Those that an earlier run flagged, and those that failed before."""
    IDS = "ids"
    """Those of `DatasetOptions.ids`."""


@dataclass(frozen=True)
class DatasetOptions:
    """What of a COCO file is labelled and how it is written.

    Attributes:
        only: which annotations.
        ids: their ids, for `Only.IDS`.
        update_bbox: also set the box of each labelled annotation to the tight box of its mask.
        restart: throw away the answers of an unfinished run instead of going on from them.
        mask_format: how masks are written; masks that are kept stay as they are. POLYGONS: a hole is joined to its
            outline by a bridge of no width, and an empty mask stays a run-length code, since COCO's polygons have
            neither holes nor emptiness. PNG: 1-bit files of the image's size in a folder beside the output, named by
            `mask_file`; `segmentation` stays a run-length code, so that the file stays a COCO file.
        polygon_tolerance_px: how far polygons may run beside the mask's edge, to have fewer points; 0 = exact.
    """

    only: Only = Only.ALL
    ids: frozenset[JsonId] = frozenset()
    update_bbox: bool = False
    restart: bool = False
    mask_format: MaskFormat = MaskFormat.RLE
    polygon_tolerance_px: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.polygon_tolerance_px < math.inf:
            raise ConfigError(f"polygon_tolerance_px: {self.polygon_tolerance_px}; it must be 0 px or more")
        if self.polygon_tolerance_px and self.mask_format is not MaskFormat.POLYGONS:
            raise ConfigError(f"polygon_tolerance_px: has no meaning for masks as {self.mask_format}; choose polygons")
        if (self.only is Only.IDS) != bool(self.ids):
            raise ConfigError(f"ids: {len(self.ids)} given with only={self.only}; the two belong together")


@dataclass(frozen=True)
class ModelRef:
    """Which weights answered; `checkpoint_sha256` is that of the server's checkpoint file."""

    name: str
    checkpoint_sha256: str
    branch: Branch


@dataclass(frozen=True)
class Timing:
    """Where the server spent the time of one message, in seconds; `batch_size` in crops, other callers' included."""

    queue_s: float
    decode_s: float
    infer_s: float
    finish_s: float
    batch_size: int


@dataclass(frozen=True)
class BoxLabel:
    """The answer for one box.

    Attributes:
        index: place of the box in the call, from 0.
        box: the box as it was sent.
        rle: the mask, run-length encoded at image size; None where `error` says why there is none.
        score: how sure the model is of the mask, in [0, 1]: its stability or, calibrated, the expected IoU; 0 for an
            empty mask.
        agreement: IoU in [0, 1] of the two networks' masks; None unless it was asked for.
        area: mask pixels.
        mask_box: tight box of the mask; None for an empty one.
        flags: what to look at, for example BOX_CLIPPED, EMPTY_MASK, FULL_BOX, MULTI_PART.
        error: why this box has no mask; None when it has one.
        model: which weights answered; None where the box never reached them.
        timing: of the message that brought this answer.
    """

    index: int
    box: BoxXywh
    rle: Rle | None = None
    score: float = 0.0
    agreement: float | None = None
    area: int = 0
    mask_box: BoxXywh | None = None
    flags: tuple[str, ...] = ()
    error: ItemError | None = None
    model: ModelRef | None = None
    timing: Timing | None = None

    @property
    def ok(self) -> bool:
        """Whether there is a mask (it may be empty; see `flags`)."""
        return self.error is None

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The mask (H, W) bool, decoded anew at each access.

        Raises:
            ValueError: the box has none; look at `error` first. So do the other forms below.
        """
        # Here and below: imported late, for it brings OpenCV and pycocotools, which a caller who only wants codes need
        # not wait for.
        from mal_train.labeling.rle import decode_mask  # noqa: PLC0415

        return decode_mask(self._code())

    @property
    def polygons(self) -> tuple[Ring, ...]:
        """Closed lines along the edges of the mask's pixels; `points` (N, 2) x, y in px, `is_hole`. () when empty.

        A hole stands behind the ring that it lies in. Exactly the mask: see `to_polygons` for fewer points.
        """
        return self.to_polygons(0.0)

    def to_polygons(self, tolerance_px: float) -> tuple[Ring, ...]:
        """As `polygons`, with lines that may run up to tolerance_px beside the mask's edge, to have fewer points."""
        from mal_train.labeling.encodings import to_polygons  # noqa: PLC0415

        return to_polygons(self._code(), tolerance_px).rings

    @property
    def png(self) -> bytes:
        """A 1-bit PNG file of the image's size, white is mask."""
        from mal_train.labeling.encodings import encode_bitmap  # noqa: PLC0415

        return encode_bitmap(self.mask)

    @property
    def png_crop(self) -> PngCrop:
        """A 1-bit PNG of the mask's tight box, and where that lies."""
        from mal_train.labeling.encodings import to_png  # noqa: PLC0415

        return to_png(self._code())

    def _code(self) -> Rle:
        if self.rle is None:
            raise ValueError(f"box {self.index} has no mask: {self.error}; check .ok or .error first")
        return self.rle


@dataclass(frozen=True)
class ServerLimits:
    """What requests must keep to: bytes, boxes an image, pixels, and unanswered items of one stream."""

    max_request_bytes: int
    max_response_bytes: int
    max_boxes: int
    max_pixels: int
    max_side: int
    max_image_bytes: int
    max_items_in_flight: int
    image_cache_bytes: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """One model of a server; `categories` maps its class ids to names."""

    model: ModelRef
    arch: str
    crop_size: int
    margin_rate: float
    mask_thresholds: tuple[float, float, float]
    categories: dict[int, str]
    devices: tuple[str, ...]
    precision: str
    score_calibrated: bool
    score_calibrated_with_flip: bool = False


@dataclass(frozen=True)
class ModelStatus:
    """A model in a server's memory.

    Attributes:
        info: what it is.
        calls: how many use it right now.
        is_retiring: it was replaced or unloaded and finishes the calls that it has.
        is_default: it answers requests that name no model.
    """

    info: ModelInfo
    calls: int
    is_retiring: bool
    is_default: bool


@dataclass(frozen=True)
class ServerInfo:
    """What a server serves and accepts. The fields about a model are those of the default one.

    `categories` maps the model's class ids to names. `score_calibrated`: scores are expected IoUs, by a map fitted to
    one pass of the student or, with `score_calibrated_with_flip`, to its mean with a mirrored pass.
    """

    version: str
    model: ModelRef
    arch: str
    crop_size: int
    margin_rate: float
    mask_thresholds: tuple[float, float, float]
    categories: dict[int, str]
    limits: ServerLimits
    devices: tuple[str, ...]
    precision: str
    score_calibrated: bool = False
    score_calibrated_with_flip: bool = False
    models: tuple[ModelInfo, ...] = ()
    data_folders: tuple[str, ...] = ()

    def score_meaning(self, options: LabelOptions = AS_SERVED) -> str:
        """What the score of a label is that was asked for so, for files that carry labels."""
        manner = Manner(
            options.branch or self.model.branch,
            options.flip,
            shared_out=options.resolve_overlaps,
            threshold=options.threshold,
            min_component_area_px=options.min_component_area_px,
        )
        return score_meaning(manner, calibrated=self.score_calibrated, fitted_with_flip=self.score_calibrated_with_flip)

    def of_model(self, name: str | None) -> ServerInfo:
        """The same server as seen by requests that name a model; None = the default one.

        Raises:
            RequestRefused: nothing is served under this name.
        """
        if name is None:
            return self
        found = next((info for info in self.models if info.model.name == name), None)
        if found is None:
            served = ", ".join(info.model.name for info in self.models) or self.model.name
            raise RequestRefused(f"model {name!r} is not served; there are {served}", "MODEL_NOT_FOUND")
        return replace(self, **vars(found))


@dataclass(frozen=True)
class Progress:
    """How far a bulk job is; images and boxes that could not be answered count as done."""

    images_done: int
    images_total: int
    boxes_done: int
    boxes_failed: int
    running_miou: float | None = None


@dataclass(frozen=True)
class FailedAnnotation:
    """An annotation without an answer. `annotation_id` and `image_id` are those of the COCO file, of any JSON type."""

    annotation_id: Any
    image_id: Any
    file_name: str | None
    error: ItemError

    def to_dict(self) -> dict[str, Any]:
        """One line of the errors file."""
        return {
            "annotation_id": self.annotation_id,
            "image_id": self.image_id,
            "file_name": self.file_name,
            "code": self.error.code,
            "reason": self.error.reason,
            "message": self.error.message,
        }


@dataclass(frozen=True)
class DatasetResult:
    """What a labelling job left behind.

    Attributes:
        output: the COCO file with masks.
        errors_file: one JSON line for each failed annotation; None when there are none.
        labelled: annotations that got a mask, in this run or in the unfinished one before it.
        copied: annotations copied through unlabelled on purpose (crowd regions, or masks that were kept).
        failed: the first FAILED_LISTED annotations that could not be answered; the errors file lists all.
        model: which weights answered.
        failed_count: how many could not be answered.
        is_final: False when the server was lost: the same job run again goes on with what is missing.
        masks_dir: folder of the PNG masks, where those were asked for.
    """

    output: Path
    errors_file: Path | None
    labelled: int
    copied: int
    failed: tuple[FailedAnnotation, ...] = field(default=())
    model: ModelRef | None = None
    failed_count: int = 0
    is_final: bool = True
    masks_dir: Path | None = None


WHOLE_FILE = DatasetOptions()
"""Every annotation, made anew."""

Figures = dict[str, float | None]
"""COCO's twelve figures by name (AP, AP50, AP75, APs …, as in mal_train.labeling.coco_ap); None where undefined."""


@dataclass(frozen=True)
class GroupMiou:
    """Mean IoU in [0, 1] of `count` instances; None of none."""

    count: int
    miou: float | None


@dataclass(frozen=True)
class MeasuredInstance:
    """One mask compared with its ground truth. Ids are those of the COCO file."""

    annotation_id: Any
    image_id: Any
    file_name: str
    box: BoxXywh
    iou: float
    score: float


@dataclass(frozen=True)
class Evaluation:
    """What the server measured on a data set; one part of a message each.

    Attributes:
        images: images that were measured.
        images_skipped: images left out as a whole, here or there; their objects are counted in `skipped`.
        overall: mean IoU over instances.
        by_size: the same for small, medium and large true masks (COCO's bounds).
        class_miou: mean over classes of class means; None when nothing was measured.
        share_good: share of masks with IoU > 0.75.
        empty_ground_truth: instances whose true mask is empty; they count with IoU 0.
        ap_at_1: COCO's figures with every score 1.
        ap_at_score: COCO's figures with the masks' own scores.
        score: what the score is worth for finding bad masks.
        categories: the classes that have instances.
        skipped: ground-truth objects that are not in the figures, by reason.
        worst: instances with the lowest IoU, lowest first; as many as were asked for.
        model: which weights were measured.
    """

    images: int
    images_skipped: int
    overall: GroupMiou
    by_size: dict[str, GroupMiou]
    class_miou: float | None
    share_good: float | None
    empty_ground_truth: int
    ap_at_1: Figures
    ap_at_score: Figures
    score: ScoreQuality
    categories: tuple[CategoryRow, ...]
    skipped: dict[str, int]
    worst: tuple[MeasuredInstance, ...]
    model: ModelRef

    @property
    def failed_count(self) -> int:
        """Objects that are not in the figures although they should be: all that was skipped but crowd regions."""
        return sum(count for reason, count in self.skipped.items() if reason != "CROWD")

    def to_dict(self, worst: int | None = 100) -> dict[str, Any]:
        """JSON form, named as `mal-train evaluate` does; the `worst` lowest instances are listed (None = all)."""
        return {
            "count": self.overall.count,
            "images": self.images,
            "images_skipped": self.images_skipped,
            "mIoU": self.overall.miou,
            "mIoU_by_size": {name: group.miou for name, group in self.by_size.items()},
            "count_by_size": {name: group.count for name, group in self.by_size.items()},
            "mIoU_class": self.class_miou,
            "share_IoU_above_0.75": self.share_good,
            "empty_ground_truth": self.empty_ground_truth,
            "AP@1": self.ap_at_1,
            "AP@score": self.ap_at_score,
            "mean_score": self.score.mean_score,
            "score_bias": self.score.bias,
            "calibration_error": self.score.calibration_error,
            "spearman": self.score.spearman,
            "count_IoU_below_0.5": self.score.bad_count,
            "bad_in_worst_scored_fifth": self.score.bad_in_worst_fifth,
            "categories": [
                {
                    "category_id": row.category_id,
                    "name": row.name,
                    "count": row.count,
                    "mIoU": row.miou,
                    "share_IoU_above_0.75": row.share_good,
                    "mean_score": row.mean_score,
                }
                for row in self.categories
            ],
            "worst_first": [
                {"annotation_id": row.annotation_id, "image_id": row.image_id, "IoU": row.iou, "score": row.score}
                for row in self.worst[:worst]
            ],
            "skipped_by_reason": self.skipped,
            "model": {**asdict(self.model), "branch": str(self.model.branch)},
        }

    def measured(self) -> Measured:
        """The same for pages and terminals."""
        return Measured(
            count=self.overall.count,
            images=self.images,
            miou=self.overall.miou,
            by_size={name: (group.count, group.miou) for name, group in self.by_size.items()},
            class_miou=self.class_miou,
            share_good=self.share_good,
            ap_at_1=self.ap_at_1,
            ap_at_score=self.ap_at_score,
            score=self.score,
            categories=self.categories,
            skipped=self.skipped,
            pairs=[(row.score, row.iou) for row in self.worst],
        )

    def figures(self) -> list[tuple[str, str, str]]:
        """(name, figure, remark) of the main figures, for terminals and reports."""
        return self.measured().figures()

    def table(self) -> str:
        """The main figures as text for a terminal."""
        return "\n".join(f"{name:<14}{figure:>7}   {remark}".rstrip() for name, figure, remark in self.figures())
