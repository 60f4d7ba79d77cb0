"""The RPCs, each a few lines: read the request (codec), follow the pipeline, write what comes out (codec)."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from mal.v1 import evaluation_pb2, evaluation_pb2_grpc, labeling_pb2, labeling_pb2_grpc, model_pb2, model_pb2_grpc

from mal_server.api.serialization import evaluation_messages, labeling_messages, model_messages
from mal_server.api.serialization.status import reason_of, status_of
from mal_server.config.limits import Limits
from mal_server.config.model_config import ModelPlan
from mal_server.config.server import ServerConfig
from mal_server.errors import NoSuchFile, ResponseTooLarge
from mal_server.evaluation.dataset_reader import memory_of, read_dataset
from mal_server.evaluation.resume_tokens import GroundTruth, ResumeTokens
from mal_server.evaluation.run import Evaluation
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.models.pinned import PinnedModels
from mal_server.models.registry import ModelRegistry
from mal_server.models.served_model import ServedModel
from mal_server.ops.metrics import Metrics
from mal_server.scheduling.background import run_in_thread
from mal_server.scheduling.memory_quota import MemoryQuota, Reservation
from mal_server.scheduling.priority import Priority
from mal_train.core.coco.annotations import JsonId
from mal_train.core.errors import DeviceLost

Request = TypeVar("Request")
Response = TypeVar("Response")


class LabelingService(labeling_pb2_grpc.LabelingServiceServicer):
    """Boxes in, masks out."""

    def __init__(self, models: ModelRegistry, limits: Limits, metrics: Metrics) -> None:
        self._models = models
        self._limits = limits
        self._metrics = metrics

    async def LabelImage(
        self, request: labeling_pb2.LabelImageRequest, context: Any
    ) -> AsyncGenerator[labeling_pb2.LabelImageResponse, None]:
        """One message for each finished batch of this request."""
        with PinnedModels(self._models) as leases:
            serving = leases.get(request.options.model)
            job = labeling_messages.read_job(request, self._limits, _call(serving, Priority.INTERACTIVE, context))
            model = labeling_messages.write_model_ref(serving.info, job.options.branch)
            async with aclosing(serving.pipeline.label(job)) as parts:
                async for part in parts:
                    yield labeling_messages.write_part(part, model)

    async def LabelImages(
        self, request_iterator: AsyncIterator[labeling_pb2.LabelImagesRequest], context: Any
    ) -> AsyncGenerator[labeling_pb2.LabelImagesResponse, None]:
        """One message for each item, in the order in which they finish."""
        self._models.check_ready()
        window = self._limits.max_items_in_flight
        with PinnedModels(self._models) as leases:
            answer = partial(self._item, leases, context)
            async with aclosing(bounded_map(request_iterator, answer, window)) as answers:
                async for found in answers:
                    yield found

    async def _item(
        self, leases: PinnedModels, context: Any, item: labeling_pb2.LabelImagesRequest
    ) -> labeling_pb2.LabelImagesResponse:
        try:
            checks = labeling_messages.Violations()
            labeling_messages.check_item_id(item.item_id, checks)
            checks.raise_if_any()
            serving = leases.get(item.request.options.model)
            call = _call(serving, Priority.BATCH, context)
            job = labeling_messages.read_job(item.request, self._limits, call, "request.")
            model = labeling_messages.write_model_ref(serving.info, job.options.branch)
            answer = labeling_messages.write_item(item.item_id, await serving.pipeline.label_whole(job), model)
            self._check_size(answer.ByteSize())
        except DeviceLost:  # nothing will be answered any more
            raise
        # An error of one item must not end the stream of the others: it becomes that item's status.
        except Exception as error:
            self._metrics.rejected(reason_of(error))
            return labeling_messages.write_item_error(item.item_id, status_of(error))
        return answer

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_response_bytes:
            limit = self._limits.max_response_bytes
            text = f"the masks of this item take {size} bytes and max_response_bytes is {limit}; use LabelImage for it"
            raise ResponseTooLarge([("request.instances", text)])


class EvaluationService(evaluation_pb2_grpc.EvaluationServiceServicer):
    """Holds a served model against ground truth."""

    def __init__(self, models: ModelRegistry, config: ServerConfig, folders: AllowedDirs, resume_key: bytes) -> None:
        self._models = models
        self._limits = config.limits
        self._folders = folders
        self._resume_key = resume_key
        self._memory = MemoryQuota(config.max_evaluation_bytes, "max_evaluation_bytes")

    async def Evaluate(
        self, request_iterator: AsyncIterator[evaluation_pb2.EvaluateRequest], context: Any
    ) -> AsyncGenerator[evaluation_pb2.EvaluateResponse, None]:
        """Progress after each image, then one result."""
        self._models.check_ready()
        first = await anext(request_iterator, evaluation_pb2.EvaluateRequest())
        with PinnedModels(self._models) as leases, self._memory.reserve() as memory:
            serving = leases.get(first.options.label.model)
            options = evaluation_messages.read_evaluate_options(first, _call(serving, Priority.BATCH, context))
            records = ResumeTokens(self._resume_key, serving.info, options.run, options.answer)
            if options.resume_token:
                records.check(options.resume_token)
            options, truths = await self._truths(options, request_iterator, memory)
            run = Evaluation(serving.pipeline, serving.pool, options.category_names, records, memory.grow)
            window = self._limits.max_items_in_flight
            async with aclosing(bounded_map(truths, run.label, window, in_order=True)) as outcomes:
                async for outcome in outcomes:
                    await run.count(outcome)
                    record = await run.record_of(outcome) if options.want_records else b""
                    if len(record) > self._limits.max_response_bytes // 2:
                        record = b""  # it is measured again instead
                    yield evaluation_messages.write_progress(run, options, record)
            model = labeling_messages.write_model_ref(serving.info, options.run.branch)
            report = run.report()
            memory.hold_until(report)
            yield evaluation_messages.write_result(await asyncio.wrap_future(report), run, options, model)

    async def _truths(
        self,
        options: evaluation_messages.EvaluateOptions,
        requests: AsyncIterator[evaluation_pb2.EvaluateRequest],
        memory: Reservation,
    ) -> tuple[evaluation_messages.EvaluateOptions, AsyncIterator[GroundTruth]]:
        """The images: those that follow, or those of a data set here, whose names and number the options then have."""
        if options.dataset is None:
            return options, evaluation_messages.read_truths(requests, options, self._limits)
        # Before the records: who has no room for the data set need not have sent them.
        memory.grow(await asyncio.to_thread(memory_of, self._folders, options.dataset[0]))
        records = await evaluation_messages.read_records(requests, options, memory.grow)
        # Both in a thread: a file of a million rows takes seconds, in which everybody else is to be answered.
        reading = run_in_thread(self._read_dataset, options, options.dataset, records)
        memory.hold_until(reading)
        names, truths = await asyncio.wrap_future(reading)
        return replace(options, category_names=names, images_total=len(truths)), _each(truths)

    def _read_dataset(
        self, options: evaluation_messages.EvaluateOptions, where: tuple[str, str], records: Mapping[str, bytes]
    ) -> tuple[Mapping[JsonId, str], list[GroundTruth]]:
        data = read_dataset(self._folders, *where)
        data.check_records(records)
        return data.category_names, list(data.truths(options.job, self._limits.max_boxes, records))


async def _each(truths: Sequence[GroundTruth]) -> AsyncGenerator[GroundTruth, None]:
    for truth in truths:
        yield truth


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Tells about the served models and changes them."""

    def __init__(self, models: ModelRegistry, config: ServerConfig, version: str) -> None:
        self._models = models
        self._config = config
        self._version = version
        self._folders = {folder.name: folder for folder in config.model_folders}
        self._roots = AllowedDirs({folder.name: folder.path for folder in config.model_folders}, "model_folders")

    async def GetServerInfo(
        self, request: model_pb2.GetServerInfoRequest, context: Any
    ) -> model_pb2.GetServerInfoResponse:
        """Models, limits, devices."""
        return model_messages.write_server_info(self._models.infos(), self._config, self._version)

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        """Every model in memory."""
        self._models.check_ready()
        return model_messages.write_models(self._models.entries())

    async def LoadModel(self, request: model_pb2.LoadModelRequest, context: Any) -> model_pb2.LoadModelResponse:
        """Loads beside what is served, then switches."""
        plan = await asyncio.to_thread(self._plan, request)
        return model_messages.write_loaded(*await self._models.load(plan))

    async def UnloadModel(self, request: model_pb2.UnloadModelRequest, context: Any) -> model_pb2.UnloadModelResponse:
        """Gives up a model that is not the default one."""
        return model_messages.write_unloaded(await self._models.unload(model_messages.read_unload(request)))

    def _plan(self, request: model_pb2.LoadModelRequest) -> ModelPlan:
        branch = model_messages.read_load(request)
        if not request.folder:
            known = self._models.plan(request.name)
            return replace(known, branch=branch or known.branch)
        try:
            path = self._roots.path(request.folder, request.path)
        except NoSuchFile as error:
            reason = "CHECKPOINT_NOT_FOUND" if error.reason == "FILE_NOT_FOUND" else error.reason
            raise NoSuchFile(str(error), reason) from None
        return self._config.plan_from(self._folders[request.folder], path, request.name, branch)


