"""Startup, drain and shutdown, ports and signals, in this process with a fake model."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mal.v1 import labeling_pb2, labeling_pb2_grpc, model_pb2, model_pb2_grpc

from mal_server import server
from mal_server.api import grpc_server
from mal_server.config.model_config import ModelPlan
from mal_server.errors import SelfTestFailed
from mal_server.lifecycle import serve
from mal_server.models.loader import LoadedModel
from mal_server.server import SERVICES, MalServer
from mal_train.core.errors import ConfigError, DeviceLost, WrongKey
from tests.mal_server.calls import reason_of, status_details, until
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, config_of, label, label_request, loaded, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LIMIT_S = 120.0


async def health_of(channel: grpc.aio.Channel) -> set[Any]:
    """Returns the states of all services; one element if they agree."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=service))).status for service in SERVICES}


async def until_refused(channel: grpc.aio.Channel) -> None:
    """Waits until the server accepts no new calls."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    with suppress(grpc.aio.AioRpcError):
        while True:
            await stub.Check(health_pb2.HealthCheckRequest())
            await asyncio.sleep(0.001)


def loading_with(predictor: BrightPredictor, gate: threading.Event | None = None) -> Callable[[ModelPlan], LoadedModel]:
    def load(plan: ModelPlan) -> LoadedModel:
        if gate is not None:
            gate.wait(LIMIT_S)
        return loaded(plan, predictor)

    return load


def test_health_is_serving_only_after_the_model_is_loaded_and_warmed_up() -> None:
    gate, predictor = threading.Event(), BrightPredictor()

    async def work() -> None:
        server = MalServer(config_of(), loading_with(predictor, gate))
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            assert await health_of(channel) == {NOT_SERVING}
            loading = asyncio.create_task(server.load())
            stub: Any = model_pb2_grpc.ModelServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.GetServerInfo(model_pb2.GetServerInfoRequest())
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert reason_of(status_details(raised.value)) == "LOADING"
            assert await health_of(channel) == {NOT_SERVING}
            gate.set()
            await loading
            assert await health_of(channel) == {SERVING}
            assert len(predictor.batches) == 1
        await server.stop(0)

    asyncio.run(work())


def test_every_worker_is_warmed_up_before_it_serves() -> None:
    first, second = BrightPredictor(), BrightPredictor()

    async def work() -> None:
        server = MalServer(config_of(), lambda plan: loaded(plan, first, second))
        await server.start()
        await server.load()
        await server.stop(0)

    asyncio.run(work())
    assert len(first.batches) == len(second.batches) == 1


class NotANumber(BrightPredictor):
    def predict(self, crops: Any, options: Any = None) -> Any:
        predictions = super().predict(crops, options)
        for prediction in predictions:
            prediction.prob[:] = float("nan")
        return predictions


def test_a_network_that_returns_nan_is_never_served() -> None:
    async def work() -> None:
        server = MalServer(config_of(), loading_with(NotANumber()))
        await server.start()
        try:
            await server.load()
        finally:
            async with grpc.aio.insecure_channel(server.address) as channel:
                assert await health_of(channel) == {NOT_SERVING}
            await server.stop(0)

    with pytest.raises(SelfTestFailed, match="finite"):
        asyncio.run(work())


def test_a_draining_server_is_not_serving_and_still_labels() -> None:
    async def work() -> None:
        async with serving() as running:
            await running.server.drain()
            assert await health_of(running.channel) == {NOT_SERVING}
            assert len(await label(running, label_request(DISC_BOX))) == 1

    asyncio.run(work())


def test_stopping_lets_running_calls_finish_and_refuses_new_ones() -> None:
    gate = threading.Event()

    async def work() -> tuple[int, grpc.StatusCode]:
        async with serving(BrightPredictor(gate=gate), max_batch_size=2) as running:
            call = asyncio.create_task(label(running, label_request(*[DISC_BOX] * 6)))
            while not running.predictor.batches:
                await asyncio.sleep(0.001)
            stopping = asyncio.create_task(running.server.stop(600))
            await until_refused(running.channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await label(running, label_request(DISC_BOX))
            gate.set()
            results = await call
            await stopping
            return len(results), raised.value.code()

    assert asyncio.run(asyncio.wait_for(work(), LIMIT_S)) == (6, grpc.StatusCode.UNAVAILABLE)


def test_calls_that_exceed_the_grace_period_are_cancelled() -> None:
    gate = threading.Event()

    async def work() -> grpc.StatusCode:
        async with serving(BrightPredictor(gate=gate)) as running:
            call = asyncio.create_task(label(running, label_request(DISC_BOX)))
            while not running.predictor.batches:
                await asyncio.sleep(0.001)
            stopping = asyncio.create_task(running.server.stop(0.05))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            gate.set()
            await stopping
            return raised.value.code()

    assert asyncio.run(asyncio.wait_for(work(), LIMIT_S)) in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_a_device_that_hangs_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(server, "CLOSE_TIMEOUT_S", 0.05)

    async def work() -> None:
        async with serving(BrightPredictor(gate=gate)) as running:
            call = asyncio.create_task(label(running, label_request(DISC_BOX)))
            while not running.predictor.batches:
                await asyncio.sleep(0.001)
            await running.server.stop(0)
            assert not gate.is_set()
            await asyncio.wait([call])

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))
    assert "left behind at the end" in caplog.messages


def test_a_port_in_use_is_named() -> None:
    async def work() -> None:
        async with serving() as running:
            port = int(running.server.address.rpartition(":")[2])
            await MalServer(config_of(listen={"port": port}), loading_with(BrightPredictor())).start()

    with pytest.raises(ConfigError, match=r"^listen: .*127\.0\.0\.1:\d+;"):
        asyncio.run(work())


def test_stopped_is_logged_only_for_a_server_that_started(caplog: pytest.LogCaptureFixture) -> None:
    def load(plan: ModelPlan) -> LoadedModel:
        raise WrongKey("the key does not open it")

    async def work() -> None:
        async with serving() as running:
            port = int(running.server.address.rpartition(":")[2])
            await serve(config_of(listen={"port": port}), load=load)

    caplog.set_level("INFO")
    with pytest.raises(ConfigError, match=r"^listen: "):
        asyncio.run(work())
    assert "stopped" not in caplog.messages
    with pytest.raises(WrongKey):
        asyncio.run(serve(config_of(), load=load))
    assert "stopped" in caplog.messages


def test_two_servers_on_port_0_get_different_ports() -> None:
    async def work() -> tuple[str, str]:
        async with serving() as one, serving() as two:
            return one.server.address, two.server.address

    one, two = asyncio.run(work())
    assert one != two
    assert not one.endswith(":0")


def served_until(signal_number: int, tmp_path: Path, *, successor: str = "", **settings: Any) -> tuple[int, str, str]:
    """Runs `serve` and sends a signal during a call; returns (results of the call, address, port file afterwards).

    Args:
        signal_number: the signal.
        tmp_path: folder of the port file.
        successor: if given, another server writes this to the port file before the first one has ended.
        settings: settings of the server.
    """
    gate, port_file = threading.Event(), tmp_path / "address"
    port_file.write_text("stale\n")
    predictor = BrightPredictor()

    async def client(ended: asyncio.Event) -> tuple[int, str]:
        while not port_file.exists() or port_file.read_text() == "stale\n":
            await asyncio.sleep(0.005)
        address = port_file.read_text().strip()
        predictor.batches.clear()
        predictor.gate = gate
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
            call = asyncio.create_task(count(stub.LabelImage(label_request(*[DISC_BOX] * 3))))
            while not predictor.batches:
                await asyncio.sleep(0.001)
            os.kill(os.getpid(), signal_number)
            await until_refused(channel)
            assert not ended.is_set()
            if successor:
                port_file.write_text(successor)
            gate.set()
            return await call, address

    async def work() -> tuple[int, str]:
        ended = asyncio.Event()
        task = asyncio.create_task(client(ended))
        await serve(config_of(**settings), port_file=port_file, load=loading_with(predictor))
        ended.set()
        return await task

    results, address = asyncio.run(asyncio.wait_for(work(), LIMIT_S))
    return results, address, port_file.read_text() if port_file.exists() else ""


async def count(call: Any) -> int:
    return sum([len(response.results) async for response in call])


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_after_its_running_calls(
    signal_number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, address, port_file = served_until(signal_number, tmp_path, drain_delay_s=0.01)
    assert results == 3
    assert port_file == ""
    line = next(line for line in capsys.readouterr().out.splitlines() if "serving" in line)
    assert line == f"mal-server: serving disc on {address} (bright/1, student, cpu, float32, torch)"


def test_the_port_file_of_a_successor_is_kept(tmp_path: Path) -> None:
    _, _, port_file = served_until(signal.SIGTERM, tmp_path, successor="127.0.0.1:1\n", drain_delay_s=0.01)
    assert port_file == "127.0.0.1:1\n"


def test_sigint_skips_the_drain_delay(tmp_path: Path) -> None:
    assert served_until(signal.SIGINT, tmp_path, drain_delay_s=600)[0] == 3


def test_a_signal_during_loading_stops_the_server() -> None:
    gate, started = threading.Event(), threading.Event()

    def load(plan: ModelPlan) -> LoadedModel:
        started.set()
        gate.wait(LIMIT_S)
        return loaded(plan, BrightPredictor())

    async def work() -> None:
        task = asyncio.create_task(serve(config_of(), load=load))
        await asyncio.to_thread(started.wait)
        os.kill(os.getpid(), signal.SIGTERM)
        await task
        gate.set()

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))


def test_a_model_that_cannot_be_loaded_stops_the_server_with_its_error(tmp_path: Path) -> None:
    def load(plan: ModelPlan) -> LoadedModel:
        raise WrongKey("the key does not open it")

    port_file = tmp_path / "address"
    with pytest.raises(WrongKey):
        asyncio.run(serve(config_of(), port_file=port_file, load=load))
    assert not port_file.exists()


class Counting(BrightPredictor):
    """Counts the images that it crops."""

    images = 0

    def prepare(self, image: Any, boxes: Any, *, first: int = 0, points: Any = None) -> Any:
        crops = super().prepare(image, boxes, first=first, points=points)
        self.images += 1
        return crops


def test_a_lost_device_stops_the_server_at_once_and_fails_every_call_with_unavailable(tmp_path: Path) -> None:
    port_file, gate, predictor = tmp_path / "address", threading.Event(), Counting()

    async def client() -> tuple[list[Any], set[Any]]:
        while not port_file.exists():
            await asyncio.sleep(0.005)
        async with grpc.aio.insecure_channel(port_file.read_text().strip()) as channel:
            stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
            watched: Any = health_pb2_grpc.HealthStub(channel)
            watch = watched.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            predictor.gate, predictor.error = gate, DeviceLost("CUDA error: an illegal memory access")
            item = labeling_pb2.LabelImagesRequest(request=label_request(DISC_BOX))
            calls = [count(stub.LabelImage(label_request(*[DISC_BOX] * 4))) for _ in range(3)]
            calls.append(responses_of(stub.LabelImages(iter([item]))))
            before = predictor.images
            tasks = [asyncio.create_task(call) for call in calls]
            # All four calls have arrived: one runs on the device, the others wait.
            while len(predictor.batches) < 2 or predictor.images < before + len(calls):
                await asyncio.sleep(0.001)
            gate.set()
            status = (await watch.read()).status
            watch.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True), {status}

    async def work() -> tuple[list[Any], set[Any]]:
        task = asyncio.create_task(client())
        with pytest.raises(DeviceLost, match="illegal memory access"):
            await serve(
                config_of(max_batch_size=2, grace_s=600, threads=1), port_file=port_file, load=loading_with(predictor)
            )
        return await task

    errors, states = asyncio.run(asyncio.wait_for(work(), LIMIT_S))
    assert states == {NOT_SERVING}
    assert [error.code() for error in errors] == [grpc.StatusCode.UNAVAILABLE] * 4
    assert {reason_of(status_details(error)) for error in errors} == {"DEVICE_LOST"}
    assert len(predictor.batches) == 2  # the warm-up, and the one that failed
    assert DeviceLost.exit_code == 1
    assert not port_file.exists()


async def responses_of(call: Any) -> int:
    return len([response async for response in call])


@pytest.mark.parametrize("is_serving", [False, True], ids=["at-the-start", "by-LoadModel"])
def test_shutdown_does_not_wait_for_a_checkpoint_that_is_being_read(tmp_path: Path, is_serving: bool) -> None:
    gate, reading, port_file = threading.Event(), threading.Event(), tmp_path / "address"
    plans: list[ModelPlan] = []

    def load(plan: ModelPlan) -> LoadedModel:
        plans.append(plan)
        if len(plans) > is_serving:
            reading.set()
            gate.wait()
        return loaded(plan, BrightPredictor())

    async def load_another() -> grpc.StatusCode:
        while not port_file.exists():
            await asyncio.sleep(0.005)
        async with grpc.aio.insecure_channel(port_file.read_text().strip()) as channel:
            stub: Any = model_pb2_grpc.ModelServiceStub(channel)
            code: grpc.StatusCode = await stub.LoadModel(model_pb2.LoadModelRequest(name="disc")).code()
            return code

    async def stop() -> None:
        await asyncio.to_thread(reading.wait)
        os.kill(os.getpid(), signal.SIGTERM)

    async def work() -> grpc.StatusCode | None:
        other = asyncio.create_task(load_another()) if is_serving else None
        stopping = asyncio.create_task(stop())
        await serve(config_of(grace_s=0.1), port_file=port_file, load=load)
        await stopping
        return None if other is None else await other

    try:
        # The gate stays closed: this would hang if anything waited for the thread.
        code = asyncio.run(work())
    finally:
        gate.set()
    assert code in ({grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE} if is_serving else {None})


def test_an_error_that_ends_grpc_ends_the_process_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Otherwise the process would stay without a port, and no supervisor would start another one.
    broken = asyncio.Event()

    async def crash(accept_loop: Any) -> None:
        await broken.wait()
        raise ZeroDivisionError

    monkeypatch.setattr(grpc_server._AcceptLoop, "_serve_unknown", crash)
    port_file = tmp_path / "port"

    async def work() -> None:
        serving_until_broken = asyncio.create_task(
            serve(config_of(), port_file=port_file, load=loading_with(BrightPredictor()))
        )
        await until(port_file.exists)
        broken.set()
        with pytest.raises(ZeroDivisionError):
            await serving_until_broken

    asyncio.run(work())
