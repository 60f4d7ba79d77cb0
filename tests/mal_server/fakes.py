"""Test doubles: a predictor without a network, an event loop with a fake clock, a server in this process."""

import asyncio
import io
import selectors
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from mal.v1 import evaluation_pb2_grpc, labeling_pb2, labeling_pb2_grpc, model_pb2_grpc, types_pb2
from numpy.typing import NDArray
from PIL import Image

from mal_server.config.model_config import ModelPlan
from mal_server.config.server import ServerConfig
from mal_server.inference.worker import Worker
from mal_server.models.loader import LoadedModel, ModelInfo
from mal_server.scheduling.batcher import Batcher
from mal_server.server import MalServer
from mal_train.core.errors import OutOfDeviceMemory
from mal_train.core.settings import LabelerConfig
from mal_train.core.yaml_config import validate
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions

Result = TypeVar("Result")

SHA256 = "ab" * 32


class BrightPredictor(Labeler):
    """The real labeler around a network that labels bright pixels as foreground.

    Args:
        wait_s: duration of a batch.
        fits: crops that fit on the device; more raise OutOfDeviceMemory.
        gate: each batch waits for it.
        error: raised for every batch.
    """

    def __init__(
        self,
        *,
        wait_s: float = 0.0,
        fits: int = 10_000,
        gate: threading.Event | None = None,
        error: Exception | None = None,
    ) -> None:
        self.config = LabelerConfig(crop_size=16, mask_thres=(0.5, 0.5, 0.5))
        self.batches: list[tuple[PredictOptions, int]] = []
        self.wait_s = wait_s
        self.fits = fits
        self.gate = gate
        self.error = error

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        self.batches.append((options, len(crops)))
        if self.gate is not None:
            self.gate.wait(120)
        time.sleep(self.wait_s)
        if self.error is not None:
            raise self.error
        if len(crops) > self.fits:
            raise OutOfDeviceMemory(f"{len(crops)} crops do not fit")
        maps = [crop.pixels.mean(axis=2, dtype=np.float32) / np.float32(255) for crop in crops]
        return [Prediction(prob, prob, 1 - prob) if options.agreement else Prediction(prob) for prob in maps]


def queued_items(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that receives the number of items of each request when it is queued, from now on."""
    queued, enqueue = list[int](), Batcher.enqueue

    def recorded(batcher: Any, admission: Any, key: Any, items: Any) -> None:
        enqueue(batcher, admission, key, items)
        queued.append(len(items))

    monkeypatch.setattr(Batcher, "enqueue", recorded)
    return queued


def bright_disc(height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    """Returns an RGB image (height, width, 3) uint8: a bright disc of radius 12 px in the center, dark elsewhere."""
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2 + 0.5) ** 2 + (x - width / 2 + 0.5) ** 2 < 144
    return np.repeat(np.where(disc, 230, 20).astype(np.uint8)[:, :, None], 3, axis=2)


def encoded(image: NDArray[np.uint8], image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, image_format, **options)
    return buffer.getvalue()


DISC_PNG = encoded(bright_disc())
DISC_BOX = (18.0, 8.0, 24.0, 24.0)


def label_request(
    *boxes: tuple[float, float, float, float],
    content: bytes = DISC_PNG,
    ids: Sequence[int] | None = None,
    **options: Any,
) -> labeling_pb2.LabelImageRequest:
    """Returns a request; its instance ids are 0, 1, … unless given."""
    return labeling_pb2.LabelImageRequest(
        image=types_pb2.ImageSource(content=content),
        instances=[
            types_pb2.Instance(instance_id=i, box=types_pb2.Box(x=x, y=y, width=w, height=h))
            for i, (x, y, w, h) in zip(ids or range(len(boxes)), boxes, strict=True)
        ],
        options=types_pb2.LabelOptions(**options),
    )


@dataclass(frozen=True)
class Running:
    """A server with a fake predictor, and stubs connected to it."""

    server: MalServer
    predictor: BrightPredictor
    channel: Any
    labeling: Any
    evaluation: Any
    model: Any


def config_of(**settings: Any) -> ServerConfig:
    """Returns settings for a server on a free port without GPUs."""
    data = {"checkpoint": "disc.malckpt", "gpu_ids": [], "listen": {"port": 0}, "drain_delay_s": 0.0, **settings}
    return validate(ServerConfig, data)


def loaded(
    plan: ModelPlan, *predictors: BrightPredictor, sha256: str = SHA256, has_teacher: bool = True
) -> LoadedModel:
    info = ModelInfo(
        name=plan.name,
        sha256=sha256,
        arch="bright/1",
        labeler=predictors[0].config,
        categories=({"id": 7, "name": "disc"}, {"id": "x"}),
        branch=plan.branch,
        devices=("cpu",) * len(predictors),
        precision="float32",
        has_teacher=has_teacher,
    )
    return LoadedModel(info, tuple(Worker(predictor, "cpu") for predictor in predictors))


@asynccontextmanager
async def serving(predictor: BrightPredictor | None = None, **settings: Any) -> AsyncIterator[Running]:
    """Runs a server in this process; stops it without a grace period."""
    predictor = predictor or BrightPredictor()
    config = config_of(**settings)
    server = MalServer(config, lambda plan: loaded(plan, predictor))
    await server.start()
    gate, predictor.gate = predictor.gate, None
    error, predictor.error = predictor.error, None
    fits, predictor.fits = predictor.fits, 10_000  # the self-test fails on a device that fits no crop
    await server.load()
    predictor.gate, predictor.error, predictor.fits = gate, error, fits
    predictor.batches.clear()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Running(
                server,
                predictor,
                channel,
                labeling_pb2_grpc.LabelingServiceStub(channel),
                evaluation_pb2_grpc.EvaluationServiceStub(channel),
                model_pb2_grpc.ModelServiceStub(channel),
            )
    finally:
        if predictor.gate is not None:
            predictor.gate.set()
        await server.stop(0)


async def label(running: Running, request: labeling_pb2.LabelImageRequest) -> list[types_pb2.InstanceResult]:
    """Calls LabelImage and returns all results in order of their ids."""
    results = [result async for response in running.labeling.LabelImage(request) for result in response.results]
    return sorted(results, key=lambda result: result.instance_id)


class _FakeClockSelector(selectors.DefaultSelector):
    """Advances the clock instead of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("deadlock: the event loop has no timer and no ready callback")
            self.now += timeout
        return ready


class FakeClockLoop(asyncio.SelectorEventLoop):
    """An event loop on a fake clock that advances only, and instantly, when the loop would wait."""

    def __init__(self) -> None:
        self._clock = _FakeClockSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run_on_fake_clock(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine on a FakeClockLoop."""
    with asyncio.Runner(loop_factory=FakeClockLoop) as runner:
        return runner.run(work)
