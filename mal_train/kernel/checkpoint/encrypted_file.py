"""Streams bytes into and out of age v1 files. Knows keys and files, nothing of tensors; `checkpoint` knows those.

    header   "age-encryption.org/v1"                 one line
             "-> X25519 …" or "-> scrypt …"          the file key, wrapped for each recipient or by a passphrase
             "--- …"                                 HMAC of the lines above
    payload  16 bytes nonce                          followed by
             chunks of 64 KiB + 16 bytes             ChaCha20-Poly1305; a flag marks the last chunk

The library (`pyrage`) does all cryptography. `age_header` checks the header first, so that a hostile file can make the
library neither parse a huge header nor derive a key with gigabytes of memory. A file fails in one of three ways:

    WrongKey    the header cannot be decrypted: wrong key, no key, wrong type of key, or a damaged header
    Truncated   the end is missing
    Altered     a chunk fails authentication

The cipher cannot distinguish a chunk that was cut short from one that was altered. A writer therefore pads its content
to full chunks (`chunk_padding`); an incomplete last chunk then means a truncated file.
Format: https://age-encryption.org/v1 (C2SP). Recipients stream; passphrases work in memory, as the library offers it.
"""

import hashlib
import io
import os
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

import pyrage

from mal_train.core.atomic_io import atomic_write
from mal_train.core.errors import Altered, ConfigError, Truncated, WrongKey
from mal_train.core.input_files import open_regular
from mal_train.kernel.checkpoint.age_header import MAX_WORK_FACTOR, EncryptionInfo, read_encryption_info
from mal_train.kernel.checkpoint.age_streams import (
    BufferReader,
    CountingWriter,
    FileWriter,
    Sink,
    StreamError,
    hashed_blocks,
)
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, Passphrase
from mal_train.kernel.checkpoint.trust import NO_POLICY, TrustPolicy

CHUNK = 64 * 1024
"""Plaintext bytes of a full chunk."""
TAG = 16
NONCE = 16
BUFFER = 1024 * 1024

_HEADER_ERRORS = ("Decryption failed", "Header", "No matching keys", "Unknown age format", "Excessive work")
"""Beginnings of the library's messages about the header; all other messages are about chunks."""
_LAST_CHUNK_MISSING = "age file is truncated"
_CHUNK_FAILED = "decryption error"


def chunk_padding(size: int) -> int:
    """Returns the number of bytes to add to `size` so that the content fills whole chunks.

    >>> chunk_padding(65_536), chunk_padding(65_537), chunk_padding(1)
    (0, 65535, 65535)
    """
    return -size % CHUNK


def write_encrypted(
    path: Path, buffers: Iterable[memoryview], key: EncryptionKey | None, *, mode: int = 0o666, overwrite: bool = True
) -> EncryptionInfo:
    """Writes the concatenated buffers to `path` and returns the encryption; without a key the file is plain.

    The write is atomic: an old file stays until the new one is complete and on disk. With recipients, one buffer at a
    time is in memory; with a passphrase, the complete content and its ciphertext are. `mode` and `overwrite` are those
    of `atomic_write`.

    Raises:
        OutputError: disk full, no permission, folder missing. The old file is intact and no temporary file is left.
        ConfigError: on this machine the library picks a scrypt work factor above the limit of readers.
    """
    with atomic_write(path, mode=mode, overwrite=overwrite) as file:
        if key is None:
            for buffer in buffers:
                file.write(buffer)
        elif key.passphrase is not None:
            file.write(_encrypt_with_passphrase(b"".join(buffers), key.passphrase))
        else:
            stream = StreamError()
            try:
                pyrage.encrypt_io(BufferReader(buffers, stream), FileWriter(file, stream), list(key.recipients))
            except pyrage.EncryptError:
                if stream.error is not None:
                    raise stream.error from None
                raise
    with EncryptedFile(path) as written:
        return written.encryption


def check_encryption_key(key: EncryptionKey | None) -> None:
    """Encrypts an empty message, so that a passphrase this machine cannot use is refused at the start of a run.

    Takes a few seconds and up to 1 GiB of memory for a passphrase, nothing for recipients.

    Raises:
        ConfigError: see `write_encrypted`.
    """
    if key is not None and key.passphrase is not None:
        _encrypt_with_passphrase(b"", key.passphrase)


