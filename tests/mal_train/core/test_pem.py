"""PEM files: the block that each use needs."""

from pathlib import Path

import pytest
import trustme

from mal_train.core.errors import ConfigError
from mal_train.core.pem import PemBlock, read_pem

CERTIFICATE = trustme.CA().cert_pem.bytes()
KEY = trustme.CA().issue_cert("a").private_key_pem.bytes()


@pytest.mark.parametrize(
    ("content", "block"),
    [(CERTIFICATE, "certificate"), (KEY, "private key"), (KEY + CERTIFICATE, "certificate")],
)
def test_a_file_with_the_block_is_returned_unchanged(tmp_path: Path, content: bytes, block: PemBlock) -> None:
    (tmp_path / "a.pem").write_bytes(content)
    assert read_pem(tmp_path / "a.pem", "tls_ca", block) == content


@pytest.mark.parametrize(
    ("content", "block"),
    [(CERTIFICATE, "private key"), (KEY, "certificate"), (b"no PEM", "certificate"), (b"", "certificate")],
)
def test_a_file_without_the_block_is_refused_by_name(tmp_path: Path, content: bytes, block: PemBlock) -> None:
    path = tmp_path / "a.pem"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_pem(path, "tls_ca", block)
    assert str(caught.value).startswith(f"tls_ca: {path}: ")


def test_a_missing_file_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        read_pem("none.pem", "tls_ca", "certificate")
    assert str(caught.value).startswith("tls_ca: none.pem: ")
