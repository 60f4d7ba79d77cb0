"""An encrypted checkpoint of a small real network, served in this process and by the command `mal-server`."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mal.v1 import labeling_pb2, labeling_pb2_grpc, model_pb2, model_pb2_grpc
from numpy.typing import NDArray

from mal_server import cli
from mal_server.config.server import load_config
from mal_server.models.loader import load_model, pick_devices
from mal_server.server import MalServer
from mal_train.core.errors import ConfigError, WrongKey
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint, sha256_of
from mal_train.kernel.checkpoint.keys import parse_key, write_identity
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Crop, Label
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from tests.mal_server.fakes import encoded, label_request

BOXES = [(10.0, 12.0, 60.0, 40.0), (-5.0, 30.0, 50.0, 80.0), (70.5, 20.25, 31.5, 33.0), (0.0, 0.0, 160.0, 120.0)]


def scene(seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 255, (12, 16, 3)), np.ones((10, 10, 1))).astype(np.uint8)


IMAGES = [scene(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates an encrypted checkpoint whose masks are neither empty nor full, its identity, and settings."""
    path = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    model = ModelConfig("vit-micro/16", mask_head_num_convs=1, mask_head_hidden_channel=8, mask_head_out_channel=8)
    network = MalNetwork(model)
    draft = Labeler(network, LabelerConfig(crop_size=64), precision="float32")
    crops = [crop for image in IMAGES for crop in draft.prepare(image, BOXES) if isinstance(crop, Crop)]
    middle = float(np.median([found.prob for found in draft.predict(crops)]))
    config = LabelerConfig(crop_size=64, mask_thres=(middle, middle, middle))
    recipient = write_identity(path / "identity.txt")
    key = parse_key(recipient, purpose="encryption", source="command line")
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    save_checkpoint(path / "micro.malckpt", Checkpoint(model, config, weights, [{"id": 3, "name": "cat"}]), key)
    settings = {
        "checkpoint": str(path / "micro.malckpt"),
        "decryption_key": f"file:{path / 'identity.txt'}",
        "gpu_ids": [],
        "precision": "float32",
        "drain_delay_s": 0.0,
        "threads": 2,
        "listen": {"port": 0},
    }
    (path / "server.yaml").write_text(yaml.safe_dump(settings))
    return path


def codes_of_the_kernel(folder: Path) -> list[list[bytes]]:
    key = parse_key(f"file:{folder / 'identity.txt'}", purpose="decryption", source="yaml")
    labeler, _ = load_labeler(folder / "micro.malckpt", key=key, precision="float32")
    labels_of_images = [labeler.label(image, BOXES) for image in IMAGES]
    return [[label.rle.counts for label in labels if isinstance(label, Label)] for labels in labels_of_images]


async def codes_of_the_server(address: str) -> list[list[bytes]]:
    """Labels all images at once, so that their crops share batches."""

    async def label(stub: Any, image: NDArray[np.uint8]) -> list[bytes]:
        call = stub.LabelImage(label_request(*BOXES, content=encoded(image)))
        results = [result async for response in call for result in response.results]
        results.sort(key=lambda result: result.instance_id)
        return [result.masks[0].coco_rle.counts for result in results]

    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        return list(await asyncio.gather(*(label(stub, image) for image in IMAGES)))


def test_the_servers_masks_are_byte_equal_to_the_kernels_in_mixed_batches(folder: Path) -> None:
    async def work() -> tuple[list[list[bytes]], model_pb2.GetServerInfoResponse]:
        server = MalServer(load_config(folder / "server.yaml", ["max_queue_delay_ms=50.0"]))
        await server.start()
        await server.load()
        codes = await codes_of_the_server(server.address)
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = model_pb2_grpc.ModelServiceStub(channel)
            info = await stub.GetServerInfo(model_pb2.GetServerInfoRequest())
        await server.stop(1)
        return codes, info

    codes, info = asyncio.run(work())
    assert codes == codes_of_the_kernel(folder)
    assert len({code for image in codes for code in image}) == len(IMAGES) * len(BOXES)
    assert (info.model.arch, info.model.crop_size, info.precision) == ("vit-micro/16", 64, "float32")
    assert info.model.ref.checkpoint_sha256 == sha256_of(folder / "micro.malckpt")
    assert [(c.category_id, c.name) for c in info.model.categories] == [(3, "cat")]


def test_a_wrong_key_is_reported_at_load(folder: Path, tmp_path: Path) -> None:
    write_identity(tmp_path / "other.txt")
    with pytest.raises(WrongKey):
        load_model(load_config(folder / "server.yaml", [f"decryption_key=file:{tmp_path / 'other.txt'}"]).plans[0])


