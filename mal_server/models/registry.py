"""Which models answer: loaded, proven, switched to at once, and given up when their last call is done.

    load    a checkpoint is read, put on its devices and proven beside what answers
    switch  one assignment: calls that look from now on get the new model
    retire  the old one finishes the calls that hold it, then its memory goes back

A call looks when it first needs a model and keeps to what it found until it ends (`leases`), so that its answers belong
together. Knows nothing of gRPC and nothing of what a request says.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from mal_server.config.model_config import ModelPlan
from mal_server.config.server import ServerConfig
from mal_server.errors import ModelRejected, NotReady, SelfTestFailed, UnknownModel
from mal_server.inference.allowed_dirs import suggest
from mal_server.inference.image_store import ImageStore
from mal_server.models.loader import LoadedModel, ModelInfo, free_memory
from mal_server.models.served_model import OnLost, ServedModel
from mal_server.models.warmup import warm_up_and_verify
from mal_server.ops.metrics import Metrics
from mal_server.scheduling.background import run_in_daemon_thread
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.memory_limiter import MemoryLimiter
from mal_train.core.errors import (
    Altered,
    CheckpointError,
    ConfigError,
    DeviceLost,
    MalError,
    OutOfDeviceMemory,
    Truncated,
    UnknownLayout,
    WrongKey,
)

log = logging.getLogger(__name__)

Load = Callable[[ModelPlan], LoadedModel]
OnChange = Callable[[str, bool], Awaitable[None]]
"""Told the name of a model and whether it answers now."""


@dataclass(frozen=True)
class ModelEntry:
    """What there is to say of a model in memory."""

    info: ModelInfo
    calls: int
    is_retiring: bool
    is_default: bool


class ModelRegistry:
    """The models of one server; used from one event loop.

    Args:
        config: queue and batch settings, the number of models.
        load: reads a checkpoint; runs in a thread.
        pool: threads for CPU work.
        pictures: gives the bytes of pictures.
        metrics: counts.
        on_lost: called when a device is lost.
        on_change: called after a model began or ceased to answer.
    """

    def __init__(
        self,
        config: ServerConfig,
        load: Load,
        *,
        pool: PriorityThreadPool,
        pictures: ImageStore,
        metrics: Metrics,
        on_lost: OnLost,
        on_change: OnChange,
    ) -> None:
        self._config = config
        self._load = load
        self._pool = pool
        self._room = MemoryLimiter(config.max_decoded_bytes, batch_aging_s=config.batch_aging_s)
        self._pictures = pictures
        self._metrics = metrics
        self._on_lost = on_lost
        self._on_change = on_change
        self._plans = {plan.name: plan for plan in config.plans}
        self.default = config.plans[0].name
        """Name of the model that answers where none is named."""
        self.lost: DeviceLost | None = None
        """Set once a device is gone; nothing answers any more."""
        self._serving: dict[str, ServedModel] = {}
        self._retiring: set[ServedModel] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_ready = False
        self._one_load = asyncio.Lock()
        metrics.watch_queue(self._waiting_crops, self._waiting_bytes)

    async def start(self) -> None:
        """Loads the configured models; none serves before all are ready. Raises the errors of `load`."""
        for plan in self._config.plans:
            loaded = await run_in_daemon_thread(partial(self._load, plan))
            self._serving[plan.name] = self._made(loaded)
            await self._prove(loaded)
        self._is_ready = True
        self._tell_metrics()
        for name in self._serving:
            await self._on_change(name, True)

    def check_ready(self) -> None:
        """Raises NotReady before `start` has ended, and DeviceLost once a device is gone."""
        if self.lost is not None:
            raise self.lost
        if not self._is_ready:
            raise NotReady("the model is still loading")

    def current(self, name: str = "") -> ServedModel:
        """The model that new calls get under a name; "" = the default.

        Raises:
            NotReady, DeviceLost: as `check_ready`.
            UnknownModel: nothing is served under it.
        """
        self.check_ready()
        found = self._serving.get(name or self.default)
        if found is None:
            raise UnknownModel(f"model {name!r} is not served here{suggest(name, self._serving)}")
        return found

    def infos(self) -> list[ModelInfo]:
        """Every model that answers, the default one first. Raises as `check_ready`."""
        self.check_ready()
        return [entry.info for entry in self.entries() if not entry.is_retiring]

    def entries(self) -> list[ModelEntry]:
        """Every model in memory: the default one, the others, then those that are being given up."""
        named = sorted(self._serving.items(), key=lambda pair: pair[0] != self.default)
        found = [ModelEntry(one.info, one.calls, False, name == self.default) for name, one in named]
        return found + [ModelEntry(one.info, one.calls, True, False) for one in self._retiring]

    def plan(self, name: str) -> ModelPlan:
        """What the settings say of a model. Raises UnknownModel."""
        known = self._plans.get(name)
        if known is None:
            raise UnknownModel(
                f"model {name!r}: the settings name no checkpoint for it{suggest(name, self._plans)}; give folder and "
                "path"
            )
        return known

    async def load(self, plan: ModelPlan) -> tuple[ModelInfo, ModelInfo | None]:
        """Puts a checkpoint into service under the plan's name; (what answers now, what answered before).

        A caller that is cancelled does not stop it.

        Raises:
            NotReady: the server itself is still loading.
            ModelRefused: it could not be loaded, or fails its test; what answered before goes on.
            DeviceLost: a device broke down for good under the test.
        """
        self.check_ready()
        return await asyncio.shield(asyncio.ensure_future(self._switch(plan)))

    async def unload(self, name: str) -> ModelInfo:
        """Gives no new call to a model, and its memory back when its last call is done.

        Raises:
            UnknownModel: nothing is served under this name.
            ModelRefused: it is the default one.
        """
        async with self._one_load:
            serving = self.current(name)
            if not name or name == self.default:
                raise ModelRejected(
                    f"model {serving.info.name!r} answers requests that name none; it can be replaced, not unloaded",
                    "MODEL_IS_DEFAULT",
                )
            del self._serving[name]
            self._tell_metrics()
            # Before anything is awaited: a caller who leaves here must not leave a model that nobody lists or closes.
            self._retire(serving)
            await self._on_change(name, False)
            log.info("unloaded model=%s sha256=%s", name, serving.info.sha256)
            return serving.info

    def take(self, name: str) -> ServedModel:
        """As `current`, and holds it until `give_back`."""
        serving = self.current(name)
        serving.calls += 1
        return serving

    def give_back(self, serving: ServedModel) -> None:
        """One call less holds it."""
        serving.calls -= 1
        self._close_if_idle(serving)

    def break_off(self, error: DeviceLost) -> None:
        """A device is gone: everything that waits, and whatever comes, is answered with the error."""
        self.lost = error
        for serving in (*self._serving.values(), *self._retiring):
            serving.batcher.fail_all(error)

    @property
    def waiting(self) -> int:
        """Crops that wait for a device."""
        return int(self._waiting_crops())

    async def close(self) -> None:
        """Waits for running batches and ends all threads; for the end of the server."""
        await asyncio.gather(*self._closing)
        for serving in (*self._serving.values(), *self._retiring):
            await serving.close()

    async def _switch(self, plan: ModelPlan) -> tuple[ModelInfo, ModelInfo | None]:
        async with self._one_load:
            self.check_ready()
            old = self._serving.get(plan.name)
            if old is None and len(self._serving) >= self._config.max_models:
                raise ModelRejected(
                    f"{len(self._serving)} models are served and max_models is {self._config.max_models}; unload one "
                    "first, or replace one",
                    "TOO_MANY_MODELS",
                )
            new = await self._loaded(plan)
            # The switch: nothing waits between these lines, so every call gets one model or the other.
            self._serving[plan.name] = new
            self._tell_metrics()
            if old is not None:
                self._retire(old)
            await self._on_change(plan.name, True)
            before = None if old is None else old.info
            log.info(
                "loaded model=%s sha256=%s replaced=%s", plan.name, new.info.sha256, before.sha256 if before else "-"
            )
            return new.info, before

    async def _loaded(self, plan: ModelPlan) -> ServedModel:
        try:
            loaded = await run_in_daemon_thread(partial(self._load, plan))
            try:
                await self._prove(loaded)
            except BaseException:  # the threads of what is not served must not stay
                for worker in loaded.workers:
                    worker.close()
                raise
        except DeviceLost:
            raise
        except (MalError, OSError) as error:
            log.warning("not loaded model=%s error=%s", plan.name, error)
            asyncio.get_running_loop().run_in_executor(None, free_memory)
            raise ModelRejected(
                f"model {plan.name!r} was not loaded, what was served goes on: {error}", _why(error)
            ) from None
        return self._made(loaded)

    async def _prove(self, loaded: LoadedModel) -> None:
        try:
            await warm_up_and_verify(loaded)
        except DeviceLost as error:
            await self._on_lost(error)
            raise

    def _made(self, loaded: LoadedModel) -> ServedModel:
        return ServedModel(
            loaded,
            self._config,
            pool=self._pool,
            room=self._room,
            pictures=self._pictures,
            metrics=self._metrics,
            on_lost=self._on_lost,
        )

    def _retire(self, serving: ServedModel) -> None:
        serving.is_retired = True
        self._retiring.add(serving)
        self._close_if_idle(serving)

    def _close_if_idle(self, serving: ServedModel) -> None:
        if serving.is_retired and not serving.calls:
            self._retiring.discard(serving)
            task = asyncio.ensure_future(self._end(serving))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _end(self, serving: ServedModel) -> None:
        name, sha256 = serving.info.name, serving.info.sha256
        await serving.close()
        del serving
        await asyncio.to_thread(free_memory)
        log.info("released model=%s sha256=%s", name, sha256)

    def _waiting_crops(self) -> float:
        return sum(one.batcher.waiting for one in (*self._serving.values(), *self._retiring))

    def _waiting_bytes(self) -> float:
        return sum(one.batcher.waiting_bytes for one in (*self._serving.values(), *self._retiring))

    def _tell_metrics(self) -> None:
        infos = [one.info for one in self._serving.values()]
        self._metrics.serves((info.name, info.sha256, str(info.branch)) for info in infos)


def _why(error: MalError | OSError) -> str:
    """Reason of a refusal."""
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (WrongKey, "WRONG_KEY"),
        (Truncated, "TRUNCATED"),
        (Altered, "ALTERED"),
        (UnknownLayout, "UNKNOWN_LAYOUT"),
        (CheckpointError, "CHECKPOINT"),
        (ConfigError, "SETTINGS"),
        (OutOfDeviceMemory, "OUT_OF_MEMORY"),
        (SelfTestFailed, "SELF_TEST_FAILED"),
        (OSError, "CHECKPOINT"),
    )
    return next((reason for kind, reason in reasons if isinstance(error, kind)), "NOT_LOADED")
