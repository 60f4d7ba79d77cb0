"""Several workers behind one queue, with fake and real networks; one encrypted checkpoint replaces another."""

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from mal.v1 import labeling_pb2_grpc, model_pb2, model_pb2_grpc

from mal_server import cli
from mal_server.config.server import load_config
from mal_server.models import loader
from mal_server.models.loader import load_model, warm_up_sizes
from mal_server.models.warmup import MAX_MEAN_DIFFERENCE, warm_up_and_verify
from mal_server.server import MalServer
from mal_train.core.errors import CheckpointError, DeviceError, DeviceLost
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import sha256_of
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import PredictOptions
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from tests.mal_server.calls import reason_of, status_details
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, config_of, label_request, loaded
from tests.mal_server.test_real_model import codes_of_the_kernel, codes_of_the_server, folder  # noqa: F401  # a fixture


@asynccontextmanager
async def workers(*predictors: BrightPredictor, **settings: Any) -> AsyncIterator[tuple[MalServer, Any]]:
    """Runs a server with a worker for each predictor; batches of the self-test are not recorded."""
    server = MalServer(config_of(**settings), lambda plan: loaded(plan, *predictors))
    await server.start()
    await server.load()
    for predictor in predictors:
        predictor.batches.clear()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield server, labeling_pb2_grpc.LabelingServiceStub(channel)
    finally:
        for predictor in predictors:
            if predictor.gate is not None:
                predictor.gate.set()
        await server.stop(0)


async def outcome_of(stub: Any, boxes: int = 1) -> str:
    """Returns OK, or the reason of the first failed box or of the failed call."""
    try:
        call = stub.LabelImage(label_request(*[DISC_BOX] * boxes))
        results = [result async for response in call for result in response.results]
    except grpc.aio.AioRpcError as error:
        return reason_of(status_details(error))
    return next((reason_of(result.status) or "FAILED" for result in results if result.status.code), "OK")


def in_time(work: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 60))


def test_two_workers_run_batches_in_parallel() -> None:
    first, second = BrightPredictor(gate=None), BrightPredictor(gate=None)

    async def work() -> str:
        async with workers(first, second, max_batch_size=2) as (_, stub):
            first.gate, second.gate = threading.Event(), threading.Event()
            call = asyncio.create_task(outcome_of(stub, boxes=4))
            while not (first.batches and second.batches):  # both have started, neither has finished
                await asyncio.sleep(0.001)
            first.gate.set()
            second.gate.set()
            return await call

    assert in_time(work) == "OK"
    assert [size for _, size in first.batches + second.batches] == [2, 2]


def test_a_busy_worker_does_not_delay_the_others() -> None:
    slow, fast = BrightPredictor(), BrightPredictor()

    async def work() -> list[str]:
        async with workers(slow, fast, max_batch_size=1) as (_, stub):
            slow.gate, fast.gate = threading.Event(), threading.Event()
            blocked = asyncio.create_task(outcome_of(stub, boxes=2))
            while not (slow.batches and fast.batches):
                await asyncio.sleep(0.001)
            fast.gate.set()
            outcomes = [await outcome_of(stub) for _ in range(20)]
            slow.gate.set()
            return [*outcomes, await blocked]

    assert in_time(work) == ["OK"] * 21
    assert (len(slow.batches), len(fast.batches)) == (1, 21)


def test_a_failing_batch_fails_only_its_own_calls() -> None:
    bad, good = BrightPredictor(), BrightPredictor()

    async def work() -> list[str]:
        async with workers(bad, good, max_batch_size=1, max_queue_delay_ms=0) as (server, stub):
            bad.error = DeviceError("a kernel failed")
            outcomes = [await outcome_of(stub) for _ in range(6)]
            assert not server.lost.is_set()
            return outcomes

    outcomes = in_time(work)
    assert outcomes.count("OK") == len(good.batches)
    assert outcomes.count("UNEXPECTED") == len(bad.batches)
    assert len(good.batches) + len(bad.batches) == 6


