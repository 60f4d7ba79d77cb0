"""Gets the picture of a task: from a folder that was named, or from the Label Studio server with its key.

Addresses come with each request, so none is followed without leave: a folder gives what lies in it, the key is shown
to the one Label Studio server that was named at the start, and other hosts are asked only when they were named too.
The same holds for the places that an answer sends us on to. Of those, messages name the host and no more: what follows
it opens the picture to whoever reads the log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urljoin, urlsplit

import httpx2

from mal_client.images.image_input import read_file
from mal_train.core.errors import BadImage, ConfigError
from mal_train.core.masks.images import DEFAULT_LIMITS

LOCAL_FILES: Final = "/data/local-files/"
TIMEOUT_S: Final = 30.0
TOKEN_LIFE_S: Final = 240.0
"""Label Studio's access tokens live five minutes."""

MOST_REDIRECTS: Final = 5
"""Label Studio sends one for a picture of a storage, to that storage's address."""


class ImageFetcher:
    """Pictures by the address that a task holds. Usable from several threads; close it at the end.

    Args:
        host: address of the Label Studio server, for example http://localhost:8080; None: no picture is fetched there.
        api_key: a personal access token (of which short-lived ones are made) or a legacy token.
        folder: what Label Studio serves as local files (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT), read directly.
        other_hosts: names of further hosts that pictures may come from, without any key.
        max_bytes: of one picture.
    """

    def __init__(
        self,
        host: str | None,
        api_key: str | None = None,
        folder: Path | None = None,
        other_hosts: Collection[str] = (),
        max_bytes: int = DEFAULT_LIMITS.max_bytes,
    ) -> None:
        self._host = None if host is None else _checked_host(host)
        self._api_key = api_key
        self._folder = None if folder is None else folder.resolve()
        self._other_hosts = frozenset(other_hosts)
        self._max_bytes = max_bytes
        # Redirects are looked at here, one by one: httpx would follow them to any host, with a POST's body too.
        self._http = httpx2.Client(timeout=TIMEOUT_S, follow_redirects=False)
        self._lock = threading.Lock()
        self._access: tuple[str, float] | None = None

    def close(self) -> None:
        """Ends the connections."""
        self._http.close()

    def read(self, address: str) -> bytes:
        """The encoded picture.

        Raises:
            BadImage: it cannot be had, or may not be asked for there.
        """
        try:
            parts = urlsplit(address)
            _ = parts.port, httpx2.URL(address)
        except (ValueError, httpx2.InvalidURL) as error:
            raise BadImage(f"{address}: no address ({error})", "IMAGE_NOT_FOUND") from None
        if self._folder is not None and not parts.netloc and parts.path == LOCAL_FILES:
            return self._read_local(parse_qs(parts.query).get("d", [""])[0])
        if parts.scheme and parts.scheme not in ("http", "https"):
            raise BadImage(
                f"{address}: {parts.scheme} addresses are not read; let Label Studio hand out http addresses "
                "(pre-signed URLs in the settings of the storage)",
                "IMAGE_NOT_FOUND",
            )
        url = address if parts.netloc else self._on_host(address)
        for _ in range(MOST_REDIRECTS + 1):
            found = self._fetch(url, self._headers_for(url, address), _told(url, address))
            if isinstance(found, bytes):
                return found
            url = found.url
        raise BadImage(f"{address}: sent on more than {MOST_REDIRECTS} times", "IMAGE_NOT_FOUND")

    def _read_local(self, name: str) -> bytes:
        assert self._folder is not None
        path = (self._folder / name.lstrip("/")).resolve()
        if not path.is_relative_to(self._folder):
            raise BadImage(f"{name}: lies outside {self._folder}", "IMAGE_NOT_FOUND")
        return read_file(path)

    def _on_host(self, address: str) -> str:
        if self._host is None:
            raise BadImage(
                f"{address}: lies on the Label Studio server; name it with --label-studio http://HOST:PORT",
                "IMAGE_NOT_FOUND",
            )
        return urljoin(self._host, address)

    def _headers_for(self, url: str, address: str) -> dict[str, str]:
        """What is shown at a place that may be asked; BadImage for any other."""
        if self._is_label_studio(url):
            return self._authorisation()
        place = httpx2.URL(url)
        if place.scheme in ("http", "https") and place.host in self._other_hosts:
            return {}
        where = address if url == address else f"{address} leads to {place.scheme}://{place.host}, which"
        raise BadImage(
            f"{where} is not on the Label Studio server that was named; allow its host with --picture-host "
            f"{place.host}",
            "IMAGE_NOT_FOUND",
        )

    def _is_label_studio(self, url: str) -> bool:
        return self._host is not None and _origin(url) == _origin(self._host)

    def _fetch(self, url: str, headers: dict[str, str], told: str) -> bytes | _Elsewhere:
        """The picture at `url`, which messages call `told`, or where else it is."""
        content = bytearray()
        try:
            with self._http.stream("GET", url, headers=headers) as answer:
                if answer.next_request is not None:
                    return _Elsewhere(str(answer.next_request.url))
                if answer.status_code in (401, 403):
                    raise BadImage(f"{told}: {self._refusal(url, headers, answer.status_code)}", "IMAGE_NOT_FOUND")
                if answer.status_code != 200:
                    raise BadImage(f"{told}: answered {answer.status_code}", "IMAGE_NOT_FOUND")
                for part in answer.iter_bytes():
                    content += part
                    if len(content) > self._max_bytes:
                        raise BadImage(f"{told}: more than {self._max_bytes} bytes", "IMAGE_TOO_LARGE")
        except httpx2.HTTPError as error:
            raise BadImage(f"{told}: cannot be fetched ({error})", "IMAGE_NOT_FOUND") from None
        return bytes(content)

    def _refusal(self, url: str, headers: dict[str, str], status: int) -> str:
        """Why a picture is not handed out, and the remedy."""
        if headers:
            return f"Label Studio refuses the key ({status}); give a valid one with --api-key-file"
        if self._is_label_studio(url):
            return f"Label Studio asks for a key ({status}); give one with --api-key-file"
        return (
            f"refused ({status}) without a key, and Label Studio's is not shown there; let Label Studio hand out "
            "addresses that need none (pre-signed URLs in the settings of the storage, valid long enough)"
        )

    def _authorisation(self) -> dict[str, str]:
        if self._api_key is None:
            return {}
        if self._api_key.count(".") != 2:
            return {"Authorization": f"Token {self._api_key}"}
        with self._lock:
            if self._access is None or time.monotonic() > self._access[1]:
                self._access = (self._new_access(), time.monotonic() + TOKEN_LIFE_S)
            return {"Authorization": f"Bearer {self._access[0]}"}

    def _new_access(self) -> str:
        """A short-lived token for the personal access token, which itself opens nothing else."""
        url = urljoin(str(self._host), "/api/token/refresh")
        try:
            answer = self._http.post(url, json={"refresh": self._api_key})
            if answer.is_success:
                return str(answer.json()["access"])
            said = f"answered {answer.status_code}"
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            said = str(error)
        raise BadImage(
            f"{url}: no access for the personal access token ({said}); check --api-key-file", "IMAGE_NOT_FOUND"
        )


@dataclass(frozen=True)
class _Elsewhere:
    """Where an answer says that the picture is."""

    url: str


def _told(url: str, address: str) -> str:
    """A task's address and, where it leads elsewhere, to which host; the rest of that address may hold a signature."""
    place = httpx2.URL(url)
    return address if url == address else f"{address} (from {place.scheme}://{place.netloc.decode('ascii')})"


def _checked_host(host: str) -> str:
    parts = urlsplit(host)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--label-studio {host}: an address such as http://localhost:8080 is needed")
    return host


def _origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port, by the library that connects: a second reading of an address could differ from its own."""
    place = httpx2.URL(url)
    return place.scheme, place.host, place.port or {"http": 80, "https": 443}.get(place.scheme)
