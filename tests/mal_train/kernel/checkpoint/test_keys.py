"""Parsing of key settings, and that no secret is shown."""

import copy
import logging
import os
import stat
import traceback
from pathlib import Path

import pytest

from mal_train.core.errors import ConfigError, OutputError
from mal_train.kernel.checkpoint.keys import KeySource, Purpose, generate_identity, parse_key, write_identity

SECRET = "correct horse battery staple"


@pytest.mark.parametrize("text", [None, ""])
def test_an_empty_setting_is_no_key(text: str | None) -> None:
    assert parse_key(text, purpose="encryption", source="yaml") is None
    assert parse_key(text, purpose="decryption", source="yaml") is None


@pytest.mark.parametrize("source", ["yaml", "command line", "environment"])
def test_a_recipient_is_accepted_from_every_source_and_cannot_decrypt(source: KeySource) -> None:
    key = parse_key(generate_identity()[0], purpose="encryption", source=source)
    assert key is not None
    assert len(key.recipients) == 1
    assert key.passphrase is None
    assert key.decryption_key is None


def test_a_recipient_is_refused_for_decryption() -> None:
    with pytest.raises(ConfigError, match="decryption_key"):
        parse_key(generate_identity()[0], purpose="decryption", source="yaml")


def test_a_literal_passphrase_is_refused_on_the_command_line_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="encryption_key") as caught:
        parse_key(SECRET, purpose="encryption", source="command line")
    assert SECRET not in str(caught.value)


def test_literal_identity_is_refused_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="decryption_key"):
        parse_key(generate_identity()[1], purpose="decryption", source="command line")


def test_a_literal_passphrase_in_yaml_is_accepted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        key = parse_key(SECRET, purpose="encryption", source="yaml")
    assert key is not None
    assert key.passphrase is not None
    assert key.passphrase.reveal() == SECRET
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "encryption_key" in caplog.text
    assert SECRET not in caplog.text


def test_a_published_passphrase_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_key("nvidia_tao", purpose="encryption", source="environment")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_identity_file_as_age_keygen_writes_it_opens_and_seals(tmp_path: Path) -> None:
    recipient = write_identity(tmp_path / "key.txt")
    text = f"file:{tmp_path / 'key.txt'}"
    decryption_key = parse_key(text, purpose="decryption", source="command line")
    encryption_key = parse_key(text, purpose="encryption", source="command line")
    assert decryption_key is not None
    assert encryption_key is not None
    assert [str(identity.to_public()) for identity in decryption_key.identities] == [recipient]
    assert [str(r) for r in encryption_key.recipients] == [recipient]
    assert encryption_key.decryption_key is not None


def test_a_file_may_hold_several_recipients_and_comments(tmp_path: Path) -> None:
    recipients = [generate_identity()[0] for _ in range(3)]
    (tmp_path / "team").write_text("# team\n" + "\n\n".join(recipients) + "\n")
    key = parse_key(f"file:{tmp_path / 'team'}", purpose="encryption", source="yaml")
    assert key is not None
    assert [str(recipient) for recipient in key.recipients] == recipients


def test_a_passphrase_file_is_stripped_of_its_line_end_only(tmp_path: Path) -> None:
    (tmp_path / "pass").write_bytes(b" with blanks \r\n")
    key = parse_key(f"file:{tmp_path / 'pass'}", purpose="decryption", source="command line")
    assert key is not None
    assert key.passphrase is not None
    assert key.passphrase.reveal() == " with blanks "


def test_an_environment_variable_accepts_the_same_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    recipient, secret = generate_identity()
    monkeypatch.setenv("MAL_TEST_KEY", secret)
    key = parse_key("env:MAL_TEST_KEY", purpose="encryption", source="command line")
    assert key is not None
    assert [str(r) for r in key.recipients] == [recipient]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "passphrase"),
        (b"\n\n", "passphrase"),
        (b"first line\nsecond line\n", "passphrase"),
        (b"\xff\xfe\x00", "text"),
        (b"x" * 70_000, "65536"),
        (b"AGE-SECRET-KEY-1QQQQ\n", "identity"),
        (b"AGE-SECRET-KEY-1QQQQ\nand a stray line\n", "identity"),
        (b"age1qqqq\n", "recipient"),
    ],
)
def test_the_error_of_a_malformed_key_file_does_not_quote_it(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match=f"encryption_key.*{named}") as caught:
        parse_key(f"file:{tmp_path / 'key'}", purpose="encryption", source="yaml")
    assert "QQQQ" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("text", ["file:/no/such/file", "env:MAL_NO_SUCH_VARIABLE"])
@pytest.mark.parametrize("purpose", ["encryption", "decryption"])
def test_a_missing_file_or_variable_is_named(text: str, purpose: Purpose) -> None:
    with pytest.raises(ConfigError, match=text.partition(":")[2]):
        parse_key(text, purpose=purpose, source="command line")


def test_secrets_appear_in_no_repr_and_no_pickle(tmp_path: Path) -> None:
    recipient, secret = generate_identity()
    (tmp_path / "pass").write_text(SECRET)
    (tmp_path / "identity").write_text(secret)
    for name in ("pass", "identity"):
        key = parse_key(f"file:{tmp_path / name}", purpose="encryption", source="yaml")
        assert key is not None
        shown = f"{key!r} {key} {key.decryption_key!r} {key.passphrase!r}"
        assert SECRET not in shown
        assert secret not in shown
        assert recipient not in shown
        assert "file" in repr(key)
        assert copy.deepcopy(key) is key
        with pytest.raises(TypeError):
            key.__reduce_ex__(4)


def test_a_written_identity_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.txt"
    old = os.umask(0)
    try:
        recipient = write_identity(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert f"# public key: {recipient}\nAGE-SECRET-KEY-1" in path.read_text()
    with pytest.raises(OutputError, match=r"key\.txt"):
        write_identity(path)
