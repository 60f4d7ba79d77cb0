"""Boxes in, masks out: how a box is to be labeled, and its answer. A mask stays encoded until asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mal_client.errors import ItemError
from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch

if TYPE_CHECKING:
    from PIL import Image

    from mal_train.core.masks.encodings import PngCrop
    from mal_train.core.masks.polygons import Ring
    from mal_train.core.masks.rle import Rle

ImageInput: TypeAlias = "NDArray[np.uint8] | Image.Image | Path | str | bytes"
"""(H, W, 3) RGB or (H, W) gray, a picture, where its file lies, or that file's bytes."""

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


SERVER_DEFAULTS = LabelOptions()
"""Everything as the server and its checkpoint set it."""


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
        from mal_train.core.masks.rle import decode_mask  # noqa: PLC0415

        return decode_mask(self._code())

    @property
    def polygons(self) -> tuple[Ring, ...]:
        """Closed lines along the edges of the mask's pixels; `points` (N, 2) x, y in px, `is_hole`. () when empty.

        A hole stands behind the ring that it lies in. Exactly the mask: see `to_polygons` for fewer points.
        """
        return self.to_polygons(0.0)

    def to_polygons(self, tolerance_px: float) -> tuple[Ring, ...]:
        """As `polygons`, with lines that may run up to tolerance_px beside the mask's edge, to have fewer points."""
        from mal_train.core.masks.encodings import to_polygons  # noqa: PLC0415

        return to_polygons(self._code(), tolerance_px).rings

    @property
    def png(self) -> bytes:
        """A 1-bit PNG file of the image's size, white is mask."""
        from mal_train.core.masks.encodings import encode_bitmap  # noqa: PLC0415

        return encode_bitmap(self.mask)

    @property
    def png_crop(self) -> PngCrop:
        """A 1-bit PNG of the mask's tight box, and where that lies."""
        from mal_train.core.masks.encodings import to_png  # noqa: PLC0415

        return to_png(self._code())

    def _code(self) -> Rle:
        if self.rle is None:
            raise ValueError(f"box {self.index} has no mask: {self.error}; check .ok or .error first")
        return self.rle
