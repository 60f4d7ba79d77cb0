"""Opens TIFF files that exceed the limits of images, to read them by windows; their bytes stay on disk."""

import io
import threading
from pathlib import Path
from weakref import finalize

from mal_train.core.errors import BadImage
from mal_train.core.images import tiff, tiff_directory
from mal_train.core.images.container import ImageHeader, refusal
from mal_train.core.images.header import MAX_FRAME_PIXELS, ImageLimits, check_memory
from mal_train.core.images.tiff_reader import TiffReader
from mal_train.core.input_files import open_regular
from mal_train.core.storage.addresses import Location


class FileSource:
    """The bytes of a file, read on access; `tiff_directory.Source`. Closed with its last reference.

    Args:
        path: a regular file.

    Raises:
        OSError, ValueError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)
        finalize(self, self._file.close)
        self._lock = threading.Lock()
        self._size = self._file.seek(0, io.SEEK_END)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        with self._lock:  # not os.pread, which Windows lacks
            self._file.seek(start)
            return self._file.read(max(stop - start, 0))


def open_large(location: Location, limits: ImageLimits, name: str) -> tuple[ImageHeader, TiffReader] | None:
    """Opens a local TIFF that exceeds the limits of images.

    Returns:
        Its header and pixels; None for an address, a file within the limits, one of another format, and one that cannot
        be opened.

    Raises:
        BadImage: a TIFF of any size whose structure is damaged or not supported; or one that exceeds the limits and has
            more pixels than masks may have, or blocks that take too much memory (reason IMAGE_TOO_LARGE).
    """
    if not isinstance(location, Path):
        return None
    try:
        source = FileSource(location)
        is_tiff = source[:4] in tiff_directory.SIGNATURES
    except (OSError, ValueError):
        return None
    if not is_tiff:
        return None
    try:
        header, page = tiff.walk(source)
    except (OSError, ValueError) as error:
        raise refusal(name, error) from None
    if len(source) <= limits.max_bytes and limits.accepts(header.size_wh):
        return None
    if header.size_wh[0] * header.size_wh[1] > MAX_FRAME_PIXELS:
        raise BadImage(
            f"{name}: {header.size_wh[0]}x{header.size_wh[1]} px; masks have {MAX_FRAME_PIXELS} px at most; cut it",
            "IMAGE_TOO_LARGE",
        )
    check_memory(tiff.rectangle_bytes(page), limits, name)
    return header, TiffReader(source, page, name)
