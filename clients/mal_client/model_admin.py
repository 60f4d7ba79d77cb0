"""Looks at the models of a server and changes them; needs the scope `admin` where the server has tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc
from mal.v1 import model_pb2, model_pb2_grpc

from mal_client.errors import from_rpc_error
from mal_client.transport.base import Transport
from mal_client.transport.serialization import labeling_messages
from mal_client.types import ModelInfo, ModelRef, ModelStatus
from mal_train.core.settings import Branch

LOAD_TIMEOUT_S = 900.0
"""Reading, warming up and testing a large checkpoint on a CPU takes minutes."""

Answer = TypeVar("Answer")


class ModelAdmin:
    """The models of one server.

    Args:
        client: of the server.

    Every method raises the client's errors; a load that fails is `RequestRefused` with the server's reason, and what
    was served goes on.
    """

    def __init__(self, client: Transport) -> None:
        self._client = client
        self._stub = model_pb2_grpc.ModelServiceStub(client.open_channel())

    def listed(self) -> list[ModelStatus]:
        """Every model in the server's memory, the default one first."""
        timeout_s = self._client.timeout_s
        answer = self._asked(lambda: self._stub.ListModels(model_pb2.ListModelsRequest(), timeout=timeout_s))
        return [labeling_messages.model_status(status) for status in answer.models]

    def load(
        self,
        name: str,
        folder: str = "",
        path: str = "",
        branch: Branch | None = None,
        *,
        timeout_s: float = LOAD_TIMEOUT_S,
    ) -> tuple[ModelInfo, ModelRef | None]:
        """Puts a checkpoint into service; (what answers now, what answered under this name before).

        Args:
            name: under which it answers; one that is served is replaced without a gap.
            folder: one of the server's `model_folders`; "" = the checkpoint that its settings name is read anew.
            path: of the checkpoint below the folder.
            branch: which network answers requests that name none.
            timeout_s: the load goes on at the server when it takes longer.
        """
        request = labeling_messages.load_request(name, folder, path, branch)
        answer = self._asked(lambda: self._stub.LoadModel(request, timeout=timeout_s))
        return labeling_messages.model_info(answer.model), labeling_messages.model_ref(
            answer.replaced
        ) if answer.HasField("replaced") else None

    def unload(self, name: str) -> ModelRef:
        """Takes a model out of service; its memory is freed when its last call is done."""
        request = model_pb2.UnloadModelRequest(name=name)
        timeout_s = self._client.timeout_s
        return labeling_messages.model_ref(
            self._asked(lambda: self._stub.UnloadModel(request, timeout=timeout_s)).model
        )

    def _asked(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except grpc.RpcError as error:
            raise from_rpc_error(self._client.address, error, None) from error
