"""Reads secrets from files and environment variables. No error message contains a secret.

Settings hold a reference instead of the secret itself:

    file:PATH    the content of a text file
    env:NAME     the value of an environment variable
"""

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from mal_train.core.errors import ConfigError
from mal_train.core.input_files import decode_text

log = logging.getLogger(__name__)

MAX_SECRET_BYTES = 64 * 1024
_SCHEMES = ("file:", "env:")


def is_secret_reference(text: str) -> bool:
    """Returns True for `file:PATH` and `env:NAME`.

    >>> is_secret_reference("env:MAL_TOKEN"), is_secret_reference("hunter2")
    (True, False)
    """
    return text.startswith(_SCHEMES)


def read_secret(reference: str, name: str) -> str:
    """Returns the text that `file:PATH` or `env:NAME` refers to, including its white space.

    Args:
        reference: `file:PATH` or `env:NAME`. A path may start with `~`, the home folder.
        name: setting or option that holds the reference; every error message begins with it.

    Raises:
        ConfigError: the variable is unset or empty, `~USER` is no user, or the file is unusable (see
            `read_secret_file`).
        ValueError: the text is not a reference.
    """
    scheme, _, target = reference.partition(":")
    if scheme == "file":
        try:
            path = Path(target).expanduser()
        except RuntimeError:
            raise ConfigError(f"{name}: {target}: no home folder of this user; give the full path") from None
        return read_secret_file(path, name)
    if scheme != "env":
        raise ValueError(f"{name}: not a file:PATH or env:NAME reference")
    value = os.environ.get(target)
    if not value:
        raise ConfigError(f"{name}: environment variable {target} is not set or empty")
    return value


def read_secret_file(path: Path, name: str) -> str:
    """Returns the text of a file, including its white space.

    Args:
        path: the file.
        name: setting or option that holds the path; every error message begins with it.

    Raises:
        ConfigError: the file cannot be read, exceeds `MAX_SECRET_BYTES` or is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: {path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_SECRET_BYTES:
        raise ConfigError(f"{name}: {path}: larger than {MAX_SECRET_BYTES} bytes; this is not a secret")
    try:
        return decode_text(data)
    except UnicodeDecodeError:
        # `from None`: the decoder's error holds the bytes.
        raise ConfigError(f"{name}: {path}: not UTF-8 text") from None


def warn_if_shared(reference: str, name: str) -> None:
    """Logs a warning if `reference` is a file that other accounts of this machine may read.

    Not an error: in a container, the secrets of its platform are readable by every account of the container.

    Args:
        reference: `file:PATH` or `env:NAME`.
        name: setting or option that holds it.
    """
    if os.name != "posix" or not reference.startswith("file:"):
        return
    path = Path(reference.removeprefix("file:")).expanduser()
    with suppress(OSError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            log.warning("%s: other accounts can read %s (mode %04o); run: chmod 600 %s", name, path, mode, path)


def is_token(text: str) -> bool:
    """Returns True for one word of printable ASCII, the form of a bearer token.

    >>> is_token("s3cret"), is_token("two words"), is_token("")
    (True, False, False)
    """
    return bool(text) and all("!" <= character <= "~" for character in text)
