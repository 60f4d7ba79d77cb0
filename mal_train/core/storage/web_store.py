"""Files on web servers (https, http), read only. Needs the extra `remote`.

One request reads a whole file: its size is taken from the head of the response before the body is read, and a size that
is not stated is limited while reading. Redirects are followed one by one, each checked by `AllowedHosts`; every address
that a host name resolves to is checked when the connection is made, so that a second answer of the name server cannot
lead elsewhere. No cookie or .netrc file is used, and an address beyond the first gets no user or password.

The proxy of the environment is used for the hosts that the user named. The others are contacted directly: their
addresses could not be checked behind a proxy, which resolves names itself.
"""

import atexit
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import urlsplit

from mal_train.core.errors import OutputError, StorageError
from mal_train.core.proxies import proxy_of_url
from mal_train.core.storage.addresses import redact
from mal_train.core.storage.disk_space import check_space, disk_errors
from mal_train.core.storage.hosts import AllowedHosts
from mal_train.core.storage.object_store import MAX_CONNECTIONS, ObjectInfo, Store, load_module
from mal_train.core.storage.retry import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Transient, attempt_timeout_s
from mal_train.core.storage.store_errors import (
    BUSY_STATUSES,
    CHANGED_STATUS,
    MISSING_STATUSES,
    changed,
    denied,
    missing,
    too_large,
    translate,
)

MAX_REDIRECTS: Final = 5
CHUNK_BYTES: Final = 1 << 18

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_DENIED: Final = (401, 403, 407, 451)
# The file itself, not a compressed form of it whose size is unknown.
_HEADERS: Final = {"Accept-Encoding": "identity", "User-Agent": "mask-auto-labeler"}

Result = TypeVar("Result")

_sessions: dict[tuple[int, AllowedHosts | None], Any] = {}
"""Sessions by process and hosts, None for proxies; only the thread of fsspec's event loop uses them."""


