"""The engine of OpenVINO: the logits of torch in float32, those of the simulation in int8, and no telemetry."""

import importlib
import importlib.util
import itertools
import os
import sys
import threading
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch

from mal_train.core.errors import ConfigError
from mal_train.core.masks.geometry import Region
from mal_train.core.settings import Branch, LabelerConfig
from mal_train.kernel.labeler import openvino_engine
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import labeler_of
from mal_train.kernel.labeler.openvino_engine import int8_network
from mal_train.kernel.labeler.types import Crop, PredictOptions
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.kernel.networks.quantization import Int8Calibration, QuantizedLayer, observed_ranges
from tests.networks import spread_network

# Not importorskip: it would import OpenVINO with its telemetry.
if importlib.util.find_spec("openvino") is None:
    pytest.skip("OpenVINO is not installed; run: pip install 'mask-auto-labeler[openvino]'", allow_module_level=True)

SIDE = 64
IMAGE = np.random.default_rng(5).integers(0, 256, (90, 140, 3), dtype=np.uint8)
BOXES = [(5, 5, 20, 20), (60, 10, 70, 75), (0, 0, 140, 90), (20, 40, 3, 45)]


def network_of(arch: str) -> MalNetwork:
    torch.manual_seed(0)
    return MalNetwork(
        ModelConfig(arch, mask_head_num_convs=3, mask_head_hidden_channel=16, mask_head_out_channel=16)
    ).eval()


def calibration_of(network: MalNetwork) -> Int8Calibration:
    with torch.no_grad(), observed_ranges(network.student) as ranges:
        network.student(torch.rand(3, 3, SIDE, SIDE), torch.tensor([0, 1, 2]))
    return Int8Calibration({f"student.{name}": bounds for name, bounds in ranges.items()}, 3)


def crops_of(labeler: Labeler) -> list[Crop]:
    return [crop for crop in labeler.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]


# Their position tables have other sizes than these crops, and are resampled.
@pytest.mark.parametrize("arch", ["vit-micro/16", "vit-demo/8", "fan_tiny_8_p4_hybrid"])
def test_logits_and_features_in_float32_are_those_of_torch(arch: str) -> None:
    network = network_of(arch)
    engine = openvino_engine.OpenVinoEngine(network)
    x, sizes = torch.rand(3, 3, SIDE, SIDE), torch.tensor([0, 2, -1])
    with torch.inference_mode():
        found, expected = engine.run(x, sizes, Branch.STUDENT), network.student.output(x, sizes)
    torch.testing.assert_close(tuple(found), tuple(expected), atol=1e-4, rtol=1e-4)


def test_crops_of_one_graph_have_logits_of_their_own() -> None:
    engine = openvino_engine.OpenVinoEngine(spread_network().eval())
    x, sizes = torch.rand(2, 3, SIDE, SIDE), torch.tensor([1, 1])
    with torch.inference_mode():
        together = engine.run(x, sizes, Branch.STUDENT).logits_N1HW
        alone = [engine.run(x[n : n + 1], sizes[:1], Branch.STUDENT).logits_N1HW for n in range(2)]
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(together, torch.cat(alone))