def test_one_lost_device_ends_the_server_and_the_calls_of_all_devices() -> None:
    lost, fine = BrightPredictor(), BrightPredictor()

    async def work() -> list[str]:
        async with workers(lost, fine, max_batch_size=1) as (server, stub):
            lost.gate, fine.gate = threading.Event(), threading.Event()
            lost.error = DeviceLost("an illegal memory access")
            calls = [asyncio.create_task(outcome_of(stub)) for _ in range(4)]
            while not (lost.batches and fine.batches):
                await asyncio.sleep(0.001)
            lost.gate.set()
            await asyncio.wait_for(server.lost.wait(), 10)
            fine.gate.set()
            return sorted(await asyncio.gather(*calls))

    outcomes = in_time(work)
    assert outcomes.count("DEVICE_LOST") >= 3  # the queued calls and the one on the lost device; the other may finish
    assert len(fine.batches) == 1


@pytest.mark.parametrize("fits", [1, 3, 7, 16])
def test_workers_too_small_for_their_batches_label_every_box_once(fits: int) -> None:
    first, second = BrightPredictor(fits=10_000), BrightPredictor(fits=10_000)

    async def work() -> str:
        async with workers(first, second, max_batch_size=16) as (_, stub):
            first.fits = second.fits = fits
            return await outcome_of(stub, boxes=50)

    assert in_time(work) == "OK"


@pytest.mark.parametrize(
    ("device", "dtype", "max_batch_size", "sizes"),
    [
        ("cpu", torch.float32, 16, ()),
        ("cpu", torch.bfloat16, 16, ()),
        ("cuda", torch.bfloat16, 16, (1, 2, 4, 8, 16)),
        ("cuda", torch.float16, 12, (1, 2, 4, 8, 12)),
    ],
)
def test_the_warm_up_runs_the_batch_sizes_that_will_be_used(
    device: str, dtype: torch.dtype, max_batch_size: int, sizes: tuple[int, ...]
) -> None:
    labeler = Labeler(MalNetwork(ModelConfig("vit-micro/16")), LabelerConfig(crop_size=64), precision="float32")
    labeler.device, labeler.dtype = torch.device(device), dtype
    assert warm_up_sizes(labeler, max_batch_size) == sizes


def test_cpu_workers_share_weights_and_return_the_same_masks_as_the_labeler(folder: Path) -> None:  # noqa: F811
    config = load_config(folder / "server.yaml", ["cpu_workers=2", "max_batch_size=3"])
    model = load_model(config.plans[0])
    first, second = (worker.predictor for worker in model.workers)
    assert isinstance(first, Labeler)
    assert isinstance(second, Labeler)
    assert first is second

    async def work() -> list[list[bytes]]:
        server = MalServer(config)
        await server.start()
        await server.load()
        try:
            return await codes_of_the_server(server.address)
        finally:
            await server.stop(1)

    assert in_time(work) == codes_of_the_kernel(folder)


def test_a_bfloat16_network_passes_the_self_test_with_a_wide_margin(folder: Path) -> None:  # noqa: F811
    config = load_config(folder / "server.yaml", ["precision=bfloat16", "max_batch_size=4"])
    model = load_model(config.plans[0])
    assert model.batch_sizes == ()
    asyncio.run(warm_up_and_verify(model))
    assert model.reference is not None
    crops = [
        c
        for c in model.reference.prepare(np.zeros((64, 64, 3), np.uint8), [(8, 8, 48, 48)])
        if not isinstance(c, Exception)
    ]
    pairs = zip(
        model.reference.predict(crops, PredictOptions()),
        model.workers[0].predictor.predict(crops, PredictOptions()),
        strict=True,
    )
    assert max(float(np.abs(a.prob - b.prob).mean()) for a, b in pairs) < MAX_MEAN_DIFFERENCE / 5


