"""Secrets in files and environment variables, and what error messages say about them."""

import traceback
from pathlib import Path

import pytest

from mal_train.core.errors import ConfigError
from mal_train.core.secrets import MAX_SECRET_BYTES, read_secret, read_secret_file, warn_if_shared


def test_a_file_and_a_variable_give_their_text_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("s3cret \n")
    monkeypatch.setenv("MAL_TEST_SECRET", "s3cret \n")
    assert read_secret(f"file:{tmp_path / 'token'}", "token") == "s3cret \n"
    assert read_secret("env:MAL_TEST_SECRET", "token") == "s3cret \n"


def test_a_path_may_start_at_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("s3cret")
    assert read_secret("file:~/token", "token") == "s3cret"


@pytest.mark.parametrize("reference", ["file:/no/such/file", "file:~no-such-user/token", "env:MAL_NO_SUCH_VARIABLE"])
def test_a_missing_source_is_named_with_its_setting(reference: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_secret(reference, "tokens: 'a'")
    assert str(caught.value).startswith("tokens: 'a': ")
    assert reference.partition(":")[2] in str(caught.value)


def test_an_empty_variable_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAL_TEST_SECRET", "")
    with pytest.raises(ConfigError):
        read_secret("env:MAL_TEST_SECRET", "token")


@pytest.mark.parametrize("content", [b"QQQQ\xff\xfe", b"Q" * (MAX_SECRET_BYTES + 1)])
def test_a_file_that_is_not_a_secret_is_named_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_secret_file(tmp_path / "key", "token")
    assert str(tmp_path / "key") in str(caught.value)
    assert "QQQQ" not in "".join(traceback.format_exception(caught.value))


def test_a_secret_itself_is_not_a_reference_and_is_not_quoted() -> None:
    with pytest.raises(ValueError, match="token") as caught:
        read_secret("hunter2", "token")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("mode", "is_shared"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_secret_that_other_accounts_may_read_is_named_in_a_warning(
    mode: int, is_shared: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "identity.txt"
    path.write_text("s3cret")
    path.chmod(mode)
    warn_if_shared(f"file:{path}", "decryption_key")
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == is_shared
    assert all(str(path) in message and "decryption_key" in message for message in messages)
    assert "s3cret" not in caplog.text


def test_a_byte_order_mark_is_no_part_of_a_secret(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "token").write_text("s3cret", encoding=encoding)
        assert read_secret_file(tmp_path / "token", "token") == "s3cret"
