"""Encrypted files: every damage raises its own error, hostile files cost no memory, and other programs read them."""

import errno
import itertools
import os
import random
import resource
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyrage
import pytest

from mal_train.core.errors import Altered, CheckpointError, ConfigError, OutputError, Truncated, WrongKey
from mal_train.kernel.checkpoint import encrypted_file
from mal_train.kernel.checkpoint.encrypted_file import (
    CHUNK,
    EncryptedFile,
    check_encryption_key,
    chunk_padding,
    write_encrypted,
)
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, parse_key
from tests.mal_train.kernel.checkpoint import age_by_hand
from tests.mal_train.kernel.checkpoint.key_pair import DECRYPTION_KEY, ENCRYPTION_KEY, identity_key

PASSPHRASE = "not a secret"
CHUNKS = 5


class Collected(bytearray):
    """A sink that collects bytes."""

    write = bytearray.extend


def passphrase_key(text: str = PASSPHRASE) -> DecryptionKey:
    key = parse_key(text, purpose="decryption", source="environment")
    assert key is not None
    return key


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def write(path: Path, data: bytes, key: EncryptionKey | None = ENCRYPTION_KEY) -> Path:
    write_encrypted(path, [memoryview(data)], key)
    return path


def read(path: Path, key: DecryptionKey | None = DECRYPTION_KEY) -> bytes:
    sink = Collected()
    with EncryptedFile(path) as file:
        file.read_into(sink, key)
    return bytes(sink)


def read_error(path: Path, key: DecryptionKey | None = DECRYPTION_KEY) -> type[CheckpointError] | None:
    """Returns the class of the error that reading raises; None if the file can be read."""
    try:
        read(path, key)
    except CheckpointError as error:
        return type(error)
    return None


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    """A file of five full chunks; every checkpoint is padded to full chunks."""
    return write(tmp_path / "f.age", content(CHUNKS * CHUNK))


def header_bytes(path: Path) -> int:
    with EncryptedFile(path) as file:
        return file.encryption.header_bytes


