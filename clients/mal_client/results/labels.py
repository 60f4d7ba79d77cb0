"""Options of a labeling request, and the label of a box. Masks are decoded on access."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mal_client.errors import ItemError
from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch, member_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from mal_train.core.masks.encodings import PngCrop
    from mal_train.core.masks.points import Point
    from mal_train.core.masks.polygons import Ring
    from mal_train.core.masks.rle import Rle

ImageInput: TypeAlias = "NDArray[Any] | Image.Image | Path | str | bytes"
"""Array (H, W, 3) RGB or (H, W) gray of real numbers, Pillow image, path of an image file, or its bytes."""

BoxXywh = tuple[float, float, float, float]
"""x, y, width, height in px of the stored image; x, y is the upper left corner."""

BoxPoints: TypeAlias = "Mapping[int, Sequence[Point]]"
"""Points that masks obey, by the index or key of their box; boxes without points may be missing."""


@dataclass(frozen=True)
class LabelOptions:
    """Options of a labeling request. The defaults are the settings of the server and its checkpoint.

    Attributes:
        branch: network that answers; None uses the server's default branch.
        threshold: probability in (0, 1) above which a pixel belongs to the mask; None uses the three thresholds of the
            checkpoint, by box size.
        agreement: also return the IoU of the masks of student and teacher. Doubles the work on the device.
        flip: average each probability map with that of the mirrored crop. Doubles the work on the device.
        min_component_area_px: remove connected components below this number of pixels from each mask, except the
            largest one, before score, area, box, flags and agreement are computed; 0 removes none.
        model: name of the served model that answers; None uses the server's default model.
        resolve_overlaps: assign pixels in which masks of several boxes overlap in part to one of them; smaller masks
            and higher probabilities win, and a mask on or in another one leaves both as they are.
            Masks and scores depend on the other boxes of their request: send all boxes of an image together.

    Raises:
        ConfigError: an unknown branch; `threshold` or `min_component_area_px` is out of range.
    """

    branch: Branch | None = None
    threshold: float | None = None
    agreement: bool = False
    flip: bool = False
    min_component_area_px: int = 0
    model: str | None = None
    resolve_overlaps: bool = False

    def __post_init__(self) -> None:
        if self.branch is not None:
            object.__setattr__(self, "branch", member_of(Branch, self.branch, "--branch (branch=)"))
        if self.min_component_area_px < 0:
            raise ConfigError(
                f"--min-component-area (min_component_area_px=): {self.min_component_area_px}; at least 0 px"
            )
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ConfigError(
                f"--threshold (threshold=): {self.threshold}; it must be a probability above 0 and below 1"
            )


SERVER_DEFAULTS = LabelOptions()
"""Uses the settings of the server and its checkpoint."""


@dataclass(frozen=True)
class ModelRef:
    """Weights that made a mask; `checkpoint_sha256` is the hex digest of the server's checkpoint file."""

    name: str
    checkpoint_sha256: str
    branch: Branch


@dataclass(frozen=True)
class Timing:
    """Seconds that the server spent on one response, by stage; `batch_size` counts crops, also of other clients."""

    queue_s: float
    decode_s: float
    infer_s: float
    finish_s: float
    batch_size: int


@dataclass(frozen=True)
class BoxLabel:
    """Label of one box: its mask with score and flags, or its error.

    >>> if label.ok:  # doctest: +SKIP
    ...     print(label.score, label.mask.sum())
    ... else:
    ...     print(label.error)

    Attributes:
        index: index of the box in the call, from 0.
        box: x, y, width, height in px, as sent.
        rle: the mask, run-length encoded at image size; None when `error` is set.
        score: confidence in [0, 1]: stability of the mask or, for a calibrated checkpoint, its expected IoU (see
            `ServerInfo.score_meaning`); 0 for an empty mask.
        agreement: IoU in [0, 1] of the masks of student and teacher; None unless requested.
        area: number of mask pixels.
        mask_box: tight box of the mask, x, y, width, height in px; None for an empty mask.
        flags: properties to check, for example BOX_CLIPPED, EMPTY_MASK, FULL_BOX, DOMINATED.
        error: reason for the missing mask; None when there is one.
        model: the weights that answered; None when the box did not reach them.
        timing: of the response with this label.
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
        """True when the box has a mask, which may be empty (see `flags`)."""
        return self.error is None

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The mask (H, W) bool, at the size of the stored image; decoded at each access.

        Raises:
            ValueError: the box has no mask (see `error`). The other forms raise it, too.
        """
        # Imported on access: it loads OpenCV and pycocotools, which callers that keep the codes do not need.
        from mal_train.core.masks.rle import decode_mask  # noqa: PLC0415

        return decode_mask(self._mask_rle())

    @property
    def polygons(self) -> tuple[Ring, ...]:
        """Exact outlines of the mask: closed rings with `points` (N, 2) x, y in px, and `is_hole`; () when it is empty.

        A hole follows the ring that contains it. `to_polygons` gives fewer points.
        """
        return self.to_polygons(0.0)

    def to_polygons(self, tolerance_px: float) -> tuple[Ring, ...]:
        """Returns `polygons`, simplified by at most `tolerance_px` px of distance from the mask's edge."""
        from mal_train.core.masks.encodings import to_polygons  # noqa: PLC0415

        return tuple(to_polygons(self._mask_rle(), tolerance_px).rings)

    @property
    def png(self) -> bytes:
        """The mask as a 1-bit PNG file of the image's size; white is mask."""
        from mal_train.core.masks.encodings import encode_bitmap  # noqa: PLC0415

        return encode_bitmap(self.mask)

    @property
    def png_crop(self) -> PngCrop:
        """The mask as a 1-bit PNG file of its tight box, with the position of that box."""
        from mal_train.core.masks.encodings import to_png  # noqa: PLC0415

        return to_png(self._mask_rle())

    def _mask_rle(self) -> Rle:
        if self.rle is None:
            raise ValueError(f"box {self.index} has no mask: {self.error}; check .ok or .error first")
        return self.rle
