"""The header of an age v1 file: how the file is sealed, which is all that can be known of it without a key.

A header that is malformed, huge or expensive is refused here, before the library sees the file; 64 KiB are read at
most. `sealed` draws the whole format.
"""

import re
from dataclasses import dataclass
from typing import BinaryIO, Literal

from mal_train.core.errors import Truncated, WrongKey

MAX_HEADER = 64 * 1024
MAX_WORK_FACTOR = 20
"""log2 of scrypt's N; 20 costs 1 GiB of memory, each step more doubles it."""

_VERSION_LINE = b"age-encryption.org/v1\n"
_STANZA = re.compile(rb"-> (?P<type>[!-~]+)(?: [!-~]+)*")
_BODY = re.compile(rb"[A-Za-z0-9+/]{0,64}")
_MAC = re.compile(rb"--- [A-Za-z0-9+/]{43}")
_SCRYPT = re.compile(rb"-> scrypt [A-Za-z0-9+/]{22} (?P<work>[1-9][0-9]{0,2})")


@dataclass(frozen=True)
class SealInfo:
    """How a file is sealed: all that can be known of it without a key.

    Attributes:
        how: "none" for a file that is not encrypted.
        recipients: wrapped copies of the file key, 0 unless `how` is "recipients".
        work_factor: log2 of scrypt's N for a passphrase, else None.
        header_bytes: length of the age header, 0 for "none".
    """

    how: Literal["none", "recipients", "passphrase"]
    recipients: int = 0
    work_factor: int | None = None
    header_bytes: int = 0

    def __str__(self) -> str:
        if self.how == "none":
            return "not encrypted"
        if self.how == "passphrase":
            return f"sealed by a passphrase (scrypt 2^{self.work_factor})"
        return f"sealed for {self.recipients} recipient{'s' if self.recipients != 1 else ''}"


NOT_SEALED = SealInfo("none")


def read_seal(file: BinaryIO, name: str = "file") -> SealInfo:
    """How the stream, at its start, is sealed. Reads 64 KiB at most.

    Raises:
        WrongKey: it is an age file whose header is malformed, too long or too expensive.
        Truncated: it ends within the header.
    """
    head = file.read(MAX_HEADER + 1)
    if not head.startswith(_VERSION_LINE):
        if _VERSION_LINE.startswith(head):
            raise Truncated(f"{name}: the file ends within its first line")
        if head.startswith(b"age-encryption.org/") or head[len(_VERSION_LINE) :].startswith(b"-> "):
            raise WrongKey(f"{name}: its first line is not that of age v1; the key header is damaged or of a later age")
        return NOT_SEALED
    lines = _header_lines(head, name)
    stanzas = [line for line in lines if line.startswith(b"-> ")]
    header_bytes = sum(len(line) + 1 for line in lines)
    if any(line.startswith(b"-> scrypt ") for line in stanzas):
        return _passphrase_seal(stanzas, header_bytes, name)
    # Writers add a stanza of noise, "<random>-grease", so that readers stay tolerant; it opens nothing.
    wrapped = [line for line in stanzas if not line.split(b" ")[1].endswith(b"-grease")]
    return SealInfo("recipients", recipients=len(wrapped), header_bytes=header_bytes)


def _header_lines(head: bytes, name: str) -> list[bytes]:
    """The lines of the age header up to and including the MAC.

    Each must be well-formed: a flipped bit in a line end must not let the search run on into the content.
    """
    lines = [_VERSION_LINE[:-1]]
    start = len(_VERSION_LINE)
    while (end := head.find(b"\n", start)) >= 0:
        line = head[start:end]
        lines.append(line)
        if _MAC.fullmatch(line):
            return lines
        # A stanza comes first; only after one may a body line stand.
        if not _STANZA.fullmatch(line) and not (len(lines) > 2 and _BODY.fullmatch(line)):
            raise WrongKey(f"{name}: line {len(lines)} of its key header is damaged")
        start = end + 1
    if len(head) > MAX_HEADER:
        raise WrongKey(f"{name}: its key header is longer than {MAX_HEADER} bytes; such a file is refused")
    rest = head[start:]
    if not any(_is_start(rest, prefix, chars) for prefix, chars in ((b"-> ", _STANZA), (b"--- ", _MAC), (b"", _BODY))):
        raise WrongKey(f"{name}: line {len(lines) + 1} of its key header is damaged")
    raise Truncated(f"{name}: the file ends within its key header")


def _is_start(rest: bytes, prefix: bytes, pattern: re.Pattern[bytes]) -> bool:
    """Whether `rest` may be the beginning of a line of this pattern."""
    if prefix.startswith(rest):
        return True
    filler = b"A" * (len("--- ") + 43 - len(rest)) if pattern is _MAC else b""
    return pattern.fullmatch(rest + filler) is not None or pattern.fullmatch(rest.rstrip(b" ")) is not None


def _passphrase_seal(stanzas: list[bytes], header_bytes: int, name: str) -> SealInfo:
    match = _SCRYPT.fullmatch(stanzas[0])
    if len(stanzas) != 1 or match is None:
        raise WrongKey(f"{name}: its passphrase header is damaged (it must stand alone and state a work factor)")
    work_factor = int(match["work"])
    if work_factor > MAX_WORK_FACTOR:
        raise WrongKey(
            f"{name}: its passphrase header asks for scrypt 2^{work_factor}; more than 2^{MAX_WORK_FACTOR} is refused, "
            "because it takes gigabytes of memory"
        )
    return SealInfo("passphrase", work_factor=work_factor, header_bytes=header_bytes)
