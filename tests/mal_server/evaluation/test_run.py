"""The Evaluate call: the same metrics as an evaluator in this process, and every failure counted."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, cast

import grpc
import numpy as np
import pytest
from mal.v1 import evaluation_pb2, types_pb2
from numpy.typing import NDArray

from mal_server.evaluation.resume_tokens import GroundTruth, SampleResult
from mal_server.evaluation.run import EvaluationRun
from mal_train.core.coco.annotations import Annotation, JsonId
from mal_train.core.masks.rle import Rle, encode_mask
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.core.metrics.lvis import Federation
from mal_train.core.metrics.report import EvaluationReport
from mal_train.kernel.labeler.types import Label
from tests.mal_server.calls import collect, fields_of, status_details, until_sent
from tests.mal_server.fakes import BrightPredictor, encoded, serving

NAMES: dict[JsonId, str] = {3: "disc", 1: "square"}
Scene = tuple[NDArray[np.uint8], list[tuple[int, tuple[float, float, float, float], int, Rle]]]


def scene(seed: int) -> Scene:
    """An image and (id, box, class, true mask) of bright ellipses on noise; boxes are a little off."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 120, (90, 120, 3), dtype=np.uint8)
    y, x = np.mgrid[:90, :120]
    objects = []
    for index in range(3):
        a, b = rng.uniform(6, 18, 2)
        cx, cy = 20 + 40 * index, rng.uniform(25, 65)
        mask = ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1
        image[mask] = rng.integers(120, 255, (int(mask.sum()), 3))
        box = (cx - a - rng.uniform(0, 3), cy - b, 2 * a + 2, 2 * b + rng.uniform(0, 3))
        objects.append((10 * seed + index, box, 3 if index else 1, encode_mask(mask)))
    return image, objects


SCENES = [scene(seed) for seed in range(6)]


def rle_of(rle: Rle) -> types_pb2.CocoRle:
    return types_pb2.CocoRle(height=rle.height, width=rle.width, counts=rle.counts)


def truth_of(
    instance_id: int, box: Sequence[float], category_id: int, mask: Rle | None, is_crowd: bool = False
) -> evaluation_pb2.GroundTruth:
    x, y, w, h = box
    return evaluation_pb2.GroundTruth(
        instance=types_pb2.Instance(instance_id=instance_id, box=types_pb2.Box(x=x, y=y, width=w, height=h)),
        category_id=category_id,
        mask=None if mask is None else rle_of(mask),
        is_crowd=is_crowd,
    )


def message_of(
    name: str, content: bytes, truths: Iterable[evaluation_pb2.GroundTruth]
) -> evaluation_pb2.EvaluateRequest:
    image = types_pb2.ImageSource(content=content)
    return evaluation_pb2.EvaluateRequest(
        image=evaluation_pb2.EvaluateImage(item_id=name, image=image, ground_truth=truths)
    )


def options_of(**options: Any) -> evaluation_pb2.EvaluateRequest:
    categories = [types_pb2.Category(category_id=int(i), name=name) for i, name in NAMES.items()]
    return evaluation_pb2.EvaluateRequest(
        options=evaluation_pb2.EvaluateOptions(categories=categories, worst_count=4, **options)
    )


def scenes() -> list[evaluation_pb2.EvaluateRequest]:
    return [
        message_of(f"scene {i}", encoded(image), [truth_of(*row) for row in objects])
        for i, (image, objects) in enumerate(SCENES)
    ]


def evaluate(
    *messages: evaluation_pb2.EvaluateRequest, predictor: BrightPredictor | None = None, **settings: Any
) -> tuple[list[evaluation_pb2.EvaluateProgress], evaluation_pb2.EvaluateResult]:
    async def stream() -> AsyncIterator[evaluation_pb2.EvaluateRequest]:
        for message in messages:
            yield message

    async def work() -> list[evaluation_pb2.EvaluateResponse]:
        async with serving(predictor, **settings) as running:
            return await until_sent(lambda: collect(running.evaluation.Evaluate(stream())))

    *progress, last = asyncio.run(asyncio.wait_for(work(), 100))
    assert all(response.WhichOneof("message") == "progress" for response in progress)
    assert last.WhichOneof("message") == "result"
    return [response.progress for response in progress], last.result


