"""Messages between processes: every field survives a round trip, and errors keep their type."""

from dataclasses import replace
from pathlib import Path

import pytest

from mal_train.core.coco.annotations import Annotation, ImageInfo, Reason
from mal_train.core.errors import MalError, OutputError
from mal_train.core.images.files import ImageFindings, ImageFolder, Images, UrlImages
from mal_train.core.masks.flags import Flag
from mal_train.core.masks.points import Point
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Branch, Compat, LabelerConfig
from mal_train.core.storage.hosts import AllowedHosts
from mal_train.kernel.labeler.types import Label, PredictOptions
from mal_train.kernel.networks.network import ModelConfig
from mal_train.kernel.networks.quantization import Int8Calibration
from mal_train.offline.dataset_labeler import LabelFailure
from mal_train.offline.tta import TtaOptions
from mal_train.offline.worker_messages import (
    Result,
    WorkerJob,
    decode_job,
    decode_results,
    decode_rows,
    encode_error,
    encode_job,
    encode_results,
    encode_rows,
)

IMAGE = ImageInfo("a", "é.png", 20, None)
POINTS = (Point(0.1, 2.5, is_positive=True), Point(1e-7, 2.0, is_positive=False))
VALID = Annotation(7, "a", 1, (0.1, 2.0, 3.5, 1e-7), False, {}, points=POINTS)
INVALID = Annotation(None, "a", None, (0.0, 0.0, 0.0, 0.0), False, {}, "annotation 3: no box", Reason.BAD_BOX)
JOB = WorkerJob(
    model=ModelConfig("vit-micro/16", mask_scale_ratio=1.5),
    labeler=LabelerConfig(64, 0.3, (0.1, 0.2, 0.3), compat=Compat.TAO, calibration=((0.0, 0.1), (1.0, 0.9))),
    device="cuda:1",
    precision="bfloat16",
    network_engine="openvino",
    int8=Int8Calibration({"student.backbone.a": (-0.1, 1 / 3)}, 5),
    image_dir=ImageFolder(Path("images")),
    tta=TtaOptions(PredictOptions(Branch.MIXED, flip=True), (0.2, 0.6), True, True),
    batch_size=3,
    threads=2,
    torch_threads=5,
)


@pytest.mark.parametrize(
    "images",
    [
        ImageFolder(Path("images")),
        ImageFolder("s3://bucket/images"),
        UrlImages({"a.png": "https://host/a.png"}, AllowedHosts(frozenset({"host"}), any_public=True)),
    ],
)
def test_a_job_survives_a_round_trip(images: Images) -> None:
    job = replace(JOB, image_dir=images)
    assert decode_job(encode_job(job)) == job


def test_rows_survive_a_round_trip() -> None:
    rows = [(IMAGE, [VALID, INVALID]), (ImageInfo(2, "", None, None, "no file name"), [])]
    assert decode_rows(encode_rows(rows)) == rows
    assert decode_rows(encode_rows([])) == []


def test_crowds_and_raw_rows_are_not_sent() -> None:
    crowd = Annotation(8, "a", 1, (0.0, 0.0, 5.0, 5.0), True, {})
    with_raw = replace(VALID, raw={"secret": 1})
    assert decode_rows(encode_rows([(IMAGE, [with_raw, crowd])])) == [(IMAGE, [VALID])]


@pytest.mark.parametrize(
    "result",
    [
        (7, Label(Rle(2, 3, b"13"), 0.1 + 0.2, 5, (0.0, 1.0, 2.0, 3.0), 0.7, (Flag.TOO_SMALL, Flag.MULTI_PART))),
        ("a", Label(Rle(2, 3, b"6"), 0.0, 0, None, None, ())),
        (None, LabelFailure("BAD_BOX", "annotation 3: no box")),
    ],
)
def test_a_result_survives_a_round_trip(result: Result) -> None:
    findings = ImageFindings(respelled={"A.png": "a.png"}, stretched=["b.tif"], dropped=[])
    assert decode_results(encode_results([result, result], findings)) == ([result, result], findings)


@pytest.mark.parametrize("error", [OutputError("disk full"), MalError("unknown")])
def test_an_error_is_raised_with_its_type_and_message(error: MalError) -> None:
    with pytest.raises(type(error), match=str(error)) as raised:
        decode_results(encode_error(error))
    assert type(raised.value) is type(error)
