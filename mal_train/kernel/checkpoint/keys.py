"""Parses the settings `encryption_key` and `decryption_key` into keys. Knows nothing of encrypted files.

Both settings accept these forms:

    age1…        an age recipient: a public key, which can only encrypt
    file:PATH    a file with recipients, an identity as `age-keygen` writes it, or a passphrase on one line
    env:NAME     the same three in an environment variable
    other text   a passphrase in plain text: accepted from YAML with a warning, refused on the command line

Training needs only a recipient; serving needs the identity, the private key. Secrets appear in no repr, message or
pickle.
Format of identities and recipients: https://age-encryption.org/v1, "The X25519 recipient type".
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, overload

import pyrage

from mal_train.core.atomic_io import atomic_write
from mal_train.core.errors import ConfigError
from mal_train.core.secrets import is_secret_reference, read_secret, warn_if_shared

Purpose = Literal["encryption", "decryption"]
KeySource = Literal["yaml", "command line", "environment"]

RECIPIENT_PREFIX = "age1"
IDENTITY_PREFIX = "AGE-SECRET-KEY-1"
PUBLISHED_PASSPHRASES = frozenset({"nvidia_tao", "nvidia_tlt", "tlt_encode"})
"""Passphrases printed in public sample specs, which are therefore no secrets."""

log = logging.getLogger(__name__)


class Passphrase:
    """A passphrase whose text is available from `reveal` only."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Returns the text, from which the age library derives the key."""
        return self._text

    def __repr__(self) -> str:
        return "Passphrase(…)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a passphrase cannot be serialized; pass its setting (file:… or env:…) and parse that again")


class _Key:
    """Base of both keys: they show their description only, and can be neither copied nor serialized."""

    __slots__ = ()
    description: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.description})"

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key cannot be serialized; pass its setting (file:… or env:…) and parse that again")


@dataclass(frozen=True, repr=False, slots=True)
class DecryptionKey(_Key):
    """A key that decrypts files: X25519 identities, or one passphrase.

    Attributes:
        description: source and type, such as "file: identity" or "yaml: passphrase"; never the secret.
        identities: `pyrage.x25519.Identity` objects; empty for a passphrase.
        passphrase: None for identities.
    """

    description: str
    identities: tuple[Any, ...] = ()
    passphrase: Passphrase | None = None


@dataclass(frozen=True, repr=False, slots=True)
class EncryptionKey(_Key):
    """A key that encrypts files: X25519 recipients, or one passphrase.

    Attributes:
        description: source and type; never the secret.
        recipients: `pyrage.x25519.Recipient` objects; empty for a passphrase.
        passphrase: None for recipients.
        decryption_key: the matching key; None if only recipients were given, which cannot decrypt.
    """

    description: str
    recipients: tuple[Any, ...] = ()
    passphrase: Passphrase | None = None
    decryption_key: DecryptionKey | None = None


@overload
def parse_key(text: str | None, *, purpose: Literal["encryption"], source: KeySource) -> EncryptionKey | None: ...
@overload
def parse_key(text: str | None, *, purpose: Literal["decryption"], source: KeySource) -> DecryptionKey | None: ...
def parse_key(text: str | None, *, purpose: Purpose, source: KeySource) -> EncryptionKey | DecryptionKey | None:
    """Parses one of the forms above. Returns None, for no encryption, if `text` is None or empty.

    Args:
        text: value of the setting, option or variable.
        purpose: "encryption" accepts recipients, an identity (for its own recipient) or a passphrase; "decryption"
            accepts an identity or a passphrase.
        source: origin of the text. The command line may not hold a secret, because the process list shows it to every
            user of the machine.

    Raises:
        ConfigError: missing file or variable, malformed key, a recipient given for decryption, or a secret on the
            command line. The message never contains the text.
    """
    if not text:
        return None
    setting = f"{purpose}_key"
    origin, content = _content(text, setting, source)
    lines = [line.strip() for line in content.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not all(line.startswith(RECIPIENT_PREFIX) for line in lines):
        warn_if_shared(text, setting)
    if any(line.startswith(IDENTITY_PREFIX) for line in lines):
        identities = tuple(_identity(line, setting, origin) for line in lines)
        key = DecryptionKey(f"{origin}: identity", identities)
        if purpose == "decryption":
            return key
        recipients = tuple(identity.to_public() for identity in identities)
        return EncryptionKey(key.description, recipients, decryption_key=key)
    if lines and all(line.startswith(RECIPIENT_PREFIX) for line in lines):
        if purpose == "decryption":
            raise ConfigError(
                f"{setting}: a recipient (age1…) can only encrypt; give the matching identity as file:PATH or env:NAME"
            )
        return EncryptionKey(f"{origin}: recipient", tuple(_recipient(line, setting, origin) for line in lines))
    return _passphrase_key(content, purpose, setting, origin)


def generate_identity() -> tuple[str, str]:
    """Generates a key pair: the recipient "age1…" and the identity "AGE-SECRET-KEY-1…". Never log the identity."""
    identity = pyrage.x25519.Identity.generate()
    return str(identity.to_public()), str(identity)


def write_identity(path: Path) -> str:
    """Writes a new identity to `path` in the format of `age-keygen`, with mode 0600, and returns its recipient.

    Raises:
        OutputError: the file cannot be written, or exists: overwriting an identity would lose its checkpoints.
    """
    recipient, secret = generate_identity()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    with atomic_write(path, mode=0o600, overwrite=False) as file:
        file.write(f"# created: {created}\n# public key: {recipient}\n{secret}\n".encode())
    return recipient


def _content(text: str, setting: str, source: KeySource) -> tuple[str, str]:
    """Returns the origin of the key ("file", "env" or `source`) and its text."""
    if is_secret_reference(text):
        return text.partition(":")[0], read_secret(text, setting)
    if text.startswith(RECIPIENT_PREFIX):
        return source, text
    if source == "command line":
        raise ConfigError(
            f"{setting}: a secret on the command line is visible to every user of the machine; "
            "give file:PATH, env:NAME or a recipient age1…"
        )
    if source == "yaml":
        log.warning("%s: the YAML file holds a secret in plain text; use file:PATH or env:NAME instead", setting)
    return source, text


def _identity(line: str, setting: str, origin: str) -> Any:
    try:
        return pyrage.x25519.Identity.from_str(line)
    except pyrage.IdentityError:
        raise ConfigError(
            f"{setting} ({origin}): invalid age identity; expected AGE-SECRET-KEY-1… as age-keygen writes it"
        ) from None


def _recipient(line: str, setting: str, origin: str) -> Any:
    try:
        return pyrage.x25519.Recipient.from_str(line)
    except pyrage.RecipientError:
        raise ConfigError(
            f"{setting} ({origin}): invalid age X25519 recipient; expected age1 and 58 more characters"
        ) from None


def _passphrase_key(content: str, purpose: Purpose, setting: str, origin: str) -> EncryptionKey | DecryptionKey:
    text = content.rstrip("\r\n")
    if not text.strip() or "\n" in text or "\r" in text:
        raise ConfigError(
            f"{setting} ({origin}): neither recipients, nor an identity, nor a passphrase on one line; "
            "`age-keygen -o FILE` creates an identity"
        )
    if text in PUBLISHED_PASSPHRASES:
        log.warning("%s: this passphrase is printed in public sample specs and protects nothing", setting)
    key = DecryptionKey(f"{origin}: passphrase", passphrase=Passphrase(text))
    if purpose == "decryption":
        return key
    return EncryptionKey(key.description, passphrase=key.passphrase, decryption_key=key)
