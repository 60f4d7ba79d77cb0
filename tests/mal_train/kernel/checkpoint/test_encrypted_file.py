"""Bytes in and out of age files: damages are found and told apart, nothing hostile costs memory, others read them."""

import errno
import itertools
import os
import random
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyrage
import pytest

from mal_train.core.errors import Altered, CheckpointError, ConfigError, OutputError, Truncated, WrongKey
from mal_train.kernel.checkpoint import encrypted_file
from mal_train.kernel.checkpoint.encrypted_file import CHUNK, SealedFile, check_encryption_key, padding, write_sealed
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, parse_key
from tests.mal_train.kernel.checkpoint import age_by_hand
from tests.mal_train.kernel.checkpoint.key_pair import OPENS, SEALS, identity_key

PASSPHRASE = "not a secret"
CHUNKS = 5


class Collected(bytearray):
    """A sink that keeps what comes."""

    write = bytearray.extend


def passphrase_key(text: str = PASSPHRASE) -> DecryptionKey:
    key = parse_key(text, purpose="decryption", where="environment")
    assert key is not None
    return key


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def seal(path: Path, data: bytes, key: EncryptionKey | None = SEALS) -> Path:
    write_sealed(path, [memoryview(data)], key)
    return path


def opened(path: Path, key: DecryptionKey | None = OPENS) -> bytes:
    sink = Collected()
    with SealedFile(path) as file:
        file.read_into(sink, key)
    return bytes(sink)


def failure(path: Path, key: DecryptionKey | None = OPENS) -> type[CheckpointError] | None:
    """The class that opening raises; None if it opens."""
    try:
        opened(path, key)
    except CheckpointError as error:
        return type(error)
    return None


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A file of five full chunks, as every checkpoint is padded to full chunks."""
    return seal(tmp_path / "f.age", content(CHUNKS * CHUNK))


def header_bytes(path: Path) -> int:
    with SealedFile(path) as file:
        return file.seal.header_bytes


def in_place(path: Path, changes: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Flips one bit at a time, (position, bit), and takes it back."""
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
def test_content_comes_back(tmp_path: Path, size: int) -> None:
    data = content(size)
    path = seal(tmp_path / "f", data)
    assert opened(path) == data
    with SealedFile(path) as file:
        assert file.content_bytes == size
        assert str(file.seal) == "sealed for 1 recipient"


def test_parts_of_any_size_join(tmp_path: Path) -> None:
    parts = [content(size, seed=size) for size in (0, 1, 8191, 8192, 8193, 100_000, 0, 3)]
    write_sealed(tmp_path / "f", map(memoryview, parts), SEALS)
    assert opened(tmp_path / "f") == b"".join(parts)


def test_every_recipient_opens_and_nobody_else(tmp_path: Path) -> None:
    pairs = [identity_key() for _ in range(3)]
    both = EncryptionKey("two", recipients=pairs[0][0].recipients + pairs[1][0].recipients)
    path = seal(tmp_path / "f", b"abc", both)
    assert [failure(path, opens) for _, opens in pairs] == [None, None, WrongKey]
    with SealedFile(path) as file:
        assert file.seal.recipients == 2


def test_without_a_key_the_file_is_bare_and_says_so(tmp_path: Path) -> None:
    made = write_sealed(tmp_path / "f", [memoryview(b"bare")], None)
    assert made.how == "none"
    assert (tmp_path / "f").read_bytes() == b"bare"
    assert opened(tmp_path / "f", None) == b"bare"


def test_bare_file_in_place_of_a_sealed_one_is_refused(tmp_path: Path) -> None:
    path = seal(tmp_path / "f", b"planted", None)
    with pytest.raises(WrongKey, match="not encrypted; it may have been replaced"):
        opened(path)


