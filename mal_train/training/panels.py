"""Close-ups of validated masks beside their ground truth, for the board of each validation and the page at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.annotations import CocoFile, JsonId
from mal_train.core.errors import BadImage, OutputError
from mal_train.core.masks.images import RgbImage, encode_png, read_image
from mal_train.core.metrics.evaluator import InstanceComparison
from mal_train.core.report.board import CELL, contact_sheet_image
from mal_train.core.report.overlays import draw_close_up


@dataclass(frozen=True)
class CloseUp:
    """One mask for people: the picture (h, w, 3) uint8 and what to write under it."""

    picture: RgbImage
    title: str
    detail: str


def close_ups(
    compared: Sequence[InstanceComparison], coco: CocoFile, image_dir: Path, *, side: int = 240
) -> list[CloseUp]:
    """Pictures `side` px long, in the order given; each image is read once.

    A mask whose image has become unreadable since it was compared gets no picture.
    """
    boxes = {(row.image_id, row.id): row.box_xywh for row in coco.annotations}
    wanted: dict[JsonId, list[int]] = {}
    for place, pair in enumerate(compared):
        wanted.setdefault(pair.row.image_id, []).append(place)
    found: dict[int, CloseUp] = {}
    for image_id, places in wanted.items():
        info = coco.images[image_id]
        try:
            image = read_image(image_dir / info.file_name, expected_wh=info.size_wh)
        except BadImage:
            continue
        for place in places:
            pair = compared[place]
            row = pair.row
            picture = draw_close_up(
                image, boxes[row.image_id, row.annotation_id], pair.prediction, pair.truth, side=side
            )
            name = coco.category_names.get(row.category_id, str(row.category_id))
            found[place] = CloseUp(
                picture,
                f"IoU {row.iou:.2f} · score {row.score:.2f}",
                f"{name} · annotation {row.annotation_id} · {info.file_name}",
            )
    return [found[place] for place in sorted(found)]


def typical(compared: Sequence[InstanceComparison], count: int) -> Sequence[InstanceComparison]:
    """The `count` masks round the median IoU of masks sorted by IoU."""
    start = max(0, (len(compared) - count) // 2)
    return compared[start : start + count]


class ContactSheet:
    """Shows the worst masks of each validation: boards/epoch_EEE.png (epochs counted from 1) and TensorBoard.

    Args:
        folder: of the run; gets the folder boards.
        coco: the validation file.
        image_dir: folder of its images.
        count: masks on a board, ≥ 1.
        events: gets the same picture, by name and optimizer step.
    """

    def __init__(
        self,
        folder: Path,
        coco: CocoFile,
        image_dir: Path,
        count: int,
        events: Callable[[str, RgbImage, int], None],
    ) -> None:
        self._folder = folder / "boards"
        self._coco = coco
        self._image_dir = image_dir
        self._count = count
        self._events = events

    def show(self, compared: Sequence[InstanceComparison], epoch: int, step: int) -> Path | None:
        """Draws the first `count` of masks sorted by IoU; None where there is nothing to draw.

        Raises:
            OutputError: the picture could not be written.
        """
        pictures = close_ups(compared[: self._count], self._coco, self._image_dir, side=CELL)
        if not pictures:
            return None
        heading = f"epoch {epoch}, step {step}: lowest IoU first. pink: mask, cyan: true mask, yellow: box"
        sheet = contact_sheet_image([(entry.picture, entry.title.replace("·", "-")) for entry in pictures], heading)
        path = self._folder / f"epoch_{epoch:03d}.png"
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self._folder}: cannot be made: {error.strerror}") from error
        with atomic_write(path) as file:
            file.write(encode_png(sheet))
        self._events("val/worst_first", sheet, step)
        return path