def test_after_the_first_crop_none_waits_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = openvino_engine.OpenVinoEngine(spread_network().eval())
    x = torch.rand(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        engine.run(x, torch.tensor([1]), Branch.STUDENT)
        monkeypatch.delattr(engine._openvino, "convert_model")
        monkeypatch.setattr(engine, "_compile", None)
        for size_class, margin in itertools.product(range(3), range(0, SIDE // 2, 5)):
            needed = [Region(margin, margin, SIDE - margin, SIDE - margin)]
            engine.run(x, torch.tensor([size_class]), Branch.STUDENT, needed)


def test_the_warnings_of_a_process_stay_in_force(recwarn: pytest.WarningsRecorder) -> None:
    engine = openvino_engine.OpenVinoEngine(spread_network().eval())
    filters = list(warnings.filters)
    with torch.inference_mode():
        engine.run(torch.rand(1, 3, SIDE, SIDE), torch.tensor([1]), Branch.STUDENT)
    assert warnings.filters == filters
    assert not recwarn.list


@pytest.mark.parametrize(("threads", "streams"), [(1, 4), (2, 2), (3, 1), (4, 1), (8, 1)])
def test_passes_of_several_threads_run_at_a_time(threads: int, streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    options = openvino_engine._options(threads)
    assert (options["NUM_STREAMS"], options["INFERENCE_NUM_THREADS"]) == (streams, streams * threads)


def test_needed_pixels_have_the_logits_of_the_complete_map() -> None:
    network = spread_network().eval()
    engine = openvino_engine.OpenVinoEngine(network)
    x, sizes = torch.rand(1, 3, SIDE, SIDE), torch.tensor([1])
    with torch.inference_mode():
        complete = engine.run(x, sizes, Branch.STUDENT).logits_N1HW
        part = engine.run(x, sizes, Branch.STUDENT, [Region(9, 8, 55, 56)]).logits_N1HW
    # Logits 2 to 13 of 16 are the sources of these pixels.
    torch.testing.assert_close(part[..., 2:14, 2:14], complete[..., 2:14, 2:14], atol=1e-4, rtol=1e-4)


def test_logits_in_int8_are_those_of_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    # Seven bits, which every CPU computes exactly: with eight, bytes saturate on CPUs without their dot product.
    monkeypatch.setattr(openvino_engine, "has_int8_dot_product", lambda: False)
    network = spread_network().eval()
    calibration = calibration_of(network)
    engine = openvino_engine.OpenVinoEngine(network, calibration)
    x, sizes = torch.rand(1, 3, SIDE, SIDE), torch.tensor([1])
    with torch.inference_mode():
        exact = network.student(x, sizes)
        expected = int8_network(network.student, calibration, "student")(x, sizes)
        logits = engine.run(x, sizes, Branch.STUDENT).logits_N1HW
    # Sums differ in the last bits, and a few activations then round to the next integer.
    assert float((logits - expected).abs().mean()) < 0.5 * float((expected - exact).abs().mean())


@pytest.mark.parametrize(("has_dot_product", "levels", "linear"), [(True, 127, True), (False, 63, False)])
def test_cpus_without_dot_products_of_bytes_get_seven_bits_and_no_int8_in_linear_layers(
    has_dot_product: bool, levels: int, linear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "has_int8_dot_product", lambda: has_dot_product)
    network = spread_network().eval()
    copy = int8_network(network.student, calibration_of(network), "student")
    layers = [module for module in copy.modules() if isinstance(module, QuantizedLayer)]
    assert {layer.weight_levels for layer in layers} == {levels}
    assert any(isinstance(layer.layer, torch.nn.Linear) for layer in layers) is linear


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_mask_does_not_depend_on_batch_and_threads(precision: str) -> None:
    network = spread_network().eval()
    config = LabelerConfig(crop_size=SIDE)
    labeler = labeler_of(network, config, calibration_of(network), precision=precision, network_engine="openvino")
    crops = crops_of(labeler)
    together = labeler.predict(crops)
    for crop, prediction in zip(crops, together, strict=True):
        (alone,) = labeler.predict([crop])
        assert np.array_equal(alone.prob, prediction.prob)


def test_threads_run_at_a_time() -> None:
    network = spread_network().eval()
    labeler = labeler_of(network, LabelerConfig(crop_size=SIDE), network_engine="openvino")
    crops = crops_of(labeler)
    expected = [prediction.prob for prediction in labeler.predict(crops)]
    equal: list[bool] = []

    def label() -> None:
        results = labeler.predict(crops)
        equal.extend(np.array_equal(one.prob, other) for one, other in zip(results, expected, strict=True))

    threads = [threading.Thread(target=label) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 4 * len(crops)


def test_flip_and_both_networks_are_those_of_torch() -> None:
    network = spread_network().eval()
    options = PredictOptions(Branch.MIXED, agreement=True, flip=True)
    ours, torchs = (
        labeler_of(network, LabelerConfig(crop_size=SIDE), precision="float32", network_engine=engine)
        for engine in ("openvino", "torch")
    )
    for one, other in zip(
        ours.predict(crops_of(ours), options), torchs.predict(crops_of(torchs), options), strict=True
    ):
        np.testing.assert_allclose(one.prob, other.prob, atol=1e-4)
        assert one.teacher is not None
        assert other.teacher is not None
        np.testing.assert_allclose(one.teacher, other.teacher, atol=1e-4)


def test_auto_is_float32() -> None:
    labeler = labeler_of(spread_network(), LabelerConfig(crop_size=SIDE), network_engine="openvino")
    assert labeler.dtype is torch.float32
    assert labeler.with_margin(0.2).engine is labeler.engine


@pytest.mark.parametrize(
    ("device", "precision", "engine"),
    [
        ("cpu", "bfloat16", "openvino"),
        ("cpu", "float16", "openvino"),
        ("cuda", "auto", "openvino"),
        ("cpu", "int8", "openvino"),  # without a calibration
        ("cpu", "int8", "torch"),
    ],
)
def test_an_engine_refuses_what_it_does_not_run(device: str, precision: str, engine: str) -> None:
    with pytest.raises(ConfigError, match=r"network_engine|precision"):
        labeler_of(
            spread_network(), LabelerConfig(crop_size=SIDE), device=device, precision=precision, network_engine=engine
        )


def test_a_network_without_ranges_is_refused() -> None:
    network = spread_network().eval()
    engine = openvino_engine.OpenVinoEngine(network, calibration_of(network))
    with pytest.raises(ConfigError, match="int8"):
        engine.run(torch.zeros(1, 3, SIDE, SIDE), torch.tensor([1]), Branch.TEACHER)


def test_a_missing_package_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"mask-auto-labeler\[openvino\]"):
        openvino_engine.OpenVinoEngine(spread_network())


def test_telemetry_is_not_imported() -> None:
    openvino_engine.import_openvino()
    with pytest.raises(ImportError):
        importlib.import_module("openvino_telemetry")
    for name in ("telemetry_utils", "convert_impl"):
        module = importlib.import_module(f"openvino.tools.ovc.{name}")
        assert module.tm.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_openvino_with_its_telemetry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", ModuleType("openvino_telemetry"))
    with pytest.raises(ConfigError, match="telemetry"):
        openvino_engine.import_openvino()
