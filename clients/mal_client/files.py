"""Small text files written whole or not at all."""

import os
import secrets
from pathlib import Path

from mal_train.errors import OutputError


def write_text_atomic(path: Path, text: str) -> None:
    """Temporary file in the same folder, fsync, rename: readers see the old file or the new one.

    Raises:
        OutputError: folder missing, no permission, disk full; an old file is intact and no temporary file stays.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as fault:
        raise OutputError(f"{path}: not written ({fault.strerror}); choose a place that can be written to") from fault
