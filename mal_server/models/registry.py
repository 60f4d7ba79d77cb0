"""Loads, replaces and unloads the models of a server. Knows nothing of gRPC or of requests.

    load    reads a checkpoint, puts it on its devices and verifies it, while the previous model keeps serving
    switch  one assignment: calls that acquire the model from now on get the new one
    drain   the previous model finishes its calls, then releases its memory

A call keeps each model that it has acquired until it ends (see `pinned`), so all its results come from one checkpoint.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from mal_server.config.model_config import ModelPlan
from mal_server.config.server import ServerConfig
from mal_server.errors import ModelRejected, NotReady, SelfTestFailed, TooManyLoads, UnknownModel
from mal_server.inference.allowed_dirs import shown, suggest
from mal_server.inference.image_store import ImageStore
from mal_server.models.loader import LoadedModel, ModelInfo, free_memory
from mal_server.models.served_model import OnLost, ServedModel
from mal_server.models.warmup import warm_up_and_verify
from mal_server.ops.logging import fields
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
    Untrusted,
    WrongKey,
)

log = logging.getLogger(__name__)

MAX_PENDING_CHANGES = 4
"""Loads and unloads that run or wait for their turn; further ones are refused."""

MAX_DRAINING = 2
"""Replaced and unloaded models that calls still use; with as many, a load is refused, as each keeps its memory."""

Load = Callable[[ModelPlan], LoadedModel]
OnChange = Callable[[str, bool], Awaitable[None]]
"""Called with the name of a model and whether it is served from now on."""


@dataclass(frozen=True)
class ModelEntry:
    """The state of a model in memory.

    Attributes:
        info: static facts about the model.
        users: number of calls that hold it.
        is_draining: no new call gets it.
        is_default: serves requests that name no model.
    """

    info: ModelInfo
    users: int
    is_draining: bool
    is_default: bool


class ModelRegistry:
    """The models of one server; used from one event loop.

    Args:
        config: queue, batch and model settings.
        load: loads a model; runs in a thread.
        pool: threads for CPU work.
        images: resolves image references of requests.
        metrics: counts.
        on_lost: called when a device is lost.
        on_change: called after a model was put into or taken out of service.

    Attributes:
        default: name of the model for requests that name none.
        lost: set once a device is lost; nothing is served from then on.
        pending_changes: loads and unloads that run or wait.
    """

    def __init__(
        self,
        config: ServerConfig,
        load: Load,
        *,
        pool: PriorityThreadPool,
        images: ImageStore,
        metrics: Metrics,
        on_lost: OnLost,
        on_change: OnChange,
    ) -> None:
        self._config = config
        self._load = load
        self._pool = pool
        self._memory_limiter = MemoryLimiter(config.max_decoded_bytes, batch_aging_s=config.batch_aging_s)
        self._images = images
        self._metrics = metrics
        self._on_lost = on_lost
        self._on_change = on_change
        self._plans = {plan.name: plan for plan in config.plans}
        self.default = config.plans[0].name
        self.lost: DeviceLost | None = None
        self._serving: dict[str, ServedModel] = {}
        self._draining: set[ServedModel] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_ready = False
        self._load_lock = asyncio.Lock()
        self.pending_changes = 0
        metrics.watch_queue(self._waiting_crops, self._held_bytes)

    async def start(self) -> None:
        """Loads the configured models; none is served before all are ready. Raises the errors of `load`."""
        for plan in self._config.plans:
            loaded = await run_in_daemon_thread(partial(self._load, plan))
            self._serving[plan.name] = self._build(loaded)
            await self._verify(loaded)
        self._is_ready = True
        self._update_metrics()
        for name in self._serving:
            await self._on_change(name, True)

    def check_ready(self) -> None:
        """Raises NotReady until `start` has finished, and DeviceLost once a device is lost."""
        if self.lost is not None:
            raise self.lost
        if not self._is_ready:
            raise NotReady("the models are still loading")

    def get(self, name: str = "") -> ServedModel:
        """Returns the model that new calls of a name get; "" is the default.

        Raises:
            NotReady, DeviceLost: see `check_ready`.
            UnknownModel: no model is served under this name.
        """
        self.check_ready()
        model = self._serving.get(name or self.default)
        if model is None:
            raise UnknownModel(f"model {shown(name)} is not served here{suggest(name, self._serving)}")
        return model

    def acquire(self, name: str) -> ServedModel:
        """Returns the model like `get` and keeps it in memory until `release`."""
        model = self.get(name)
        model.users += 1
        return model

    def release(self, model: ServedModel) -> None:
        """Ends one `acquire`; a draining model without users releases its memory."""
        model.users -= 1
        self._close_if_unused(model)

    def infos(self) -> list[ModelInfo]:
        """Returns every served model, the default first. Raises the errors of `check_ready`."""
        self.check_ready()
        return [entry.info for entry in self.entries() if not entry.is_draining]

    def entries(self) -> list[ModelEntry]:
        """Returns every model in memory: the default, the other served ones, then the draining ones."""
        served = sorted(self._serving.items(), key=lambda item: item[0] != self.default)
        return [
            *(
                ModelEntry(model.info, model.users, is_draining=False, is_default=name == self.default)
                for name, model in served
            ),
            *(ModelEntry(model.info, model.users, is_draining=True, is_default=False) for model in self._draining),
        ]

    def plan(self, name: str) -> ModelPlan:
        """Returns the plan that the settings define for a name. Raises UnknownModel."""
        plan = self._plans.get(name)
        if plan is None:
            raise UnknownModel(
                f"model {shown(name)}: the settings name no checkpoint for it{suggest(name, self._plans)}; give folder "
                "and path"
            )
        return plan

    async def load(self, plan: ModelPlan) -> tuple[ModelInfo, ModelInfo | None]:
        """Loads a checkpoint, verifies it and serves it under the plan's name; returns (new model, replaced model).

        Continues if its caller is cancelled.

        Raises:
            NotReady: the server itself is still loading.
            TooManyLoads: MAX_PENDING_CHANGES others wait, or MAX_DRAINING replaced models are still in use.
            ModelRejected: the model cannot be loaded or fails its self-test; the previous one stays in service.
            DeviceLost: a device failed for good during the self-test.
        """
        self.check_ready()
        return await asyncio.shield(asyncio.ensure_future(self._switch(plan)))

    async def unload(self, name: str) -> ModelInfo:
        """Takes a model out of service; it releases its memory when its last call ends.

        Raises:
            UnknownModel: no model is served under this name.
            ModelRejected: it is the default model.
            TooManyLoads: MAX_PENDING_CHANGES others wait.
        """
        async with self._change():
            model = self.get(name)
            if not name or name == self.default:
                raise ModelRejected(
                    f"model {model.info.name!r} is the default; it can be replaced, not unloaded", "MODEL_IS_DEFAULT"
                )
            del self._serving[name]
            self._update_metrics()
            # Before any await: if the caller is cancelled there, the model must still be listed and closed.
            self._drain(model)
            await self._on_change(name, False)
            log.info("unloaded", extra=fields(model=name, sha256=model.info.sha256))
            return model.info

    def fail_all(self, error: DeviceLost) -> None:
        """Fails all queued and all future work with the error, after a device was lost."""
        self.lost = error
        for model in self._in_memory():
            model.batcher.fail_all(error)

    @property
    def waiting(self) -> int:
        """Number of crops that wait for a device."""
        return int(self._waiting_crops())

    async def close(self) -> None:
        """Waits for running batches and ends all threads, at the end of the server."""
        await asyncio.gather(*self._closing)
        for model in self._in_memory():
            await model.close()

    async def _switch(self, plan: ModelPlan) -> tuple[ModelInfo, ModelInfo | None]:
        async with self._change():
            self.check_ready()
            if len(self._draining) >= MAX_DRAINING:
                raise TooManyLoads(
                    f"{len(self._draining)} replaced models are still in use; at most {MAX_DRAINING} may be; wait "
                    "until their calls end"
                )
            old = self._serving.get(plan.name)
            if old is None and len(self._serving) >= self._config.max_models:
                raise ModelRejected(
                    f"max_models: {len(self._serving)} of {self._config.max_models} models are served; unload or "
                    "replace one",
                    "TOO_MANY_MODELS",
                )
            new = await self._load_and_verify(plan)
            # The switch: no await between these lines, so every call gets either the old or the new model.
            self._serving[plan.name] = new
            self._update_metrics()
            if old is not None:
                self._drain(old)
            await self._on_change(plan.name, True)
            replaced = None if old is None else old.info
            sha256 = "-" if replaced is None else replaced.sha256
            log.info("loaded", extra=fields(model=plan.name, sha256=new.info.sha256, replaced=sha256))
            return new.info, replaced

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """A context of the only load or unload that runs. Raises TooManyLoads instead of a long wait."""
        self._check_pending()
        self.pending_changes += 1
        try:
            async with self._load_lock:
                yield
        finally:
            self.pending_changes -= 1

    def _check_pending(self) -> None:
        if self.pending_changes >= MAX_PENDING_CHANGES:
            raise TooManyLoads(f"{self.pending_changes} loads and unloads of models wait already; try again later")

    async def _load_and_verify(self, plan: ModelPlan) -> ServedModel:
        try:
            loaded = await run_in_daemon_thread(partial(self._load, plan))
            try:
                await self._verify(loaded)
            except BaseException:  # a rejected model, or a cancelled load, must leave no threads
                for worker in loaded.workers:
                    worker.close()
                raise
        except DeviceLost:
            raise
        except (MalError, OSError) as error:
            log.warning("not loaded", extra=fields(model=plan.name, error=error))
            asyncio.get_running_loop().run_in_executor(None, free_memory)
            raise ModelRejected(
                f"model {plan.name!r} was not loaded; served models are unchanged: {error}", _reason_of(error)
            ) from None
        return self._build(loaded)

    async def _verify(self, loaded: LoadedModel) -> None:
        try:
            await warm_up_and_verify(loaded)
        except DeviceLost as error:
            await self._on_lost(error)
            raise

    def _build(self, loaded: LoadedModel) -> ServedModel:
        return ServedModel(
            loaded,
            self._config,
            pool=self._pool,
            memory_limiter=self._memory_limiter,
            images=self._images,
            metrics=self._metrics,
            on_lost=self._on_lost,
        )

    def _drain(self, model: ServedModel) -> None:
        model.is_draining = True
        self._draining.add(model)
        self._close_if_unused(model)

    def _close_if_unused(self, model: ServedModel) -> None:
        if model.is_draining and not model.users:
            self._draining.discard(model)
            task = asyncio.ensure_future(self._close(model))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, model: ServedModel) -> None:
        name, sha256 = model.info.name, model.info.sha256
        await model.close()
        # The last reference, so that the memory can be freed.
        del model
        await asyncio.to_thread(free_memory)
        log.info("released", extra=fields(model=name, sha256=sha256))

    def _in_memory(self) -> tuple[ServedModel, ...]:
        return *self._serving.values(), *self._draining

    def _waiting_crops(self) -> float:
        return sum(model.batcher.waiting for model in self._in_memory())

    def _held_bytes(self) -> float:
        return sum(model.batcher.held_bytes for model in self._in_memory())

    def _update_metrics(self) -> None:
        infos = [model.info for model in self._serving.values()]
        self._metrics.set_models((info.name, info.sha256, str(info.branch)) for info in infos)


def _reason_of(error: MalError | OSError) -> str:
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (WrongKey, "WRONG_KEY"),
        (Truncated, "TRUNCATED"),
        (Altered, "ALTERED"),
        (Untrusted, "UNTRUSTED"),
        (UnknownLayout, "UNKNOWN_LAYOUT"),
        (CheckpointError, "CHECKPOINT"),
        (ConfigError, "SETTINGS"),
        (OutOfDeviceMemory, "OUT_OF_MEMORY"),
        (SelfTestFailed, "SELF_TEST_FAILED"),
        (OSError, "CHECKPOINT"),
    )
    return next((reason for error_type, reason in reasons if isinstance(error, error_type)), "NOT_LOADED")