def local_report() -> EvaluationReport:
    predictor, evaluator = BrightPredictor(), Evaluator(NAMES)
    for index, (image, objects) in enumerate(SCENES):
        labels = predictor.label(image, [box for _, box, _, _ in objects])
        for (instance_id, box, category_id, mask), label in zip(objects, labels, strict=True):
            assert isinstance(label, Label)
            raw = {"segmentation": mask.to_coco()}
            evaluator.add(Annotation(instance_id, index, category_id, box, False, raw), label.rle, label.score)
    return evaluator.report()


def test_the_metrics_equal_those_of_an_evaluator_in_this_process() -> None:
    _, result = evaluate(options_of(), *scenes())
    expected = local_report()
    assert expected.overall.miou is not None
    assert 0.3 < expected.overall.miou < 0.99
    assert result.overall.miou == expected.overall.miou
    assert (result.images, result.overall.instances, result.images_skipped) == (6, 18, 0)
    assert [result.small.instances, result.medium.instances, result.large.instances] == [
        group.count for group in expected.by_size.values()
    ]
    assert result.medium.HasField("miou") == (expected.by_size["medium"].miou is not None)
    assert result.class_miou == expected.class_miou
    assert (result.ap_at_one.ap, result.ap_at_one.ar_max100) == (expected.ap_at_1["AP"], expected.ap_at_1["ARmax100"])
    assert (result.ap_at_score.ap50, result.ap_at_score.ap75) == (
        expected.ap_at_score["AP50"],
        expected.ap_at_score["AP75"],
    )
    assert result.ap_at_one.HasField("ap_large") == (expected.ap_at_1["APl"] is not None)
    assert result.score.rank_correlation == expected.score.spearman
    assert result.score.calibration_error == expected.score.calibration_error
    assert [(row.category.category_id, row.category.name, row.miou) for row in result.categories] == [
        (row.category_id, row.name, row.miou) for row in expected.categories
    ]
    assert [(row.item_id, row.instance_id, row.iou) for row in result.worst] == [
        (f"scene {row.image_id}", row.annotation_id, row.iou) for row in expected.worst[:4]
    ]
    assert result.model.name == "disc"


def test_progress_is_sent_after_each_image() -> None:
    progress, result = evaluate(options_of(images_total=6), *scenes())
    assert [step.images_done for step in progress] == [1, 2, 3, 4, 5, 6]
    assert [step.images_total for step in progress] == [6] * 6
    assert progress[-1].instances_done == 18
    assert progress[-1].running_miou == pytest.approx(result.overall.miou)


def test_the_report_does_not_depend_on_the_order_in_which_images_finish() -> None:
    _, one = evaluate(options_of(), *scenes(), limits={"max_items_in_flight": 1})
    _, many = evaluate(options_of(), *scenes(), max_batch_size=2, limits={"max_items_in_flight": 6})
    assert one == many


