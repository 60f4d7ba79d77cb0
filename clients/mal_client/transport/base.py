"""What a job needs of a blocking client: the way to one server, without the calls that start jobs."""

from __future__ import annotations

from typing import Protocol

import grpc

from mal_client.results.server_info import ServerInfo


class Transport(Protocol):
    """One server; `Client` is one. Usable from several threads.

    Attributes:
        address: of the server, for sentences.
        timeout_s: how long the server may stay silent.
    """

    address: str
    timeout_s: float

    def server_info(self) -> ServerInfo:
        """What the server serves and accepts. Raises ClientError."""

    def open_channel(self) -> grpc.Channel:
        """The channel. Raises CallCancelled when the client is closed."""

    def pause(self, pause_s: float) -> None:
        """Waits before something is sent again. Raises CallCancelled when the client is closed meanwhile."""