def test_plain_library_reads_ours_and_ours_reads_its(tmp_path: Path) -> None:
    data = content(2 * CHUNK + 5)
    path = seal(tmp_path / "f", data)
    assert pyrage.decrypt(path.read_bytes(), list(OPENS.identities)) == data
    (tmp_path / "g").write_bytes(pyrage.encrypt(data, list(SEALS.recipients)))
    assert opened(tmp_path / "g") == data


def test_passphrase_file_is_read_by_the_plain_library_and_back(tmp_path: Path) -> None:
    """The one real derivation: seconds and up to a gigabyte, as the library chooses."""
    key = parse_key(PASSPHRASE, purpose="encryption", where="environment")
    assert key is not None
    made = write_sealed(tmp_path / "f", [memoryview(b"abc"), memoryview(b"def")], key)
    assert made.how == "passphrase"
    assert opened(tmp_path / "f", key.opens) == b"abcdef"


def test_the_sealed_form_is_let_go_before_its_content_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE) + bytes(8 * CHUNK))
    monkeypatch.setattr(pyrage.passphrase, "decrypt", lambda whole, passphrase: b"content")
    held: list[int] = []

    class Weighing:
        def write(self, _: object) -> None:
            held.append(tracemalloc.get_traced_memory()[0])

    with SealedFile(tmp_path / "f") as file:
        tracemalloc.start()
        try:
            file.read_into(Weighing(), passphrase_key())
        finally:
            tracemalloc.stop()
    assert held[0] < CHUNK


def test_file_written_by_hand_from_the_specification_opens(tmp_path: Path) -> None:
    data = content(CHUNK + 100)
    (tmp_path / "f").write_bytes(age_by_hand.seal(data, PASSPHRASE))
    assert opened(tmp_path / "f", passphrase_key()) == data


@pytest.mark.parametrize("size", [0, 1, 100, CHUNK])
def test_age_file_without_padding_opens(tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.seal(bytes(size), PASSPHRASE))
    assert opened(tmp_path / "f", passphrase_key()) == bytes(size)


FULL, SHORT = bytes(CHUNK), bytes(100)
SHORT_BY = 1000
STRUCTURES: list[tuple[str, list[bytes], int | None, type[CheckpointError]]] = [
    ("final chunk empty after a full one", [FULL, b""], None, Altered),
    ("no final chunk", [FULL, FULL], 9, Truncated),
    ("a chunk after the final one", [FULL, FULL], 0, Altered),
    ("short chunk in the middle, whole in all", [FULL[:-SHORT_BY], FULL[: SHORT_BY - 16]], None, Altered),
    ("short chunk in the middle, of the size of a cut file", [SHORT, FULL], None, Truncated),
    ("final flag on all but the last", [FULL, FULL, FULL], 1, Altered),
]


@pytest.mark.parametrize(("parts", "last", "error"), [case[1:] for case in STRUCTURES], ids=[c[0] for c in STRUCTURES])
def test_payload_of_wrong_structure_is_refused(
    tmp_path: Path, parts: list[bytes], last: int | None, error: type[CheckpointError]
) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE) + age_by_hand.payload(parts, last=last))
    assert failure(tmp_path / "f", passphrase_key()) is error


@pytest.mark.parametrize(
    "work", [b"", b"0", b"01", b"+1", b"0x1", b"1 1", b"-1", b"a", b"21", b"22", b"63", b"999", b"1" * 30]
)
def test_odd_or_costly_work_factor_is_refused_before_any_work(
    tmp_path: Path, work: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE, work_factor=work) + age_by_hand.payload([b"x"]))
    # The library would pay for it, so it must not be asked.
    monkeypatch.setattr(encrypted_file, "pyrage", None)
    assert failure(tmp_path / "f", passphrase_key()) is WrongKey


def test_costly_work_factor_does_not_reach_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encrypted_file, "pyrage", None)
    (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE, work_factor=b"24") + age_by_hand.payload([b"x"]))
    with pytest.raises(WrongKey, match=r"scrypt 2\^24; more than 2\^20 is refused"):
        opened(tmp_path / "f", passphrase_key())


