"""Several models in one server: selection, replacement, unloading, and failures that leave the others unchanged."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mal.v1 import labeling_pb2, labeling_pb2_grpc, model_pb2, model_pb2_grpc, types_pb2

from mal_server.config.model_config import ModelPlan
from mal_server.models.loader import LoadedModel
from mal_server.models.pinned_models import PinnedModels
from mal_server.models.registry import MAX_DRAINING, MAX_PENDING_CHANGES
from mal_server.server import MalServer, health_name
from mal_train.core.errors import (
    Altered,
    DeviceLost,
    MalError,
    OutOfDeviceMemory,
    Truncated,
    UnknownLayout,
    Untrusted,
    WrongKey,
)
from mal_train.kernel.labeler.types import Prediction
from tests.mal_server.calls import reason_of, status_details
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, config_of, label_request, loaded

HEALTH = health_pb2.HealthCheckResponse


class FakeLoader:
    """Returns a new `BrightPredictor` for each load, or `next`.

    Attributes:
        predictors: weak references to all predictors so far, in order, which show their release.
        plans: arguments of all loads so far.
        gate: the next loads wait for it.
        gates: loads of a model of that name wait for its event.
        next: predictor or error of the next load.
    """

    def __init__(self) -> None:
        self.predictors: list[weakref.ref[BrightPredictor]] = []
        self.plans: list[ModelPlan] = []
        self.gate: threading.Event | None = None
        self.gates: dict[str, threading.Event] = {}
        self.next: BrightPredictor | Exception | None = None

    def load(self, plan: ModelPlan) -> LoadedModel:
        self.plans.append(plan)
        gate = self.gates.get(plan.name, self.gate)
        if gate is not None:
            gate.wait(30)
        predictor, self.next = self.next or BrightPredictor(), None
        if isinstance(predictor, Exception):
            raise predictor
        self.predictors.append(weakref.ref(predictor))
        return loaded(plan, predictor, sha256=f"{len(self.predictors):02x}" * 32)

    def predictor(self, index: int) -> BrightPredictor:
        predictor = self.predictors[index]()
        assert predictor is not None
        return predictor


class Session:
    """Stubs of all services of one server."""

    def __init__(self, server: MalServer, channel: Any, loader: FakeLoader) -> None:
        self.server, self.loader = server, loader
        self.labeling: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        self.model: Any = model_pb2_grpc.ModelServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    async def used_model(self, model: str = "") -> tuple[str, int]:
        """Returns (name, number of the load) of the model that serves a new call."""
        refs = [response.model async for response in self.labeling.LabelImage(label_request(DISC_BOX, model=model))]
        return refs[0].name, int(refs[0].checkpoint_sha256[:2], 16)

    async def load(self, name: str, **fields: Any) -> model_pb2.LoadModelResponse:
        request = model_pb2.LoadModelRequest(name=name, **fields)
        response: model_pb2.LoadModelResponse = await self.model.LoadModel(request)
        return response

    async def unload(self, name: str) -> None:
        await self.model.UnloadModel(model_pb2.UnloadModelRequest(name=name))

    async def listed(self) -> list[tuple[str, str, int, bool]]:
        response = await self.model.ListModels(model_pb2.ListModelsRequest())
        return [
            (entry.model.ref.name, model_pb2.ModelState.Name(entry.state)[12:], entry.calls, entry.is_default)
            for entry in response.models
        ]

    async def health_of(self, model: str) -> Any:
        return (await self.health.Check(health_pb2.HealthCheckRequest(service=health_name(model)))).status


@asynccontextmanager
async def open_session(loader: FakeLoader | None = None, **settings: Any) -> AsyncIterator[Session]:
    """Starts a server of fake models with the names cats (the default) and dogs."""
    loader = loader or FakeLoader()
    models = [{"name": name, "checkpoint": f"{name}.malckpt"} for name in ("cats", "dogs")]
    server = MalServer(config_of(**{"checkpoint": None, "models": models, **settings}), loader.load)
    await server.start()
    try:
        await server.load()
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Session(server, channel, loader)
    finally:
        await server.stop(0)


def with_server(work: Callable[[Session], Awaitable[Any]], loader: FakeLoader | None = None, **settings: Any) -> Any:
    async def run() -> Any:
        async with open_session(loader, **settings) as session:
            return await asyncio.wait_for(work(session), 60)

    return asyncio.run(run())


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, str]:
    """Returns (code, reason, message) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), reason_of(status_details(raised.value)), raised.value.details() or ""


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_request_selects_its_model_and_the_first_is_the_default() -> None:
    async def work(session: Session) -> list[tuple[str, int]]:
        return [await session.used_model(name) for name in ("", "cats", "dogs")]

    assert with_server(work) == [("cats", 1), ("cats", 1), ("dogs", 2)]


