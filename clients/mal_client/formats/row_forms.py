"""Forms of rows that their files do not show and the user states, as options of the command line name them."""

from enum import StrEnum


class Units(StrEnum):
    """Unit of the numbers of a table."""

    AUTO = "auto"
    """Fractions in Open Images' table; else that of the first row that has a number above 1, or one with decimals."""
    PIXELS = "pixels"
    SHARES = "shares"


class YoloRows(StrEnum):
    """Meaning of the numbers after the class of a row."""

    AUTO = "auto"
    """Key points if the data.yaml has `kpt_shape`; else boxes and outlines, by their count."""
    BOXES = "boxes"
    SEGMENTS = "segments"
    POSE = "pose"
    OBB = "obb"


class Corners(StrEnum):
    """Meaning of the corners of a box."""

    INDICES = "indices"
    """Indices of pixels from 1, both inclusive, as in the VOC development kit."""
    FROM_0 = "from-0"
    """Coordinates in px, as CVAT writes them."""
    FROM_1 = "from-1"
    """Coordinates in px, plus 1, as Roboflow writes them."""
