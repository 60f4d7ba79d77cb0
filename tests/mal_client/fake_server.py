"""Fake server in the test process: answers with box-filled masks, and fails as configured."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from mal.v1 import (
    evaluation_pb2,
    evaluation_pb2_grpc,
    labeling_pb2,
    labeling_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    types_pb2,
)

from deploy.demo.baselines import box_filled
from mal_train.core.errors import BadBox, BadImage
from mal_train.core.images.decoder import decode_image
from mal_train.core.masks import geometry, rle

SHA = "ab" * 32
MAX_MESSAGE = 64 * 1024 * 1024
UNAVAILABLE_TEXT = "configured to be unavailable"
BREAK_TEXT = "configured to break"


@dataclass
class Faults:
    """Faults to inject. Counters count down to 0, which means none."""

    unavailable: int = 0
    """Calls that are refused before a request is read."""
    pushback_ms: int | None = None
    """Retry pushback of these refusals."""
    break_after: int = -1
    """Responses after which a stream fails, once for each of `breaks`."""
    breaks: int = 0
    break_code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    batch: int = 0
    """Boxes in each message of LabelImage; 0 = all in one."""
    retry_boxes: dict[int, int] = field(default_factory=dict)
    """Number of responses with RetryInfo by instance id."""
    retry_items: dict[str, int] = field(default_factory=dict)
    """Number of responses with RetryInfo by item id."""
    bad_boxes: set[int] = field(default_factory=set)
    """Instance ids that fail with BAD_BOX."""
    delay_s: float = 0.0
    hold_after: int = -1
    """Responses of a call after which it waits for `released`."""
    reverse: bool = False
    """Answer the last of the waiting items first (use it with delay_s), and the last box first."""
    leave_out: set[int] = field(default_factory=set)
    """Instance ids without a result."""
    shas: list[str] = field(default_factory=list)
    """Checkpoints of the next items, before `SHA`."""
    kill_after: int = -1
    """Bulk responses, over all streams, after which every call fails."""


@dataclass
class Limits:
    """Limits and properties in the response of GetServerInfo."""

    max_boxes: int = 100
    max_image_bytes: int = 32 * 1024 * 1024
    max_items_in_flight: int = 4
    boxes_per_response: int = 10**6
    """Larger items fail with RESPONSE_TOO_LARGE."""
    max_points: int = 64
    """Points of one box; 0 as a server that ignores them."""
    precision: str = "float32"
    is_0_1_0: bool = False
    """Fail as a server of version 0.1.0: no reason for a large item, and the number of a box in its message."""
    branches: Sequence[types_pb2.Branch.ValueType] = ()
    """Branches of the model; () as an older server, which does not report them."""


class FakeServer(
    labeling_pb2_grpc.LabelingServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    evaluation_pb2_grpc.EvaluationServiceServicer,
):
    """Answers every box with itself as its mask; records the requests."""

    def __init__(self, faults: Faults | None = None, limits: Limits | None = None) -> None:
        self.faults = faults or Faults()
        self.limits = limits or Limits()
        self.calls: list[str] = []
        self.label_requests: list[labeling_pb2.LabelImageRequest] = []
        self.item_ids: list[str] = []
        """Ids of answered items."""
        self.received: list[str] = []
        """Ids of received items, answered or not."""
        self.released = threading.Event()
        """Ends the wait of `Faults.hold_after`; set at the end of `serving`, too."""
        self.max_in_flight = 0
        self.evaluated: list[evaluation_pb2.EvaluateImage] = []
        self.evaluate_options: evaluation_pb2.EvaluateOptions | None = None
        self._answered_items = 0
        self._lock = threading.Lock()

    def GetServerInfo(self, request: model_pb2.GetServerInfoRequest, context: Any) -> model_pb2.GetServerInfoResponse:
        """Returns the description of the fake."""
        self.calls.append("GetServerInfo")
        return model_pb2.GetServerInfoResponse(
            version="1.2.3",
            model=model_pb2.ModelInfo(
                ref=_model(),
                arch="box-filler",
                crop_size=64,
                margin_rate=0.6,
                mask_thresholds=model_pb2.SizeThresholds(small=0.1, medium=0.2, large=0.3),
                categories=[types_pb2.Category(category_id=1, name="cup")],
                branches=self.limits.branches,
            ),
            limits=model_pb2.ServerLimits(
                max_request_bytes=MAX_MESSAGE,
                max_response_bytes=MAX_MESSAGE,
                max_boxes=self.limits.max_boxes,
                max_pixels=64_000_000,
                max_side=16_384,
                max_image_bytes=self.limits.max_image_bytes,
                max_items_in_flight=self.limits.max_items_in_flight,
                max_points=self.limits.max_points,
            ),
            devices=["cpu"],
            precision=self.limits.precision,
        )

    def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        """Is not implemented."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        raise AssertionError("abort returned")

    def LoadModel(self, request: model_pb2.LoadModelRequest, context: Any) -> model_pb2.LoadModelResponse:
        """Is not implemented."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        raise AssertionError("abort returned")

    def UnloadModel(self, request: model_pb2.UnloadModelRequest, context: Any) -> model_pb2.UnloadModelResponse:
        """Is not implemented."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        raise AssertionError("abort returned")

    def LabelImage(
        self, request: labeling_pb2.LabelImageRequest, context: Any
    ) -> Iterator[labeling_pb2.LabelImageResponse]:
        """Streams results in batches of `Faults.batch` boxes."""
        self.calls.append("LabelImage")
        self._refuse_if_configured(context)
        self.label_requests.append(request)
        time.sleep(self.faults.delay_s)
        try:
            results = self._results(request)
        except BadImage as error:
            _abort(context, _status(code_pb2.INVALID_ARGUMENT, str(error), error.reason))
        if self.faults.reverse:
            results.reverse()
        size = self.faults.batch or max(1, len(results))
        for sent, start in enumerate(range(0, len(results), size)):
            self._break_if_configured(context, sent)
            if not self._wait_for_release(context, sent):
                return
            yield labeling_pb2.LabelImageResponse(
                results=results[start : start + size],
                model=_model(request.options.branch),
                timing=types_pb2.Timing(batch_size=size),
            )

    def LabelImages(
        self, request_iterator: Iterator[labeling_pb2.LabelImagesRequest], context: Any
    ) -> Iterator[labeling_pb2.LabelImagesResponse]:
        """Reads as fast as possible, so that only the client's window limits the items in flight."""
        self.calls.append("LabelImages")
        self._refuse_if_configured(context)
        waiting: queue.Queue[labeling_pb2.LabelImagesRequest | None]
        waiting = queue.LifoQueue() if self.faults.reverse else queue.Queue()
        reader = threading.Thread(target=self._drain, args=(request_iterator, waiting), daemon=True)
        reader.start()
        yield from self._responses(waiting, context)

    def Evaluate(
        self, request_iterator: Iterator[evaluation_pb2.EvaluateRequest], context: Any
    ) -> Iterator[evaluation_pb2.EvaluateResponse]:
        """Evaluates each instance by the IoU of its box with its mask."""
        self.calls.append("Evaluate")
        self._refuse_if_configured(context)
        self.evaluated = []
        measured: list[evaluation_pb2.InstanceIou] = []
        skipped = images_done = 0
        image_id = ""
        for number, request in enumerate(request_iterator):
            if number == 0:
                self.evaluate_options = request.options
                continue
            self._break_if_configured(context, number - 1)
            if not request.image.continues:
                images_done, image_id = images_done + 1, request.image.item_id
            self.evaluated.append(request.image)
            for truth in request.image.ground_truth:
                if truth.is_crowd:
                    skipped += 1
                    continue
                mask = rle.Rle(truth.mask.height, truth.mask.width, truth.mask.counts)
                iou = rle.iou(mask, box_filled(_xywh(truth.instance.box), (mask.height, mask.width)))
                measured.append(
                    evaluation_pb2.InstanceIou(
                        item_id=image_id, instance_id=truth.instance.instance_id, iou=iou, score=0.9
                    )
                )
            yield evaluation_pb2.EvaluateResponse(
                progress=evaluation_pb2.EvaluateProgress(images_done=images_done, instances_done=len(measured))
            )
        measured.sort(key=lambda row: row.iou)
        mean = sum(row.iou for row in measured) / max(1, len(measured))
        count = self.evaluate_options.worst_count if self.evaluate_options else 0
        yield evaluation_pb2.EvaluateResponse(
            result=evaluation_pb2.EvaluateResult(
                images=len(self.evaluated),
                overall=evaluation_pb2.GroupMiou(instances=len(measured), miou=mean),
                ap_at_one=evaluation_pb2.CocoFigures(ap=0.25),
                score=evaluation_pb2.ScoreQuality(mean_score=0.9, bias=0.9 - mean),
                skipped=[evaluation_pb2.SkippedCount(reason="CROWD", instances=skipped)] if skipped else [],
                worst=measured[:count],
                model=_model(),
            )
        )

    def _responses(
        self, waiting: queue.Queue[labeling_pb2.LabelImagesRequest | None], context: Any
    ) -> Iterator[labeling_pb2.LabelImagesResponse]:
        sent = 0
        time.sleep(self.faults.delay_s)
        while (item := waiting.get()) is not None:
            time.sleep(self.faults.delay_s)
            if not self._wait_for_release(context, sent):
                return
            self.max_in_flight = max(self.max_in_flight, waiting.qsize() + 1)
            self._break_if_configured(context, sent)
            self.item_ids.append(item.item_id)
            self.label_requests.append(item.request)
            yield self._item(item)
            sent += 1
            self._answered_items += 1
            if self._answered_items == self.faults.kill_after:
                self.faults.unavailable = 10**6
                _abort(context, _status(code_pb2.UNAVAILABLE, "the server is killed"))

    def _item(self, item: labeling_pb2.LabelImagesRequest) -> labeling_pb2.LabelImagesResponse:
        if self._count_down(self.faults.retry_items, item.item_id):
            return labeling_pb2.LabelImagesResponse(item_id=item.item_id, status=_retry_status())
        if len(item.request.instances) > self.limits.boxes_per_response:
            status = self._too_large()
            return labeling_pb2.LabelImagesResponse(item_id=item.item_id, status=status)
        try:
            results = self._results(item.request)
        except BadImage as error:
            status = _status(code_pb2.INVALID_ARGUMENT, str(error), error.reason)
            return labeling_pb2.LabelImagesResponse(item_id=item.item_id, status=status)
        model = _model(item.request.options.branch)
        if self.faults.shas:
            model.checkpoint_sha256 = self.faults.shas.pop(0)
        return labeling_pb2.LabelImagesResponse(
            item_id=item.item_id, response=labeling_pb2.LabelImageResponse(results=results, model=model)
        )

    def _too_large(self) -> status_pb2.Status:
        if not self.limits.is_0_1_0:
            return _status(code_pb2.INVALID_ARGUMENT, "request.instances: too many masks", "RESPONSE_TOO_LARGE")
        text = "the masks of this item take 9 bytes and max_response_bytes is 8; use LabelImage for it"
        status = _status(code_pb2.INVALID_ARGUMENT, f"request.instances: {text}")
        violation = error_details_pb2.BadRequest.FieldViolation(field="request.instances", description=text)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        return status

    def _results(self, request: labeling_pb2.LabelImageRequest) -> list[types_pb2.InstanceResult]:
        expected = (request.image.expected_width, request.image.expected_height)
        image = decode_image(request.image.content, expected_wh=expected if all(expected) else None)
        results = [self._result(instance, image.shape[:2]) for instance in request.instances]
        return [result for result in results if result.instance_id not in self.faults.leave_out]

    def _result(self, instance: types_pb2.Instance, image_hw: tuple[int, int]) -> types_pb2.InstanceResult:
        key = instance.instance_id
        if self._count_down(self.faults.retry_boxes, key):
            return types_pb2.InstanceResult(instance_id=key, status=_retry_status())
        try:
            geometry.check_box(_xywh(instance.box), image_hw)
            if key in self.faults.bad_boxes:
                raise BadBox("configured to fail")
        except BadBox as error:
            number = f"box {key}: " if self.limits.is_0_1_0 else ""
            status = _status(code_pb2.INVALID_ARGUMENT, f"{number}{error.problem}", "BAD_BOX")
            return types_pb2.InstanceResult(instance_id=key, status=status)
        mask = box_filled(_xywh(instance.box), image_hw)
        x, y, w, h = rle.to_box(mask) or (0.0, 0.0, 0.0, 0.0)
        return types_pb2.InstanceResult(
            instance_id=key,
            masks=[
                types_pb2.Mask(coco_rle=types_pb2.CocoRle(height=mask.height, width=mask.width, counts=mask.counts))
            ],
            score=0.75,
            agreement=0.5,
            area_px=rle.area(mask),
            mask_box=types_pb2.Box(x=x, y=y, width=w, height=h),
            flags=[types_pb2.MASK_FLAG_FULL_BOX],
        )

    def _refuse_if_configured(self, context: Any) -> None:
        with self._lock:
            is_refused = self.faults.unavailable > 0
            self.faults.unavailable -= is_refused
        if is_refused:
            trailers = []
            if self.faults.pushback_ms is not None:
                trailers = [("grpc-retry-pushback-ms", str(self.faults.pushback_ms))]
            context.set_trailing_metadata(tuple(trailers))
            context.abort(grpc.StatusCode.UNAVAILABLE, UNAVAILABLE_TEXT)

    def _wait_for_release(self, context: Any, answered: int) -> bool:
        """Waits for `released` if configured; returns whether the client is still connected."""
        if not 0 <= self.faults.hold_after <= answered:
            return True
        self.released.wait()
        return bool(context.is_active())

    def _break_if_configured(self, context: Any, answered: int) -> None:
        if self.faults.breaks > 0 and answered >= self.faults.break_after:
            self.faults.breaks -= 1
            context.abort(self.faults.break_code, BREAK_TEXT)

    def _drain(self, requests: Iterator[labeling_pb2.LabelImagesRequest], waiting: queue.Queue[Any]) -> None:
        try:
            for request in requests:
                waiting.put(request)
                self.received.append(request.item_id)
        except grpc.RpcError:
            # The stream has ended.
            pass
        waiting.put(None)

    def _count_down(self, counters: dict[Any, int], key: Any) -> bool:
        if counters.get(key, 0) <= 0:
            return False
        counters[key] -= 1
        return True