def test_second_stanza_beside_a_passphrase_is_refused(tmp_path: Path) -> None:
    for extra in (b"-> scrypt AAAAAAAAAAAAAAAAAAAAAA 30\n" + b"A" * 43 + b"\n", b"-> x-grease a\n\n"):
        (tmp_path / "f").write_bytes(age_by_hand.header(PASSPHRASE, extra=extra) + age_by_hand.payload([b"x"]))
        assert failure(tmp_path / "f", passphrase_key()) is WrongKey


def test_header_over_64_kib_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encrypted_file, "pyrage", None)
    stanza = b"-> X25519 " + b"A" * 43 + b"\n" + b"A" * 43 + b"\n"
    (tmp_path / "f").write_bytes(b"age-encryption.org/v1\n" + stanza * 5000)
    with pytest.raises(WrongKey, match="longer than 65536 bytes"):
        opened(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"age-encryption.org/v1\n-> X25519 " + b"A" * 200_000)
    with pytest.raises(WrongKey, match="longer than 65536 bytes"):
        opened(tmp_path / "f")


def test_many_recipients_within_the_header_limit_open(tmp_path: Path) -> None:
    many = EncryptionKey("many", recipients=identity_key()[0].recipients * 300 + SEALS.recipients)
    assert opened(seal(tmp_path / "f", b"abc", many)) == b"abc"


def test_wrong_key_is_reported_as_wrong_key_not_as_corruption(whole: Path) -> None:
    with pytest.raises(WrongKey, match="identity does not open it"):
        opened(whole, identity_key()[1])


def test_missing_key_is_reported_with_what_would_open_it(whole: Path) -> None:
    with pytest.raises(WrongKey, match="sealed for 1 recipient; give decryption_key"):
        opened(whole, None)


def test_passphrase_for_a_recipient_file_asks_for_the_identity(whole: Path) -> None:
    with pytest.raises(WrongKey, match="a passphrase does not open it, give the identity"):
        opened(whole, passphrase_key())


def test_identity_for_a_passphrase_file_asks_for_the_passphrase(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.seal(b"abc", PASSPHRASE))
    with pytest.raises(WrongKey, match="is an identity, give the passphrase"):
        opened(tmp_path / "f")


def test_wrong_passphrase_is_reported_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.seal(b"abc", PASSPHRASE))
    with pytest.raises(WrongKey, match="passphrase does not open it") as caught:
        opened(tmp_path / "f", passphrase_key("another one"))
    assert "another one" not in str(caught.value)


def test_every_flipped_bit_of_a_recipient_header_is_a_wrong_key(whole: Path) -> None:
    changes = itertools.product(range(header_bytes(whole)), range(8))
    assert {failure(whole) for _ in in_place(whole, changes)} == {WrongKey}