class WebStore(Store):
    """Web servers.

    Args:
        hosts: hosts that may be contacted; None: that of each address, which the user gave, and public ones that it
            redirects to.
    """

    def __init__(self, hosts: AllowedHosts | None = None) -> None:
        self._hosts = hosts

    def info(self, address: str) -> ObjectInfo:
        """Returns size and version of a file, by a request for its first byte."""
        return self._run(lambda: self._info(address), address, 0)

    def read(self, address: str, max_bytes: int) -> bytes:
        """Returns a file of at most `max_bytes`."""
        return self._run(lambda: self._read(address, max_bytes), address, max_bytes)

    def copy(self, address: str, file: BinaryIO, max_bytes: int) -> None:
        """Writes a file of at most `max_bytes` over the content of an open one.

        Raises:
            OutputError: the disk has not enough space.
        """

        def write(part: bytes) -> None:
            with disk_errors(address):
                file.write(part)

        with disk_errors(address):
            file.seek(0)
            file.truncate()
        self._run(lambda: self._copy(address, write, max_bytes, partial(check_space, address)), address, max_bytes)

    def read_range(self, address: str, start: int, end: int, info: ObjectInfo) -> bytes:
        """Returns a range of a file.

        Raises:
            StorageError: the server sends another version than `info` names (CHANGED) or no ranges (FAILED).
        """
        if start >= end:
            return b""
        return self._run(lambda: self._read_range(address, start, end, info), address, end - start)

    def upload(self, source: Path, address: str) -> None:
        """Refuses: web servers are read only."""
        raise _read_only(address)

    def check_writable(self, address: str) -> None:
        """Refuses: web servers are read only."""
        raise _read_only(address)

    def remove(self, address: str) -> None:
        """Refuses: web servers are read only."""
        raise _read_only(address)

    def names(self, prefix: str) -> Iterator[str]:
        """Refuses: web servers have no standard way to list files."""
        raise StorageError(
            f"{redact(prefix)}: files on a web server cannot be listed; give names in the annotations, or use s3://, "
            "gs:// or az://",
            "FAILED",
        )

    def _run(self, work: Callable[[], Awaitable[Result]], address: str, size: int) -> Result:
        asyn = load_module("fsspec.asyn", address)
        load_module("aiohttp", address)

        async def translated() -> Result:
            try:
                return await work()
            except (Transient, StorageError, OutputError):
                raise
            except HostRefused as error:
                raise StorageError(f"{redact(address)}: {error}", "HOST_NOT_ALLOWED") from None
            # aiohttp raises errors of many kinds, whose texts hold the URL.
            except Exception as error:
                raise _translate(error, address, self._proxy_note(address)) from None

        try:
            return asyn.sync(asyn.get_loop(), translated, timeout=attempt_timeout_s(size))  # type: ignore[no-any-return]
        except TimeoutError:
            raise Transient("timeout") from None

    def _proxy_note(self, address: str) -> str:
        """Returns what the environment's proxy has to do with a failed connection."""
        proxy = proxy_of_url(address)
        if proxy is None:
            return ""
        if (self._hosts or AllowedHosts.of_address(address)).is_named(urlsplit(address).hostname or ""):
            return f" through the proxy {proxy}"
        return f" without the proxy {proxy}, which is used for hosts that you name"

    async def _info(self, address: str) -> ObjectInfo:
        async with self._response(address, {"Range": "bytes=0-0"}) as response:
            return ObjectInfo(_total_size(response), _version(response))

    async def _read(self, address: str, max_bytes: int) -> bytes:
        content = bytearray()
        await self._copy(address, content.extend, max_bytes)
        return bytes(content)

    async def _copy(
        self,
        address: str,
        write: Callable[[bytes], object],
        max_bytes: int,
        check_size: Callable[[int], None] = lambda _: None,
    ) -> None:
        async with self._response(address, {}) as response:
            if response.status != 200:
                raise StorageError(f"{redact(address)}: the server sends a part of the file", "FAILED")
            size = response.content_length
            if size is not None and size > max_bytes:
                raise too_large(address, f"{size} bytes", max_bytes)
            check_size(size or 0)
            await _copy_body(response, address, write, max_bytes)

    async def _read_range(self, address: str, start: int, end: int, info: ObjectInfo) -> bytes:
        async with self._response(address, {"Range": f"bytes={start}-{end - 1}"}) as response:
            if (_version(response), _total_size(response)) != (info.version, info.size):
                raise changed(address)
            if response.status != 206:
                raise StorageError(
                    f"{redact(address)}: the server sends no ranges of a file; download the file", "FAILED"
                )
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-{end - 1}/"):
                raise StorageError(f"{redact(address)}: the server sends another range; download the file", "FAILED")
            data = bytearray()
            await _copy_body(response, address, data.extend, end - start)
        if len(data) != end - start:
            raise Transient("incomplete")
        return bytes(data)

    @asynccontextmanager
    async def _response(self, address: str, headers: dict[str, str]) -> AsyncIterator[Any]:
        """Yields the response to a request, after redirects."""
        import yarl  # noqa: PLC0415 (an extra)

        hosts = self._hosts or AllowedHosts.of_address(address)
        # An address that is encoded already may be signed in this spelling.
        url = yarl.URL(address, encoded=address.isascii() and " " not in address)
        for _ in range(MAX_REDIRECTS + 1):
            problem = hosts.problem(url.scheme, url.raw_host or "")
            if problem is not None:
                raise HostRefused(problem)
            proxy = _proxy_for(url, hosts, address)
            # The proxy's own address is not subject to the rules of hosts.
            session = await _session(hosts if proxy is None else None)
            request = session.get(url, headers={**_HEADERS, **headers}, allow_redirects=False, proxy=proxy)
            async with request as response:
                if response.status not in _REDIRECTS or "Location" not in response.headers:
                    _check_status(response.status, address)
                    yield response
                    return
                url = _redirect(url, response.headers["Location"])
        raise StorageError(f"{redact(address)}: more than {MAX_REDIRECTS} redirects", "FAILED")


def _proxy_for(url: Any, hosts: AllowedHosts, address: str) -> str | None:
    """Returns the URL of the proxy for a request; None without one."""
    proxy = proxy_of_url(str(url)) if hosts.is_named(url.raw_host or "") else None
    if proxy is None:
        return None
    if not proxy.carries_http:
        raise StorageError(f"{redact(address)}: the proxy {proxy} is not supported; give one of http://", "FAILED")
    if url.scheme == "http" and url.user is not None:
        raise StorageError(
            f"{redact(address)}: the proxy {proxy} could read the password; use https://, or add the host to no_proxy",
            "FAILED",
        )
    return proxy.url