@contextmanager
def serving(server: FakeServer, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """Runs the fake, on a free port unless one is given; yields its address."""
    grpc_server = grpc.server(
        futures.ThreadPoolExecutor(8),
        options=[("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)],
    )
    labeling_pb2_grpc.add_LabelingServiceServicer_to_server(server, grpc_server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(server, grpc_server)
    evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server(server, grpc_server)
    port = grpc_server.add_insecure_port(f"{host}:{port}")
    grpc_server.start()
    try:
        yield f"{host}:{port}"
    finally:
        stopped = grpc_server.stop(None)
        server.released.set()
        stopped.wait()


@contextmanager
def once(condition: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Calls `act` in a thread as soon as the condition holds; never if it does not hold within the block."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if condition():
                act()
                return
            over.wait(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _model(branch: types_pb2.Branch | int = types_pb2.BRANCH_UNSPECIFIED) -> types_pb2.ModelRef:
    known = branch or types_pb2.BRANCH_STUDENT
    return types_pb2.ModelRef(name="fake", checkpoint_sha256=SHA, branch=known)  # type: ignore[arg-type]


def _xywh(box: types_pb2.Box) -> tuple[float, float, float, float]:
    return (box.x, box.y, box.width, box.height)


def _status(code: int, message: str, reason: str = "") -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=message)
    if reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="mal.v1"))
    return status


def _retry_status() -> status_pb2.Status:
    status = _status(code_pb2.UNAVAILABLE, "queue full", "QUEUE_FULL")
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(10)
    status.details.add().Pack(retry)
    return status


def _abort(context: Any, status: status_pb2.Status) -> NoReturn:
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    codes = {code.value[0]: code for code in grpc.StatusCode}
    context.abort(codes[status.code], status.message)
    raise AssertionError("abort returned")
