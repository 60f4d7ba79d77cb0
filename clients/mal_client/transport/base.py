"""Interface to one server that jobs need of a blocking client; it has none of the methods that start jobs."""

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
        """Returns the channel. Raises CallCancelled when the client is closed."""

    def pause(self, pause_s: float) -> None:
        """Waits before a retry. Raises CallCancelled when the client is closed meanwhile."""
