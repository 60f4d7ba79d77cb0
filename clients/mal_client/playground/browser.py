"""Opens the page in the default browser without showing its key to other accounts of the machine.

The arguments of a process are public (`ps`), so the browser gets the path of a file that only this account can read.
The file redirects to the URL.
"""

from __future__ import annotations

import html
import os
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mal_train.core.errors import OutputError

_PAGE = (
    '<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer">'
    '<meta http-equiv="refresh" content="0; url={url}"><title>Playground</title>'
    '<a href="{url}">Open the playground</a>\n'
)


@contextmanager
def redirect_file(url: str) -> Iterator[Path]:
    """Yields an HTML file of mode 0600 that redirects to `url`; deletes it at the end of the block.

    Raises:
        OutputError: the folder of temporary files is not writable.
    """
    try:
        # mkstemp creates the file with mode 0600 under every umask, and follows no link.
        descriptor, name = tempfile.mkstemp(prefix="mal-playground-", suffix=".html")
    except OSError as error:
        raise OutputError(f"--open: no temporary file ({error.strerror}); open the printed URL instead") from error
    path = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_PAGE.format(url=html.escape(url)))
        yield path
    finally:
        path.unlink(missing_ok=True)


def open_browser(path: Path) -> None:
    """Opens a local file in the default browser, which can take seconds."""
    webbrowser.open(path.as_uri())
