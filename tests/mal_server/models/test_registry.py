"""Several models in one server: which answers, how one takes the place of another, and what a failure leaves behind."""

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
from mal_server.models.pinned import PinnedModels
from mal_server.server import MalServer, health_name
from mal_train.core.errors import Altered, DeviceLost, MalError, OutOfDeviceMemory, Truncated, UnknownLayout, WrongKey
from mal_train.kernel.labeler.labeler import Prediction
from tests.mal_server.calls import reason_of, status_details
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, config_of, label_request, loaded

HEALTH = health_pb2.HealthCheckResponse


class Shop:
    """Gives a fresh stand-in for each load, or what it was told to.

    Attributes:
        made: weak references to every predictor so far, in order, so that its release can be seen.
        gate: the next loads wait for it.
        next: made in the place of a plain stand-in, or raised.
    """

    def __init__(self) -> None:
        self.made: list[weakref.ref[BrightPredictor]] = []
        self.plans: list[ModelPlan] = []
        self.gate: threading.Event | None = None
        self.next: BrightPredictor | Exception | None = None

    def load(self, plan: ModelPlan) -> LoadedModel:
        self.plans.append(plan)
        if self.gate is not None:
            self.gate.wait(30)
        found, self.next = self.next or BrightPredictor(), None
        if isinstance(found, Exception):
            raise found
        self.made.append(weakref.ref(found))
        return loaded(plan, found, sha256=f"{len(self.made):02x}" * 32)

    def predictor(self, nth: int) -> BrightPredictor:
        found = self.made[nth]()
        assert found is not None
        return found


class Talk:
    """Stubs on one server."""

    def __init__(self, server: MalServer, channel: Any, shop: Shop) -> None:
        self.server, self.shop = server, shop
        self.labeling: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        self.model: Any = model_pb2_grpc.ModelServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    async def answered_by(self, model: str = "") -> tuple[str, int]:
        """(name, number of the load) of the model that answers a call now."""
        refs = [answer.model async for answer in self.labeling.LabelImage(label_request(DISC_BOX, model=model))]
        return refs[0].name, int(refs[0].checkpoint_sha256[:2], 16)

    async def load(self, name: str, **where: Any) -> model_pb2.LoadModelResponse:
        found: model_pb2.LoadModelResponse = await self.model.LoadModel(model_pb2.LoadModelRequest(name=name, **where))
        return found

    async def unload(self, name: str) -> None:
        await self.model.UnloadModel(model_pb2.UnloadModelRequest(name=name))

    async def listed(self) -> list[tuple[str, str, int, bool]]:
        found = await self.model.ListModels(model_pb2.ListModelsRequest())
        return [
            (one.model.ref.name, model_pb2.ModelState.Name(one.state)[12:], one.calls, one.is_default)
            for one in found.models
        ]

    async def health_of(self, model: str) -> Any:
        return (await self.health.Check(health_pb2.HealthCheckRequest(service=health_name(model)))).status


@asynccontextmanager
async def talking(shop: Shop | None = None, **settings: Any) -> AsyncIterator[Talk]:
    """A server of stand-ins under the names cats (the default) and dogs."""
    shop = shop or Shop()
    models = [{"name": name, "checkpoint": f"{name}.malckpt"} for name in ("cats", "dogs")]
    server = MalServer(config_of(**{"checkpoint": None, "models": models, **settings}), shop.load)
    await server.start()
    try:
        await server.load()
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Talk(server, channel, shop)
    finally:
        await server.stop(0)