def test_every_flipped_bit_of_a_passphrase_header_is_a_wrong_key(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(age_by_hand.seal(bytes(10), PASSPHRASE))
    key = passphrase_key()
    changes = itertools.product(range(header_bytes(path)), range(8))
    assert {failure(path, key) for _ in in_place(path, changes)} == {WrongKey}


def check_cuts(path: Path, count: int, key: DecryptionKey = OPENS) -> None:
    rng = random.Random(6)
    size, start = path.stat().st_size, header_bytes(path)
    cuts = [0, 1, 21, 22, 23, start - 1, start, start + 15, start + 16, start + 17, start + 32, size - 1, size - 16]
    cuts += [start + 16 + k * (CHUNK + 16) + off for k in range(CHUNKS) for off in (-1, 0, 1) if k or off > 0]
    cuts += list(range(start)) + [rng.randrange(size) for _ in range(count)]
    found = []
    for cut in sorted(set(cuts), reverse=True):
        os.truncate(path, cut)
        found.append(failure(path, key))
    assert set(found) == {Truncated}


def test_flipped_bits_of_the_content_are_an_alteration(whole: Path) -> None:
    rng = random.Random(5)
    start, end = header_bytes(whole), whole.stat().st_size
    changes = ((rng.randrange(start, end), rng.randrange(8)) for _ in range(3000))
    assert {failure(whole) for _ in in_place(whole, changes)} == {Altered}


def test_cuts_anywhere_are_a_truncation(whole: Path) -> None:
    check_cuts(whole, 2000)


def test_cuts_of_a_passphrase_file_are_a_truncation(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(age_by_hand.seal(bytes(CHUNKS * CHUNK), PASSPHRASE))
    check_cuts(tmp_path / "f", 50, passphrase_key())


def test_every_other_order_of_five_chunks_is_an_alteration(whole: Path) -> None:
    data = whole.read_bytes()
    start = header_bytes(whole) + 16
    chunks = [data[at : at + CHUNK + 16] for at in range(start, len(data), CHUNK + 16)]
    assert len(chunks) == CHUNKS
    found = set()
    for order in itertools.permutations(range(CHUNKS)):
        whole.write_bytes(data[:start] + b"".join(chunks[i] for i in order))
        if order != tuple(range(CHUNKS)):
            found.add(failure(whole))
    assert found == {Altered}


@pytest.mark.parametrize("tail", [b"\0", bytes(16), bytes(CHUNK + 16), b"x" * 100_000])
def test_appended_bytes_are_an_alteration(whole: Path, tail: bytes) -> None:
    with whole.open("ab") as file:
        file.write(tail)
    assert failure(whole) is Altered


def test_chunk_of_another_file_is_an_alteration(tmp_path: Path, whole: Path) -> None:
    other = seal(tmp_path / "other", content(CHUNKS * CHUNK)).read_bytes()
    mine = bytearray(whole.read_bytes())
    mine[-CHUNK - 16 :] = other[-CHUNK - 16 :]
    whole.write_bytes(mine)
    assert failure(whole) is Altered


def test_empty_file_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert failure(tmp_path / "f") is Truncated


def test_what_the_sink_raises_comes_out_unchanged(whole: Path) -> None:
    class Refusing:
        def write(self, part: bytes) -> None:
            raise OSError(errno.EIO, "sink")

    with SealedFile(whole) as file, pytest.raises(OSError, match="sink"):
        file.read_into(Refusing(), OPENS)


def test_what_a_part_raises_comes_out_unchanged_and_leaves_no_file(tmp_path: Path) -> None:
    def parts() -> Iterator[memoryview]:
        yield memoryview(b"abc")
        raise CheckpointError("no such dtype")

    with pytest.raises(CheckpointError, match="no such dtype"):
        write_sealed(tmp_path / "f", parts(), SEALS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [SEALS, None], ids=["sealed", "bare"])
def test_full_disk_is_an_output_error_and_keeps_the_old_file(tmp_path: Path, key: EncryptionKey | None) -> None:
    path = seal(tmp_path / "f", b"old", key)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OutputError, match="not written"):
            seal(path, content(3 << 20), key)
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
    path = seal(tmp_path / "f", b"old")
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", _fail_with(errno.ENOSPC))
    with pytest.raises(OutputError, match="No space left on device"):
        seal(path, b"new")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        seal(tmp_path / "missing" / "f", b"abc")


def test_machine_too_fast_for_passphrases_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    costly = age_by_hand.header(PASSPHRASE, work_factor=b"21") + age_by_hand.payload([b""])
    monkeypatch.setattr(pyrage.passphrase, "encrypt", lambda content, passphrase: costly)
    key = parse_key(PASSPHRASE, purpose="encryption", where="environment")
    with pytest.raises(ConfigError, match="use a recipient"):
        check_encryption_key(key)
    check_encryption_key(SEALS)
    check_encryption_key(None)


def test_padding_fills_whole_chunks() -> None:
    assert all((size + padding(size)) % CHUNK == 0 and 0 <= padding(size) < CHUNK for size in range(0, 3 * CHUNK, 1021))
