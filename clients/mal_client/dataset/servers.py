"""Selects the servers of a job: those that are reachable, which must all give the same masks.

`JobServers` checks them at the start, and while the job runs those that are added to a name or come back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mal_client.bulk.server_finder import ServerChanges
from mal_client.dataset.provenance import provenance_of
from mal_client.errors import CallCancelled, CallTimedOut, ClientError, InvalidRequest, ServerUnavailable
from mal_client.transport.base import Transport
from mal_client.transport.resolver import Lookup, system_lookup
from mal_client.types import LabelOptions, ServerInfo, ServerLimits
from mal_train.core.errors import ConfigError, MalError
from mal_train.core.fingerprint import differences

FIRST_PAUSE_S = 10.0
"""Seconds before a server that failed is checked again; each further failure doubles them."""

LONGEST_PAUSE_S = 300.0
"""Longest pause in seconds; a server that serves the job for longer begins again with the first pause."""

MAX_DOUBLINGS = 10

MAX_PARALLEL_QUERIES = 16
"""Servers that are queried at once: one that does not answer takes seconds."""

SHARED_LIMITS = ("max_boxes", "max_image_bytes", "max_pixels", "max_points", "max_side")
"""Limits of one image; the items of a job keep to the lowest of all servers."""


@dataclass(frozen=True)
class _Failures:
    """Failures of one server in a row, and the clock time before which it is not checked again."""

    count: int = 0
    not_before: float = 0.0
    text: str = ""


class JobServers:
    """The servers of one job; a `ServerDirectory`, safe in threads.

    Args:
        clients: each of one server, or of a name with several.
        options: label options.
        on_notice: receives messages about the start.
        lookup: resolves names.
        clock: monotonic seconds.

    Attributes:
        first: what the first reachable server serves under these options.
        limits: of requests; the lowest of all servers that were reachable at the start.

    Raises:
        ServerUnavailable, CallTimedOut: no server is reachable, or no name has an address.
        ConfigError: the servers differ in model or settings.
        InvalidRequest: a server does not serve what the options ask for.
    """

    def __init__(
        self,
        clients: Sequence[Transport],
        options: LabelOptions,
        on_notice: Callable[[str], None],
        *,
        lookup: Lookup = system_lookup,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clients = clients
        self._options = options
        self._lookup = lookup
        self._clock = clock
        self._refresh_lock = threading.Lock()
        self._lock = threading.Lock()
        self._failures: dict[str, _Failures] = {}
        """By the address of a server; changed under `_lock`, which is never held for long."""
        self._known: list[list[Transport]] = [[] for _ in clients]
        """Servers of each client, as its name was last resolved."""
        self._name_errors = [""] * len(clients)
        self._reachable = self._start(on_notice)
        self.first = self._reachable[0][1]
        self._expected = provenance_of(self.first, options)
        self._refuse_different()
        self.limits = _lowest([info.limits for _, info in self._reachable])

    @property
    def reachable(self) -> list[tuple[Transport, int]]:
        """Servers that were reachable at the start, each with its limit of items in flight."""
        return [(client, info.limits.max_items_in_flight) for client, info in self._reachable]

    def refresh(self, in_use: frozenset[str]) -> ServerChanges:
        """Resolves the names again and checks the servers that are not in use; see `ServerDirectory`."""
        with self._refresh_lock:
            notices = list(self._resolve_again())
            listed = {client.address: client for clients in self._known for client in clients}
            now = self._clock()
            unused = [
                client
                for address, client in listed.items()
                if address not in in_use and self._failures_of(address).not_before <= now
            ]
            added: list[tuple[Transport, int]] = []
            for client, info in zip(unused, self._query(unused), strict=True):
                reason = self._problem(client.address, info)
                if isinstance(info, ServerInfo) and not reason:
                    added.append((client, info.limits.max_items_in_flight))
                    continue
                if reason != self._failures_of(client.address).text:
                    notices.append(f"{reason}; the job continues without it")
                self._note_failure(client.address, reason)
            return ServerChanges(added, in_use - listed.keys(), notices)

    def note_lost(self, address: str) -> None:
        """Delays the next check of a server that failed during the job."""
        self._note_failure(address, "")

    def _start(self, on_notice: Callable[[str], None]) -> list[tuple[Transport, ServerInfo]]:
        errors: list[ServerUnavailable | CallTimedOut] = []
        for index, client in enumerate(self._clients):
            try:
                self._known[index] = list(client.servers(self._lookup))
            except ServerUnavailable as error:
                errors.append(error)
        servers = list({client.address: client for known in self._known for client in known}.values())
        reachable: list[tuple[Transport, ServerInfo]] = []
        for client, info in zip(servers, self._query(servers), strict=True):
            if isinstance(info, ServerInfo):
                reachable.append((client, info))
            elif isinstance(info, ServerUnavailable | CallTimedOut):
                errors.append(info)
                self._note_failure(client.address, str(info))
            else:
                raise info
        if not reachable:
            raise errors[0]
        for unreachable in errors:
            on_notice(f"{unreachable}; starting with {len(reachable)} of {len(reachable) + len(errors)} servers")
        return reachable

    def _refuse_different(self) -> None:
        (first, _), *others = self._reachable
        for client, info in others:
            different = differences(provenance_of(info, self._options), self._expected)
            if different:
                raise ConfigError(
                    f"{client.address}: differs from {first.address}: {'; '.join(different)}; {_SAME_MASKS}"
                )

    def _resolve_again(self) -> Iterator[str]:
        """Updates the servers of each name; yields a notice for a name that has no address now, and keeps them."""
        for index, client in enumerate(self._clients):
            try:
                self._known[index] = list(client.servers(self._lookup))
            except (ServerUnavailable, ConfigError) as error:
                if str(error) != self._name_errors[index]:
                    yield f"{error}; continuing with the servers that are known"
                self._name_errors[index] = str(error)
            else:
                self._name_errors[index] = ""

    def _query(self, clients: Sequence[Transport]) -> list[ServerInfo | MalError]:
        """Returns what each server serves under these options, or its error; many are queried at once."""
        if not clients:
            return []
        threads = ThreadPoolExecutor(min(len(clients), MAX_PARALLEL_QUERIES))
        try:
            return list(threads.map(self._info_of, clients))
        finally:
            # Without a wait: a user who interrupts the start should not wait for the timeouts.
            threads.shutdown(wait=False, cancel_futures=True)

    def _info_of(self, client: Transport) -> ServerInfo | MalError:
        try:
            return client.server_info().for_options(self._options)
        except CallCancelled:
            raise
        except (ClientError, InvalidRequest) as error:
            return error

    def _problem(self, address: str, info: ServerInfo | MalError) -> str:
        """Returns the reason for which the job cannot use a server; empty if it can."""
        if isinstance(info, MalError):
            return str(info)
        different = differences(provenance_of(info, self._options), self._expected)
        if different:
            return f"{address}: differs from the job: {'; '.join(different)}; {_SAME_MASKS}"
        lower = [name for name in SHARED_LIMITS if getattr(info.limits, name) < getattr(self.limits, name)]
        return f"{address}: lower limits than the job began with: {', '.join(lower)}" if lower else ""

    def _failures_of(self, address: str) -> _Failures:
        with self._lock:
            return self._failures.get(address, _Failures())

    def _note_failure(self, address: str, text: str) -> None:
        with self._lock:
            earlier, now = self._failures.get(address, _Failures()), self._clock()
            # A server that is not in use is checked soon after its pause, so this one has been in use since then. A
            # shorter time does not count: a server may answer each check and fail at the first image.
            count = earlier.count if now <= earlier.not_before + LONGEST_PAUSE_S else 0
            pause_s = min(FIRST_PAUSE_S * 2 ** min(count, MAX_DOUBLINGS), LONGEST_PAUSE_S)
            self._failures[address] = _Failures(count + 1, now + pause_s, text)


_SAME_MASKS = "the masks of one file must come from servers with the same checkpoint, version, precision and engine"


def _lowest(limits: Sequence[ServerLimits]) -> ServerLimits:
    """Returns the limits of the first server with the lowest of all for one image."""
    lowest: dict[str, Any] = {name: min(getattr(each, name) for each in limits) for name in SHARED_LIMITS}
    return replace(limits[0], **lowest)
