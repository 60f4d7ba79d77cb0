"""Streams that a server ends because they are idle."""

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from mal_client.bulk.stream import MAX_BREAKS, BulkStream
from mal_client.bulk.work_queue import WorkItem, WorkQueue
from mal_client.errors import DETAILS_KEY
from mal_client.images.image_input import EncodedImage
from mal_client.types import SERVER_DEFAULTS


class IdleError(grpc.RpcError):
    """The error of an idle stream, as mal-server sends it."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def trailing_metadata(self) -> Any:
        status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0])
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason="STREAM_IDLE", domain="mal.v1"))
        status.details.add().Pack(error_details_pb2.RetryInfo())
        return ((DETAILS_KEY, status.SerializeToString()),)


def no_image(item: WorkItem) -> EncodedImage:
    raise AssertionError(item)


def test_a_server_that_ends_idle_streams_for_hours_is_not_given_up() -> None:
    now = 0.0
    stream = BulkStream(
        address="here:1",
        queue=WorkQueue(iter(()), clock=lambda: now),
        load=no_image,
        on_failure=lambda result: None,
        options=SERVER_DEFAULTS,
        max_items=8,
        idle_timeout_s=60.0,
    )
    for _ in range(2 * MAX_BREAKS):
        stream.requests()
        now += 300.0
        assert stream.on_error(IdleError()) == 0.0
