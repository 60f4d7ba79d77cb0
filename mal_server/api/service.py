"""The RPCs. Each method reads the request, calls the domain, and writes the response.

    LabelImage     read_label_request → pipeline.label        → write_response, one for each finished batch
    LabelImages    for each item: the same, collected         → write_item, or write_item_error
    Evaluate       read_ground_truths or a data set on disk   → EvaluationRun.label, .count → progress, then a result
    ModelService   read_load, read_unload                     → ModelRegistry → write_…

Exceptions leave these methods as they are; the interceptor turns them into statuses (`serialization.status`).
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from mal.v1 import evaluation_pb2, evaluation_pb2_grpc, labeling_pb2, labeling_pb2_grpc, model_pb2, model_pb2_grpc

from mal_server.api.serialization import evaluation_messages, labeling_messages, model_messages
from mal_server.api.serialization.status import reason_of, status_of
from mal_server.api.streaming import bounded_map, contextless, each, each_within
from mal_server.config.model_config import ModelPlan
from mal_server.config.server import ServerConfig
from mal_server.errors import NoSuchFile, RefusedItem, ResponseTooLarge
from mal_server.evaluation.dataset_reader import Dataset, memory_of, read_dataset
from mal_server.evaluation.resume_tokens import ResumeTokens
from mal_server.evaluation.run import EvaluationRun, UnreadImage
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.inference.requests import LabelRequest, PartialResult
from mal_server.models.pinned_models import PinnedModels
from mal_server.models.registry import ModelRegistry
from mal_server.models.served_model import ServedModel
from mal_server.ops.metrics import Metrics
from mal_server.scheduling.background import run_in_thread, when_done
from mal_server.scheduling.memory_quota import MemoryQuota, Reservation
from mal_server.scheduling.priority import Priority
from mal_server.security.caller import current_caller
from mal_train.core.errors import DeviceLost
from mal_train.core.settings import RowRules

MAX_NUMBERS_IN_LOOP = 20_000
"""Numbers of a response up to which it is written in the event loop, in two milliseconds; see `size_of`."""


class LabelingService(labeling_pb2_grpc.LabelingServiceServicer):
    """Labels the objects inside boxes."""

    def __init__(self, models: ModelRegistry, config: ServerConfig, metrics: Metrics) -> None:
        self._models = models
        self._limits = config.limits
        self._idle_s = config.connections.stream_idle_s
        self._metrics = metrics

    async def LabelImage(  # type: ignore[override] # encoded responses, see `interceptors`
        self, request: labeling_pb2.LabelImageRequest, context: Any
    ) -> AsyncGenerator[bytes, None]:
        """Labels the boxes of one image; sends a message for each device batch that held crops of the request.

        Limits: `max_boxes` boxes; the limits of images in `Limits`.

        Errors: INVALID_ARGUMENT for a field or an image, NOT_FOUND for a model or an image that the request names,
        UNAVAILABLE with RetryInfo while the server is loading or the queue is full, DEADLINE_EXCEEDED. An error of one
        box (BAD_BOX, BAD_POINT, OUT_OF_MEMORY) is the status of its result.
        """
        with PinnedModels(self._models) as models:
            model = models.get(request.options.model)
            defaults = _call_defaults(model, Priority.INTERACTIVE, context)
            label_request = labeling_messages.read_label_request(request, self._limits, defaults)
            model_ref = labeling_messages.write_model_ref(model.info, label_request.predict_options.branch)
            async with aclosing(model.pipeline.label(label_request)) as partial_results:
                async for partial_result in partial_results:
                    write = partial(labeling_messages.write_response, partial_result, model_ref)
                    yield await _written(write, partial_result, model, label_request)

    async def LabelImages(  # type: ignore[override] # as above
        self, request_iterator: AsyncIterator[labeling_pb2.LabelImagesRequest], context: Any
    ) -> AsyncGenerator[bytes, None]:
        """Labels a stream of images; sends one message for each item, in the order in which they finish.

        Limits: `max_items_in_flight` unanswered items, after which the server stops reading; `max_response_bytes` for
        one item, above which its reason is RESPONSE_TOO_LARGE.

        Errors: UNAVAILABLE while the server is loading, when a device is lost, or when the stream is idle for
        `stream_idle_s`. Any other error of one item is the status of that item, and the stream continues.
        """
        self._models.check_ready()
        with PinnedModels(self._models) as models:
            label_item = partial(self._label_item, models, context)
            responses = bounded_map(request_iterator, label_item, self._limits.max_items_in_flight, idle_s=self._idle_s)
            async with aclosing(responses):
                async for response in responses:
                    yield response

    @asynccontextmanager
    async def _label_item(
        self, models: PinnedModels, context: Any, item: labeling_pb2.LabelImagesRequest | RefusedItem
    ) -> AsyncIterator[bytes]:
        """Returns the encoded response to an item, whose memory is counted until the context ends."""
        async with AsyncExitStack() as stack:
            try:
                if isinstance(item, RefusedItem):
                    raise item
                labeling_messages.check_item(item)
                model = models.get(item.request.options.model)
                defaults = _call_defaults(model, Priority.BATCH, context)
                label_request = labeling_messages.read_label_request(item.request, self._limits, defaults, "request.")
                model_ref = labeling_messages.write_model_ref(model.info, label_request.predict_options.branch)
                result = await stack.enter_async_context(model.pipeline.labeled(label_request))
                write = partial(labeling_messages.write_item, item.item_id, result, model_ref)
                response = await _written(write, result, model, label_request)
                self._check_size(len(response))
            except DeviceLost:  # no later item can be labeled either
                raise
            # An error of one item must not end the stream: it becomes the status of that item.
            except Exception as error:
                problem = error.under("request.") if isinstance(error, ResponseTooLarge) else error
                self._metrics.rejected(reason_of(problem))
                response = labeling_messages.write_item_error(item.item_id, status_of(problem))
            yield response

    def _check_size(self, size_bytes: int) -> None:
        limit = self._limits.max_response_bytes
        if size_bytes > limit:
            problem = f"the masks take {size_bytes} bytes; max_response_bytes is {limit}; send fewer boxes at a time"
            raise ResponseTooLarge([("instances", problem)])


class EvaluationService(evaluation_pb2_grpc.EvaluationServiceServicer):
    """Compares the masks of a served model with ground truth."""

    def __init__(self, models: ModelRegistry, config: ServerConfig, folders: AllowedDirs, resume_key: bytes) -> None:
        self._models = models
        self._limits = config.limits
        self._idle_s = config.connections.stream_idle_s
        self._folders = folders
        self._resume_key = resume_key
        self._memory = MemoryQuota(config.max_evaluation_bytes, "max_evaluation_bytes")
        # One data set is read at a time: threads of one interpreter are no faster together, and others need them too.
        self._reader = asyncio.Semaphore()

    async def Evaluate(
        self, request_iterator: AsyncIterator[evaluation_pb2.EvaluateRequest], context: Any
    ) -> AsyncGenerator[evaluation_pb2.EvaluateResponse, None]:
        """Labels images with ground truth; sends progress after each image, then one result.

        Limits: `max_items_in_flight` unanswered images; `max_evaluation_bytes` of memory for all evaluations together,
        and for each, above which its reason is CALL_TOO_LARGE.

        Errors: INVALID_ARGUMENT for the options or a message of the wrong type, NOT_FOUND for a model or a data set,
        FAILED_PRECONDITION (RESUME_TOKEN_STALE) for a resume token of another evaluation, UNAVAILABLE (LOADING,
        MEMORY_FULL) with RetryInfo. An image or an object that cannot be measured is counted in `skipped`.
        """
        self._models.check_ready()
        first = await anext(each_within(request_iterator, self._idle_s), evaluation_pb2.EvaluateRequest())
        with PinnedModels(self._models) as models, self._memory.reserve() as memory:
            model = models.get(first.options.label.model)
            defaults = _call_defaults(model, Priority.BATCH, context)
            options = evaluation_messages.read_evaluate_options(first, defaults)
            tokens = ResumeTokens(self._resume_key, model.info, options.predict, options.output)
            if options.resume_token:
                tokens.check(options.resume_token)
            options, images, rows = await self._images(options, request_iterator, memory)
            run = EvaluationRun(
                model.pipeline,
                model.pool,
                options.category_names,
                tokens,
                memory,
                caller=options.caller.name,
                federation=options.federation,
                left_out=options.left_out,
            )
            try:
                samples = bounded_map(
                    images, contextless(run.label), self._limits.max_items_in_flight, idle_s=self._idle_s, in_order=True
                )
                async with aclosing(samples):
                    async for sample in samples:
                        await run.count(sample)
                        record = await run.record_of(sample) if options.want_records else b""
                        if len(record) > self._limits.max_response_bytes // 2:
                            record = b""  # a resumed evaluation labels this image again
                        yield evaluation_messages.write_progress(run, options, record)
                model_ref = labeling_messages.write_model_ref(model.info, options.predict.branch)
                finished = await run.report(options.worst_count)
                # In a thread: with ten thousand categories and instances it takes a tenth of a second.
                write = partial(evaluation_messages.write_result, finished, run, options, model_ref)
                yield await run.run_in_pool(write)
            finally:
                freed = run.free(*rows)
                memory.hold_until(freed)
            # So that a client that was refused for want of memory finds it free when this call has ended. Not if the
            # call fails: then nothing more may be awaited.
            await asyncio.wrap_future(freed)

    async def _images(
        self,
        options: evaluation_messages.EvaluateOptions,
        requests: AsyncIterator[evaluation_pb2.EvaluateRequest],
        memory: Reservation,
    ) -> tuple[evaluation_messages.EvaluateOptions, AsyncIterator[UnreadImage], tuple[list[Any] | dict[Any, Any], ...]]:
        """Returns the images of the stream, or of a data set on the server with the options that it completes.

        The last value are the collections that hold the data set.
        """
        if options.dataset is None:
            return options, evaluation_messages.read_images(requests, options, self._limits), ()
        # Before the records are read: without memory for the data set they are not needed.
        while_read = await asyncio.to_thread(memory_of, self._folders, options.dataset[0])
        memory.grow(while_read)
        records = await evaluation_messages.read_records(each_within(requests, self._idle_s), options, memory.grow)
        await self._reader.acquire()
        # In a thread: parsing a file of a million rows takes seconds, during which other calls must be served.
        reading = run_in_thread(self._read_dataset, options.dataset, records, options.rules)
        memory.hold_until(reading)
        try:
            dataset, size_bytes = await asyncio.wrap_future(reading)
        finally:
            when_done(reading, self._reader.release)
        memory.adjust(size_bytes - while_read)
        max_boxes = self._limits.max_boxes
        is_whole = options.output.resolve_overlaps
        images = dataset.images(options.label_request, max_boxes, records, complete_images=is_whole)
        options = replace(
            options,
            category_names=dataset.category_names,
            images_total=len(dataset.head.images),
            federation=dataset.federation,
            left_out=dataset.left_out,
        )
        return options, each(images), (dataset.rows, dataset.head.images, records)

    def _read_dataset(
        self, names: tuple[str, str], records: Mapping[str, bytes], rules: RowRules
    ) -> tuple[Dataset, int]:
        dataset = read_dataset(self._folders, *names, rules)
        dataset.check_records(records)
        return dataset, dataset.memory


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Describes the served models and changes them."""

    def __init__(self, models: ModelRegistry, config: ServerConfig, version: str) -> None:
        self._models = models
        self._config = config
        self._version = version
        self._folders = {folder.name: folder for folder in config.model_folders}
        self._allowed_dirs = AllowedDirs({folder.name: folder.path for folder in config.model_folders}, "model_folders")

    async def GetServerInfo(
        self, request: model_pb2.GetServerInfoRequest, context: Any
    ) -> model_pb2.GetServerInfoResponse:
        """Returns the served models, the limits of requests and the devices, also while the server drains.

        Errors: UNAVAILABLE (LOADING) until the first model is served.
        """
        return model_messages.write_server_info(self._models.infos(), self._config, self._version, current_caller.get())

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        """Returns every model in memory: those that serve, then those that drain.

        Errors: UNAVAILABLE (LOADING) until the first model is served.
        """
        self._models.check_ready()
        return model_messages.write_models(self._models.entries())

    async def LoadModel(self, request: model_pb2.LoadModelRequest, context: Any) -> model_pb2.LoadModelResponse:
        """Loads a checkpoint, warms it up and verifies it, then serves it; on failure the served models stay.

        Limits: one load at a time; three more wait. At most two replaced models may still be in use.

        Errors: UNAVAILABLE (TOO_MANY_LOADS) above these limits, INVALID_ARGUMENT for a name or path, NOT_FOUND
        (MODEL_NOT_FOUND, FOLDER_NOT_FOUND, CHECKPOINT_NOT_FOUND), FAILED_PRECONDITION with the reason why the
        checkpoint was rejected.
        """
        plan = await asyncio.to_thread(self._plan, request)
        return model_messages.write_loaded(*await self._models.load(plan))

    async def UnloadModel(self, request: model_pb2.UnloadModelRequest, context: Any) -> model_pb2.UnloadModelResponse:
        """Stops serving a model; its memory is freed after its last call.

        Errors: INVALID_ARGUMENT for the name, NOT_FOUND (MODEL_NOT_FOUND), FAILED_PRECONDITION (MODEL_IS_DEFAULT).
        """
        return model_messages.write_unloaded(await self._models.unload(model_messages.read_unload(request)))

    def _plan(self, request: model_pb2.LoadModelRequest) -> ModelPlan:
        branch = model_messages.read_load(request)
        if not request.folder:
            configured = self._models.plan(request.name)
            return replace(configured, branch=branch or configured.branch)
        try:
            path = self._allowed_dirs.path(request.folder, request.path)
        except NoSuchFile as error:
            reason = "CHECKPOINT_NOT_FOUND" if error.reason == "FILE_NOT_FOUND" else error.reason
            raise NoSuchFile(str(error), reason) from None
        return self._config.plan_from(self._folders[request.folder], path, request.name, branch)


async def _written(
    write: Callable[[], bytes], result: PartialResult, model: ServedModel, request: LabelRequest
) -> bytes:
    """Returns the message that `write` encodes; in a thread if that takes long: the event loop serves all calls."""
    if labeling_messages.size_of(result) <= MAX_NUMBERS_IN_LOOP:
        return write()
    return await model.pool.run(request.priority, write, caller=request.caller)


def _call_defaults(model: ServedModel, priority: Priority, context: Any) -> labeling_messages.CallDefaults:
    left_s = context.time_remaining()
    deadline = math.inf if left_s is None else asyncio.get_running_loop().time() + left_s
    return labeling_messages.CallDefaults(
        model.info.branch, priority, deadline, model.info.branches, current_caller.get()
    )