def test_items_of_one_stream_may_use_different_models() -> None:
    async def work(session: Session) -> dict[str, str]:
        names = ("dogs", "cats", "", "mice")
        items = [
            labeling_pb2.LabelImagesRequest(item_id=name, request=label_request(DISC_BOX, model=name)) for name in names
        ]
        responses = [response async for response in session.labeling.LabelImages(iter(items))]
        return {item.item_id: item.response.model.name or reason_of(item.status) for item in responses}

    assert with_server(work) == {"dogs": "dogs", "cats": "cats", "": "cats", "mice": "MODEL_NOT_FOUND"}


def test_an_unknown_model_is_not_found_and_the_closest_name_is_suggested() -> None:
    code, reason, message = with_server(lambda session: refused(session.used_model("cat")))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert "'cats'" in message
    assert "cats, dogs" in message


def test_the_server_lists_the_default_model_first() -> None:
    async def work(session: Session) -> tuple[list[str], str, Any]:
        info = await session.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        return [model.ref.name for model in info.models], info.model.ref.name, await session.listed()

    names, default, listed = with_server(work)
    assert (names, default) == (["cats", "dogs"], "cats")
    assert listed == [("cats", "SERVING", 0, True), ("dogs", "SERVING", 0, False)]


def test_each_model_has_a_health_state() -> None:
    async def work(session: Session) -> list[Any]:
        before = [await session.health_of("cats"), await session.health_of("dogs")]
        await session.unload("dogs")
        code, *_ = await refused(session.health_of("dogs"))
        return [*before, await session.health_of("cats"), code]

    assert with_server(work) == [HEALTH.SERVING, HEALTH.SERVING, HEALTH.SERVING, grpc.StatusCode.NOT_FOUND]


def test_no_model_is_served_before_all_are_loaded() -> None:
    loader = FakeLoader()
    gate = loader.gates["dogs"] = threading.Event()

    async def work() -> None:
        models = [{"name": name, "checkpoint": "x"} for name in ("cats", "dogs")]
        server = MalServer(config_of(checkpoint=None, models=models), loader.load)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            session = Session(server, channel, loader)
            loading = asyncio.create_task(server.load())
            await until(lambda: len(loader.plans) == 2)
            assert await session.health_of("cats") == HEALTH.NOT_SERVING
            assert (await refused(session.used_model("cats")))[1] == "LOADING"
            gate.set()
            await loading
            assert await session.health_of("cats") == HEALTH.SERVING
        await server.stop(0)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_call_from_before_the_switch_ends_on_the_old_model_and_later_calls_get_the_new() -> None:
    async def work(session: Session) -> tuple[Any, ...]:
        old, gate = session.loader.predictor(0), threading.Event()
        old.gate, warm = gate, len(old.batches)
        early = asyncio.create_task(session.used_model())
        await until(lambda: len(old.batches) > warm)
        response = await session.load("cats")
        late = await session.used_model()
        during = await session.listed()
        gate.set()
        return response, late, during, await early

    response, late, during, early = with_server(work)
    assert (response.replaced.checkpoint_sha256[:2], response.model.ref.checkpoint_sha256[:2]) == ("01", "03")
    assert (early, late) == (("cats", 1), ("cats", 3))
    assert during == [("cats", "SERVING", 0, True), ("dogs", "SERVING", 0, False), ("cats", "RETIRING", 1, False)]