def test_a_missing_checkpoint_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint: nothing\.malckpt: "):
        load_model(load_config(folder / "server.yaml", ["checkpoint=nothing.malckpt"]).plans[0])


def test_without_cuda_the_cpu_is_used_and_one_line_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_devices((0, 1)) == ("cpu",)
    (line,) = capsys.readouterr().out.splitlines()
    assert "CUDA" in line
    assert pick_devices(()) == ("cpu",)
    assert capsys.readouterr().out == ""


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_devices((1, 0)) == ("cuda:1", "cuda:0")
    with pytest.raises(ConfigError, match=r"^gpu_ids: \[2\].* 2 GPUs"):
        pick_devices((0, 2))


@contextmanager
def command(folder: Path, port_file: Path, *overrides: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Runs `mal-server serve` in its own process; yields it and its address once it serves."""
    line = "import sys; from mal_server.cli import main; sys.exit(main())"
    arguments = ["serve", "-c", str(folder / "server.yaml"), "--port-file", str(port_file), *overrides]
    process = subprocess.Popen(
        [sys.executable, "-c", line, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        until = time.monotonic() + 90
        while not port_file.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.02)
        yield process, port_file.read_text().strip()
    finally:
        process.kill()
        process.communicate()


def test_the_command_finishes_its_calls_on_sigterm_and_exits_with_0(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    with command(folder, tmp_path / "address", "max_batch_size=4") as (process, address):
        with grpc.insecure_channel(address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            port = address.rpartition(":")[2]
            assert cli.main(["serve", "-c", str(folder / "server.yaml"), f"listen.port={port}"]) == 2
            error = capsys.readouterr().err
            assert "listen: " in error
            assert address in error
            stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
            responses = stub.LabelImage(label_request(*BOXES * 25, content=encoded(IMAGES[0])))
            results = len(next(responses).results)
            process.send_signal(signal.SIGTERM)
            results += sum(len(response.results) for response in responses)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, results) == (0, 100)
    assert f"mal-server: serving micro on {address} (vit-micro/16, student, cpu, float32, torch)" in out
    assert "method=mal.v1.LabelingService/LabelImage code=OK" in err
    assert "AGE-SECRET-KEY" not in out + err
    assert not (tmp_path / "address").exists()


def test_a_client_of_a_killed_server_gets_an_error_and_keeps_earlier_results(folder: Path, tmp_path: Path) -> None:
    with (
        command(folder, tmp_path / "address", "max_batch_size=1") as (process, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        killed = threading.Event()

        def items() -> Iterator[labeling_pb2.LabelImagesRequest]:
            request = label_request(*BOXES, content=encoded(IMAGES[0]))
            yield labeling_pb2.LabelImagesRequest(item_id="1", request=request)
            # Keeps the call open until the server is gone.
            killed.wait()

        call = stub.LabelImages(items(), timeout=120)
        responses: list[labeling_pb2.LabelImagesResponse] = [next(call)]
        process.kill()
        with pytest.raises(grpc.RpcError) as raised:
            responses += list(call)
        killed.set()
    code = raised.value.code()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert [(response.item_id, len(response.response.results)) for response in responses] == [("1", len(BOXES))]


def test_check_prints_address_devices_and_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "-c", str(folder / "server.yaml"), "listen.port=50051"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[:4] == [
        "listen: 127.0.0.1, port 50051, plaintext",
        "clients: every client that reaches the port",
        "metrics: not served",
        "devices: cpu in float32, network engine torch",
    ]
    assert "model: micro, vit-micro/16, crop 64 px, branch student, " in output
    assert f"sha256 {sha256_of(folder / 'micro.malckpt')}" in output


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("checkpoint=nothing.malckpt", "checkpoint: nothing.malckpt"),
        ("decryption_key=env:MAL_NO_SUCH", "MAL_NO_SUCH"),
        ("listen.tls_client_ca=ca.pem", "listen.tls_client_ca"),
        ("precision=float16", "float16"),
        ("tokens=[{name: a, token: 'file:/none', scopes: [label]}]", "tokens: 'a': /none"),
        ("max_batch_size=0", "max_batch_size: 0"),
    ],
)
def test_check_names_the_wrong_setting(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, named: str
) -> None:
    assert cli.main(["check", "-c", str(folder / "server.yaml"), override]) == 2
    assert named in capsys.readouterr().err


def test_check_reads_the_checkpoint_to_its_last_byte(folder: Path, tmp_path: Path) -> None:
    data = (folder / "micro.malckpt").read_bytes()
    cut = tmp_path / "cut.malckpt"
    cut.write_bytes(data[:-1])
    assert cli.main(["check", "-c", str(folder / "server.yaml"), f"checkpoint={cut}"]) == 2
