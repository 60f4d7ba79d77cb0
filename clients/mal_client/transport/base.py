"""Interface of the blocking client that jobs use; it has none of the methods that start jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import grpc

from mal_client.results.server_info import ServerInfo
from mal_client.transport.resolver import Lookup, system_lookup


class Transport(Protocol):
    """Connection to one server or to several alike, safe in threads; `Client` implements it.

    Attributes:
        address: of the servers, for messages.
        timeout_s: seconds without a response after which the server counts as lost.
    """

    address: str
    timeout_s: float

    def server_info(self) -> ServerInfo:
        """Returns version, models and limits of the server. Raises ClientError."""

    def open_channel(self) -> grpc.Channel:
        """Returns the channel. Raises CallCancelled after the client was closed."""

    def servers(self, lookup: Lookup = system_lookup) -> Sequence[Transport]:
        """Returns a connection to each server. Raises ServerUnavailable: the name has no IP address."""

    def pause(self, pause_s: float) -> None:
        """Sleeps for `pause_s` before a retry. Raises CallCancelled if the client is closed meanwhile."""
