"""Reads the header of an age v1 file: all that can be known of an encrypted file without a key.

Malformed, oversized and expensive headers are refused here, before the age library sees the file. At most 64 KiB are
read. `encrypted_file` describes the complete format.
"""

import re
from dataclasses import dataclass
from typing import BinaryIO, Literal

from mal_train.core.errors import Truncated, WrongKey

MAX_HEADER = 64 * 1024
MAX_WORK_FACTOR = 20
"""log2 of scrypt's N. A value of 20 costs 1 GiB of memory; each further step doubles it."""

_VERSION_LINE = b"age-encryption.org/v1\n"
_STANZA = re.compile(rb"-> (?P<type>[!-~]+)(?: [!-~]+)*")
_BODY = re.compile(rb"[A-Za-z0-9+/]{0,64}")
_MAC = re.compile(rb"--- [A-Za-z0-9+/]{43}")
_SCRYPT = re.compile(rb"-> scrypt [A-Za-z0-9+/]{22} (?P<work>[1-9][0-9]{0,2})")


@dataclass(frozen=True)
class EncryptionInfo:
    """The encryption of a file, as its header states it.

    Attributes:
        mode: "none" for a plain file.
        recipients: number of recipients that can decrypt the file; 0 unless `mode` is "recipients".
        work_factor: log2 of scrypt's N for a passphrase, else None.
        header_bytes: length of the age header; 0 for "none".
    """

    mode: Literal["none", "recipients", "passphrase"]
    recipients: int = 0
    work_factor: int | None = None
    header_bytes: int = 0

    def __str__(self) -> str:
        if self.mode == "none":
            return "not encrypted"
        if self.mode == "passphrase":
            return f"encrypted with a passphrase (scrypt 2^{self.work_factor})"
        return f"encrypted for {self.recipients} recipient{'s' if self.recipients != 1 else ''}"


NOT_ENCRYPTED = EncryptionInfo("none")


def read_encryption_info(file: BinaryIO, name: str = "file") -> EncryptionInfo:
    """Returns the encryption of a stream, which is read from its start; at most 64 KiB of it.

    Raises:
        WrongKey: an age file whose header is malformed, too long or too expensive.
        Truncated: the stream ends within the header.
    """
    start = file.read(MAX_HEADER + 1)
    if not start.startswith(_VERSION_LINE):
        if _VERSION_LINE.startswith(start):
            raise Truncated(f"{name}: the file ends within its first line")
        if start.startswith(b"age-encryption.org/") or start[len(_VERSION_LINE) :].startswith(b"-> "):
            raise WrongKey(f"{name}: the first line is not that of age v1; the header is damaged or of a later version")
        return NOT_ENCRYPTED
    lines = _header_lines(start, name)
    stanzas = [line for line in lines if line.startswith(b"-> ")]
    header_bytes = sum(len(line) + 1 for line in lines)
    if any(line.startswith(b"-> scrypt ") for line in stanzas):
        return _passphrase_info(stanzas, header_bytes, name)
    # Writers may add a random stanza of type "<random>-grease", so that readers stay tolerant; it holds no key.
    wrapped = [line for line in stanzas if not line.split(b" ")[1].endswith(b"-grease")]
    return EncryptionInfo("recipients", recipients=len(wrapped), header_bytes=header_bytes)


def _header_lines(start: bytes, name: str) -> list[bytes]:
    """Returns the lines of the age header, up to and including the MAC.

    Every line is checked: after a flipped bit in a line end, the search for the MAC must not run into the payload.
    """
    lines = [_VERSION_LINE[:-1]]
    line_start = len(_VERSION_LINE)
    while (line_end := start.find(b"\n", line_start)) >= 0:
        line = start[line_start:line_end]
        lines.append(line)
        if _MAC.fullmatch(line):
            return lines
        # The first line after the version is a stanza; body lines may follow only after one.
        if not _STANZA.fullmatch(line) and not (len(lines) > 2 and _BODY.fullmatch(line)):
            raise WrongKey(f"{name}: line {len(lines)} of the header is damaged")
        line_start = line_end + 1
    if len(start) > MAX_HEADER:
        raise WrongKey(f"{name}: the header is longer than {MAX_HEADER} bytes, which is the limit")
    rest = start[line_start:]
    patterns = ((b"-> ", _STANZA), (b"--- ", _MAC), (b"", _BODY))
    if not any(_is_line_start(rest, prefix, pattern) for prefix, pattern in patterns):
        raise WrongKey(f"{name}: line {len(lines) + 1} of the header is damaged")
    raise Truncated(f"{name}: the file ends within its header")


def _is_line_start(rest: bytes, prefix: bytes, pattern: re.Pattern[bytes]) -> bool:
    """Returns True if a line of this pattern can begin with `rest`."""
    if prefix.startswith(rest):
        return True
    filler = b"A" * (len("--- ") + 43 - len(rest)) if pattern is _MAC else b""
    return pattern.fullmatch(rest + filler) is not None or pattern.fullmatch(rest.rstrip(b" ")) is not None


def _passphrase_info(stanzas: list[bytes], header_bytes: int, name: str) -> EncryptionInfo:
    match = _SCRYPT.fullmatch(stanzas[0])
    if len(stanzas) != 1 or match is None:
        raise WrongKey(f"{name}: the passphrase header is damaged; it must be a single scrypt stanza with work factor")
    work_factor = int(match["work"])
    if work_factor > MAX_WORK_FACTOR:
        raise WrongKey(
            f"{name}: the passphrase header asks for scrypt 2^{work_factor}; the limit is 2^{MAX_WORK_FACTOR}, because "
            "more takes gigabytes of memory"
        )
    return EncryptionInfo("passphrase", work_factor=work_factor, header_bytes=header_bytes)
