"""Reads PEM files and checks that they hold the expected block. Parses no certificate.

gRPC reports an unusable file only as a failed connection, so files are checked before a port or channel opens.
"""

from pathlib import Path
from typing import Literal

from mal_train.core.errors import ConfigError

PemBlock = Literal["certificate", "private key"]


def read_pem(path: Path | str, name: str, block: PemBlock) -> bytes:
    """Returns the content of a PEM file that holds at least one block of the given type.

    Args:
        path: may hold other blocks too, for example a chain, or a certificate with its key.
        name: setting or option that holds the path; begins every message.
        block: `private key` accepts every key algorithm (`RSA PRIVATE KEY`, `EC PRIVATE KEY`, ...).

    Raises:
        ConfigError: the file cannot be read, is not PEM or holds no such block.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {path}: cannot be read: {error.strerror}") from None
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{name}: {path}: not a PEM file")
    if f"{block.upper()}-----".encode() not in data:
        raise ConfigError(f"{name}: {path}: no {block} in this PEM file; give the file that holds it")
    return data
