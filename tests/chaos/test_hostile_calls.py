"""Calls of every method with any content: only statuses of the contract, an answer after each, no traceback."""

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor
from mal.v1 import evaluation_pb2, labeling_pb2, model_pb2, types_pb2

from mal_train.core.masks.rle import encode_mask
from tests.form import Form
from tests.mal_server.evaluation.served_datasets import data_folders, write_dataset
from tests.mal_server.evaluation.test_run import SCENES, options_of, rle_of, scenes
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, Running, encoded, label, label_request, serving
from tests.mal_server.random_messages import RandomMessages, Values
from tests.mal_train.core.masks.hostile_runs import compressed, wrapping_runs

METHODS = [
    method
    for file in (labeling_pb2, evaluation_pb2, model_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
SHARE = {"LabelImage": 4, "LabelImages": 4, "Evaluate": 6, "GetServerInfo": 1, "ListModels": 1}
"""Weights of the methods in the choice; 2 for the others."""

ALWAYS = (
    "mal.v1.EvaluateImage.image",
    "mal.v1.EvaluateImage.item_id",
    "mal.v1.EvaluateImage.ground_truth",
    "mal.v1.GroundTruth.mask",
    "mal.v1.GroundTruth.instance",
    "mal.v1.Instance.box",
    "mal.v1.LabelImageRequest.image",
)
ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}
MAX_STALL_S = 0.5
"""Ten times what a call may take of the event loop at once."""


def masks(rng: np.random.Generator) -> Iterator[types_pb2.CocoRle]:
    """Yields ground-truth masks: valid ones, and run-length codes that no encoder writes."""
    height, width = SCENES[0][0].shape[:2]
    yield from (rle_of(rle) for _, _, _, rle in SCENES[0][1])
    yield rle_of(encode_mask(np.zeros((height, width), dtype=bool)))
    pixels = height * width
    for runs in (
        [pixels],
        [0, pixels],
        [pixels + 1],
        [-1, pixels + 1],
        [0] * 5000,
        [1] * pixels,
        [2**62, 2**62, pixels],
        *(wrapping_runs(rng, pixels) for _ in range(4)),
    ):
        yield types_pb2.CocoRle(height=height, width=width, counts=compressed(runs))
    for counts in (b"", b"0", b"\xff" * 9, b"o" * 20, b"P" * 3000):
        yield types_pb2.CocoRle(height=height, width=width, counts=counts)
        yield types_pb2.CocoRle(height=2**31 - 1, width=2**31 - 1, counts=counts)


def write_hostile_datasets(folder: Path, chance: random.Random, count: int) -> list[str]:
    """Writes COCO files with rows of any content; returns their names."""
    segmentations: list[Any] = [
        None, [], [[]], [[1, 2]], [[1e300] * 6], [[-999_999, 999_999] * 30], [[0, 0, 60, 0, 60, 40] * 50], "x", 7,
        {"size": [90, 120], "counts": [10800]}, {"size": [90, 120], "counts": [-1, 10801]},
        {"size": [2**40, 2**40], "counts": "P"}, {"size": [90, 120], "counts": [2**70]}, {"counts": None}, {},
        *(objects[3].to_coco() for objects in SCENES[0][1]),
    ]  # fmt: skip
    values: list[Any] = [0, 1, 2, "a", 1.5, -1, 2**70, None, True, [], {}, "1", 1e300]
    boxes: list[Any] = [[1, 1, 30, 30], [0, 0, 120, 90], [1e300] * 4, [-1, -1, 0, 0], [1, 2, 3], "box", None]
    names = []
    for number in range(count):
        images: list[Any] = [{"id": n, "file_name": f"{n}.png"} for n in range(3)]
        images += [{"id": chance.choice(values), "file_name": chance.choice(values), "width": chance.choice(values)}]
        rows: list[Any] = [
            {
                "id": n if chance.random() < 0.9 else chance.choice(values),
                "image_id": chance.randrange(3) if chance.random() < 0.8 else chance.choice(values),
                "category_id": 1 if chance.random() < 0.8 else chance.choice(values),
                "bbox": chance.choice(boxes),
                "iscrowd": chance.choice([0, 0, 1, "x"]),
                "segmentation": chance.choice(segmentations),
            }
            for n in range(chance.choice((0, 3, 30)))
        ]
        categories = [{"id": 1, "name": chance.choice(values)}, {"id": chance.choice(values)}]
        content = json.dumps({"images": images, "annotations": rows, "categories": categories})
        cut = len(content) if chance.random() < 0.9 else chance.randrange(len(content))
        (folder / f"hostile_{number}.json").write_text(content[:cut])
        names.append(f"sets/hostile_{number}.json")
    return names


async def known_values(running: Running, datasets: list[str], rng: np.random.Generator) -> Values:
    """Returns valid values by field, among them the token and records of an evaluation."""
    stream = running.evaluation.Evaluate(iter_of([options_of(want_records=True), *scenes()[:3]]))
    progress = [response.progress async for response in stream][:-1]
    boxes = [types_pb2.Box(x=x, y=y, width=w, height=h) for x, y, w, h in (DISC_BOX, (1, 1, 30, 30), (0, 0, 120, 90))]
    return {
        "mal.v1.ImageSource.content": [DISC_PNG, encoded(SCENES[0][0]), encoded(SCENES[0][0], "JPEG")],
        "mal.v1.ImageSource.uri": ["sets/images/0.png", "sets/images/1.png", "sets/truth.json"],
        "mal.v1.ImageSource.expected_width": [0],
        "mal.v1.ImageSource.expected_height": [0],
        "mal.v1.Instance.box": boxes,
        "mal.v1.Instance.instance_id": list(range(1000)),
        "mal.v1.Point.x": [8.0, 24.0, 30.5],
        "mal.v1.Point.y": [8.0, 20.0, 30.5],
        "mal.v1.Point.label": [1, 2],
        "mal.v1.Box.width": [8.0, 24.0],
        "mal.v1.Box.height": [8.0, 24.0],
        "mal.v1.LabelOptions.model": ["", "disc"],
        "mal.v1.LabelOptions.branch": [0, 1, 2, 3],
        "mal.v1.LabelOptions.priority": [0, 1, 2],
        "mal.v1.LabelOptions.threshold": [0.5, 0.1],
        "mal.v1.LabelOptions.formats": [1, 2, 3, 4],
        "mal.v1.LabelOptions.polygon_tolerance_px": [0.0, 2.0],
        "mal.v1.LabelOptions.min_component_area_px": [0, 9],
        "mal.v1.EvaluateOptions.images_total": [0, 3],
        "mal.v1.EvaluateOptions.worst_count": [0, 4],
        "mal.v1.EvaluateOptions.resume_token": [b"", progress[0].resume_token],
        "mal.v1.EvaluateImage.record": [b"", *(one.record for one in progress)],
        "mal.v1.EvaluateImage.item_id": [f"scene {n}" for n in range(50)],
        "mal.v1.DatasetSource.annotations": ["sets/truth.json", *datasets],
        "mal.v1.DatasetSource.images": ["sets/images"],
        "mal.v1.GroundTruth.instance": [types_pb2.Instance(instance_id=n, box=boxes[n % 3]) for n in range(30)],
        "mal.v1.GroundTruth.mask": list(masks(rng)),
        "mal.v1.GroundTruth.category_id": [1, 3],
        "mal.v1.LoadModelRequest.name": ["disc", "cats"],
    }


def requests_of(messages: RandomMessages, method: MethodDescriptor) -> list[bytes]:
    """Returns the encoded requests of one call: one, or a stream that begins as its method expects most of the time."""
    if method.name == "Evaluate":
        options = evaluation_pb2.EvaluateRequest()
        options.options.CopyFrom(messages.message(evaluation_pb2.EvaluateOptions.DESCRIPTOR))
        if messages.chance.random() < 0.7:
            for name in ("dataset", "resume_token", "label"):
                options.options.ClearField(name)
            del options.options.categories[1:]
        images = [
            evaluation_pb2.EvaluateRequest(image=messages.message(evaluation_pb2.EvaluateImage.DESCRIPTOR))
            for _ in range(messages.chance.randint(0, 6))
        ]
        stream = [options.SerializeToString(), *(image.SerializeToString() for image in images)]
        damaged = [messages.encoded(method.input_type)] if messages.chance.random() < 0.2 else []
        return stream + damaged
    count = messages.chance.randint(1, 8) if method.name == "LabelImages" else 1
    return [messages.encoded(method.input_type) for _ in range(count)]


async def iter_of(requests: Any) -> AsyncIterator[Any]:
    for request in requests:
        yield request


async def called(running: Running, method: MethodDescriptor, requests: list[bytes]) -> list[str]:
    """Makes a call and returns the codes of the items in its responses."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    call: Any = running.channel.stream_stream(path)(iter_of(requests))
    codes = []
    try:
        async for data in call:
            if method.name == "LabelImages":
                item = labeling_pb2.LabelImagesResponse.FromString(data)
                codes.append(grpc_code(item.status.code))
    except grpc.aio.AioRpcError:
        pass  # counted by the server; a client that is still sending may see INTERNAL, which the server did not send
    return codes


def ended(running: Running) -> Counter[str]:
    """Returns the numbers of calls that have ended, by method and code."""
    codes = Counter[str]()
    for metric in running.server.registry.collect():
        for sample in metric.samples:
            if sample.name == "grpc_server_handled_total":
                codes[f"{sample.labels['method'].rpartition('/')[2]} {sample.labels['code']}"] += int(sample.value)
    return codes


def grpc_code(number: int) -> str:
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


@asynccontextmanager
async def heartbeat() -> AsyncIterator[list[float]]:
    """Yields a list that receives the CPU seconds that this event loop spent between two beats, 5 ms apart."""
    spent: list[float] = []

    async def beat() -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.005)
            now = time.thread_time()
            spent.append(now - last)
            last = now

    task = asyncio.create_task(beat())
    try:
        yield spent
    finally:
        task.cancel()


@pytest.mark.promise(
    "requests",
    "No content of any method's messages causes a traceback, a status outside of the contract, a stall of the event "
    "loop, or the end of the server",
)
def test_hostile_calls_of_every_method_get_a_status_of_the_contract(
    form: Form, record: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count, items, calls = form.pick(400, 20_000), Counter[str](), Counter[str]()
    folder, rng = write_dataset(tmp_path / "sets"), np.random.default_rng(form.seed)
    datasets = write_hostile_datasets(folder, random.Random(form.seed), 40)
    sent = Counter[str]()

    async def work() -> float:
        settings: dict[str, Any] = {"limits": {"max_boxes": 40}, **data_folders(folder)}
        async with serving(**settings) as running, heartbeat() as spent:
            messages = RandomMessages(form.seed, await known_values(running, datasets, rng), ALWAYS)
            weights = [SHARE.get(method.name, 2) for method in METHODS]
            while sent.total() < count:
                (method,) = messages.chance.choices(METHODS, weights)
                requests = await asyncio.to_thread(requests_of, messages, method)
                sent[method.name] += len(requests)
                items.update(await asyncio.wait_for(called(running, method, requests), 120))
                await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
            assert len(await label(running, label_request(DISC_BOX))) == 1
            calls.update(ended(running))
            return max(spent)

    with caplog.at_level(logging.WARNING):
        stall_s = asyncio.run(work())
    tracebacks = [line for line in caplog.records if line.exc_info or line.levelno >= logging.ERROR]
    record(
        "hostile calls",
        **sent,
        calls=dict(calls),
        items=dict(items),
        worst_loop_ms=stall_s * 1000,
        tracebacks=len(tracebacks),
    )
    assert not tracebacks
    assert set(items) | {call.split()[1] for call in calls} <= ALLOWED
    assert all(calls[f"{method} OK"] for method in ("LabelImage", "LabelImages", "Evaluate"))
    assert set(sent) == {method.name for method in METHODS}
    assert stall_s <= MAX_STALL_S