def talk(work: Callable[[Talk], Awaitable[Any]], shop: Shop | None = None, **settings: Any) -> Any:
    async def run() -> Any:
        async with talking(shop, **settings) as found:
            return await asyncio.wait_for(work(found), 60)

    return asyncio.run(run())


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, str]:
    """(code, reason, message) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), reason_of(status_details(raised.value)), raised.value.details() or ""


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


def test_a_request_says_which_model_answers_and_the_first_is_the_default() -> None:
    async def work(talk: Talk) -> list[tuple[str, int]]:
        return [await talk.answered_by(name) for name in ("", "cats", "dogs")]

    assert talk(work) == [("cats", 1), ("cats", 1), ("dogs", 2)]


def test_the_items_of_a_stream_may_go_to_different_models() -> None:
    async def work(talk: Talk) -> dict[str, str]:
        names = ("dogs", "cats", "", "mice")
        items = [
            labeling_pb2.LabelImagesRequest(item_id=name, request=label_request(DISC_BOX, model=name)) for name in names
        ]
        answers = [answer async for answer in talk.labeling.LabelImages(iter(items))]
        return {one.item_id: one.response.model.name or reason_of(one.status) for one in answers}

    assert talk(work) == {"dogs": "dogs", "cats": "cats", "": "cats", "mice": "MODEL_NOT_FOUND"}


def test_an_unknown_model_is_not_found_and_the_nearest_is_named() -> None:
    code, reason, message = talk(lambda talk: refused(talk.answered_by("cat")))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert "did you mean 'cats'? there are cats, dogs" in message.replace(";", "")


def test_the_server_lists_its_models_the_default_first() -> None:
    async def work(talk: Talk) -> tuple[list[str], str, Any]:
        info = await talk.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        return [model.ref.name for model in info.models], info.model.ref.name, await talk.listed()

    names, default, listed = talk(work)
    assert (names, default) == (["cats", "dogs"], "cats")
    assert listed == [("cats", "SERVING", 0, True), ("dogs", "SERVING", 0, False)]


def test_health_tells_of_each_model() -> None:
    async def work(talk: Talk) -> list[Any]:
        found = [await talk.health_of("cats"), await talk.health_of("dogs")]
        await talk.unload("dogs")
        return [*found, await talk.health_of("cats"), await talk.health_of("dogs")]

    assert talk(work) == [HEALTH.SERVING, HEALTH.SERVING, HEALTH.SERVING, HEALTH.SERVICE_UNKNOWN]


def test_nothing_is_ready_before_every_model_is() -> None:
    shop = Shop()

    async def work() -> None:
        models = [{"name": name, "checkpoint": "x"} for name in ("cats", "dogs")]
        server = MalServer(config_of(checkpoint=None, models=models), shop.load)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            found = Talk(server, channel, shop)
            loading = asyncio.create_task(server.load())
            await until(lambda: len(shop.made) == 1)
            shop.gate = threading.Event()
            await until(lambda: len(shop.plans) == 2)
            assert await found.health_of("cats") == HEALTH.NOT_SERVING
            assert (await refused(found.answered_by("cats")))[1] == "LOADING"
            shop.gate.set()
            await loading
            assert await found.health_of("cats") == HEALTH.SERVING
        await server.stop(0)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_call_that_began_before_the_switch_ends_on_the_old_model_and_later_ones_get_the_new() -> None:
    async def work(talk: Talk) -> tuple[Any, ...]:
        old, gate = talk.shop.predictor(0), threading.Event()
        old.gate, warm = gate, len(old.batches)
        early = asyncio.create_task(talk.answered_by())
        await until(lambda: len(old.batches) > warm)
        answer = await talk.load("cats")
        late = await talk.answered_by()
        during = await talk.listed()
        gate.set()
        return answer, late, during, await early

    answer, late, during, early = talk(work)
    assert (answer.replaced.checkpoint_sha256[:2], answer.model.ref.checkpoint_sha256[:2]) == ("01", "03")
    assert (early, late) == (("cats", 1), ("cats", 3))
    assert during == [("cats", "SERVING", 0, True), ("dogs", "SERVING", 0, False), ("cats", "RETIRING", 1, False)]


def test_a_stream_keeps_to_the_model_that_it_began_with() -> None:
    async def work(talk: Talk) -> list[int]:
        stream = talk.labeling.LabelImages()
        found = []
        for place in range(3):
            if place == 1:
                await talk.load("cats")
            await stream.write(labeling_pb2.LabelImagesRequest(item_id=str(place), request=label_request(DISC_BOX)))
            found.append(int((await stream.read()).response.model.checkpoint_sha256[:2], 16))
        await stream.done_writing()
        return [*found, (await talk.answered_by())[1]]

    assert talk(work) == [1, 1, 1, 3]


def test_the_old_models_memory_is_released_when_its_last_call_is_done() -> None:
    async def work(talk: Talk) -> tuple[bool, bool]:
        gate = talk.shop.predictor(0).gate = threading.Event()
        warm = len(talk.shop.predictor(0).batches)
        early = asyncio.create_task(talk.answered_by())
        await until(lambda: len(talk.shop.predictor(0).batches) > warm)
        await talk.load("cats")
        gc.collect()
        held = talk.shop.made[0]() is not None
        gate.set()
        await early
        for _ in range(1000):
            if talk.shop.made[0]() is None:
                break
            await asyncio.sleep(0.01)
            gc.collect()
        return held, talk.shop.made[0]() is None

    assert talk(work) == (True, True)


def test_a_hundred_calls_under_way_lose_nothing_while_models_are_switched() -> None:
    async def work(talk: Talk) -> list[int]:
        over, count = False, 0

        async def caller() -> list[int]:
            nonlocal count
            found = []
            while not over:
                found.append((await talk.answered_by())[1])
                count += 1
            return found

        async def answered(more: int) -> None:
            most = count + more
            await until(lambda: count >= most)

        callers = [asyncio.create_task(caller()) for _ in range(8)]
        await answered(1)
        while count < 100:
            await talk.load("cats")
            # Of so many calls of eight callers at least one began after the switch.
            await answered(16)
        over = True
        rows = await asyncio.gather(*callers)
        for row in rows:
            assert row == sorted(row), "a call after the switch was answered by the model before it"
        return [number for row in rows for number in row]

    numbers = talk(work)
    assert len(numbers) >= 100
    assert len(set(numbers)) >= 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (WrongKey("no"), "WRONG_KEY"),
        (Truncated("cut"), "TRUNCATED"),
        (Altered("flipped"), "ALTERED"),
        (UnknownLayout("new"), "UNKNOWN_LAYOUT"),
        (OutOfDeviceMemory("full"), "OUT_OF_MEMORY"),
        (PermissionError(13, "denied"), "CHECKPOINT"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_leaves_the_old_model_and_says_why(
    fault: MalError | OSError, reason: str
) -> None:
    async def work(talk: Talk) -> tuple[Any, ...]:
        talk.shop.next = fault
        return (*(await refused(talk.load("cats"))), await talk.answered_by(), await talk.health_of("cats"))

    code, found, message, answered, health = talk(work)
    assert (code, found) == (grpc.StatusCode.FAILED_PRECONDITION, reason)
    assert str(fault) in message
    assert (answered, health) == (("cats", 1), HEALTH.SERVING)


class Wrong(BrightPredictor):
    """Answers as `change` makes of the right map."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self._change = change

    def predict(self, crops: Any, options: Any = None) -> Any:
        return [Prediction(self._change(one.prob)) for one in super().predict(crops, options)]


