"""The library, `mal-train inference`, and server with client give identical masks, with each engine."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from mal_client.cli import main as client_cli

from deploy.demo.synthetic import SceneSettings, write_split
from mal_train import cli as train_cli
from mal_train.core.coco.annotations import by_image, read_coco
from mal_train.core.images.files import read_image
from mal_train.core.settings import Branch, LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Crop, Label, PredictOptions
from mal_train.kernel.networks.network import MalNetwork, normalize
from mal_train.kernel.networks.quantization import Int8Calibration, observed_ranges
from tests.networks import spread_network

pytestmark = pytest.mark.timeout(1200)  # the first test starts the server
READY_S = 600.0
NEEDS_OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
BIN = Path(sys.executable).parent


class Numerics(NamedTuple):
    """Engine and precision of a network, as the settings of library, inference and server name them."""

    network_engine: str
    precision: str


@pytest.fixture(
    scope="module",
    ids="-".join,
    params=[
        Numerics("torch", "float32"),
        pytest.param(Numerics("openvino", "float32"), marks=NEEDS_OPENVINO),
        pytest.param(Numerics("openvino", "int8"), marks=NEEDS_OPENVINO),
    ],
)
def numerics(request: pytest.FixtureRequest) -> Numerics:
    """The numerics that all sides use."""
    chosen: Numerics = request.param
    return chosen


@pytest.fixture(scope="module")
def folder(numerics: Numerics, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what is written with these numerics."""
    return tmp_path_factory.mktemp("-".join(numerics))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scenes with boxes of different sizes, and a checkpoint whose masks are neither empty nor full."""
    folder = tmp_path_factory.mktemp("same")
    write_split(folder, "scenes", 8, 3, masks=True, settings=SceneSettings())
    network, config = _network_with_real_masks(folder)
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    int8 = _calibration(network, config, folder)
    save_checkpoint(folder / "model.malckpt", Checkpoint(network.config, config, weights, [], int8=int8), None)
    return folder


def _calibration(network: MalNetwork, config: LabelerConfig, folder: Path) -> Int8Calibration:
    """Returns the ranges of both networks over the crops of all boxes."""
    labeler = Labeler(network, config, precision="float32")
    crops = [crop for crops in _crops(labeler, folder) for crop in crops]
    x = normalize(torch.from_numpy(np.stack([crop.pixels for crop in crops])))
    ranges: dict[str, tuple[float, float]] = {}
    for branch in (Branch.STUDENT, Branch.TEACHER):
        half = network.branch_network(branch)
        for size_class in range(3):
            with torch.no_grad(), observed_ranges(half) as seen:
                half(x, torch.full((len(x),), size_class))
            for name, (low, high) in seen.items():
                before = ranges.get(f"{branch}.{name}", (low, high))
                ranges[f"{branch}.{name}"] = (min(low, before[0]), max(high, before[1]))
    return Int8Calibration(ranges, len(crops))


def _crops(labeler: Labeler, folder: Path) -> Iterator[list[Crop]]:
    """Yields the crops of each image."""
    for image, annotations in by_image(read_coco(folder / "scenes.json")):
        pixels = read_image(folder / "scenes" / image.file_name)
        found = labeler.prepare(pixels, [a.box_xywh for a in annotations])
        yield [crop for crop in found if isinstance(crop, Crop)]


def _network_with_real_masks(folder: Path) -> tuple[MalNetwork, LabelerConfig]:
    """Returns the first of several random networks whose masks are rarely empty or the full box."""
    for seed in range(16):
        network = spread_network(seed)
        median = _median_probability(Labeler(network, LabelerConfig(crop_size=64), precision="float32"), folder)
        config = LabelerConfig(
            crop_size=64,
            mask_thres=(median, median, median),
            calibration=((0.0, 0.0), (0.55, 0.3), (0.7, 0.45), (1.0, 0.95)),
        )
        labels = [label for _, label in _labeled(Labeler(network, config, precision="float32"), folder)]
        if sum(bool(label.area) and "FULL_BOX" not in label.flags for label in labels) >= 0.95 * len(labels):
            return network, config
    pytest.fail("every random network has too many masks that are empty or the full box")


def _median_probability(labeler: Labeler, folder: Path) -> float:
    """Returns the median over all boxes of the median probability inside the box."""
    predictions = [one for crops in _crops(labeler, folder) for one in labeler.predict(crops)]
    return float(np.median([float(np.median(prediction.prob[16:48, 16:48])) for prediction in predictions]))


def _labeled(labeler: Labeler, folder: Path, options: PredictOptions | None = None) -> Iterator[tuple[int, Label]]:
    """Yields the annotation id and label of every box."""
    for image, annotations in by_image(read_coco(folder / "scenes.json")):
        pixels = read_image(folder / "scenes" / image.file_name)
        labels = labeler.label(pixels, [a.box_xywh for a in annotations], options or PredictOptions(), batch_size=3)
        for annotation, label in zip(annotations, labels, strict=True):
            assert isinstance(label, Label)
            yield int(str(annotation.id)), label


@pytest.fixture(scope="module")
def server(scenes: Path, folder: Path, numerics: Numerics) -> Iterator[str]:
    settings = {
        "checkpoint": str(scenes / "model.malckpt"),
        "gpu_ids": [],
        **numerics._asdict(),
        "drain_delay_s": 0.0,
        "max_batch_size": 6,
        "listen": {"port": 0},
    }
    (folder / "server.yaml").write_text(yaml.safe_dump(settings))
    port_file = folder / "port"
    command = [str(BIN / "mal-server"), "serve", "-c", str(folder / "server.yaml")]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([*command, "--port-file", str(port_file)], stdout=log, stderr=log)
        try:
            limit = time.monotonic() + READY_S
            while not port_file.exists():
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < limit, "the server was not ready in time"
                time.sleep(0.05)
            yield port_file.read_text().strip()
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=600) == 0


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["annotations"]
    return rows


def by_the_library(scenes: Path, numerics: Numerics, options: PredictOptions | None = None) -> dict[int, Label]:
    labeler, _ = load_labeler(scenes / "model.malckpt", **numerics._asdict())
    return dict(_labeled(labeler, scenes, options))


def test_masks_of_library_inference_and_server_are_identical(
    scenes: Path, folder: Path, numerics: Numerics, server: str
) -> None:
    library = by_the_library(scenes, numerics)
    partial = [label for label in library.values() if label.area and "FULL_BOX" not in label.flags]
    assert len(partial) >= 0.9 * len(library)

    spec = {
        "results_dir": str(folder / "results"),
        "inference": {
            "checkpoint": str(scenes / "model.malckpt"),
            "ann_path": str(scenes / "scenes.json"),
            "img_dir": str(scenes / "scenes"),
            "label_dump_path": str(folder / "inferred.json"),
            "batch_size": 5,
            **numerics._asdict(),
        },
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert train_cli.main(["inference", "-e", str(folder / "spec.yaml")]) == 0
    arguments = ["--annotations", str(scenes / "scenes.json"), "--images", str(scenes / "scenes")]
    assert client_cli.main(["label", "--server", server, *arguments, "--output", str(folder / "served.json")]) == 0

    inferred, served = rows_of(folder / "inferred.json"), rows_of(folder / "served.json")
    assert [row["id"] for row in inferred] == [row["id"] for row in served] == list(library)
    for inferred_row, served_row in zip(inferred, served, strict=True):
        label = library[inferred_row["id"]]
        assert inferred_row["segmentation"] == served_row["segmentation"] == label.rle.to_coco()
        assert inferred_row["score"] == served_row["score"] == label.score
        assert inferred_row["area"] == served_row["area"] == label.area
        assert inferred_row.get("flags", []) == served_row.get("flags", []) == list(label.flags)


def test_branches_and_agreement_of_library_and_server_are_identical(
    scenes: Path, folder: Path, numerics: Numerics, server: str
) -> None:
    library = by_the_library(scenes, numerics, PredictOptions(Branch.MIXED, agreement=True, flip=True))
    arguments = ["--annotations", str(scenes / "scenes.json"), "--images", str(scenes / "scenes")]
    output = folder / "mixed.json"
    options = ["--branch", "mixed", "--agreement", "--flip", "--output", str(output)]
    assert client_cli.main(["label", "--server", server, *arguments, *options]) == 0
    for row in rows_of(output):
        label = library[row["id"]]
        assert row["segmentation"] == label.rle.to_coco()
        assert row["agreement"] == label.agreement


@pytest.mark.skipif(os.environ.get("OMP_NUM_THREADS") == "1", reason="OMP_NUM_THREADS is already 1")
def test_masks_do_not_depend_on_concurrent_clients(scenes: Path, folder: Path, numerics: Numerics, server: str) -> None:
    arguments = ["--annotations", str(scenes / "scenes.json"), "--images", str(scenes / "scenes")]
    command = [str(BIN / "mal-client"), "label", "--server", server, *arguments]
    runs = [
        subprocess.Popen([*command, "--output", str(folder / f"crowd{i}.json")], stdout=subprocess.DEVNULL)
        for i in range(3)
    ]
    assert [run.wait(timeout=600) for run in runs] == [0, 0, 0]
    first, *others = (rows_of(folder / f"crowd{i}.json") for i in range(3))
    assert all(rows == first for rows in others)
    assert first[0]["segmentation"] == next(iter(by_the_library(scenes, numerics).values())).rle.to_coco()
