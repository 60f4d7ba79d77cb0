"""Decides whether a checkpoint file comes from a known author: by its SHA-256, or by a signature beside it.

Encryption for a recipient authenticates the content but not its author, since recipients are public keys. An author
signs a file with an Ed25519 key; the signature of X.malckpt is the text file X.malckpt.sig:

    mal-signature/1
    signer ed25519:BASE64           public key, 32 bytes
    sha256 HEX                      of all bytes of the file, as they are on disk
    signature BASE64                64 bytes, over the line "mask-auto-labeler checkpoint signature 1" with its line end
                                    and the 32 bytes of the SHA-256

A signature says who made a file, not which file is wanted: an older file of the same author has one too. A pinned
SHA-256 names one file. The library `cryptography` does all cryptography. Private keys are PEM files (PKCS 8).
"""

import base64
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from mal_train.core.atomic_io import atomic_write
from mal_train.core.errors import CheckpointError, ConfigError, Untrusted
from mal_train.core.input_files import open_regular, read_limited
from mal_train.core.secrets import is_secret_reference, read_secret, warn_if_shared

SIGNATURE_SUFFIX = ".sig"
SIGNER_PREFIX = "ed25519:"
MAX_SIGNATURE_BYTES = 4096

_DOMAIN = b"mask-auto-labeler checkpoint signature 1\n"
_SIGNER = r"ed25519:[A-Za-z0-9+/]{43}="
_PRIME = 2**255 - 19
_ORDER_8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_SMALL_ORDER = frozenset({0, 1, _ORDER_8, _PRIME - _ORDER_8, _PRIME - 1, _PRIME, _PRIME + 1})
"""y of the public keys under which one signature fits many files, as libsodium lists them; OpenSSL accepts them."""
_TEXT = re.compile(
    rf"mal-signature/1\nsigner (?P<signer>{_SIGNER})\nsha256 (?P<sha256>[0-9a-f]{{64}})\n"
    r"signature (?P<signature>[A-Za-z0-9+/]{86}==)\n?"
)


