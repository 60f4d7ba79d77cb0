"""Which texts are keys, what they become, and that no secret shows."""

import copy
import logging
import os
import stat
import traceback
from pathlib import Path

import pytest

from mal_train.core.errors import ConfigError, OutputError
from mal_train.kernel.checkpoint.keys import Purpose, Where, generate_identity, parse_key, write_identity

SECRET = "correct horse battery staple"


@pytest.mark.parametrize("text", [None, ""])
def test_no_text_is_no_key(text: str | None) -> None:
    assert parse_key(text, purpose="encryption", where="yaml") is None
    assert parse_key(text, purpose="decryption", where="yaml") is None


@pytest.mark.parametrize("where", ["yaml", "command line", "environment"])
def test_recipient_may_stand_anywhere_and_opens_nothing(where: Where) -> None:
    key = parse_key(generate_identity()[0], purpose="encryption", where=where)
    assert key is not None
    assert len(key.recipients) == 1
    assert key.passphrase is None
    assert key.opens is None


def test_recipient_is_refused_for_decryption() -> None:
    with pytest.raises(ConfigError, match="can only seal; give the identity"):
        parse_key(generate_identity()[0], purpose="decryption", where="yaml")


def test_literal_passphrase_is_refused_on_the_command_line_without_being_repeated() -> None:
    with pytest.raises(ConfigError, match="file:PATH, env:NAME") as caught:
        parse_key(SECRET, purpose="encryption", where="command line")
    assert SECRET not in str(caught.value)


def test_literal_identity_is_refused_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="secret on the command line"):
        parse_key(generate_identity()[1], purpose="decryption", where="command line")


def test_literal_passphrase_in_yaml_is_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        key = parse_key(SECRET, purpose="encryption", where="yaml")
    assert key is not None
    assert key.passphrase is not None
    assert key.passphrase.reveal() == SECRET
    assert "stands in clear" in caplog.text
    assert SECRET not in caplog.text


def test_published_passphrase_is_called_worthless(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_key("nvidia_tao", purpose="encryption", where="yaml")
    assert "protects nothing" in caplog.text


def test_identity_file_as_age_keygen_writes_it_opens_and_seals(tmp_path: Path) -> None:
    recipient = write_identity(tmp_path / "key.txt")
    text = f"file:{tmp_path / 'key.txt'}"
    opens = parse_key(text, purpose="decryption", where="command line")
    seals = parse_key(text, purpose="encryption", where="command line")
    assert opens is not None
    assert seals is not None
    assert [str(identity.to_public()) for identity in opens.identities] == [recipient]
    assert [str(r) for r in seals.recipients] == [recipient]
    assert seals.opens is not None


def test_file_may_hold_several_recipients_and_comments(tmp_path: Path) -> None:
    recipients = [generate_identity()[0] for _ in range(3)]
    (tmp_path / "team").write_text("# team\n" + "\n\n".join(recipients) + "\n")
    key = parse_key(f"file:{tmp_path / 'team'}", purpose="encryption", where="yaml")
    assert key is not None
    assert [str(recipient) for recipient in key.recipients] == recipients


def test_passphrase_file_loses_its_line_end_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "pass").write_bytes(b" with blanks \r\n")
    key = parse_key(f"file:{tmp_path / 'pass'}", purpose="decryption", where="command line")
    assert key is not None
    assert key.passphrase is not None
    assert key.passphrase.reveal() == " with blanks "


def test_environment_variable_holds_the_same_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    recipient, secret = generate_identity()
    monkeypatch.setenv("MAL_TEST_KEY", secret)
    key = parse_key("env:MAL_TEST_KEY", purpose="encryption", where="command line")
    assert key is not None
    assert [str(r) for r in key.recipients] == [recipient]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither recipients, nor an identity"),
        (b"\n\n", "neither recipients, nor an identity"),
        (b"first line\nsecond line\n", "neither recipients, nor an identity"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"x" * 70_000, "larger than 65536 bytes"),
        (b"AGE-SECRET-KEY-1QQQQ\n", "no valid age identity"),
        (b"AGE-SECRET-KEY-1QQQQ\nand a stray line\n", "no valid age identity"),
        (b"age1qqqq\n", "not a valid age X25519 recipient"),
    ],
)
def test_malformed_key_file_is_named_and_not_quoted(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        parse_key(f"file:{tmp_path / 'key'}", purpose="encryption", where="yaml")
    assert "encryption_key" in str(caught.value)
    assert "QQQQ" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("text", ["file:/no/such/file", "env:MAL_NO_SUCH_VARIABLE"])
@pytest.mark.parametrize("purpose", ["encryption", "decryption"])
def test_missing_key_source_is_named(text: str, purpose: Purpose) -> None:
    with pytest.raises(ConfigError, match=text.partition(":")[2]):
        parse_key(text, purpose=purpose, where="command line")


def test_secrets_show_in_no_repr_and_leave_in_no_pickle(tmp_path: Path) -> None:
    recipient, secret = generate_identity()
    (tmp_path / "pass").write_text(SECRET)
    (tmp_path / "identity").write_text(secret)
    for name in ("pass", "identity"):
        key = parse_key(f"file:{tmp_path / name}", purpose="encryption", where="yaml")
        assert key is not None
        shown = f"{key!r} {key} {key.opens!r} {key.passphrase!r}"
        assert SECRET not in shown
        assert secret not in shown
        assert recipient not in shown
        assert "file" in repr(key)
        assert copy.deepcopy(key) is key
        with pytest.raises(TypeError, match="never serialized"):
            key.__reduce_ex__(4)


def test_written_identity_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.txt"
    old = os.umask(0)
    try:
        recipient = write_identity(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert f"# public key: {recipient}\nAGE-SECRET-KEY-1" in path.read_text()
    with pytest.raises(OutputError, match="never overwritten"):
        write_identity(path)
