"""Streams bytes into and out of age v1 files. Knows keys and files, and nothing of tensors; `checkpoint` does those.

    "age-encryption.org/v1"                          one line
    "-> X25519 …" or "-> scrypt …"                   the file key, wrapped once for each recipient or by a passphrase
    "--- …"                                          HMAC over all of the above
    16 bytes nonce, then chunks of 64 KiB + 16       ChaCha20-Poly1305; a flag marks the last one

The library (`pyrage`) does all cryptography. The header is read first (`age_header`), so that a hostile file can make
the library neither parse a huge header nor derive a key with gigabytes of memory. Three failures are told apart:

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
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pyrage

from mal_train.core.atomic_io import atomic_write
from mal_train.core.errors import Altered, ConfigError, Truncated, WrongKey
from mal_train.kernel.checkpoint.age_header import MAX_WORK_FACTOR, SealInfo, read_seal
from mal_train.kernel.checkpoint.age_streams import CountingSink, HashedFile, KeepingFile, KeptError, PartsReader, Sink
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, Passphrase

CHUNK = 64 * 1024
"""Plaintext bytes of a full chunk."""
TAG = 16
NONCE = 16
BUFFER = 1024 * 1024

_HEADER_ERRORS = ("Decryption failed", "Header", "No matching keys", "Unknown age format", "Excessive work")
"""How the library's messages begin when the header does not open; the others come from the chunks."""
_LAST_CHUNK_MISSING = "age file is truncated"
_CHUNK_FAILED = "decryption error"


def padding(size: int) -> int:
    """Bytes to add to `size` so that the content fills whole chunks.

    >>> padding(65_536), padding(65_537), padding(1)
    (0, 65535, 65535)
    """
    return -size % CHUNK


def write_sealed(path: Path, parts: Iterable[memoryview], key: EncryptionKey | None) -> SealInfo:
    """Write `parts`, one after the other, to `path`: sealed by `key`, bare without one. All or nothing.

    The old file stays until the new one is complete and on disk. To recipients the parts stream, one in memory at a
    time; for a passphrase the library needs the content whole, and its result beside it.

    Raises:
        OutputError: disk full, no permission, folder missing. The old file is intact and no temporary one is left.
        ConfigError: the machine is so fast that the library picks a work factor that readers refuse.
    """
    with atomic_write(path) as file:
        if key is None:
            for part in parts:
                file.write(part)
        elif key.passphrase is not None:
            file.write(_seal_by_passphrase(b"".join(parts), key.passphrase))
        else:
            kept = KeptError()
            try:
                pyrage.encrypt_io(PartsReader(parts, kept), KeepingFile(file, kept), list(key.recipients))
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
        del sealed  # what the sink makes of the content needs the room
        sink.write(content)

    def _read_by_identity(self, sink: Sink, key: DecryptionKey) -> None:
        if not key.identities:
            raise WrongKey(f"{self.path}: {self.seal}; a passphrase does not open it, give the identity")
        kept = KeptError()
        counted = CountingSink(sink, kept)
        try:
            pyrage.decrypt_io(HashedFile(self._file, self._hash, kept), counted, list(key.identities))
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
