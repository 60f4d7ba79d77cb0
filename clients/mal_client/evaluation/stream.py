"""One evaluation by a server, whatever it measures: the stream, what comes back on it, and when it is given up.

The server keeps nothing of an evaluation whose stream broke; it seals what it measured on each image and gives it to
this side, which brings it back in the next stream (`EvaluationRecords`). What is sent is decided in
`evaluation_sources`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
from mal.v1 import evaluation_pb2, evaluation_pb2_grpc

from mal_client.bulk.dispatcher import OnNotice, watchdog
from mal_client.dataset.run import OnProgress
from mal_client.errors import CallTimedOut, ServerError, from_rpc_error, is_disconnect, rpc_details
from mal_client.evaluation.checkpoint import EvaluationRecords
from mal_client.transport.base import Transport
from mal_client.transport.serialization import evaluation_messages, labeling_messages
from mal_client.types import Evaluation, LabelOptions, MeasuredInstance, Progress
from mal_train.core.coco.annotations import JsonId, Reason
from mal_train.core.metrics.report import CategoryRow
from mal_train.core.settings import SIZE_NAMES

STALE = "RESUME_TOKEN_STALE"

RESTART_PAUSE_S = 2.0

MAX_ATTEMPTS = 5
"""How many streams without a new image there may be before the evaluation is given up."""


class IdleTimeout:
    """How long nothing has moved in either direction."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since = time.monotonic()

    def heard(self) -> None:
        """Something moved."""
        self._since = time.monotonic()

    def is_over(self) -> bool:
        """It lasts too long."""
        return time.monotonic() - self._since > self._limit_s


class RetryBudget:
    """Whether another stream is tried after those that brought no new image.

    `MAX_ATTEMPTS` of them are enough. Those on which the server said when to come back do not count: it is alive, and
    they end by the clock, once such answers alone have come for `limit_s`.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._starts = 0
        self._asked_since: float | None = None

    def is_over(self, asked_s: float | None, *, has_new: bool) -> bool:
        """After a stream without a result. `asked_s`: the server's word; `has_new`: it brought an image."""
        if has_new:
            self._starts, self._asked_since = 0, None
        if asked_s is None:
            self._starts, self._asked_since = self._starts + 1, None
            return self._starts >= MAX_ATTEMPTS
        now = self._clock()
        self._asked_since = now if self._asked_since is None else self._asked_since
        return now - self._asked_since > self._limit_s


class EvaluationPass(ABC):
    """What local data sets and those on the server share: the stream, what comes back, and the records."""

    def __init__(self, options: LabelOptions, worst_count: int, records: EvaluationRecords) -> None:
        self.result: evaluation_pb2.EvaluateResult | None = None
        self.records = records
        self._options = options
        self._worst_count = worst_count
        self._images_total = 0
        self._before = dict(records.items())
        """What an earlier run measured, by image."""
        self._images_before = 0
        self._contents: dict[str, str] = {}
        """SHA-256 of each image's file that this side read."""
        self._skipped: Counter[str] = Counter()
        self._images_skipped = 0
        self._fault: Exception | None = None

    def stream(
        self, client: Transport, on_progress: OnProgress | None, on_notice: OnNotice | None, patience: RetryBudget
    ) -> float:
        """Runs one stream; when it brought no result, seconds to wait before another start.

        Raises:
            MalError: the failure is final, or patience is over.
        """
        known = len(self.records)
        silence = IdleTimeout(client.timeout_s)
        self._images_before = 0
        self._begin()
        stub = evaluation_pb2_grpc.EvaluationServiceStub(client.open_channel())
        stream = stub.Evaluate(self._requests(silence))
        try:
            with watchdog(silence.is_over, stream.cancel):
                for response in stream:
                    silence.heard()
                    self._take(response, on_progress)
        except grpc.RpcError as error:
            if self._fault is not None:
                raise self._fault from None
            if silence.is_over():
                raise CallTimedOut(
                    f"{client.address}: no sign of the evaluation for {client.timeout_s:g} s; look whether the server "
                    "is alive, or allow more time"
                ) from error
            if rpc_details(error).reason == STALE and self.records.token:
                if on_notice is not None:
                    on_notice(
                        f"{client.address}: does not take back what was measured before (its weights, its resume_key "
                        "or the options are others now): everything is measured anew"
                    )
                self.records.clear()
                return 0.0
            asked_s = rpc_details(error).retry_after_s
            if not is_disconnect(error) or patience.is_over(asked_s, has_new=len(self.records) > known):
                raise from_rpc_error(client.address, error, None) from error
            return asked_s or RESTART_PAUSE_S
        finally:
            stream.cancel()  # type: ignore[no-untyped-call]
        if self.result is None and patience.is_over(None, has_new=len(self.records) > known):
            raise ServerError(
                f"{client.address}: ended the evaluation {MAX_ATTEMPTS} times without a result; see its log"
            )
        return RESTART_PAUSE_S

    def evaluation(self, result: evaluation_pb2.EvaluateResult) -> Evaluation:
        """The server's figures, with the ids of the file and with what this side could not send."""
        return Evaluation(
            images=result.images,
            images_skipped=result.images_skipped + self._images_skipped,
            overall=evaluation_messages.group_miou(result.overall),
            by_size={name: evaluation_messages.group_miou(getattr(result, name)) for name in SIZE_NAMES},
            class_miou=result.class_miou if result.HasField("class_miou") else None,
            share_good=result.share_good if result.HasField("share_good") else None,
            empty_ground_truth=result.empty_ground_truth,
            ap_at_1=evaluation_messages.coco_figures(result.ap_at_one),
            ap_at_score=evaluation_messages.coco_figures(result.ap_at_score),
            score=evaluation_messages.score_quality(result.score),
            categories=tuple(map(self._category, result.categories)),
            skipped=self._all_skipped(result),
            worst=tuple(map(self._measured, result.worst)),
            model=labeling_messages.model_ref(result.model),
        )

    def _take(self, response: evaluation_pb2.EvaluateResponse, on_progress: OnProgress | None) -> None:
        if response.HasField("result"):
            self.result = response.result
            return
        progress = response.progress
        self._images_before += bool(progress.record) and self._before.get(progress.item_id) == progress.record
        self.records.add(
            progress.resume_token, progress.item_id, progress.record, self._contents.get(progress.item_id, "")
        )
        if on_progress is not None:
            on_progress(
                Progress(
                    images_done=progress.images_done + self._images_skipped,
                    images_total=self._images_total or progress.images_total,
                    boxes_done=progress.instances_done,
                    boxes_failed=self._skipped.total() - self._skipped[Reason.CROWD],
                    running_miou=progress.running_miou if progress.HasField("running_miou") else None,
                    images_before=self._images_before,
                )
            )

    @abstractmethod
    def _begin(self) -> None:
        """Before each stream."""

    @abstractmethod
    def _requests(self, silence: IdleTimeout) -> Iterator[evaluation_pb2.EvaluateRequest]:
        """What is sent on one stream, from its first message on."""

    def _all_skipped(self, result: evaluation_pb2.EvaluateResult) -> dict[str, int]:
        counts = Counter(self._skipped)
        counts.update({row.reason: row.instances for row in result.skipped})
        return dict(counts.most_common())

    def _category(self, row: evaluation_pb2.CategoryFigures) -> CategoryRow:
        return evaluation_messages.category_row(row, self._category_id(row.category.category_id))

    def _category_id(self, key: int) -> JsonId:
        return key

    @abstractmethod
    def _measured(self, row: evaluation_pb2.InstanceIou) -> MeasuredInstance:
        """A row of the result under the data set's own names."""
