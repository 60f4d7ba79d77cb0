"""Errors of the libraries behind the stores become ours, without their texts."""

from typing import Any

import pytest

from mal_train.core.errors import StorageError
from mal_train.core.storage.object_store import AzureStore, GcsStore, ObjectInfo
from mal_train.core.storage.retry import Transient
from mal_train.core.storage.store_errors import translate
from tests import tools

SECRET = "sig=0f3c9a"


def http_error(code: int) -> Exception:
    error: Exception = tools.module("gcsfs.retry").HttpError({"code": code, "message": SECRET})
    return error


def azure_error(name: str, status: int | None = None, code: str | None = None) -> Exception:
    error: Any = getattr(tools.module("azure.core.exceptions"), name)(SECRET)
    error.status_code = status
    error.error_code = code
    return error  # type: ignore[no-any-return]


def google_auth_error(name: str) -> Exception:
    return getattr(tools.module("google.auth.exceptions"), name)(SECRET)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("address", "make", "reason"),
    [
        ("gs://b/k", lambda: http_error(401), "CREDENTIALS_REFUSED"),
        ("gs://b/k", lambda: OSError(f"Forbidden: https://storage/{SECRET}"), "ACCESS_DENIED"),
        ("gs://b/k", lambda: FileNotFoundError(SECRET), "NOT_FOUND"),
        ("gs://b/k", lambda: google_auth_error("DefaultCredentialsError"), "NO_CREDENTIALS"),
        ("gs://b/k", lambda: http_error(400), "FAILED"),
        (
            "az://c/k",
            lambda: azure_error("ClientAuthenticationError", 403, "AuthenticationFailed"),
            "CREDENTIALS_REFUSED",
        ),
        ("az://c/k", lambda: azure_error("ResourceNotFoundError", 404, "BlobNotFound"), "NOT_FOUND"),
        ("az://c/k", lambda: azure_error("ResourceNotFoundError", 404, "ContainerNotFound"), "BUCKET_NOT_FOUND"),
        ("az://c/k", lambda: ValueError("Must provide either a connection_string or account_name"), "NO_CREDENTIALS"),
        ("https://h/k", lambda: ValueError(SECRET), "FAILED"),
    ],
)
def test_permanent_error_has_its_reason(address: str, make: Any, reason: str) -> None:
    error = translate(make(), address)
    assert isinstance(error, StorageError)
    assert error.reason == reason
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    "make",
    [
        lambda: http_error(503),
        lambda: http_error(429),
        lambda: TimeoutError(SECRET),
        lambda: ConnectionResetError(SECRET),
        lambda: azure_error("ServiceRequestError"),
        lambda: azure_error("HttpResponseError", 503, "ServerBusy"),
        lambda: google_auth_error("TransportError"),
    ],
)
def test_error_that_may_pass_is_transient(make: Any) -> None:
    error = translate(make(), "gs://b/k")
    assert isinstance(error, Transient)
    assert SECRET not in str(error)


class Filesystem:
    """Answers as gcsfs and adlfs do; `on_read` runs after each read."""

    def __init__(self, content: bytes, version: str, on_read: Any = lambda: None) -> None:
        self.content = content
        self.version = version
        self.on_read = on_read
        self.calls: list[dict[str, Any]] = []

    def info(self, _: str, **__: Any) -> dict[str, Any]:
        return {"type": "file", "size": len(self.content), "etag": self.version, "generation": self.version}

    def cat_file(self, _: str, start: int, end: int, **options: Any) -> bytes:
        self.calls.append(options)
        if options.get("generation") not in (None, self.version):
            raise FileNotFoundError
        data = self.content[start:end]
        self.on_read()
        return data


def test_google_reads_one_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem = Filesystem(b"0123456789", "7")
    monkeypatch.setattr(GcsStore, "filesystem", lambda *_: filesystem)
    store = GcsStore()
    info = store.info("gs://b/k")
    assert info == ObjectInfo(10, "7")
    assert store.read_range("gs://b/k", 2, 5, info) == b"234"
    assert filesystem.calls[0]["concurrency"] == 1
    filesystem.version = "8"
    with pytest.raises(StorageError) as caught:
        store.read_range("gs://b/k", 2, 5, info)
    assert caught.value.reason == "CHANGED"


def test_azure_compares_the_version_after_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem = Filesystem(b"0123456789", "a")
    monkeypatch.setattr(AzureStore, "filesystem", lambda *_: filesystem)
    store = AzureStore()
    assert store.read("az://c/k", 10) == b"0123456789"
    filesystem.on_read = lambda: setattr(filesystem, "version", "b")
    with pytest.raises(StorageError) as caught:
        store.read("az://c/k", 10)
    assert caught.value.reason == "CHANGED"
    with pytest.raises(StorageError) as caught:
        store.read("az://c/k", 9)
    assert caught.value.reason == "TOO_LARGE"