def in_place(path: Path, changes: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Flips one bit (position, bit) at a time, and restores it after each."""
    with path.open("r+b", buffering=0) as file:
        for position, bit in changes:
            file.seek(position)
            old = file.read(1)
            file.seek(position)
            file.write(bytes([old[0] ^ (1 << bit)]))
            yield position, bit
            file.seek(position)
            file.write(old)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_content_survives_a_round_trip(tmp_path: Path, size: int) -> None:
    data = content(size)
    path = write(tmp_path / "f", data)
    assert read(path) == data
    with EncryptedFile(path) as file:
        assert file.content_bytes == size
        assert (file.encryption.mode, file.encryption.recipients) == ("recipients", 1)


def test_buffers_of_any_size_are_concatenated(tmp_path: Path) -> None:
    parts = [content(size, seed=size) for size in (0, 1, 8191, 8192, 8193, 100_000, 0, 3)]
    write_encrypted(tmp_path / "f", map(memoryview, parts), ENCRYPTION_KEY)
    assert read(tmp_path / "f") == b"".join(parts)


def test_every_recipient_can_decrypt_and_no_other_key(tmp_path: Path) -> None:
    pairs = [identity_key() for _ in range(3)]
    both = EncryptionKey("two", recipients=pairs[0][0].recipients + pairs[1][0].recipients)
    path = write(tmp_path / "f", b"abc", both)
    assert [read_error(path, decryption_key) for _, decryption_key in pairs] == [None, None, WrongKey]
    with EncryptedFile(path) as file:
        assert file.encryption.recipients == 2


def test_without_a_key_the_file_is_plain_and_reported_so(tmp_path: Path) -> None:
    made = write_encrypted(tmp_path / "f", [memoryview(b"plain")], None)
    assert made.mode == "none"
    assert (tmp_path / "f").read_bytes() == b"plain"
    assert read(tmp_path / "f", None) == b"plain"


def test_a_plain_file_in_place_of_an_encrypted_one_is_refused(tmp_path: Path) -> None:
    assert read_error(write(tmp_path / "f", b"planted", None)) is WrongKey


def test_files_are_compatible_with_the_age_library(tmp_path: Path) -> None:
    data = content(2 * CHUNK + 5)
    path = write(tmp_path / "f", data)
    assert pyrage.decrypt(path.read_bytes(), list(DECRYPTION_KEY.identities)) == data
    (tmp_path / "g").write_bytes(pyrage.encrypt(data, list(ENCRYPTION_KEY.recipients)))
    assert read(tmp_path / "g") == data


def test_a_passphrase_encrypted_file_survives_a_round_trip(tmp_path: Path) -> None:
    """The only real key derivation: it takes seconds and up to a gigabyte, as the library chooses."""
    key = parse_key(PASSPHRASE, purpose="encryption", source="environment")
    assert key is not None
    made = write_encrypted(tmp_path / "f", [memoryview(b"abc"), memoryview(b"def")], key)
    assert made.mode == "passphrase"
    assert read(tmp_path / "f", key.decryption_key) == b"abcdef"


def test_the_ciphertext_is_freed_before_the_content_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE) + bytes(8 * CHUNK))
    monkeypatch.setattr(pyrage.passphrase, "decrypt", lambda data, passphrase: b"content")
    held: list[int] = []

    class Weighing:
        def write(self, _: object) -> None:
            held.append(tracemalloc.get_traced_memory()[0])

    with EncryptedFile(tmp_path / "f") as file:
        tracemalloc.start()
        try:
            file.read_into(Weighing(), passphrase_key())
        finally:
            tracemalloc.stop()
    assert held[0] < CHUNK


def test_a_file_written_from_the_specification_is_read(tmp_path: Path) -> None:
    data = content(CHUNK + 100)
    (tmp_path / "f").write_bytes(age_by_hand.encrypt(data, PASSPHRASE))
    assert read(tmp_path / "f", passphrase_key()) == data


@pytest.mark.parametrize("size", [0, 1, 100, CHUNK])
def test_an_age_file_without_padding_is_read(tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.encrypt(bytes(size), PASSPHRASE))
    assert read(tmp_path / "f", passphrase_key()) == bytes(size)


FULL, SHORT = bytes(CHUNK), bytes(100)
SHORT_BY = 1000
STRUCTURES: list[tuple[str, list[bytes], int | None, type[CheckpointError]]] = [
    ("final chunk empty after a full one", [FULL, b""], None, Altered),
    ("no final chunk", [FULL, FULL], 9, Truncated),
    ("a chunk after the final one", [FULL, FULL], 0, Altered),
    ("short chunk in the middle, complete in size", [FULL[:-SHORT_BY], FULL[: SHORT_BY - 16]], None, Altered),
    ("short chunk in the middle, of the size of a cut file", [SHORT, FULL], None, Truncated),
    ("final flag on all but the last", [FULL, FULL, FULL], 1, Altered),
]


@pytest.mark.parametrize(("parts", "last", "error"), [case[1:] for case in STRUCTURES], ids=[c[0] for c in STRUCTURES])
def test_a_payload_of_wrong_structure_is_refused(
    tmp_path: Path, parts: list[bytes], last: int | None, error: type[CheckpointError]
) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE) + age_by_hand.payload(parts, last=last))
    assert read_error(tmp_path / "f", passphrase_key()) is error


@pytest.mark.parametrize(
    "work", [b"", b"0", b"01", b"+1", b"0x1", b"1 1", b"-1", b"a", b"21", b"22", b"63", b"999", b"1" * 30]
)
def test_an_invalid_or_expensive_work_factor_is_refused_before_any_work(
    tmp_path: Path, work: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE, work_factor=work) + age_by_hand.payload([b"x"]))
    # The library would do the work, so it must not be called.
    monkeypatch.setattr(encrypted_file, "pyrage", None)
    assert read_error(tmp_path / "f", passphrase_key()) is WrongKey


def test_the_error_names_an_expensive_work_factor_and_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encrypted_file, "pyrage", None)
    (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE, work_factor=b"24") + age_by_hand.payload([b"x"]))
    with pytest.raises(WrongKey, match=r"2\^24.*2\^20"):
        read(tmp_path / "f", passphrase_key())


def test_a_second_stanza_beside_a_passphrase_is_refused(tmp_path: Path) -> None:
    for extra in (b"-> scrypt AAAAAAAAAAAAAAAAAAAAAA 30\n" + b"A" * 43 + b"\n", b"-> x-grease a\n\n"):
        (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE, extra=extra) + age_by_hand.payload([b"x"]))
        assert read_error(tmp_path / "f", passphrase_key()) is WrongKey


def test_a_header_over_64_kib_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encrypted_file, "pyrage", None)
    stanza = b"-> X25519 " + b"A" * 43 + b"\n" + b"A" * 43 + b"\n"
    (tmp_path / "f").write_bytes(b"age-encryption.org/v1\n" + stanza * 5000)
    with pytest.raises(WrongKey, match="65536"):
        read(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"age-encryption.org/v1\n-> X25519 " + b"A" * 200_000)
    with pytest.raises(WrongKey, match="65536"):
        read(tmp_path / "f")


def test_a_file_with_many_recipients_within_the_header_limit_is_read(tmp_path: Path) -> None:
    many = EncryptionKey("many", recipients=identity_key()[0].recipients * 300 + ENCRYPTION_KEY.recipients)
    assert read(write(tmp_path / "f", b"abc", many)) == b"abc"


def test_wrong_key_is_reported_as_wrong_key_not_as_corruption(encrypted: Path) -> None:
    with pytest.raises(WrongKey, match="identity"):
        read(encrypted, identity_key()[1])


def test_a_missing_key_is_reported_with_the_setting_that_needs_it(encrypted: Path) -> None:
    with pytest.raises(WrongKey, match=r"1 recipient.*decryption_key"):
        read(encrypted, None)


def test_passphrase_for_a_recipient_file_asks_for_the_identity(encrypted: Path) -> None:
    with pytest.raises(WrongKey, match="identity"):
        read(encrypted, passphrase_key())


def test_identity_for_a_passphrase_file_asks_for_the_passphrase(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.encrypt(b"abc", PASSPHRASE))
    with pytest.raises(WrongKey, match="passphrase"):
        read(tmp_path / "f")


def test_wrong_passphrase_is_reported_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.encrypt(b"abc", PASSPHRASE))
    with pytest.raises(WrongKey, match="passphrase") as caught:
        read(tmp_path / "f", passphrase_key("another one"))
    assert "another one" not in str(caught.value)


@pytest.mark.promise("checkpoints", "Any flipped bit in the header of an encrypted checkpoint is a wrong key")
def test_every_flipped_bit_of_a_recipient_header_is_a_wrong_key(encrypted: Path, record: Callable[..., None]) -> None:
    changes = itertools.product(range(header_bytes(encrypted)), range(8))
    errors = Counter(read_error(encrypted) for _ in in_place(encrypted, changes))
    record("flipped bits of a header", cases=errors.total(), undetected=errors[None])
    assert errors.keys() == {WrongKey}


def test_every_flipped_bit_of_a_passphrase_header_is_a_wrong_key(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(age_by_hand.encrypt(bytes(10), PASSPHRASE))
    key = passphrase_key()
    changes = itertools.product(range(header_bytes(path)), range(8))
    assert {read_error(path, key) for _ in in_place(path, changes)} == {WrongKey}


def check_cuts(path: Path, count: int, key: DecryptionKey = DECRYPTION_KEY) -> int:
    """Cuts a file at every critical byte and at `count` random ones; returns the number of cuts."""
    rng = random.Random(6)
    size, start = path.stat().st_size, header_bytes(path)
    cuts = [0, 1, 21, 22, 23, start - 1, start, start + 15, start + 16, start + 17, start + 32, size - 1, size - 16]
    cuts += [start + 16 + k * (CHUNK + 16) + off for k in range(CHUNKS) for off in (-1, 0, 1) if k or off > 0]
    cuts += list(range(start)) + [rng.randrange(size) for _ in range(count)]
    found = []
    for cut in sorted(set(cuts), reverse=True):
        os.truncate(path, cut)
        found.append(read_error(path, key))
    assert set(found) == {Truncated}
    return len(found)


@pytest.mark.promise("checkpoints", "Any flipped bit in the content of an encrypted checkpoint is an alteration")
def test_flipped_bits_of_the_content_are_an_alteration(encrypted: Path, record: Callable[..., None]) -> None:
    rng = random.Random(5)
    start, end = header_bytes(encrypted), encrypted.stat().st_size
    changes = ((rng.randrange(start, end), rng.randrange(8)) for _ in range(3000))
    errors = Counter(read_error(encrypted) for _ in in_place(encrypted, changes))
    record("flipped bits of content", cases=errors.total(), undetected=errors[None])
    assert errors.keys() == {Altered}


@pytest.mark.promise("checkpoints", "An encrypted checkpoint that is cut anywhere is refused as truncated")
def test_cuts_anywhere_are_a_truncation(encrypted: Path, record: Callable[..., None]) -> None:
    record("cuts", cases=check_cuts(encrypted, 2000), undetected=0)


def test_cuts_of_a_passphrase_file_are_a_truncation(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.encrypt(bytes(CHUNKS * CHUNK), PASSPHRASE))
    check_cuts(tmp_path / "f", 50, passphrase_key())


@pytest.mark.promise("checkpoints", "The chunks of an encrypted checkpoint in any other order are refused")
def test_every_other_order_of_five_chunks_is_an_alteration(encrypted: Path, record: Callable[..., None]) -> None:
    data = encrypted.read_bytes()
    start = header_bytes(encrypted) + 16
    chunks = [data[at : at + CHUNK + 16] for at in range(start, len(data), CHUNK + 16)]
    assert len(chunks) == CHUNKS
    found = Counter[type[CheckpointError] | None]()
    for order in itertools.permutations(range(CHUNKS)):
        encrypted.write_bytes(data[:start] + b"".join(chunks[i] for i in order))
        if order != tuple(range(CHUNKS)):
            found[read_error(encrypted)] += 1
    record("orders of chunks", cases=found.total(), undetected=found[None])
    assert found.keys() - {None} == {Altered}
    assert found[None] == 0


@pytest.mark.parametrize("tail", [b"\0", bytes(16), bytes(CHUNK + 16), b"x" * 100_000])
def test_appended_bytes_are_an_alteration(encrypted: Path, tail: bytes) -> None:
    with encrypted.open("ab") as file:
        file.write(tail)
    assert read_error(encrypted) is Altered


def test_chunk_of_another_file_is_an_alteration(tmp_path: Path, encrypted: Path) -> None:
    other = write(tmp_path / "other", content(CHUNKS * CHUNK)).read_bytes()
    mine = bytearray(encrypted.read_bytes())
    mine[-CHUNK - 16 :] = other[-CHUNK - 16 :]
    encrypted.write_bytes(mine)
    assert read_error(encrypted) is Altered


def test_empty_file_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert read_error(tmp_path / "f") is Truncated


def test_an_exception_of_the_sink_propagates_unchanged(encrypted: Path) -> None:
    class Refusing:
        def write(self, data: bytes | memoryview) -> None:
            raise OSError(errno.EIO, "sink")

    with EncryptedFile(encrypted) as file, pytest.raises(OSError, match="sink"):
        file.read_into(Refusing(), DECRYPTION_KEY)


def test_an_exception_of_a_buffer_propagates_unchanged_and_leaves_no_file(tmp_path: Path) -> None:
    def parts() -> Iterator[memoryview]:
        yield memoryview(b"abc")
        raise CheckpointError("no such dtype")

    with pytest.raises(CheckpointError, match="no such dtype"):
        write_encrypted(tmp_path / "f", parts(), ENCRYPTION_KEY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [ENCRYPTION_KEY, None], ids=["encrypted", "plain"])
def test_full_disk_is_an_output_error_and_keeps_the_old_file(tmp_path: Path, key: EncryptionKey | None) -> None:
    path = write(tmp_path / "f", b"old", key)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OutputError, match=os.strerror(errno.EFBIG)):
            write(path, content(3 << 20), key)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def _fail_with(code: int) -> Callable[[int], None]:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_no_space_at_the_sync_is_an_output_error_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "f", b"old")
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", _fail_with(errno.ENOSPC))
    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
        write(path, b"new")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=os.strerror(errno.ENOENT)):
        write(tmp_path / "missing" / "f", b"abc")


def test_a_machine_too_fast_for_passphrases_is_reported_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    costly = age_by_hand.header(PASSPHRASE, work_factor=b"21") + age_by_hand.payload([b""])
    monkeypatch.setattr(pyrage.passphrase, "encrypt", lambda content, passphrase: costly)
    key = parse_key(PASSPHRASE, purpose="encryption", source="environment")
    with pytest.raises(ConfigError, match="encryption_key"):
        check_encryption_key(key)
    check_encryption_key(ENCRYPTION_KEY)
    check_encryption_key(None)


def test_padding_fills_the_last_chunk() -> None:
    assert all(
        (size + chunk_padding(size)) % CHUNK == 0 and 0 <= chunk_padding(size) < CHUNK
        for size in range(0, 3 * CHUNK, 1021)
    )