def test_a_stream_keeps_its_model_after_a_switch() -> None:
    async def work(session: Session) -> list[int]:
        stream = session.labeling.LabelImages()
        loads = []
        for index in range(3):
            if index == 1:
                await session.load("cats")
            await stream.write(labeling_pb2.LabelImagesRequest(item_id=str(index), request=label_request(DISC_BOX)))
            loads.append(int((await stream.read()).response.model.checkpoint_sha256[:2], 16))
        await stream.done_writing()
        return [*loads, (await session.used_model())[1]]

    assert with_server(work) == [1, 1, 1, 3]


def test_a_replaced_model_is_released_when_its_last_call_ends() -> None:
    async def work(session: Session) -> tuple[bool, bool]:
        gate = session.loader.predictor(0).gate = threading.Event()
        warm = len(session.loader.predictor(0).batches)
        early = asyncio.create_task(session.used_model())
        await until(lambda: len(session.loader.predictor(0).batches) > warm)
        await session.load("cats")
        gc.collect()
        held = session.loader.predictors[0]() is not None
        gate.set()
        await early
        for _ in range(1000):
            if session.loader.predictors[0]() is None:
                break
            await asyncio.sleep(0.01)
            gc.collect()
        return held, session.loader.predictors[0]() is None

    assert with_server(work) == (True, True)


