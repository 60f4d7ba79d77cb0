"""Streams bytes into and out of age v1 files. Knows keys and files, and nothing of tensors; `checkpoint` does those.

    "age-encryption.org/v1"                          one line
    "-> X25519 …" or "-> scrypt …"                   the file key, wrapped once for each recipient or by a passphrase
    "--- …"                                          HMAC over all of the above
    16 bytes nonce, then chunks of 64 KiB + 16       ChaCha20-Poly1305; a flag marks the last one

The library (`pyrage`) does all cryptography. This module reads the header first, so that a hostile file can make the
library neither parse a huge header nor derive a key with gigabytes of memory, and tells the three failures apart:

    WrongKey    the header does not open: wrong key, no key, a passphrase for a file with recipients, a damaged header
    Truncated   the end is missing
    Altered     a chunk is not what was sealed

A cut inside a chunk looks, to the cipher, like an altered one. Therefore a writer pads its content to whole chunks
(`padding`), and an incomplete last chunk then shows a cut.
Format: https://age-encryption.org/v1 (C2SP). Recipients stream; a passphrase works in memory, as the library offers it.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Protocol, Self

import pyrage

from mal_train.atomic import replacing
from mal_train.errors import Altered, ConfigError, Truncated, WrongKey
from mal_train.model.keys import DecryptionKey, EncryptionKey, Passphrase

CHUNK = 64 * 1024
"""Plaintext bytes of a full chunk."""
TAG = 16
NONCE = 16
MAX_HEADER = 64 * 1024
MAX_WORK_FACTOR = 20
"""log2 of scrypt's N; 20 costs 1 GiB of memory, each step more doubles it."""
BUFFER = 1024 * 1024

_VERSION_LINE = b"age-encryption.org/v1\n"
_STANZA = re.compile(rb"-> (?P<type>[!-~]+)(?: [!-~]+)*")
_BODY = re.compile(rb"[A-Za-z0-9+/]{0,64}")
_MAC = re.compile(rb"--- [A-Za-z0-9+/]{43}")
_SCRYPT = re.compile(rb"-> scrypt [A-Za-z0-9+/]{22} (?P<work>[1-9][0-9]{0,2})")
_HEADER_ERRORS = ("Decryption failed", "Header", "No matching keys", "Unknown age format", "Excessive work")
"""How the library's messages begin when the header does not open; the others come from the chunks."""
_LAST_CHUNK_MISSING = "age file is truncated"
_CHUNK_FAILED = "decryption error"


@dataclass(frozen=True)
class Seal:
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


NOT_SEALED = Seal("none")


class Sink(Protocol):
    """Takes content in order. What it gathers may be used only after `SealedFile.read_into` has returned."""

    def write(self, part: bytes, /) -> object:
        """Take the next bytes."""


def padding(size: int) -> int:
    """Bytes to add to `size` so that the content fills whole chunks.

    >>> padding(65_536), padding(65_537), padding(1)
    (0, 65535, 65535)
    """
    return -size % CHUNK


def write_sealed(path: Path, parts: Iterable[memoryview], key: EncryptionKey | None) -> Seal:
    """Write `parts`, one after the other, to `path`: sealed by `key`, bare without one. All or nothing.

    The old file stays until the new one is complete and on disk. To recipients the parts stream, one in memory at a
    time; for a passphrase the library needs the content whole, and its result beside it.

    Raises:
        OutputError: disk full, no permission, folder missing. The old file is intact and no temporary one is left.
        ConfigError: the machine is so fast that the library picks a work factor that readers refuse.
    """
    with replacing(path) as file:
        if key is None:
            for part in parts:
                file.write(part)
        elif key.passphrase is not None:
            file.write(_seal_by_passphrase(b"".join(parts), key.passphrase))
        else:
            kept = _KeptError()
            try:
                pyrage.encrypt_io(_PartsReader(parts, kept), _KeepingFile(file, kept), list(key.recipients))
            except pyrage.EncryptError:
                if kept.error is not None:
                    raise kept.error from None
                raise
    with SealedFile(path) as written:
        return written.seal


def check_encryption_key(key: EncryptionKey | None) -> None:
    """Seal nothing with `key`, once, so that a passphrase this machine cannot use is refused at the start of a run.

    Takes a few seconds and up to 1 GiB for a passphrase, no time for recipients.

    Raises:
        ConfigError: see `write_sealed`.
    """
    if key is not None and key.passphrase is not None:
        _seal_by_passphrase(b"", key.passphrase)


