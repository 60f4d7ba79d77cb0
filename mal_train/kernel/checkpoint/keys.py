"""Turns what a user wrote for a key into what seals or opens a checkpoint. Knows nothing of files that are sealed.

Forms (the same ones for `encryption_key` and `decryption_key`):

    age1…        an age recipient: public, seals only
    file:PATH    a file: recipients, an identity as `age-keygen` writes it, or a passphrase on one line
    env:NAME     the same three, from an environment variable
    other text   a passphrase in clear: accepted from YAML with a warning, refused on the command line

Whoever trains needs only recipients; whoever serves needs the identity. Secrets appear in no repr, message or pickle.
Format of identities and recipients: https://age-encryption.org/v1, "The X25519 recipient type".
"""

import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, overload

import pyrage

from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.secrets import is_secret_reference, read_secret

Purpose = Literal["encryption", "decryption"]
Where = Literal["yaml", "command line", "environment"]

RECIPIENT_PREFIX = "age1"
IDENTITY_PREFIX = "AGE-SECRET-KEY-1"
PUBLISHED_PASSPHRASES = frozenset({"nvidia_tao", "nvidia_tlt", "tlt_encode"})
"""Keys that public sample specs carry; everybody has them."""

log = logging.getLogger(__name__)


class Passphrase:
    """A passphrase that shows itself to nobody but the one who calls `reveal`."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself, for the library that derives the key from it."""
        return self._text

    def __repr__(self) -> str:
        return "Passphrase(…)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a passphrase is never serialized; pass the form (file:… or env:…) and read it again")


class _Key:
    """What both kinds of key share: they are told apart by form alone, and they neither copy nor serialize."""

    __slots__ = ()
    form: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form})"

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is never serialized; pass the form (file:… or env:…) and read it again")


@dataclass(frozen=True, repr=False, slots=True)
class DecryptionKey(_Key):
    """Opens sealed files: X25519 identities, or one passphrase.

    Attributes:
        form: how it was given ("file: identity", "yaml: passphrase", …); never the secret.
        identities: `pyrage.x25519.Identity` objects; empty for a passphrase.
        passphrase: set when it is one.
    """

    form: str
    identities: tuple[Any, ...] = ()
    passphrase: Passphrase | None = None


@dataclass(frozen=True, repr=False, slots=True)
class EncryptionKey(_Key):
    """Seals files: to X25519 recipients, or by a passphrase.

    Attributes:
        form: how it was given; never the secret.
        recipients: `pyrage.x25519.Recipient` objects; empty for a passphrase.
        passphrase: set when it is one.
        opens: the key that opens what this one seals; None for bare recipients, where only the identity's owner can.
    """

    form: str
    recipients: tuple[Any, ...] = ()
    passphrase: Passphrase | None = None
    opens: DecryptionKey | None = None


@overload
def parse_key(text: str | None, *, purpose: Literal["encryption"], where: Where) -> EncryptionKey | None: ...
@overload
def parse_key(text: str | None, *, purpose: Literal["decryption"], where: Where) -> DecryptionKey | None: ...
def parse_key(text: str | None, *, purpose: Purpose, where: Where) -> EncryptionKey | DecryptionKey | None:
    """The key that `text` means in one of the forms above; None for None or an empty text (no encryption).

    Args:
        text: what stands in the spec, the flag or the variable.
        purpose: "encryption" takes recipients, an identity (its own recipient is meant) or a passphrase; "decryption"
            an identity or a passphrase.
        where: where the text was found. On the command line a secret in clear is refused: every user of the machine
            can read it in the process list.

    Raises:
        ConfigError: missing file or variable, malformed key, a recipient given for decryption, a secret in clear on
            the command line. The message holds the form, never the text.
    """
    if not text:
        return None
    setting = f"{purpose}_key"
    source, content = _content(text, setting, where)
    lines = [line.strip() for line in content.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if any(line.startswith(IDENTITY_PREFIX) for line in lines):
        identities = tuple(_identity(line, setting, source) for line in lines)
        opens = DecryptionKey(f"{source}: identity", identities)
        if purpose == "decryption":
            return opens
        return EncryptionKey(opens.form, tuple(identity.to_public() for identity in identities), opens=opens)
    if lines and all(line.startswith(RECIPIENT_PREFIX) for line in lines):
        if purpose == "decryption":
            raise ConfigError(
                f"{setting}: a recipient (age1…) can only seal; give the identity that belongs to it, "
                "by file:PATH or env:NAME"
            )
        return EncryptionKey(f"{source}: recipient", tuple(_recipient(line, setting, source) for line in lines))
    return _passphrase_key(content, purpose, setting, source)


def generate_identity() -> tuple[str, str]:
    """A fresh pair (recipient "age1…", identity "AGE-SECRET-KEY-1…"). The second is a secret: keep it out of logs."""
    identity = pyrage.x25519.Identity.generate()
    return str(identity.to_public()), str(identity)


def write_identity(path: Path) -> str:
    """Write a fresh identity to `path` as `age-keygen` would (mode 0600) and return its recipient.

    Raises:
        OutputError: the file exists (a key is never overwritten: its checkpoints would be lost) or cannot be written.
    """
    recipient, secret = generate_identity()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"# created: {created}\n# public key: {recipient}\n{secret}\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise OutputError(f"{path}: exists; an identity is never overwritten, choose another name") from None
    except OSError as error:
        raise OutputError(f"{path}: the identity could not be written: {error.strerror}") from error
    return recipient


def _content(text: str, setting: str, where: Where) -> tuple[str, str]:
    """(name of the form, what stands behind it)."""
    if is_secret_reference(text):
        return text.partition(":")[0], read_secret(text, setting)
    if text.startswith(RECIPIENT_PREFIX):
        return where, text
    if where == "command line":
        raise ConfigError(
            f"{setting}: a secret on the command line can be read by every user of the machine; "
            "give file:PATH, env:NAME or a recipient age1…"
        )
    if where == "yaml":
        log.warning("%s: a secret stands in clear in the YAML file; file:PATH or env:NAME keeps it out", setting)
    return where, text


def _identity(line: str, setting: str, source: str) -> Any:
    try:
        return pyrage.x25519.Identity.from_str(line)
    except pyrage.IdentityError:
        raise ConfigError(
            f"{setting} ({source}): a line is no valid age identity; expected AGE-SECRET-KEY-1… as age-keygen writes it"
        ) from None


def _recipient(line: str, setting: str, source: str) -> Any:
    try:
        return pyrage.x25519.Recipient.from_str(line)
    except pyrage.RecipientError:
        raise ConfigError(
            f"{setting} ({source}): not a valid age X25519 recipient; expected age1 and 58 more characters"
        ) from None


def _passphrase_key(content: str, purpose: Purpose, setting: str, source: str) -> EncryptionKey | DecryptionKey:
    text = content.rstrip("\r\n")
    if not text.strip() or "\n" in text or "\r" in text:
        raise ConfigError(
            f"{setting} ({source}): neither recipients, nor an identity, nor a passphrase on one line; "
            "`age-keygen -o FILE` makes an identity"
        )
    if text in PUBLISHED_PASSPHRASES:
        log.warning("%s: this passphrase is printed in public sample specs; it protects nothing", setting)
    opens = DecryptionKey(f"{source}: passphrase", passphrase=Passphrase(text))
    if purpose == "decryption":
        return opens
    return EncryptionKey(opens.form, passphrase=opens.passphrase, opens=opens)