class Careless(BrightPredictor):
    """Its masks leave their boxes."""

    def finish(self, crop: Any, probability: Any, **options: Any) -> Any:
        whole = type(crop)(**{**vars(crop), "box_inside": (0.0, 0.0, *map(float, reversed(crop.image_hw)))})
        return super().finish(whole, probability, **options)


@pytest.mark.parametrize(
    ("predictor", "said"),
    [
        (Wrong(lambda m: m * np.float32("nan")), "not finite"),
        (Wrong(lambda m: m + 2), "probabilities between"),
        (Wrong(lambda m: 1 - m), "differ from float32 on the CPU"),
        (Wrong(lambda m: m[:8]), "a map of (8, 16)"),
        (Careless(), "leaves its box"),
        (BrightPredictor(error=RuntimeError("no such kernel")), "no such kernel"),
        (BrightPredictor(fits=0), "do not fit"),
    ],
)
def test_a_model_that_fails_its_test_is_never_served(predictor: BrightPredictor, said: str) -> None:
    class Comparing(Shop):
        def load(self, plan: ModelPlan) -> LoadedModel:
            found = super().load(plan)
            return LoadedModel(found.info, found.workers, reference=BrightPredictor())

    async def work(talk: Talk) -> tuple[Any, ...]:
        talk.shop.next = predictor
        return (*(await refused(talk.load("cats"))), await talk.answered_by())

    code, reason, message, answered = talk(work, Comparing())
    assert (code, reason, answered) == (grpc.StatusCode.FAILED_PRECONDITION, "SELF_TEST_FAILED", ("cats", 1))
    assert said in message


def test_a_caller_that_leaves_does_not_stop_the_load() -> None:
    async def work(talk: Talk) -> tuple[str, int]:
        gate = talk.shop.gate = threading.Event()
        before = len(talk.shop.plans)
        call = asyncio.create_task(talk.load("cats"))
        await until(lambda: len(talk.shop.plans) > before)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        gate.set()
        while (found := await talk.answered_by())[1] == 1:
            await asyncio.sleep(0.01)
        return found

    assert talk(work) == ("cats", 3)


