"""One model in service: its workers, batcher and pipeline. The registry decides which models are served."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from mal_server.config.server import ServerConfig
from mal_server.inference.image_store import ImageStore
from mal_server.inference.pipeline import CropBatcher, Pipeline
from mal_server.inference.worker import Worker
from mal_server.models.loader import LoadedModel
from mal_server.ops.metrics import Metrics
from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.memory_limiter import MemoryLimiter
from mal_train.core.errors import DeviceLost
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions

OnLost = Callable[[DeviceLost], Awaitable[None]]


class ServedModel:
    """A model that serves calls, or finishes its last ones.

    Attributes:
        info: static facts about the model.
        batcher: groups crops of all calls into device batches.
        pipeline: turns a request into labels.
        pool: threads for CPU work.
        users: number of calls that hold the model.
        is_draining: no new call gets the model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: ServerConfig,
        *,
        pool: PriorityThreadPool,
        memory_limiter: MemoryLimiter,
        images: ImageStore,
        metrics: Metrics,
        on_lost: OnLost,
    ) -> None:
        self.info = loaded.info
        self.pool = pool
        self.users = 0
        self.is_draining = False
        self._on_lost = on_lost
        self._workers = loaded.workers
        self.batcher: CropBatcher = Batcher(
            [partial(self._run, worker) for worker in loaded.workers],
            max_batch_size=config.max_batch_size,
            max_delay_s=config.max_queue_delay_ms / 1000,
            max_waiting=config.max_queue_crops,
            max_bytes=config.max_queue_bytes,
            batch_share=config.batch_queue_share,
            caller_share=config.caller_queue_share,
            batch_aging_s=config.batch_aging_s,
            observer=metrics,
        )
        self.pipeline = Pipeline(
            loaded.workers[0].predictor,
            self.batcher,
            pool,
            images,
            config.limits.images(),
            memory_limiter=memory_limiter,
            crop_size=loaded.info.labeler.crop_size,
            max_result_bytes=config.limits.max_response_bytes,
            metrics=metrics,
        )

    async def close(self) -> None:
        """Waits for running batches and ends the workers' threads."""
        await self.batcher.wait_until_idle()
        for worker in self._workers:
            worker.close()

    async def _run(
        self, worker: Worker, options: PredictOptions, crops: Sequence[Crop]
    ) -> list[Prediction | Exception]:
        """Runs one batch on a worker, for the batcher."""
        try:
            return await worker.run(options, crops)
        except DeviceLost as error:
            await self._on_lost(error)
            raise