def test_a_checkpoint_modified_while_it_is_read_is_refused(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path(shutil.copy(folder / "micro.malckpt", tmp_path / "written.malckpt"))
    key = f"decryption_key=file:{folder / 'identity.txt'}"
    (plan,) = load_config(folder / "server.yaml", [f"checkpoint={path}", key]).plans
    checkpoint, sha256 = loader.read_checkpoint(plan)
    assert sha256 == sha256_of(path)

    def touched(path: Path, *rest: Any, **options: Any) -> Any:
        os.utime(path, ns=(0, 1))
        return checkpoint

    monkeypatch.setattr(loader, "load_checkpoint", touched)
    with pytest.raises(CheckpointError, match=r"written\.malckpt"):
        loader.read_checkpoint(plan)


def test_a_valid_encrypted_checkpoint_replaces_the_served_one_and_a_damaged_one_does_not(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copy(folder / "micro.malckpt", tmp_path / "good.malckpt")
    content = bytearray((folder / "micro.malckpt").read_bytes())
    content[-100] ^= 1
    (tmp_path / "altered.malckpt").write_bytes(content)
    (tmp_path / "cut.malckpt").write_bytes(content[:-5000])
    (tmp_path / "text.malckpt").write_text("not a checkpoint")
    key = f"file:{folder / 'identity.txt'}"
    folders = (
        f"model_folders=[{{name: mine, path: {tmp_path}, decryption_key: '{key}'}}, {{name: open, path: {tmp_path}}}]"
    )

    async def work() -> tuple[list[str], str, str, bool]:
        server = MalServer(load_config(folder / "server.yaml", [folders]))
        await server.start()
        await server.load()
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub: Any = model_pb2_grpc.ModelServiceStub(channel)

                async def load(folder_name: str, name: str) -> str:
                    request = model_pb2.LoadModelRequest(name="micro", folder=folder_name, path=f"{name}.malckpt")
                    try:
                        response = await stub.LoadModel(request)
                    except grpc.aio.AioRpcError as error:
                        return reason_of(status_details(error))
                    return str(response.model.ref.checkpoint_sha256)

                failed = [await load("mine", name) for name in ("altered", "cut", "text")]
                failed.append(await load("open", "good"))
                good = await load("mine", "good")
                codes = await codes_of_the_server(server.address)
                return failed, good, sha256_of(tmp_path / "good.malckpt"), codes == codes_of_the_kernel(folder)
        finally:
            await server.stop(1)

    failed, loaded_sha, sha256, is_same = in_time(work)
    assert failed[:2] == ["ALTERED", "TRUNCATED"]
    assert failed[3] == "WRONG_KEY"
    assert set(failed) <= {"ALTERED", "TRUNCATED", "WRONG_KEY", "CHECKPOINT", "UNKNOWN_LAYOUT"}
    assert (loaded_sha, is_same) == (sha256, True)


def test_check_lists_all_models_and_folders(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = f"file:{folder / 'identity.txt'}"
    entry = f"checkpoint: {folder / 'micro.malckpt'}, decryption_key: '{key}', gpu_ids: []"
    text = f"models: [{{name: a, {entry}}}, {{name: b, branch: teacher, {entry}}}]\n"
    text += f"model_folders: [{{name: mine, path: {folder}}}]\ndata_folders: [{{name: photos, path: {tmp_path}}}]\n"
    (tmp_path / "server.yaml").write_text(text)
    assert cli.main(["check", "-c", str(tmp_path / "server.yaml")]) == 0
    output = capsys.readouterr().out
    assert "model: a, vit-micro/16" in output
    assert "model: b, vit-micro/16, crop 64 px, branch teacher" in output
    assert "model folder mine" in output
    assert "1 checkpoint\n" in output
    assert "data folder photos" in output
    assert cli.main(["check", "-c", str(tmp_path / "server.yaml"), "data_folders=[{name: x, path: /none}]"]) == 2