def test_a_device_lost_under_the_test_of_a_new_model_ends_the_server() -> None:
    async def work(talk: Talk) -> tuple[str, str, bool]:
        talk.shop.next = BrightPredictor(error=DeviceLost("an illegal memory access"))
        first = await refused(talk.load("cats"))
        second = await refused(talk.answered_by())
        return first[1], second[1], talk.server.lost.is_set()

    assert talk(work) == ("DEVICE_LOST", "DEVICE_LOST", True)


def test_a_model_can_be_unloaded_but_not_the_default() -> None:
    async def work(talk: Talk) -> tuple[Any, ...]:
        default = await refused(talk.unload("cats"))
        await talk.unload("dogs")
        return default[1], (await refused(talk.answered_by("dogs")))[1], (await refused(talk.unload("dogs")))[1]

    assert talk(work) == ("MODEL_IS_DEFAULT", "MODEL_NOT_FOUND", "MODEL_NOT_FOUND")


def test_a_model_whose_unloader_leaves_is_still_given_up_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    told, left = asyncio.Event(), asyncio.Event()

    async def slow(self: MalServer, name: str, answers: bool) -> None:
        if answers:
            return
        told.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    monkeypatch.setattr(MalServer, "_model_changed", slow)

    async def work(talk: Talk) -> list[tuple[str, str, int, bool]]:
        with PinnedModels(talk.server._models) as leases:
            leases.get("dogs")
            call = asyncio.ensure_future(talk.unload("dogs"))
            await told.wait()
            call.cancel()
            await left.wait()
            return await talk.listed()

    assert talk(work) == [("cats", "SERVING", 0, True), ("dogs", "RETIRING", 1, False)]


def test_the_default_model_is_one_for_a_stream_by_either_name() -> None:
    async def work(talk: Talk) -> bool:
        models = talk.server._models
        with PinnedModels(models) as leases:
            first = leases.get("")
            await talk.load("cats")
            return leases.get("cats") is first

    assert talk(work)


def test_the_metrics_name_the_models_that_answer() -> None:
    async def work(talk: Talk) -> set[str]:
        await talk.unload("dogs")
        await talk.load("cats")
        samples = [s for family in talk.server.registry.collect() for s in family.samples]
        return {s.labels["name"] + s.labels["sha256"][:2] for s in samples if s.name == "mal_model_info"}

    assert talk(work) == {"cats03"}


class TestFolders:
    """What LoadModel takes from the server's disk."""

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

    def test_a_file_of_a_folder_is_loaded_with_the_folders_key(self, folders: dict[str, Any], tmp_path: Path) -> None:
        async def work(talk: Talk) -> tuple[Any, ...]:
            await talk.load("mice", folder="trained", path="in.malckpt", branch=types_pb2.BRANCH_TEACHER)
            return talk.shop.plans[-1], await talk.answered_by("mice")

        plan, answered = talk(work, **folders)
        assert plan.checkpoint == tmp_path / "trained" / "old" / "a.malckpt"
        assert (plan.decryption_key, str(plan.branch), answered[0]) == ("file:identity.txt", "teacher", "mice")

    @pytest.mark.parametrize(
        ("folder", "path", "found"),
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
    def test_nothing_outside_of_the_folders_is_loaded(
        self, folders: dict[str, Any], folder: str, path: str, found: str
    ) -> None:
        async def work(talk: Talk) -> tuple[Any, ...]:
            before = len(talk.shop.plans)
            code, reason, _ = await refused(talk.load("mice", folder=folder, path=path))
            return reason or code.name, len(talk.shop.plans) - before

        assert talk(work, **folders) == (found, 0)

    def test_more_models_than_allowed_are_refused(self, folders: dict[str, Any]) -> None:
        async def work(talk: Talk) -> str:
            return (await refused(talk.load("mice", folder="trained", path="old/a.malckpt")))[1]

        assert talk(work, max_models=2, **folders) == "TOO_MANY_MODELS"

    def test_a_name_without_a_checkpoint_needs_a_folder(self) -> None:
        code, reason, message = talk(lambda talk: refused(talk.load("dog")))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "did you mean 'dogs'" in message
