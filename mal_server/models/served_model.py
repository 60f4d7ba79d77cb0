"""One model at work: its batcher, its workers and its pipeline, from what was loaded to the end of its threads.

Which models there are, and which of them answers, is decided in `models`.
"""

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
from mal_train.kernel.labeler.labeler import Crop, Prediction, PredictOptions

OnLost = Callable[[DeviceLost], Awaitable[None]]


class ServedModel:
    """A model that answers, or that finishes what it has.

    Attributes:
        info: what it is.
        pipeline: from a job to its labels.
        pool: threads for CPU work.
        calls: how many hold it.
        is_retired: new calls get another one, or none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: ServerConfig,
        *,
        pool: PriorityThreadPool,
        room: MemoryLimiter,
        pictures: ImageStore,
        metrics: Metrics,
        on_lost: OnLost,
    ) -> None:
        self.info = loaded.info
        self.pool = pool
        self.calls = 0
        self.is_retired = False
        self._on_lost = on_lost
        self._workers = loaded.workers
        self.batcher: CropBatcher = Batcher(
            [partial(self._run, worker) for worker in loaded.workers],
            max_batch_size=config.max_batch_size,
            max_delay_s=config.max_queue_delay_ms / 1000,
            max_waiting=config.max_queue_crops,
            max_bytes=config.max_queue_bytes,
            batch_aging_s=config.batch_aging_s,
            observer=metrics,
        )
        self.pipeline = Pipeline(
            loaded.workers[0].predictor,
            self.batcher,
            pool,
            pictures,
            config.limits.images(),
            memory_limiter=room,
            crop_size=loaded.info.labeler.crop_size,
            metrics=metrics,
        )

    async def close(self) -> None:
        """Waits for running batches and ends the workers' threads."""
        await self.batcher.idle()
        for worker in self._workers:
            worker.close()

    async def _run(
        self, worker: Worker, options: PredictOptions, crops: Sequence[Crop]
    ) -> list[Prediction | Exception]:
        """A batcher's runner."""
        try:
            return await worker.run(options, crops)
        except DeviceLost as error:
            await self._on_lost(error)
            raise
