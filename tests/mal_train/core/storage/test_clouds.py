"""gcsfs and adlfs against stand-ins of their services on loopback: the calls that we make work, and their errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mal_train.core.errors import OutputError, StorageError, StoreUnreachable
from mal_train.core.storage import object_store
from mal_train.core.storage.listing import list_names
from mal_train.core.storage.reading import local_copy, open_random, read_bytes
from mal_train.core.storage.writing import check_writable, remove, write_output
from mal_train.distributed.launch import free_port
from tests import tools
from tests.mal_train.core.storage.cloud_servers import BUCKET, AzureHandler, CloudServer, GoogleHandler, serving

LIMIT = 1000
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The public key of Azure's emulator."""


@pytest.fixture(params=["gs", "az"])
def scheme(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture
def cloud(scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CloudServer]:
    tools.module("gcsfs" if scheme == "gs" else "adlfs")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    object_store.forget_connections()
    with serving(GoogleHandler if scheme == "gs" else AzureHandler) as server:
        point_to(monkeypatch, server.url)
        yield server
    object_store.forget_connections()


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    account = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={KEY};"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"{account}BlobEndpoint={url}/devstoreaccount1;")


def reason_of(address: str) -> str:
    with pytest.raises(StorageError) as caught:
        read_bytes(address, LIMIT)
    return caught.value.reason


def test_objects_are_read_listed_and_copied(scheme: str, cloud: CloudServer) -> None:
    content = os.urandom(500)
    cloud.put("images/a b.jpg", content)
    cloud.put("images/deeper/b.jpg", b"b")
    cloud.put("images/empty", b"")
    base = f"{scheme}://{BUCKET}/images"
    assert read_bytes(f"{base}/a b.jpg", LIMIT) == content
    assert read_bytes(f"{base}/empty", LIMIT) == b""
    assert list(list_names(base)) == ["a b.jpg", "deeper/b.jpg", "empty"]
    assert list(list_names(f"{base}/empty")) == []
    with local_copy(f"{base}/a b.jpg") as path:
        assert path.read_bytes() == content


def test_errors_have_their_reasons(scheme: str, cloud: CloudServer, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.put("large", bytes(LIMIT + 1))
    cloud.put("denied", b"x")
    cloud.denied.add("denied")
    base = f"{scheme}://{BUCKET}"
    assert reason_of(f"{base}/large") == "TOO_LARGE"
    assert reason_of(f"{base}/nothing") == "NOT_FOUND"
    assert reason_of(f"{base}/denied") == "ACCESS_DENIED"
    assert reason_of(f"{scheme}://no-such-bucket/a") in ("NOT_FOUND", "BUCKET_NOT_FOUND")


def test_ranges_are_of_one_version(scheme: str, cloud: CloudServer) -> None:
    content = os.urandom(500)
    cloud.put("a.parquet", content)
    with open_random(f"{scheme}://{BUCKET}/a.parquet") as file:
        file.seek(-8, os.SEEK_END)
        assert file.read() == content[-8:]
        file.seek(100)
        assert file.read(10) == content[100:110]
        cloud.put("a.parquet", os.urandom(500))
        with pytest.raises(StorageError) as caught:
            file.read(10)
    assert caught.value.reason == "CHANGED"


def test_outputs_are_whole(scheme: str, cloud: CloudServer) -> None:
    address = f"{scheme}://{BUCKET}/out/masks.json"
    check_writable(address)
    with pytest.raises(OutputError):
        check_writable(f"{scheme}://no-such-bucket/masks.json")
    with write_output(address) as file:
        file.write(b"{}")
        assert cloud.get("out/masks.json") is None
    assert cloud.get("out/masks.json") == b"{}"
    cloud.denied.add("out/masks.json")
    with pytest.raises(OutputError), write_output(address) as file:
        file.write(b"new")
    cloud.denied.clear()
    assert cloud.get("out/masks.json") == b"{}"
    remove(address)
    remove(address)
    assert cloud.get("out/masks.json") is None


def test_service_that_is_not_there(scheme: str, cloud: CloudServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(*_: object, **__: object) -> None:
        """Replaces the pauses of the libraries, up to a minute in all."""

    monkeypatch.setattr("asyncio.sleep", at_once)
    point_to(monkeypatch, f"http://127.0.0.1:{free_port()}")
    object_store.forget_connections()
    with pytest.raises(StoreUnreachable):
        read_bytes(f"{scheme}://{BUCKET}/a", LIMIT)
