"""A caller without stubs: everything it knows comes from the server's reflection, as with grpcurl."""

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


def asked(address: str, service: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of a method as JSON, by descriptors that the server gave."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        found = DescriptorPool(database).FindServiceByName(service).FindMethodByName(method)
        message = ParseDict(request, GetMessageClass(found.input_type)())
        open_call = channel.unary_stream if found.server_streaming else channel.unary_unary
        call = open_call(
            f"/{service}/{method}",
            request_serializer=lambda sent: sent.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        answers: Any = call(message, timeout=20)
        return [MessageToDict(one) for one in (answers if found.server_streaming else [answers])]


def with_server(service: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    async def work() -> list[dict[str, Any]]:
        async with serving() as running:
            return await asyncio.to_thread(asked, running.server.address, service, method, request)

    return asyncio.run(work())


def test_a_caller_without_stubs_labels_an_image() -> None:
    x, y, width, height = DISC_BOX
    request = {
        "image": {"content": base64.b64encode(DISC_PNG).decode()},
        "instances": [{"instanceId": 7, "box": {"x": x, "y": y, "width": width, "height": height}}],
        "options": {"formats": ["MASK_FORMAT_UNCOMPRESSED_RLE"]},
    }
    (answer,) = with_server("mal.v1.LabelingService", "LabelImage", request)
    (result,) = answer["results"]
    runs = result["masks"][0]["uncompressedRle"]
    assert result["instanceId"] == "7"
    code = Rle.from_coco({"size": [runs["height"], runs["width"]], "counts": [int(run) for run in runs["counts"]]})
    assert area(code) == int(result["areaPx"]) > 0


def test_a_caller_without_stubs_asks_what_is_served() -> None:
    (info,) = with_server("mal.v1.ModelService", "GetServerInfo", {})
    assert (info["model"]["ref"]["name"], info["devices"]) == ("disc", ["cpu"])
