"""Interface of the blocking client that jobs use; it has none of the methods that start jobs."""

from __future__ import annotations

from typing import Protocol

import grpc

from mal_client.results.server_info import ServerInfo


class Transport(Protocol):
    """Connection to one server, safe in threads; `Client` implements it.

    Attributes:
        address: of the server, for messages.
        timeout_s: seconds without a response after which the server counts as lost.
    """

    address: str
    timeout_s: float

    def server_info(self) -> ServerInfo:
        """Returns version, models and limits of the server. Raises ClientError."""

    def open_channel(self) -> grpc.Channel:
        """Returns the channel. Raises CallCancelled after the client was closed."""

    def pause(self, pause_s: float) -> None:
        """Sleeps for `pause_s` before a retry. Raises CallCancelled if the client is closed meanwhile."""