class EncryptedFile:
    """A file open for reading, encrypted or plain. `encryption` describes it and `read_into` streams its content.

    Args:
        path: the file.
        trust: what the file must have before anything of it is parsed.

    Raises on construction:
        OSError: the file cannot be opened.
        Untrusted: the file does not have it.
        WrongKey: the age header is malformed, over 64 KiB, or asks for more than scrypt 2^20.
        Truncated: the file is empty or ends within its header.
    """

    def __init__(self, path: Path, trust: TrustPolicy = NO_POLICY) -> None:
        self.path = path
        with ExitStack() as close_on_error:
            self._file = close_on_error.enter_context(open_regular(path, BUFFER))
            self._hash = hashlib.sha256()
            self.file_bytes = os.fstat(self._file.fileno()).st_size
            if self.file_bytes == 0:
                raise Truncated(f"{path}: the file is empty")
            self._trusted_sha256 = trust.check(path, self._file)
            self.encryption = read_encryption_info(self._file, name=str(path))
            close_on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def content_bytes(self) -> int:
        """Content size of a complete file of this size, in bytes; negative if the file has no room for one tag."""
        if self.encryption.mode == "none":
            return self.file_bytes
        payload = self.file_bytes - self.encryption.header_bytes - NONCE
        chunks = max(1, -(-payload // (CHUNK + TAG)))
        return payload - chunks * TAG

    def first_bytes(self, size: int) -> bytes:
        """Returns the first bytes on disk, by which foreign formats are recognized."""
        self._file.seek(0)
        return self._file.read(size)

    def sha256(self) -> str:
        """Returns the SHA-256 of the file as the last `read_into` read it, in hex. Call it once that has returned."""
        return self._hash.hexdigest()

    def read_into(self, sink: Sink, key: DecryptionKey | None) -> None:
        """Streams the content into `sink`. The content is authenticated only when this returns.

        Args:
            sink: receives every byte in order; its exceptions propagate unchanged.
            key: None for a plain file, and only for one.

        Raises:
            WrongKey: the key does not decrypt the file, or a key was given for a plain file, which may have been
                replaced.
            Truncated: the end is missing.
            Altered: a chunk fails authentication, or the file has changed since `trust` was checked.
        """
        self._hash = hashlib.sha256()
        self._file.seek(0)
        self._read(sink, key)
        if self._trusted_sha256 not in (None, self.sha256()):
            raise Altered(f"{self.path}: changed while it was read; load it again once it is complete")

    def _read(self, sink: Sink, key: DecryptionKey | None) -> None:
        if self.encryption.mode == "none":
            self._read_plain(sink, key)
            return
        if key is None:
            raise WrongKey(f"{self.path}: {self.encryption}; give decryption_key (file:PATH or env:NAME)")
        if self.file_bytes < self.encryption.header_bytes + NONCE + TAG:
            raise Truncated(f"{self.path}: the file ends right after its header")
        if self.encryption.mode == "passphrase":
            self._read_by_passphrase(sink, key)
        else:
            self._read_by_identity(sink, key)

    def _read_plain(self, sink: Sink, key: DecryptionKey | None) -> None:
        if key is not None:
            raise WrongKey(
                f"{self.path}: a key was given, but the file is not encrypted and may have been replaced; to use it "
                "anyway, give no key"
            )
        with closing(hashed_blocks(self._file, self._hash)) as blocks:
            for block in blocks:
                sink.write(block)

    def _read_by_passphrase(self, sink: Sink, key: DecryptionKey) -> None:
        if key.passphrase is None:
            raise WrongKey(f"{self.path}: {self.encryption}; the key is an identity; give the passphrase")
        ciphertext = self._file.read()
        self._hash.update(ciphertext)
        try:
            content = pyrage.passphrase.decrypt(ciphertext, key.passphrase.reveal())
        except pyrage.DecryptError as error:
            message = str(error)
            if not message.startswith(_HEADER_ERRORS):
                raise self._payload_error(None, message) from None
            if message.startswith("Excessive work"):
                raise WrongKey(f"{self.path}: {self.encryption}; too much work for this machine") from None
            raise WrongKey(f"{self.path}: wrong passphrase, or the header is damaged") from None
        del ciphertext  # the sink needs the memory
        sink.write(content)

    def _read_by_identity(self, sink: Sink, key: DecryptionKey) -> None:
        if not key.identities:
            raise WrongKey(f"{self.path}: {self.encryption}; the key is a passphrase; give the identity")
        stream = StreamError()
        writer = CountingWriter(sink, stream)
        with closing(hashed_blocks(self._file, self._hash)) as blocks:
            try:
                pyrage.decrypt_io(BufferReader(blocks, stream), writer, list(key.identities))
            except (pyrage.DecryptError, OSError) as error:
                if stream.error is not None:
                    raise stream.error from None
                if isinstance(error, OSError):
                    raise self._payload_error(writer.count, str(error)) from None
                raise WrongKey(f"{self.path}: wrong identity, or the header is damaged") from None
            for _ in blocks:  # none, unless the library leaves bytes after the last chunk unread
                pass

    def _payload_error(self, verified_bytes: int | None, message: str) -> Truncated | Altered:
        """Returns Truncated if the last chunk is missing, or if it alone failed and is incomplete; else Altered."""
        payload = self.file_bytes - self.encryption.header_bytes - NONCE
        last = (payload - 1) // (CHUNK + TAG)
        failed = last if verified_bytes is None else verified_bytes // CHUNK
        cut_inside = message == _CHUNK_FAILED and failed == last and payload % (CHUNK + TAG) != 0
        if message == _LAST_CHUNK_MISSING or cut_inside:
            return Truncated(f"{self.path}: the end of the file is missing; copy or create it again")
        part = "the content" if verified_bytes is None else f"chunk {failed + 1} of {last + 1}"
        return Altered(f"{self.path}: {part} fails authentication; the file was altered, do not use it")


def _encrypt_with_passphrase(content: bytes, passphrase: Passphrase) -> bytes:
    ciphertext: bytes = pyrage.passphrase.encrypt(content, passphrase.reveal())
    try:
        read_encryption_info(io.BytesIO(ciphertext))
    except WrongKey:
        raise ConfigError(
            f"encryption_key: on this machine the age library picks a scrypt work factor above 2^{MAX_WORK_FACTOR}, "
            "which readers refuse; use a recipient (age1…) instead"
        ) from None
    return ciphertext
