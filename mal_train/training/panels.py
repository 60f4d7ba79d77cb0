"""Close-ups of predicted masks beside their ground truth, for the contact sheets and the training report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.annotations import CocoFile, JsonId
from mal_train.core.errors import BadImage, OutputError
from mal_train.core.images.decoder import RgbImage, encode_png
from mal_train.core.images.files import ImageSource, images_of, read_image
from mal_train.core.metrics.evaluator import InstanceComparison
from mal_train.core.report.contact_sheet import CELL, contact_sheet_image
from mal_train.core.report.overlays import draw_close_up


@dataclass(frozen=True)
class CloseUp:
    """An image (h, w, 3) uint8 of one mask, with its caption."""

    image: RgbImage
    title: str
    detail: str


def close_ups(
    compared: Sequence[InstanceComparison], coco: CocoFile, image_dir: ImageSource, *, side: int = 240
) -> list[CloseUp]:
    """Draws close-ups in the order of `compared`; their longer side is `side` px.

    Each image is read once. A mask whose image has become unreadable since the validation is left out.
    """
    boxes = {(row.image_id, row.id): row.box_xywh for row in coco.annotations}
    by_image: dict[JsonId, list[int]] = {}
    for index, pair in enumerate(compared):
        by_image.setdefault(pair.row.image_id, []).append(index)
    images = images_of(image_dir)
    drawn: dict[int, CloseUp] = {}
    for image_id, indices in by_image.items():
        info = coco.images[image_id]
        try:
            image = read_image(
                images.locate(info.file_name), expected_wh=info.size_wh, limits=images.limits, hosts=images.hosts
            )
        except BadImage:
            continue
        for index in indices:
            pair = compared[index]
            row = pair.row
            close_up = draw_close_up(
                image, boxes[row.image_id, row.annotation_id], pair.prediction, pair.truth, side=side
            )
            name = coco.category_names.get(row.category_id, str(row.category_id))
            drawn[index] = CloseUp(
                close_up,
                f"IoU {row.iou:.2f} · score {row.score:.2f}",
                f"{name} · annotation {row.annotation_id} · {info.file_name}",
            )
    return [drawn[index] for index in sorted(drawn)]


def around_median(compared: Sequence[InstanceComparison], count: int) -> Sequence[InstanceComparison]:
    """Returns the `count` masks around the median IoU, from masks sorted by IoU."""
    start = max(0, (len(compared) - count) // 2)
    return compared[start : start + count]


class ContactSheet:
    """Contact sheet of the worst masks of each validation: boards/epoch_EEE.png (epochs from 1) and TensorBoard.

    Args:
        folder: output folder of the run.
        coco: the validation file.
        image_dir: folder of its images.
        count: masks per sheet, ≥ 1.
        add_image: adds the sheet to the TensorBoard events, by name and optimizer step.
    """

    def __init__(
        self,
        folder: Path,
        coco: CocoFile,
        image_dir: ImageSource,
        count: int,
        add_image: Callable[[str, RgbImage, int], None],
    ) -> None:
        self._folder = folder / "boards"
        self._coco = coco
        self._image_dir = image_dir
        self._count = count
        self._add_image = add_image

    def write(self, compared: Sequence[InstanceComparison], epoch: int, step: int) -> Path | None:
        """Writes the sheet of the first `count` masks and returns its path; None without masks.

        Args:
            compared: masks sorted by IoU, lowest first.
            epoch: number of finished epochs.
            step: number of finished optimizer steps.

        Raises:
            OutputError: the sheet cannot be written.
        """
        panels = close_ups(compared[: self._count], self._coco, self._image_dir, side=CELL)
        if not panels:
            return None
        heading = f"epoch {epoch}, step {step}: lowest IoU first. pink: mask, cyan: true mask, yellow: box"
        sheet = contact_sheet_image([(panel.image, panel.title.replace("·", "-")) for panel in panels], heading)
        path = self._folder / f"epoch_{epoch:03d}.png"
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self._folder}: cannot be created: {error.strerror}") from error
        with atomic_write(path) as file:
            file.write(encode_png(sheet))
        self._add_image("val/worst_first", sheet, step)
        return path
