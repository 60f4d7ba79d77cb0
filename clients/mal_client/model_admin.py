"""Lists, loads and unloads the models of a server; needs the scope `admin` when the server has tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc
from mal.v1 import model_pb2, model_pb2_grpc

from mal_client.errors import from_rpc_error
from mal_client.transport.base import Transport
from mal_client.transport.serialization import labeling_messages
from mal_client.types import ModelInfo, ModelRef, ModelStatus
from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch

LOAD_TIMEOUT_S = 900.0
"""Default deadline of a load: reading, warming up and testing a large checkpoint takes minutes on a CPU."""

Response = TypeVar("Response")


class ModelAdmin:
    """Administration of the models of one server.

    >>> with Client("localhost:50051", token=token) as client:  # doctest: +SKIP
    ...     ModelAdmin(client).load("default", folder="trained", path="model_epoch_010.malckpt")

    Args:
        client: of one server: calls to several would each change another one. `Client.servers` has one for each.

    Raises:
        ConfigError: the client is of several servers.

    Every method raises `InvalidRequest` when the server refuses the call, with the server's reason, and `ClientError`
    when no answer arrives. A failed load leaves the served models unchanged.
    """

    def __init__(self, client: Transport) -> None:
        server, *others = client.servers()
        if others:
            raise ConfigError(
                f"{client.address}: {1 + len(others)} servers; models are changed on one server at a time: use each of "
                "client.servers()"
            )
        self._client = server
        self._stub = model_pb2_grpc.ModelServiceStub(server.open_channel())

    def list_models(self) -> list[ModelStatus]:
        """Returns the models in the server's memory, the default one first."""
        timeout_s = self._client.timeout_s
        response = self._call(lambda: self._stub.ListModels(model_pb2.ListModelsRequest(), timeout=timeout_s))
        return [labeling_messages.model_status(status) for status in response.models]

    def load(
        self,
        name: str,
        folder: str = "",
        path: str = "",
        branch: Branch | None = None,
        *,
        timeout_s: float = LOAD_TIMEOUT_S,
    ) -> tuple[ModelInfo, ModelRef | None]:
        """Loads a checkpoint and serves it.

        Args:
            name: of the model; a served model of this name is replaced without interruption.
            folder: one of the server's `model_folders`; "" loads the checkpoint in the server's settings again.
            path: of the checkpoint, relative to the folder.
            branch: network that answers requests without a branch; None uses the server's default.
            timeout_s: deadline of the call in seconds; the server finishes a load that takes longer.

        Returns:
            The model that is served, and the one that it replaced, if any.
        """
        request = labeling_messages.load_request(name, folder, path, branch)
        response = self._call(lambda: self._stub.LoadModel(request, timeout=timeout_s))
        replaced = labeling_messages.model_ref(response.replaced) if response.HasField("replaced") else None
        return labeling_messages.model_info(response.model), replaced

    def unload(self, name: str) -> ModelRef:
        """Takes a model out of service and returns it; its memory is freed when its last call ends."""
        request = model_pb2.UnloadModelRequest(name=labeling_messages.wire_text(name))
        timeout_s = self._client.timeout_s
        response = self._call(lambda: self._stub.UnloadModel(request, timeout=timeout_s))
        return labeling_messages.model_ref(response.model)

    def _call(self, send: Callable[[], Response]) -> Response:
        try:
            return send()
        except grpc.RpcError as error:
            raise from_rpc_error(self._client.address, error, None) from error
