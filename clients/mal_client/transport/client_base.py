"""Base class of the blocking and the asyncio client: address, connection, limits and cache of uploads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.errors import CallCancelled, from_rpc_error, is_truncated
from mal_client.images.upload_cache import UploadCache
from mal_client.results.labels import LabelOptions
from mal_client.results.server_info import ServerInfo, ServerLimits
from mal_client.transport.channel import Connection
from mal_client.transport.image_call import ImageCall, Prompts
from mal_client.transport.serialization import labeling_messages

if TYPE_CHECKING:
    import grpc
    from mal.v1 import model_pb2

    from mal_client.images.image_input import EncodedImage
    from mal_client.images.large_image import LargeImage
    from mal_client.results.labels import ImageInput

DEFAULT_TIMEOUT_S = 300.0
"""Deadline of one image: 300 boxes take minutes on a CPU. An address where no server listens fails in seconds."""

INFO_TIMEOUT_S = 30.0
"""Deadline of `server_info`, which needs no device."""

MAX_INFO_RETRIES = 3
"""Number of retries of `server_info` after truncated streams, which gRPC itself does not retry."""


def open_large_image(image: ImageInput, limits: ServerLimits) -> LargeImage | None:
    """Opens a path as `large_image.open_image` does; None for every other image."""
    if not isinstance(image, str | Path):
        return None
    # Imported here: it loads Pillow and OpenCV, which other images do not need.
    from mal_client.images.large_image import open_image  # noqa: PLC0415

    return open_image(Path(image), limits)


class ClientBase:
    """State of a client that does not depend on the type of its channel.

    Args:
        connection: address and credentials of the server.
        timeout_s: deadline of one image in seconds.
    """

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self.address = connection.address
        self.timeout_s = timeout_s
        self._connection = connection
        self._limits: ServerLimits | None = None
        self._uploads = UploadCache()

    def _image_call(
        self,
        encoded: EncodedImage,
        prompts: Prompts,
        options: LabelOptions,
        limits: ServerLimits,
        timeout_s: float | None,
    ) -> ImageCall:
        return ImageCall(
            self.address,
            image=encoded,
            prompts=prompts,
            options=options,
            limits=limits,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
            upload=self._uploads.entry(encoded),
        )

    @property
    def _info_timeout_s(self) -> float:
        return min(self.timeout_s, INFO_TIMEOUT_S)

    def _keep_info(self, response: model_pb2.GetServerInfoResponse) -> ServerInfo:
        """Returns the response as `ServerInfo`, and keeps the limits for the calls that follow."""
        info = labeling_messages.server_info(response)
        self._limits = info.limits
        return info

    def _check_info_retry(self, error: grpc.RpcError, failures: int) -> None:
        """Raises the error of a failed `server_info`, unless a truncated stream justifies another attempt."""
        if not is_truncated(error) or failures > MAX_INFO_RETRIES:
            raise from_rpc_error(self.address, error, self._info_timeout_s) from error

    def _closed_error(self) -> CallCancelled:
        return CallCancelled(f"{self.address}: the client is closed; create a new one")