class HostRefused(OSError):
    """A host or an address that `AllowedHosts` refuses."""


def _redirect(url: Any, location: str) -> Any:
    """Returns the target of a redirect, without user and password, which the first server could choose."""
    target = url.join(type(url)(location, encoded=location.isascii() and " " not in location))
    if url.scheme == "https" and target.scheme != "https":
        raise HostRefused("redirects from https to http")
    return target.with_user(None) if target.user is not None else target


def _check_status(status: int, address: str) -> None:
    if status in MISSING_STATUSES:
        raise missing(address)
    if status in _DENIED:
        raise denied(address, f"HTTP status {status}")
    if status in BUSY_STATUSES:
        raise Transient(f"HTTP status {status}")
    if status == CHANGED_STATUS:
        raise changed(address)
    if status not in (200, 206):
        raise StorageError(f"{redact(address)}: HTTP status {status}", "FAILED")


async def _copy_body(response: Any, address: str, write: Callable[[bytes], object], max_bytes: int) -> None:
    count = 0
    async for part in response.content.iter_chunked(CHUNK_BYTES):
        count += len(part)
        if count > max_bytes:
            raise too_large(address, f"more than {max_bytes} bytes", max_bytes)
        write(part)


def _total_size(response: Any) -> int | None:
    if response.status == 206:
        total = str(response.headers.get("Content-Range", "")).rpartition("/")[2]
        return int(total) if total.isdecimal() else None
    size: int | None = response.content_length
    return size


def _version(response: Any) -> str:
    return str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")


def _translate(error: Exception, address: str, proxy_note: str) -> Exception:
    os_error, certificate_error = (getattr(error, name, None) for name in ("os_error", "certificate_error"))
    if isinstance(os_error, HostRefused):
        return StorageError(f"{redact(address)}: {os_error}", "HOST_NOT_ALLOWED")
    if certificate_error is not None:
        reason = getattr(certificate_error, "verify_message", "other host")
        return StorageError(
            f"{redact(address)}: the certificate is not valid ({reason}); check the address, or name the certificate "
            "authority by SSL_CERT_FILE",
            "FAILED",
        )
    if type(error).__name__ == "ClientHttpProxyError":
        status = getattr(error, "status", "no status")
        return StorageError(f"{redact(address)}: refused{proxy_note} (HTTP status {status}); check the proxy", "FAILED")
    translated = translate(error, address)
    return Transient(f"{translated}{proxy_note}") if isinstance(translated, Transient) else translated


async def _session(hosts: AllowedHosts | None) -> Any:
    """Returns the session of this process for some hosts, or for proxies; connections are not shared between rules."""
    import aiohttp  # noqa: PLC0415 (an extra)

    key = os.getpid(), hosts
    if key not in _sessions:
        atexit.register(close_sessions)
        _sessions[key] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=MAX_CONNECTIONS,
                resolver=None if hosts is None else _checked_resolver(hosts),
                # Made now: aiohttp's own was made at import, before SSL_CERT_FILE may have been set.
                ssl=ssl.create_default_context(),
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S),
            trust_env=False,
        )
    return _sessions[key]


def close_sessions() -> None:
    """Closes the sessions of this process; aiohttp would report them as forgotten at its end."""
    for key in [key for key in _sessions if key[0] == os.getpid()]:
        asyn = load_module("fsspec.asyn", "https://")
        asyn.sync(asyn.get_loop(), _sessions.pop(key).close, timeout=1)


def _checked_resolver(hosts: AllowedHosts) -> Any:
    from aiohttp import ThreadedResolver  # noqa: PLC0415 (an extra)
    from aiohttp.abc import ResolveResult  # noqa: PLC0415

    class Checked(ThreadedResolver):
        """Resolver that refuses a host with an address that is not allowed."""

        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            """Returns the addresses of a host."""
            found = await super().resolve(host, port, family)
            for row in found:
                problem = hosts.address_problem(host, row["host"])
                if problem is not None:
                    raise HostRefused(problem)
            return found

    return Checked()


def _read_only(address: str) -> OutputError:
    return OutputError(f"{redact(address)}: web servers are read only; write to s3://, gs://, az:// or a local file")
