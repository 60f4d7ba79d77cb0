"""A second, slow writer of the age v1 format, from its specification. It also writes files that no library would write.

Passphrase files only, with a work factor of 2^1, so that a file costs milliseconds. Never for real secrets.
Sources: C2SP age.md; RFC 8439 (ChaCha20-Poly1305), RFC 5869 (HKDF).
"""

import base64
import hashlib
import hmac
import struct
from collections.abc import Sequence

CHUNK = 64 * 1024
MASK = 0xFFFFFFFF


def _rotate(value: int, count: int) -> int:
    return ((value << count) | (value >> (32 - count))) & MASK


def _block(key: bytes, counter: int, nonce: bytes) -> bytes:
    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *struct.unpack("<8I", key), counter]
    start += struct.unpack("<3I", nonce)
    x = list(start)
    columns = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
    diagonals = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
    for _ in range(10):
        for a, b, c, d in (*columns, *diagonals):
            for first, second, third, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[first] = (x[first] + x[second]) & MASK
                x[third] = _rotate(x[third] ^ x[first], turn)
    return struct.pack("<16I", *((a + b) & MASK for a, b in zip(x, start, strict=True)))


def encrypt_chunk(key: bytes, nonce: bytes, plain: bytes) -> bytes:
    """Encrypts with ChaCha20-Poly1305 without associated data."""
    stream = b"".join(_block(key, 1 + i, nonce) for i in range(-(-len(plain) // 64)))[: len(plain)]
    cipher = (int.from_bytes(plain, "little") ^ int.from_bytes(stream, "little")).to_bytes(len(plain), "little")
    one_time = _block(key, 0, nonce)
    r = int.from_bytes(one_time[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    message = cipher + bytes(-len(cipher) % 16) + struct.pack("<QQ", 0, len(cipher))
    total = 0
    for at in range(0, len(message), 16):
        total = (total + int.from_bytes(message[at : at + 16] + b"\1", "little")) * r % (2**130 - 5)
    return cipher + ((total + int.from_bytes(one_time[16:32], "little")) % 2**128).to_bytes(16, "little")


def _hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\1", "sha256")


def _base64(data: bytes) -> bytes:
    return base64.b64encode(data).rstrip(b"=")


def header(passphrase: str, *, work_factor: bytes = b"1", file_key: bytes = bytes(16), extra: bytes = b"") -> bytes:
    """Returns a header with MAC. `work_factor` is written as given and used if small; `extra` follows the stanza."""
    salt = b"sixteen byte sal"
    n = 2 ** int(work_factor) if work_factor.isdigit() and 0 < int(work_factor) <= 10 else 2
    key = hashlib.scrypt(passphrase.encode(), salt=b"age-encryption.org/v1/scrypt" + salt, n=n, r=8, p=1, dklen=32)
    stanza = b"-> scrypt " + _base64(salt) + b" " + work_factor + b"\n"
    text = (
        b"age-encryption.org/v1\n" + stanza + _base64(encrypt_chunk(key, bytes(12), file_key)) + b"\n" + extra + b"---"
    )
    return text + b" " + _base64(hmac.digest(_hkdf(file_key, b"", b"header"), text, "sha256")) + b"\n"


def payload(chunks: Sequence[bytes], *, last: int | None = None, file_key: bytes = bytes(16)) -> bytes:
    """Returns nonce and chunks of any length. Chunk number `last` (default: the final one) has the last flag."""
    nonce = b"nonce of payload"
    key = _hkdf(file_key, nonce, b"payload")
    final = len(chunks) - 1 if last is None else last
    return nonce + b"".join(
        encrypt_chunk(key, i.to_bytes(11, "big") + bytes([i == final]), chunk) for i, chunk in enumerate(chunks)
    )


def encrypt(content: bytes, passphrase: str) -> bytes:
    """Encrypts a valid file."""
    chunks = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)] or [b""]
    return header(passphrase) + payload(chunks)