def _call(serving: ServedModel, priority: Priority, context: Any) -> labeling_messages.CallDefaults:
    left_s = context.time_remaining()
    deadline = math.inf if left_s is None else asyncio.get_running_loop().time() + left_s
    return labeling_messages.CallDefaults(serving.info.branch, priority, deadline, serving.info.branches)


async def bounded_map(
    requests: AsyncIterator[Request],
    answer: Callable[[Request], Coroutine[Any, Any, Response]],
    window: int,
    *,
    in_order: bool = False,
) -> AsyncGenerator[Response, None]:
    """Answers up to `window` requests at a time and reads no further ahead; yields as they finish, or in order.

    An error of `requests` or `answer` ends everything. Leaving early cancels what is running.
    """
    reading: asyncio.Task[Request | None] | None = None
    running: deque[asyncio.Task[Response]] = deque()
    is_over = False
    try:
        while running or not is_over:
            if not is_over and reading is None and len(running) < window:
                reading = asyncio.create_task(_next(requests))
            awaited = {running[0]} if in_order and running else set(running)
            await asyncio.wait(awaited | ({reading} if reading else set()), return_when=asyncio.FIRST_COMPLETED)
            if reading is not None and reading.done():
                request, reading = reading.result(), None
                if request is None:
                    is_over = True
                else:
                    running.append(asyncio.create_task(answer(request)))
            for task in awaited:
                if task.done():
                    running.remove(task)
                    yield task.result()
    finally:
        left: list[asyncio.Task[Any]] = [*running, *([reading] if reading else [])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def _next(requests: AsyncIterator[Request]) -> Request | None:
    return await anext(requests, None)