class SealedFile:
    """A file open for reading, sealed or bare: `seal` tells how, `read_into` streams its content.

    Raises when opened:
        FileNotFoundError, PermissionError: as `open` does.
        WrongKey: the age header is malformed, over 64 KiB, or asks for more than scrypt 2^20.
        Truncated: the file ends within its header, or holds no bytes at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as close_on_error:
            self._file = close_on_error.enter_context(path.open("rb", buffering=BUFFER))
            self._hash = hashlib.sha256()
            self.file_bytes = os.fstat(self._file.fileno()).st_size
            if self.file_bytes == 0:
                raise Truncated(f"{path}: the file is empty")
            self.seal = read_seal(self._file, name=str(path))
            close_on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def content_bytes(self) -> int:
        """Bytes of content that a file of this size holds, before any is read; negative if it lacks even a tag."""
        if self.seal.how == "none":
            return self.file_bytes
        payload = self.file_bytes - self.seal.header_bytes - NONCE
        chunks = max(1, -(-payload // (CHUNK + TAG)))
        return payload - chunks * TAG

    def head(self, size: int) -> bytes:
        """The first bytes of the file as it lies there, to say what a foreign one looks like."""
        self._file.seek(0)
        return self._file.read(size)

    def sha256(self) -> str:
        """Of the bytes of the file, as `read_into` read them, hex. To be asked for once it has returned."""
        return self._hash.hexdigest()

    def read_into(self, sink: Sink, key: DecryptionKey | None) -> None:
        """Stream the whole content into `sink`. Only when this returns has the last chunk verified.

        Args:
            sink: gets every byte in order; what it raises comes out unchanged.
            key: must be None for a bare file and must not be None for a sealed one.

        Raises:
            WrongKey: the key does not open the file; or one was given and the file is not sealed, which may mean that
                somebody replaced it.
            Truncated: the end is missing.
            Altered: a chunk is not what was sealed.
        """
        self._hash = hashlib.sha256()
        self._file.seek(0)
        if self.seal.how == "none":
            self._read_bare(sink, key)
            return
        if key is None:
            raise WrongKey(f"{self.path}: {self.seal}; give decryption_key (file:PATH or env:NAME)")
        if self.file_bytes < self.seal.header_bytes + NONCE + TAG:
            raise Truncated(f"{self.path}: the file ends right after its key header")
        if self.seal.how == "passphrase":
            self._read_by_passphrase(sink, key)
        else:
            self._read_by_identity(sink, key)

    def _read_bare(self, sink: Sink, key: DecryptionKey | None) -> None:
        if key is not None:
            raise WrongKey(
                f"{self.path}: a key was given, but the file is not encrypted; it may have been replaced. "
                "To use it as it is, give no key"
            )
        while part := self._file.read(BUFFER):
            self._hash.update(part)
            sink.write(part)

    def _read_by_passphrase(self, sink: Sink, key: DecryptionKey) -> None:
        if key.passphrase is None:
            raise WrongKey(f"{self.path}: {self.seal}; the given key is an identity, give the passphrase")
        sealed = self._file.read()
        self._hash.update(sealed)
        try:
            content = pyrage.passphrase.decrypt(sealed, key.passphrase.reveal())
        except pyrage.DecryptError as error:
            said = str(error)
            if not said.startswith(_HEADER_ERRORS):
                raise self._payload_failure(None, said) from None
            if said.startswith("Excessive work"):
                raise WrongKey(f"{self.path}: {self.seal}; that is too much work for this machine") from None
            raise WrongKey(f"{self.path}: the passphrase does not open it, or its key header is damaged") from None
        sink.write(content)

    def _read_by_identity(self, sink: Sink, key: DecryptionKey) -> None:
        if not key.identities:
            raise WrongKey(f"{self.path}: {self.seal}; a passphrase does not open it, give the identity")
        kept = _KeptError()
        counted = _CountingSink(sink, kept)
        try:
            pyrage.decrypt_io(_HashedFile(self._file, self._hash, kept), counted, list(key.identities))
        except (pyrage.DecryptError, OSError) as error:
            if kept.error is not None:
                raise kept.error from None
            if isinstance(error, OSError):
                raise self._payload_failure(counted.count, str(error)) from None
            raise WrongKey(f"{self.path}: the identity does not open it, or its key header is damaged") from None
        self._hash.update(self._file.read())  # nothing, unless the library leaves bytes behind the last chunk unread

    def _payload_failure(self, verified_bytes: int | None, said: str) -> Truncated | Altered:
        """Truncated when only the last chunk failed and it is incomplete, or when it is no last chunk; else Altered."""
        payload = self.file_bytes - self.seal.header_bytes - NONCE
        last = (payload - 1) // (CHUNK + TAG)
        failed = last if verified_bytes is None else verified_bytes // CHUNK
        cut_inside = said == _CHUNK_FAILED and failed == last and payload % (CHUNK + TAG) != 0
        if said == _LAST_CHUNK_MISSING or cut_inside:
            return Truncated(f"{self.path}: the end of the file is missing; copy or make it again")
        where = "its content" if verified_bytes is None else f"chunk {failed + 1} of {last + 1}"
        return Altered(f"{self.path}: {where} is not what was sealed; do not use the file")


def read_seal(file: BinaryIO, name: str = "file") -> Seal:
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
    return Seal("recipients", recipients=len(wrapped), header_bytes=header_bytes)


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


def _passphrase_seal(stanzas: list[bytes], header_bytes: int, name: str) -> Seal:
    match = _SCRYPT.fullmatch(stanzas[0])
    if len(stanzas) != 1 or match is None:
        raise WrongKey(f"{name}: its passphrase header is damaged (it must stand alone and state a work factor)")
    work_factor = int(match["work"])
    if work_factor > MAX_WORK_FACTOR:
        raise WrongKey(
            f"{name}: its passphrase header asks for scrypt 2^{work_factor}; more than 2^{MAX_WORK_FACTOR} is refused, "
            "because it takes gigabytes of memory"
        )
    return Seal("passphrase", work_factor=work_factor, header_bytes=header_bytes)


def _seal_by_passphrase(content: bytes, passphrase: Passphrase) -> bytes:
    sealed: bytes = pyrage.passphrase.encrypt(content, passphrase.reveal())
    try:
        read_seal(io.BytesIO(sealed))
    except WrongKey:
        raise ConfigError(
            f"encryption_key: this machine is so fast that its passphrase files ask for more than scrypt "
            f"2^{MAX_WORK_FACTOR}, which readers refuse; use a recipient (age1…) instead"
        ) from None
    return sealed


class _KeptError:
    """Remembers what was raised within `with kept:`. The library flattens errors of its streams into text."""

    error: BaseException | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.error = self.error or error


class _PartsReader:
    """A readable stream over buffers, in the small steps in which the library reads."""

    def __init__(self, parts: Iterable[memoryview], kept: _KeptError) -> None:
        self._parts: Iterator[memoryview] = iter(parts)
        self._kept = kept
        self._part = memoryview(b"")
        self._at = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        while self._at == len(self._part):
            with self._kept:
                part = next(self._parts, None)
            if part is None:
                return b""
            self._part, self._at = part, 0
        piece = bytes(self._part[self._at : self._at + size])
        self._at += len(piece)
        return piece


class _KeepingFile:
    """A file for the library to write, whose errors are remembered."""

    def __init__(self, file: BinaryIO, kept: _KeptError) -> None:
        self._file = file
        self._kept = kept

    def write(self, data: bytes) -> int:
        """As the file does."""
        with self._kept:
            return self._file.write(data)

    def flush(self) -> None:
        """Left to `replacing`, which syncs once."""


class _HashedFile:
    """A file for the library to read, whose bytes are hashed and whose errors are remembered.

    The library reads and writes 8 KiB at a time: what happens here happens a hundred thousand times a gigabyte.
    """

    def __init__(self, file: BinaryIO, digest: "hashlib._Hash", kept: _KeptError) -> None:
        self._read, self._update, self._kept = file.read, digest.update, kept

    def read(self, size: int) -> bytes:
        """As the file does."""
        try:
            part = self._read(size)
        # Whatever it is: the library would make text of it.
        except BaseException as error:
            self._kept.error = self._kept.error or error
            raise
        self._update(part)
        return part


class _CountingSink:
    """A writable stream that counts: every byte that arrives belongs to a chunk that has verified."""

    def __init__(self, sink: Sink, kept: _KeptError) -> None:
        self._sink = sink
        self._kept = kept
        self.count = 0

    def write(self, part: bytes) -> int:
        """Pass on."""
        try:
            self._sink.write(part)
        # Whatever it is: the library would make text of it.
        except BaseException as error:
            self._kept.error = self._kept.error or error
            raise
        size = len(part)
        self.count += size
        return size

    def flush(self) -> None:
        """Nothing is held back."""
