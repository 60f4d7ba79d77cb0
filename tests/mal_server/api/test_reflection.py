"""A client without stubs, which uses the server's reflection, as grpcurl does."""

import asyncio
import base64
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from mal_train.core.masks.rle import Rle, area
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, serving


def call(address: str, service: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the responses of a method as JSON, decoded with descriptors from the server."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        descriptor = DescriptorPool(database).FindServiceByName(service).FindMethodByName(method)
        message = ParseDict(request, GetMessageClass(descriptor.input_type)())
        open_call = channel.unary_stream if descriptor.server_streaming else channel.unary_unary
        method_call = open_call(
            f"/{service}/{method}",
            request_serializer=lambda sent: sent.SerializeToString(),
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )
        responses: Any = method_call(message, timeout=20)
        return [MessageToDict(one) for one in (responses if descriptor.server_streaming else [responses])]


def with_server(service: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    async def work() -> list[dict[str, Any]]:
        async with serving() as running:
            return await asyncio.to_thread(call, running.server.address, service, method, request)

    return asyncio.run(work())


def test_a_client_without_stubs_labels_an_image() -> None:
    x, y, width, height = DISC_BOX
    request = {
        "image": {"content": base64.b64encode(DISC_PNG).decode()},
        "instances": [{"instanceId": 7, "box": {"x": x, "y": y, "width": width, "height": height}}],
        "options": {"formats": ["MASK_FORMAT_UNCOMPRESSED_RLE"]},
    }
    (response,) = with_server("mal.v1.LabelingService", "LabelImage", request)
    (result,) = response["results"]
    runs = result["masks"][0]["uncompressedRle"]
    assert result["instanceId"] == "7"
    code = Rle.from_coco({"size": [runs["height"], runs["width"]], "counts": [int(run) for run in runs["counts"]]})
    assert area(code) == int(result["areaPx"]) > 0


def test_a_client_without_stubs_reads_the_server_info() -> None:
    (info,) = with_server("mal.v1.ModelService", "GetServerInfo", {})
    assert (info["model"]["ref"]["name"], info["devices"]) == ("disc", ["cpu"])