@dataclass(frozen=True)
class TrustPolicy:
    """Requirements that a checkpoint file must meet before it is read. The default has none.

    Attributes:
        sha256: accepted SHA-256 digests in hex; (): any.
        signers: public keys, one of which must have signed the file; (): no signature is needed.
    """

    sha256: tuple[str, ...] = ()
    signers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for digest in self.sha256:
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ConfigError(f"checkpoint_sha256: {digest[:70]!r}; expected 64 digits 0-9 and a-f (sha256sum)")
        for signer in self.signers:
            parse_signer(signer)

    def check(self, path: Path, file: BinaryIO) -> str | None:
        """Checks an open file from its start, before anything of it is parsed; leaves it at its start.

        Args:
            path: path of the file; the signature lies beside it.
            file: the open file that is read afterwards, so that nobody can exchange it between the two.

        Returns:
            The SHA-256 of the file, which must be that of the bytes that are parsed; None if nothing is required.

        Raises:
            Untrusted: another SHA-256, or no signature of a trusted signer.
        """
        if not self.sha256 and not self.signers:
            return None
        readable: Any = file  # `file_digest` is typed for `readinto`, which BinaryIO lacks
        digest = hashlib.file_digest(readable, "sha256")
        file.seek(0)
        sha256 = digest.hexdigest()
        if self.sha256 and sha256 not in self.sha256:
            raise Untrusted(f"{path}: its SHA-256 is {sha256}, not the one that the settings require; do not use it")
        if self.signers:
            verify_signature(path, digest.digest(), self.signers)
        return sha256

    def check_file(self, path: Path) -> str:
        """Returns the SHA-256 of the file at `path`, which has what the policy requires; see `check`.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            with open_regular(path) as file:
                return self.check(path, file) or hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


NO_POLICY = TrustPolicy()


def signature_path(path: Path) -> Path:
    """Returns the path of the signature of a file; for a link, beside the file that it names."""
    target = Path(os.path.realpath(path))
    return target.with_name(target.name + SIGNATURE_SUFFIX)


def verify_signature(path: Path, digest: bytes, signers: tuple[str, ...]) -> str:
    """Returns the signer of a file, one of `signers`.

    Args:
        path: the signed file.
        digest: its SHA-256, 32 bytes.
        signers: public keys that are trusted.

    Raises:
        Untrusted: the signature is missing or malformed, of an unknown signer, or not of these bytes.
    """
    place = signature_path(path)
    try:
        text = read_limited(place, MAX_SIGNATURE_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise Untrusted(f"{path}: not signed ({place.name}: {error.strerror}); sign it with `mal-train sign`") from None
    match = _TEXT.fullmatch(text)
    if match is None:
        raise Untrusted(f"{place}: no signature of the form mal-signature/1; sign the file again")
    if match["signer"] not in signers:
        raise Untrusted(f"{path}: signed by {match['signer']}, which is not a trusted signer")
    if match["sha256"] != digest.hex():
        raise Untrusted(f"{path}: changed since it was signed; do not use it")
    try:
        parse_signer(match["signer"]).verify(base64.b64decode(match["signature"]), _DOMAIN + digest)
    except InvalidSignature:
        raise Untrusted(f"{place}: the signature is not valid; do not use the file") from None
    return match["signer"]


def sign_file(path: Path, key: Ed25519PrivateKey) -> tuple[Path, str]:
    """Signs a file; returns the path of the signature, and the signer.

    Raises:
        CheckpointError: the file cannot be read.
        OutputError: the signature cannot be written, or exists.
    """
    try:
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    signer = _signer_of(key)
    signature = base64.b64encode(key.sign(_DOMAIN + digest)).decode()
    text = f"mal-signature/1\nsigner {signer}\nsha256 {digest.hex()}\nsignature {signature}\n"
    with atomic_write(signature_path(path), overwrite=False) as output:
        output.write(text.encode())
    return signature_path(path), signer


def write_signing_key(path: Path) -> str:
    """Writes a new private key to `path` with mode 0600; returns the public key.

    Raises:
        OutputError: the file cannot be written, or exists.
    """
    key = Ed25519PrivateKey.generate()
    with atomic_write(path, mode=0o600, overwrite=False) as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return _signer_of(key)


def read_signing_key(reference: str, name: str) -> Ed25519PrivateKey:
    """Returns the private key that `file:PATH` or `env:NAME` refers to; `name` begins every error message.

    Raises:
        ConfigError: no such reference, file or variable, or no Ed25519 key in it. The message never contains the key.
    """
    if not is_secret_reference(reference):
        raise ConfigError(f"{name}: give file:PATH or env:NAME of a key of `mal-train keygen --signing`")
    pem = read_secret(reference, name).encode()
    warn_if_shared(reference, name)
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    # `from None` is not enough: the library's error may hold the text.
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"{name}: no Ed25519 private key in PEM without a password; create one: mal-train keygen --signing"
        )
    return key


def parse_signer(text: str) -> Ed25519PublicKey:
    """Returns the public key of "ed25519:BASE64". Raises ConfigError."""
    if not re.fullmatch(_SIGNER, text):
        raise ConfigError(f"trusted_signers: {text[:70]!r}; expected ed25519: and 44 characters, as keygen prints them")
    raw = base64.b64decode(text.removeprefix(SIGNER_PREFIX))
    if int.from_bytes(raw, "little") % 2**255 in _SMALL_ORDER:  # the highest bit is the sign of x
        raise ConfigError(f"trusted_signers: {text}: not the key of an author; anybody can sign for it")
    return Ed25519PublicKey.from_public_bytes(raw)


def _signer_of(key: Ed25519PrivateKey) -> str:
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return SIGNER_PREFIX + base64.b64encode(raw).decode()