def test_a_hundred_calls_all_succeed_while_models_are_switched() -> None:
    async def work(session: Session) -> list[int]:
        is_over, count = False, 0

        async def caller() -> list[int]:
            nonlocal count
            loads = []
            while not is_over:
                loads.append((await session.used_model())[1])
                count += 1
            return loads

        async def until_more(calls: int) -> None:
            goal = count + calls
            await until(lambda: count >= goal)

        callers = [asyncio.create_task(caller()) for _ in range(8)]
        await until_more(1)
        while count < 100:
            await session.load("cats")
            # Of 16 calls by eight clients, at least one started after the switch.
            await until_more(16)
        is_over = True
        rows = await asyncio.gather(*callers)
        for row in rows:
            assert row == sorted(row), "a call after a switch used the model from before it"
        return [number for row in rows for number in row]

    numbers = with_server(work)
    assert len(numbers) >= 100
    assert len(set(numbers)) >= 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (WrongKey("no"), "WRONG_KEY"),
        (Truncated("cut"), "TRUNCATED"),
        (Altered("flipped"), "ALTERED"),
        (UnknownLayout("new"), "UNKNOWN_LAYOUT"),
        (Untrusted("unsigned"), "UNTRUSTED"),
        (OutOfDeviceMemory("full"), "OUT_OF_MEMORY"),
        (PermissionError(13, "denied"), "CHECKPOINT"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_leaves_the_old_model_in_service(
    error: MalError | OSError, reason: str
) -> None:
    async def work(session: Session) -> tuple[Any, ...]:
        session.loader.next = error
        return (*(await refused(session.load("cats"))), await session.used_model(), await session.health_of("cats"))

    code, actual, message, used, health = with_server(work)
    assert (code, actual) == (grpc.StatusCode.FAILED_PRECONDITION, reason)
    assert str(error) in message
    assert (used, health) == (("cats", 1), HEALTH.SERVING)


class WrongPredictor(BrightPredictor):
    """Returns the right maps after `change`."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self._change = change

    def predict(self, crops: Any, options: Any = None) -> Any:
        return [Prediction(self._change(prediction.prob)) for prediction in super().predict(crops, options)]


class UnclippedPredictor(BrightPredictor):
    """Returns masks that extend beyond their boxes."""

    def finish(self, crop: Any, prediction: Any, **options: Any) -> Any:
        unclipped = type(crop)(**{**vars(crop), "box_inside": (0.0, 0.0, *map(float, reversed(crop.image_hw)))})
        return super().finish(unclipped, prediction, **options)


@pytest.mark.parametrize(
    ("predictor", "fault"),
    [
        (WrongPredictor(lambda m: m * np.float32("nan")), "finite"),
        (WrongPredictor(lambda m: m + 2), "between 2"),
        (WrongPredictor(lambda m: 1 - m), "float32"),
        (WrongPredictor(lambda m: m[:8]), "(8, 16)"),
        (UnclippedPredictor(), "mask"),
        (BrightPredictor(error=RuntimeError("no such kernel")), "no such kernel"),
        (BrightPredictor(fits=0), "fit"),
    ],
)
def test_a_model_that_fails_its_self_test_is_never_served(predictor: BrightPredictor, fault: str) -> None:
    class LoaderWithReference(FakeLoader):
        def load(self, plan: ModelPlan) -> LoadedModel:
            model = super().load(plan)
            return LoadedModel(model.info, model.workers, reference=BrightPredictor())

    async def work(session: Session) -> tuple[Any, ...]:
        session.loader.next = predictor
        return (*(await refused(session.load("cats"))), await session.used_model())

    code, reason, message, used = with_server(work, LoaderWithReference())
    assert (code, reason, used) == (grpc.StatusCode.FAILED_PRECONDITION, "SELF_TEST_FAILED", ("cats", 1))
    assert fault in message


def test_a_cancelled_call_does_not_stop_the_load() -> None:
    async def work(session: Session) -> tuple[str, int]:
        gate = session.loader.gate = threading.Event()
        before = len(session.loader.plans)
        call = asyncio.create_task(session.load("cats"))
        await until(lambda: len(session.loader.plans) > before)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        gate.set()
        while (used := await session.used_model())[1] == 1:
            await asyncio.sleep(0.01)
        return used

    assert with_server(work) == ("cats", 3)


def test_a_device_lost_during_a_self_test_stops_the_server() -> None:
    async def work(session: Session) -> tuple[str, str, bool]:
        session.loader.next = BrightPredictor(error=DeviceLost("an illegal memory access"))
        first = await refused(session.load("cats"))
        second = await refused(session.used_model())
        return first[1], second[1], session.server.lost.is_set()

    assert with_server(work) == ("DEVICE_LOST", "DEVICE_LOST", True)


def test_every_model_but_the_default_can_be_unloaded() -> None:
    async def work(session: Session) -> tuple[Any, ...]:
        default = await refused(session.unload("cats"))
        await session.unload("dogs")
        return default[1], (await refused(session.used_model("dogs")))[1], (await refused(session.unload("dogs")))[1]

    assert with_server(work) == ("MODEL_IS_DEFAULT", "MODEL_NOT_FOUND", "MODEL_NOT_FOUND")


def test_a_cancelled_unload_still_drains_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    called, cancelled = asyncio.Event(), asyncio.Event()

    async def slow(self: MalServer, name: str, is_served: bool) -> None:
        if is_served:
            return
        called.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    monkeypatch.setattr(MalServer, "_on_model_change", slow)

    async def work(session: Session) -> list[tuple[str, str, int, bool]]:
        with PinnedModels(session.server._models) as pinned:
            pinned.get("dogs")
            call = asyncio.ensure_future(session.unload("dogs"))
            await called.wait()
            call.cancel()
            await cancelled.wait()
            return await session.listed()

    assert with_server(work) == [("cats", "SERVING", 0, True), ("dogs", "RETIRING", 1, False)]


def test_a_stream_gets_one_default_model_under_both_of_its_names() -> None:
    async def work(session: Session) -> bool:
        with PinnedModels(session.server._models) as pinned:
            first = pinned.get("")
            await session.load("cats")
            return pinned.get("cats") is first

    assert with_server(work)


def test_the_metrics_name_the_served_models() -> None:
    async def work(session: Session) -> set[str]:
        await session.unload("dogs")
        await session.load("cats")
        samples = [s for family in session.server.registry.collect() for s in family.samples]
        return {s.labels["name"] + s.labels["sha256"][:2] for s in samples if s.name == "mal_model_info"}

    assert with_server(work) == {"cats03"}


class TestFolders:
    """LoadModel with checkpoints from folders of the server."""

    @pytest.fixture
    def folders(self, tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "trained" / "old").mkdir(parents=True)
        (tmp_path / "trained" / "old" / "a.malckpt").write_bytes(b"x")
        (tmp_path / "secret.malckpt").write_bytes(b"x")
        (tmp_path / "trained" / "out.malckpt").symlink_to(tmp_path / "secret.malckpt")
        (tmp_path / "trained" / "in.malckpt").symlink_to(tmp_path / "trained" / "old" / "a.malckpt")
        return {
            "model_folders": [
                {"name": "trained", "path": str(tmp_path / "trained"), "decryption_key": "file:identity.txt"}
            ]
        }

    def test_a_checkpoint_in_a_folder_is_loaded_with_the_folders_key(
        self, folders: dict[str, Any], tmp_path: Path
    ) -> None:
        async def work(session: Session) -> tuple[Any, ...]:
            await session.load("mice", folder="trained", path="in.malckpt", branch=types_pb2.BRANCH_TEACHER)
            return session.loader.plans[-1], await session.used_model("mice")

        plan, used = with_server(work, **folders)
        assert plan.checkpoint == tmp_path / "trained" / "old" / "a.malckpt"
        assert (plan.decryption_key, str(plan.branch), used[0]) == ("file:identity.txt", "teacher", "mice")

    @pytest.mark.parametrize(
        ("folder", "path", "reason"),
        [
            ("trained", "none.malckpt", "CHECKPOINT_NOT_FOUND"),
            ("trained", "out.malckpt", "CHECKPOINT_NOT_FOUND"),
            ("trained", "old/../../secret.malckpt", "INVALID_ARGUMENT"),
            ("trained", "../secret.malckpt", "INVALID_ARGUMENT"),
            ("trained", "/etc/passwd", "INVALID_ARGUMENT"),
            ("trained", "old/a.malckpt\0.txt", "INVALID_ARGUMENT"),
            ("trained", "", "INVALID_ARGUMENT"),
            ("", "old/a.malckpt", "INVALID_ARGUMENT"),
            ("train", "old/a.malckpt", "FOLDER_NOT_FOUND"),
        ],
    )
    def test_only_checkpoints_inside_the_folders_are_loaded(
        self, folders: dict[str, Any], folder: str, path: str, reason: str
    ) -> None:
        async def work(session: Session) -> tuple[Any, ...]:
            before = len(session.loader.plans)
            code, actual, _ = await refused(session.load("mice", folder=folder, path=path))
            return actual or code.name, len(session.loader.plans) - before

        assert with_server(work, **folders) == (reason, 0)

    def test_a_model_beyond_max_models_is_refused(self, folders: dict[str, Any]) -> None:
        async def work(session: Session) -> str:
            return (await refused(session.load("mice", folder="trained", path="old/a.malckpt")))[1]

        assert with_server(work, max_models=2, **folders) == "TOO_MANY_MODELS"

    def test_a_name_without_a_checkpoint_needs_a_folder(self) -> None:
        code, reason, message = with_server(lambda session: refused(session.load("dog")))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "'dogs'" in message


def test_loads_that_wait_are_bounded_also_if_their_callers_have_left() -> None:
    loader = FakeLoader()

    async def work(session: Session) -> None:
        loader.gate = threading.Event()
        calls = [asyncio.ensure_future(session.load("cats")) for _ in range(MAX_PENDING_CHANGES)]
        await until(lambda: session.server.pending_changes == MAX_PENDING_CHANGES)
        for call in calls:
            call.cancel()
        expected = (grpc.StatusCode.UNAVAILABLE, "TOO_MANY_LOADS")
        assert (await refused(session.load("cats")))[:2] == expected
        assert (await refused(session.unload("dogs")))[:2] == expected
        loader.gate.set()
        await until(lambda: session.server.pending_changes == 0)
        await session.unload("dogs")

    with_server(work, loader)


def test_a_load_is_refused_while_too_many_replaced_models_are_in_use() -> None:
    async def work(session: Session) -> None:
        items: asyncio.Queue[labeling_pb2.LabelImagesRequest | None] = asyncio.Queue()

        async def requests() -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
            while (item := await items.get()) is not None:
                yield item

        streams = []
        for _ in range(MAX_DRAINING):
            streams.append(session.labeling.LabelImages(requests()))
            items.put_nowait(labeling_pb2.LabelImagesRequest(request=label_request(DISC_BOX)))
            await streams[-1].read()
            await session.load("cats")
        assert (await refused(session.load("cats")))[:2] == (grpc.StatusCode.UNAVAILABLE, "TOO_MANY_LOADS")
        for stream in streams:
            items.put_nowait(None)
            await stream.read()
        await session.load("cats")

    with_server(work)
