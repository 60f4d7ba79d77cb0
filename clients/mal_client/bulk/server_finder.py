"""Looks for servers while a bulk job runs: some are added to a name or come back, others are taken from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mal_client.errors import CallCancelled
from mal_client.transport.base import Transport

REFRESH_EVERY_S = 10.0
"""Seconds between two refreshes: within the 30 s or less for which DNS answers in a cluster are valid."""

MIN_PAUSE_S = 1.0
"""Least number of seconds between two refreshes when a lost connection requests one."""


@dataclass(frozen=True)
class ServerChanges:
    """Result of one refresh.

    Attributes:
        added: servers that the job may use and does not use, each with its limit of items in flight.
        gone: addresses in use that no name has any more.
        notices: messages for the user.
    """

    added: Sequence[tuple[Transport, int]] = ()
    gone: frozenset[str] = frozenset()
    notices: Sequence[str] = ()


class ServerDirectory(Protocol):
    """Knows the servers of a job; safe in threads."""

    def refresh(self, in_use: frozenset[str]) -> ServerChanges:
        """Resolves the names again and checks the servers that are not in use.

        Args:
            in_use: addresses of the servers that the job uses.

        Raises:
            CallCancelled: a client of the job was closed.
        """

    def note_lost(self, address: str) -> None:
        """Delays the next check of a server that failed."""


class ServerFinder(threading.Thread):
    """Calls `ServerDirectory.refresh` from time to time, in a thread of its own, and delivers the result.

    Args:
        directory: the servers of the job.
        in_use: returns the addresses of the servers that the job uses.
        deliver: receives the changes, or the exception that ended the thread.
    """

    def __init__(
        self,
        directory: ServerDirectory,
        in_use: Callable[[], frozenset[str]],
        deliver: Callable[[ServerChanges | Exception], None],
    ) -> None:
        super().__init__(name="mal-client-server-finder", daemon=True)
        self._directory = directory
        self._in_use = in_use
        self._deliver = deliver
        self._requested = threading.Event()
        self._is_stopped = False

    def run(self) -> None:
        """Refreshes until `stop`, or until a client of the job is closed."""
        while True:
            self._requested.wait(REFRESH_EVERY_S)
            if self._is_stopped:
                return
            self._requested.clear()
            try:
                self._deliver(self._directory.refresh(self._in_use()))
            except CallCancelled:  # the streams of the job report it
                return
            # Any other error is raised again in the thread that runs the job.
            except Exception as error:
                self._deliver(error)
                return
            time.sleep(MIN_PAUSE_S)

    def request(self) -> None:
        """Requests a refresh soon."""
        self._requested.set()

    def stop(self) -> None:
        """Ends the thread after the refresh that runs, without waiting for it: a name server may take long to fail."""
        self._is_stopped = True
        self._requested.set()
