"""Images of a job as a server receives them: files as stored, and parts of TIFFs that exceed its limits.

A part is the window of one box. Its server gets the place in the image with it, so its mask is that of the complete
image, byte for byte.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from typing import Final

from mal_client.bulk.work_queue import WorkItem
from mal_client.images.image_files import ImageFiles
from mal_client.images.image_input import MAX_FILE_BYTES, EncodedImage
from mal_client.images.large_image import LargeImage, open_image
from mal_client.types import ServerLimits
from mal_train.core.coco.annotations import ImageInfo
from mal_train.core.errors import BadImage
from mal_train.core.images.decoder import check_expected_size
from mal_train.core.images.header import read_header
from mal_train.core.images.pixels import FormatCounts
from mal_train.core.masks.rle import MAX_DECODED_PIXELS
from mal_train.core.storage.addresses import Location

LARGE_OPEN: Final = 8
"""Large images that are held open: of values of more than 8 bits, the range is found once while one is open."""


class JobImages:
    """Reads the images of a job; safe in threads.

    Args:
        files: the files.
        images: rows of the images; items go by their index.
        limits: of the servers.
        margin_rate: of the served model.
        resolve_overlaps: overlaps are to be resolved, which needs complete images.
        writes_png: masks are written as images, which are decoded.

    Attributes:
        files: the files.
        margin_rate: of the served model.
    """

    def __init__(
        self,
        files: ImageFiles,
        images: Sequence[ImageInfo],
        limits: ServerLimits,
        margin_rate: float,
        *,
        resolve_overlaps: bool,
        writes_png: bool = False,
    ) -> None:
        self.files = files
        self.margin_rate = margin_rate
        self._formats = FormatCounts()
        self._images = images
        self._limits = limits
        self._resolve_overlaps = resolve_overlaps
        self._writes_png = writes_png
        self._open: OrderedDict[int, LargeImage] = OrderedDict()
        self._located: dict[int, Location] = {}
        """Places of images that `is_large` has found not to be large, until they are loaded."""
        self._lock = Lock()

    def is_large(self, index: int) -> bool:
        """Returns True for an image by its index whose boxes are sent one by one, each with its part of the image."""
        try:
            found = self._opened(index)
        except BadImage:
            return False  # its item fails when it is loaded
        if isinstance(found, LargeImage):
            return True
        self._located[index] = found
        return False

    def load(self, item: WorkItem) -> EncodedImage:
        """Returns the image of an item.

        Raises:
            BadImage: a file that is missing, exceeds the limit and cannot be read by windows, or has another size.
            MalError: the store of the images cannot be used at all.
        """
        index = int(item.key)
        # Taken out: a link may lead elsewhere by the time the image is sent again.
        found = self._located.pop(index, None) or self._checked(index)
        if not isinstance(found, LargeImage):
            return self.stored(index, found)
        if len(item.boxes) > 1:
            # It had another size, or could not be read, when its boxes were put together.
            raise BadImage(f"{found.name}: exceeds the limits now; it has changed during the job", "IMAGE_TOO_LARGE")
        (box,) = item.boxes.values()
        return found.part(box, self.margin_rate)

    def large(self, index: int) -> LargeImage | None:
        """Returns an image by its index that is sent in parts; None for any other one.

        Raises:
            BadImage: it cannot be read by windows, has another size, or its masks need the complete image.
        """
        found = self._checked(index)
        return found if isinstance(found, LargeImage) else None

    def notes(self) -> list[str]:
        """Returns a sentence on each way in which images were not used as their names and files say."""
        respelled = self.files.respelling_note()
        return [*([] if respelled is None else [respelled]), *self._formats.notes()]

    def _checked(self, index: int) -> LargeImage | Location:
        """Returns an image that is sent in parts, or the place of any other one. Raises as `large`."""
        image, large = self._images[index], self._opened(index)
        if not isinstance(large, LargeImage):
            return large
        check_expected_size(large.header, image.size_wh, large.name)
        width, height = large.header.size_wh
        if self._writes_png and width * height > MAX_DECODED_PIXELS:
            raise BadImage(
                f"{large.name}: {width}x{height} px; masks are written as PNG up to {MAX_DECODED_PIXELS} px; choose "
                "another --format (mask_format)",
                "IMAGE_TOO_LARGE",
            )
        if self._resolve_overlaps:
            large.refuse_overlaps()
        self._formats.add(image.file_name, large.header.pixel_format)
        return large

    def stored(self, index: int, location: Location | None = None) -> EncodedImage:
        """Returns the file of an image by its index, which is located unless its place is given. Raises as `load`."""
        image = self._images[index]
        location = location or self.files.locate(image.file_name)
        content = self.files.read_located(location, min(self._limits.max_image_bytes, MAX_FILE_BYTES))
        width, height = image.size_wh or (0, 0)
        with suppress(BadImage):  # of which the server states the reason
            header = read_header(content)
            check_expected_size(header, image.size_wh, image.file_name)
            self._formats.add(image.file_name, header.pixel_format)
        return EncodedImage(content, width, height)

    def _opened(self, index: int) -> LargeImage | Location:
        """Returns an image that exceeds the limits, or the place of any other one. Keeps LARGE_OPEN of them open."""
        with self._lock:
            known = self._open.get(index)
            if known is not None:
                self._open.move_to_end(index)
                return known
        location = self.files.locate(self._images[index].file_name)
        opened = open_image(location, self._limits)
        if opened is None:
            return location
        with self._lock:
            # Another thread may have opened it meanwhile.
            known = self._open.setdefault(index, opened)
            while len(self._open) > LARGE_OPEN:
                self._open.popitem(last=False)
            return known