def test_every_failure_is_counted_by_its_reason_and_the_evaluation_continues() -> None:
    image, objects = SCENES[0]
    content, (first, second, third) = encoded(image), objects
    messages = [
        message_of("good", content, [truth_of(*first)]),
        message_of("no image", b"text", [truth_of(*first), truth_of(*second)]),
        message_of("good", content, [truth_of(*third)]),
        message_of(
            "bad box", content, [truth_of(5, (0, 0, -1, 5), 3, None), truth_of(*second), truth_of(5, *second[1:])]
        ),
        message_of("no mask", content, [truth_of(1, first[1], 3, None)]),
        message_of("bad mask", content, [truth_of(1, first[1], 3, Rle(90, 120, b"\xff\xff\xff"))]),
        message_of("empty mask", content, [truth_of(1, first[1], 3, encode_mask(np.zeros((90, 120))))]),
        message_of("crowd", content, [truth_of(1, (0, 0, 0, 0), 3, first[3], is_crowd=True), truth_of(*third)]),
        message_of("twice", content, [truth_of(*first), truth_of(*first)]),
        message_of("x" * 300, content, [truth_of(*first)]),
        message_of("empty", content, []),
    ]
    _, result = evaluate(options_of(), *messages)
    assert {row.reason: row.instances for row in result.skipped} == {
        "IMAGE_FORMAT": 2,
        "REPEATED": 3,
        "BAD_BOX": 1,
        "NO_GROUND_TRUTH": 1,
        "BAD_GROUND_TRUTH": 1,
        "EMPTY_GROUND_TRUTH": 1,
        "CROWD": 1,
        "REQUEST_REFUSED": 1,
    }
    assert (result.overall.instances, result.images, result.images_skipped) == (4, 8, 3)
    assert result.empty_ground_truth == 1
    assert {row.reason: row.message for row in result.skipped}["BAD_BOX"].startswith("annotation 5: ")


def continued(message: evaluation_pb2.EvaluateRequest) -> evaluation_pb2.EvaluateRequest:
    message.image.continues = True
    return message


def test_an_image_in_parts_is_measured_if_one_part_is() -> None:
    image, objects = SCENES[0]
    content = encoded(image)
    for first, second in ((content, b"text"), (b"text", content), (b"text", b"text")):
        messages = [
            message_of("image", first, [truth_of(*objects[0])]),
            continued(message_of("part", second, [truth_of(*objects[1])])),
        ]
        _, result = evaluate(options_of(), *messages)
        measured = (first, second).count(content)
        assert (result.images, result.images_skipped) == (int(measured > 0), int(not measured))
        assert (result.overall.instances, sum(row.instances for row in result.skipped)) == (measured, 2 - measured)


def test_the_first_message_of_a_reason_names_its_image() -> None:
    message = message_of("no image", b"text", [truth_of(*SCENES[0][1][0])])
    _, result = evaluate(options_of(), message)
    (skipped,) = result.skipped
    assert (skipped.reason, "no image" in skipped.message) == ("IMAGE_FORMAT", True)


def test_categories_that_are_not_exhaustive_add_up_over_the_parts_of_an_image() -> None:
    federation, unused = Federation(), cast(Any, None)
    run = EvaluationRun(unused, unused, NAMES, unused, unused, caller="anyone", federation=federation)
    for part, category in enumerate(NAMES):
        row = Annotation(part, 7, category, (1.0, 1.0, 5.0, 5.0), False, {})
        truth = GroundTruth(f"{part}", (row,), None, continues=part > 0, not_exhaustive=frozenset({category}))
        run._count(SampleResult(truth, {}, None))
    assert federation.not_exhaustive == {7: set(NAMES)}


def test_an_evaluation_without_images_has_a_result_without_metrics() -> None:
    _, result = evaluate(options_of())
    assert (result.images, result.overall.instances) == (0, 0)
    assert not result.overall.HasField("miou")
    assert not result.ap_at_one.HasField("ap")


def test_an_evaluation_waits_while_the_queue_is_full() -> None:
    predictor = BrightPredictor(wait_s=0.01)
    _, result = evaluate(
        options_of(), *scenes(), predictor=predictor, max_batch_size=1, max_queue_crops=6, limits={"max_boxes": 3}
    )
    assert (result.overall.instances, list(result.skipped)) == (18, [])


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "options"),
        (scenes()[:1], "options"),
        ([options_of(), options_of()], "image"),
        ([options_of(), evaluation_pb2.EvaluateRequest()], "image"),
        ([options_of(images_total=-1)], "options.images_total"),
        ([options_of(label=types_pb2.LabelOptions(threshold=7.0))], "options.label.threshold"),
    ],
)
def test_a_stream_that_breaks_the_contract_is_refused(
    messages: list[evaluation_pb2.EvaluateRequest], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        evaluate(*messages)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = status_details(raised.value)
    assert fields_of(details) == [field]
