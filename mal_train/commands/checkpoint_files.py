"""`mal-train encrypt`, `decrypt`, `rekey`, `sign` and `verify`: commands on the checkpoint file itself."""

from pathlib import Path

from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import encryption_of, reencrypt
from mal_train.kernel.checkpoint.keys import parse_key
from mal_train.kernel.checkpoint.trust import TrustPolicy, read_signing_key, sign_file


def copy_with_key(source: Path, target: Path, *, key: str | None, new_key: str | None, console: Console) -> None:
    """Writes a copy of a checkpoint with another encryption.

    Args:
        source: the checkpoint, or `builtin`.
        target: the file to write; it must not exist.
        key: decrypts the source: file:PATH or env:NAME; None for a plain file, and only for one.
        new_key: encrypts the copy: a recipient, file:PATH or env:NAME; None leaves it plain.
        console: prints messages.

    Raises:
        ConfigError: a key is malformed, or a secret on the command line.
        CheckpointError: the source is damaged, or the key is not its key.
        OutputError: the target exists or cannot be written.
    """
    old = parse_key(key, purpose="decryption", source="command line")
    new = parse_key(new_key, purpose="encryption", source="command line")
    encryption = reencrypt(builtin.resolve(source), old, target, new)
    console.print(f"wrote {target}: {encryption}")


def require_encryption(source: Path, *, is_encrypted: bool) -> None:
    """Raises ConfigError unless a file is encrypted, or plain, as the command needs it."""
    path = builtin.resolve(source)
    if (encryption_of(path).mode != "none") is not is_encrypted:
        rule = "is not encrypted; use `mal-train encrypt`" if is_encrypted else "is encrypted; use `mal-train rekey`"
        raise ConfigError(f"{path}: {rule}")


def sign(path: Path, key: str, console: Console) -> None:
    """Writes the signature of a file beside it.

    Raises:
        ConfigError: `key` is no file:PATH or env:NAME of a signing key.
        CheckpointError: the file cannot be read.
        OutputError: a signature exists, or cannot be written.
    """
    signature, signer = sign_file(path, read_signing_key(key, "--key"))
    console.print(f"wrote {signature}: signed by {signer}")


def verify(path: Path, signers: list[str], sha256: str | None) -> str:
    """Returns the SHA-256 of a file that one of the signers has signed and that has the SHA-256, if one is given.

    Raises:
        ConfigError: neither a signer nor a SHA-256 is given, or one is malformed.
        CheckpointError: the file cannot be read, or is not trusted.
    """
    if not signers and sha256 is None:
        raise ConfigError("verify: give --signer ed25519:..., --sha256 HEX, or both")
    return TrustPolicy(() if sha256 is None else (sha256,), tuple(signers)).check_file(builtin.resolve(path))
