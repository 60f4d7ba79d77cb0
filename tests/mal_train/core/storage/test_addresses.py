"""Addresses: what is remote, what a message may show, and how names are joined."""

from pathlib import Path

import pytest

from mal_train.core.errors import BadImage, ConfigError
from mal_train.core.storage.addresses import is_remote, join, parse_location, redact, sibling


@pytest.mark.parametrize(
    "address", ["s3://b/k", "gs://b/k", "az://c/k", "abfs://c@a.dfs.core.windows.net/k", "https://h/p", "HTTP://h/p"]
)
def test_addresses_of_stores_are_remote(address: str) -> None:
    assert is_remote(address)
    assert parse_location(address) == address


@pytest.mark.parametrize("text", ["a.json", "/a/b.json", "./s3:/b", "C:/photos", "images/**/*.jpg", "s3:bucket"])
def test_everything_else_is_a_path(text: str) -> None:
    assert not is_remote(text)
    assert parse_location(text) == Path(text)


@pytest.mark.parametrize(
    "text",
    ["ftp://h/p", "file:///etc/passwd", "s3://", "https:///p", "gs:///k", "https://h:0/p", "s3://b/k?versionId=1"],
)
def test_unusable_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_location(text)


@pytest.mark.parametrize("text", ["s3://AKIA1:secret/1@bucket/a", "https://me:secret/1@h/p", "https://me:secret?1@h/p"])
def test_an_address_with_a_password_that_is_not_encoded_is_refused_without_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_location(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://u:pw@h:8443/p/a.jpg?X-Amz-Signature=sig#f", "https://h:8443/p/a.jpg?[redacted]"),
        ("https://token@h/p", "https://h/p"),
        ("https://h?sig=1", "https://h?[redacted]"),
        ("https://h/p#sig=1", "https://h/p?[redacted]"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("az://container/a?sv=1&sig=2", "az://container/a?[redacted]"),
        ("abfs://c@a.dfs.core.windows.net/k", "abfs://c@a.dfs.core.windows.net/k"),
        ("abfs://c:secret@a.dfs.core.windows.net/k", "abfs://a.dfs.core.windows.net/k"),
        ("ftp://u:pw@h/p", "ftp://h/p"),
        ("s3://AKIA1:se/cr/et@bucket/a", "s3://bucket/a"),
        ("s3://AKIA1:se/cret", "s3://[redacted]"),
        ("https://me:se/cret@h/p", "https://h/p"),
        ("https://me:se?cret@h/p", "https://h/p"),
        ("https://me:se#cret@h/p", "https://h/p"),
        ("https://[::1]:8443/p@q", "https://[::1]:8443/p@q"),
        ("a@b?.jpg", "a@b?.jpg"),
    ],
)
def test_redaction_leaves_no_way_to_use_a_signed_address(address: str, shown: str) -> None:
    assert redact(address) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "a/../../b.jpg"])
def test_name_cannot_leave_a_prefix(name: str) -> None:
    with pytest.raises(BadImage) as caught:
        join("s3://bucket/images", name)
    assert caught.value.reason == "IMAGE_NOT_FOUND"


def test_name_with_an_address_stays_below_the_prefix() -> None:
    assert join("s3://bucket/images", "https://evil/a.jpg") == "s3://bucket/images/https://evil/a.jpg"
    assert join(Path("images"), "s3://bucket/a.jpg") == Path("images/s3://bucket/a.jpg")


def test_sibling_of_a_signed_address_has_no_signature() -> None:
    assert sibling("https://h/out/a.json?sig=1", "b.json") == "https://h/out/b.json"
    assert sibling("https://h/out/a.json#x/y", "b.json") == "https://h/out/b.json"


@pytest.mark.parametrize(
    "folder", ["s3://bucket/a?b", "gs://bucket/out/a?b#c", "az://bucket/a#b", "s3://bucket/", "s3://bucket/a/"]
)
def test_sibling_of_an_object_is_in_the_same_prefix(folder: str) -> None:
    assert sibling(f"{folder}/masks?.json", "masks.errors.jsonl") == f"{folder}/masks.errors.jsonl"
