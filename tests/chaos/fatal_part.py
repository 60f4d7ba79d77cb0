"""Runs `mal-train inference` on Ray, where one part ends each process that labels it.

Usage: python -m tests.chaos.fatal_part ARGUMENT …
"""

import os
import sys
from typing import Any, Final

from mal_train.cli import main
from mal_train.core.coco.parquet_parts import Part
from mal_train.offline import ray_cluster
from mal_train.offline.part_labeler import PartLabeler, PartResult

FATAL: Final = 2
"""Number of the part."""


class FatalPartLabeler(PartLabeler):
    """Labeler that a part kills, as a lack of memory does."""

    def _label_part(self, part: Part, *arguments: Any) -> PartResult:
        if part.number == FATAL:
            os._exit(9)
        return super()._label_part(part, *arguments)


if __name__ == "__main__":
    # Ray sends a class of this module to the actors by value.
    setattr(ray_cluster, "PartLabeler", FatalPartLabeler)  # noqa: B010 - a class in place of a class
    sys.exit(main(["inference", *sys.argv[1:]]))
