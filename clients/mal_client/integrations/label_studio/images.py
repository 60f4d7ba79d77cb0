"""Fetches the image of a task from a local folder, from the Label Studio server or from an allowed host.

URLs come from requests and are not trusted: only files inside the folder are read, the token is sent only to the
configured Label Studio server, and other hosts are contacted only if they are allowed. Redirects follow the same rules.
Messages name only the host of a redirect, because the rest of its URL may be signed and would give readers of the log
access to the image.
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

from mal_client.integrations.label_studio.regions import LOCAL_FILES
from mal_train.core.errors import BadImage, ConfigError
from mal_train.core.images.files import read_image_bytes
from mal_train.core.images.header import DEFAULT_LIMITS
from mal_train.core.input_files import resolve_inside
from mal_train.core.proxies import proxy_of_url, refuse_plaintext, url_hint
from mal_train.core.storage.addresses import redact

TIMEOUT_S: Final = 30.0
TOKEN_LIFE_S: Final = 240.0
"""Seconds that an access token is used; Label Studio's expire after five minutes."""

MAX_REDIRECTS: Final = 5
"""Label Studio sends one redirect for an image in a cloud storage."""


class ImageFetcher:
    """Fetches images by the URL in a task. Thread-safe; close it at the end.

    Args:
        host: URL of the Label Studio server, for example http://localhost:8080; None fetches nothing from it.
        api_key: a personal access token (exchanged for short-lived access tokens) or a legacy token.
        folder: folder of Label Studio's local files (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT), which is read directly.
        other_hosts: names of other allowed hosts, which get no token.
        max_bytes: size limit of an encoded image.

    Raises:
        ConfigError: the host is no URL, or a proxy could read the token.
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
        if self._host is not None and api_key is not None:
            refuse_plaintext(self._host, "--label-studio", "the token of --api-key-file")
        self._clients: dict[str | None, httpx2.Client] = {}
        self._clients_lock = threading.Lock()
        self._lock = threading.Lock()
        self._access: tuple[str, float] | None = None

    def close(self) -> None:
        """Closes the connections."""
        for client in self._clients.values():
            client.close()

    def read(self, url: str) -> bytes:
        """Returns the encoded image.

        Raises:
            BadImage: the image cannot be fetched, or its URL is not allowed.
        """
        try:
            parts = urlsplit(url)
            _ = parts.port, httpx2.URL(url)
        except (ValueError, httpx2.InvalidURL) as error:
            raise BadImage(f"{url}: not a valid URL ({error})", "IMAGE_NOT_FOUND") from None
        if self._folder is not None and not parts.netloc and parts.path == LOCAL_FILES:
            # Names that are not UTF-8 keep their bytes.
            return self._read_local(parse_qs(parts.query, errors="surrogateescape").get("d", [""])[0])
        if parts.scheme and parts.scheme not in ("http", "https"):
            raise BadImage(
                f"{url}: scheme {parts.scheme!r} is not supported; let Label Studio provide http URLs (pre-signed URLs "
                "in the settings of the storage)",
                "IMAGE_NOT_FOUND",
            )
        target = url if parts.netloc else self._on_host(url)
        for _ in range(MAX_REDIRECTS + 1):
            response = self._fetch(target, self._headers_for(target, url), _public_name(target, url))
            if isinstance(response, bytes):
                return response
            target = response.url
        raise BadImage(f"{url}: more than {MAX_REDIRECTS} redirects", "IMAGE_NOT_FOUND")

    def _read_local(self, name: str) -> bytes:
        assert self._folder is not None
        path = resolve_inside(self._folder, name.lstrip("/"))
        if path is None:
            raise BadImage(f"{name}: outside {self._folder}", "IMAGE_NOT_FOUND")
        return read_image_bytes(path, self._max_bytes)

    def _on_host(self, url: str) -> str:
        if self._host is None:
            raise BadImage(
                f"{url}: relative to the Label Studio server, which is unknown; give it with "
                "--label-studio http://HOST:PORT",
                "IMAGE_NOT_FOUND",
            )
        return urljoin(self._host, url)

    def _headers_for(self, target: str, url: str) -> dict[str, str]:
        """Returns the headers for an allowed target. Raises BadImage for any other."""
        if self._is_label_studio(target):
            return self._authorization()
        parsed = httpx2.URL(target)
        if parsed.scheme in ("http", "https") and parsed.host in self._other_hosts:
            return {}
        redirect = "" if target == url else f" redirects to {parsed.scheme}://{parsed.host},"
        raise BadImage(
            f"{url}:{redirect} host is not allowed; allow it with --image-host {parsed.host}",
            "IMAGE_NOT_FOUND",
        )

    def _is_label_studio(self, url: str) -> bool:
        return self._host is not None and _origin(url) == _origin(self._host)

    def _fetch(self, target: str, headers: dict[str, str], name: str) -> bytes | _Redirect:
        """Returns the image or the redirect at `target`, which messages call `name`."""
        content = bytearray()
        try:
            with self._client_for(target).stream("GET", target, headers=headers) as response:
                if response.next_request is not None:
                    return _Redirect(str(response.next_request.url))
                if response.status_code in (401, 403):
                    raise BadImage(f"{name}: {self._denial(target, headers, response.status_code)}", "IMAGE_NOT_FOUND")
                if response.status_code != 200:
                    raise BadImage(f"{name}: HTTP status {response.status_code}", "IMAGE_NOT_FOUND")
                for part in response.iter_bytes():
                    content += part
                    if len(content) > self._max_bytes:
                        raise BadImage(f"{name}: more than {self._max_bytes} bytes", "IMAGE_TOO_LARGE")
        except httpx2.HTTPError as error:
            raise BadImage(f"{name}: cannot be fetched ({error}){url_hint(target)}", "IMAGE_NOT_FOUND") from None
        return bytes(content)

    def _client_for(self, url: str) -> httpx2.Client:
        """Returns the client of a URL: one for each proxy, one without. Raises BadImage for a proxy of another type."""
        proxy = proxy_of_url(url)
        if proxy is not None and not proxy.carries_http:
            raise BadImage(
                f"{redact(url)}: the proxy {proxy} is not supported; give an address that begins with http://, or add "
                f"{httpx2.URL(url).host} to no_proxy",
                "IMAGE_NOT_FOUND",
            )
        key = None if proxy is None else proxy.url
        with self._clients_lock:
            if key not in self._clients:
                # With a transport, httpx applies no rule of its own to the variables. Redirects are checked one by one;
                # httpx would follow them to any host, with the body of a POST.
                transport = httpx2.HTTPTransport(proxy=key)
                self._clients[key] = httpx2.Client(transport=transport, timeout=TIMEOUT_S, follow_redirects=False)
            return self._clients[key]

    def _denial(self, target: str, headers: dict[str, str], status: int) -> str:
        """Explains a status of 401 or 403, with the remedy."""
        if headers:
            return f"Label Studio rejected the token ({status}); give a valid one with --api-key-file"
        if self._is_label_studio(target):
            return f"Label Studio requires a token ({status}); give one with --api-key-file"
        return (
            f"access denied ({status}); this host gets no token, so let Label Studio provide URLs that need none "
            "(pre-signed URLs in the settings of the storage, valid for long enough)"
        )

    def _authorization(self) -> dict[str, str]:
        if self._api_key is None:
            return {}
        if self._api_key.count(".") != 2:
            return {"Authorization": f"Token {self._api_key}"}
        with self._lock:
            if self._access is None or time.monotonic() > self._access[1]:
                self._access = (self._new_access_token(), time.monotonic() + TOKEN_LIFE_S)
            return {"Authorization": f"Bearer {self._access[0]}"}

    def _new_access_token(self) -> str:
        """Exchanges the personal access token, which grants no access by itself, for a short-lived access token."""
        url = urljoin(str(self._host), "/api/token/refresh")
        try:
            response = self._client_for(url).post(url, json={"refresh": self._api_key})
            if response.is_success:
                return str(response.json()["access"])
            cause = f"HTTP status {response.status_code}"
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            cause = str(error)
        raise BadImage(
            f"{url}: personal access token was not accepted ({cause}); check --api-key-file{url_hint(url)}",
            "IMAGE_NOT_FOUND",
        )


@dataclass(frozen=True)
class _Redirect:
    """A response that redirects to another URL."""

    url: str


def _public_name(target: str, url: str) -> str:
    """Returns the URL of a task and the host that it redirects to, without the path, which may be signed."""
    parsed = httpx2.URL(target)
    return url if target == url else f"{url} (from {parsed.scheme}://{parsed.netloc.decode('ascii')})"


def _checked_host(host: str) -> str:
    parts = urlsplit(host)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--label-studio {host}: expected a URL such as http://localhost:8080")
    return host


def _origin(url: str) -> tuple[str, str, int | None]:
    """Returns scheme, host and port as parsed by the library that connects; another parser could disagree with it."""
    parsed = httpx2.URL(url)
    return parsed.scheme, parsed.host, parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)
