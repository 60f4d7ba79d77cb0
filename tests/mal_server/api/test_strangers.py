"""Callers without a token: their method names, request ids, health checks and unfinished messages."""

import asyncio
import json
from itertools import count
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mal.v1 import model_pb2

from mal_server.api.grpc_server import READ_AHEAD_BYTES
from mal_server.api.health import MAX_NAME_BYTES, MAX_WATCHES, HealthService
from mal_server.api.interceptors import MAX_SMALL_BYTES, SMALL_SLOTS, _catch_refusal
from mal_server.errors import InvalidRequest
from mal_server.ops.logging import JsonFormatter
from tests.mal_server.calls import until
from tests.mal_server.fakes import DISC_BOX, Running, label, label_request, serving
from tests.mal_server.ops.test_metrics import failed, logged, metrics_after
from tests.mal_server.raw_http2 import RawConnection, message

CHECK = b"/grpc.health.v1.Health/Check"
INFO = b"/mal.v1.ModelService/GetServerInfo"


async def is_served(running: Running) -> bool:
    """Returns whether another caller is served."""
    return len(await label(running, label_request(DISC_BOX))) == 1


async def send_raw(running: Running, path: bytes, *headers: tuple[bytes, bytes]) -> bytes:
    """Sends an empty message; returns the undecoded headers and trailers of the response."""
    connection = await RawConnection.open(running.server.address)
    connection.call(1, path, *headers)
    await connection.send(1, message(b""), is_last=True)
    await connection.wait_ended(1)
    await connection.close()
    return connection.headers[1]


@pytest.mark.parametrize("path", [b"/x/\xff\xfe", b"\xff", b"/mal.v1.ModelService/GetServerInfo\xc3", b"/x/\x00"])
def test_a_method_name_of_any_bytes_does_not_end_the_server(path: bytes) -> None:
    async def work() -> bool:
        async with serving() as running:
            await send_raw(running, path)
            return await is_served(running)

    assert asyncio.run(work())


def test_an_unknown_method_is_unimplemented() -> None:
    async def work() -> grpc.StatusCode:
        async with serving() as running:
            return (await failed(running.channel.unary_unary("/mal.v2.Later/Method")(b""))).code()

    assert asyncio.run(work()) is grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setenv("MAL_TEST_TOKEN", "0123456789abcdef")
    return [{"name": "a", "token": "env:MAL_TEST_TOKEN", "scopes": ["admin"]}]


def test_made_up_methods_add_one_label_to_the_metrics(tokens: list[dict[str, Any]]) -> None:
    async def work(running: Running) -> None:
        for index in range(20):
            await failed(running.channel.unary_unary(f"/x/{index}")(b""))

    metrics = metrics_after(work, tokens=tokens)
    labels = [name for name in metrics if name.startswith("grpc_server_handled_total")]
    assert labels == ['grpc_server_handled_total{code="UNAUTHENTICATED",method="unknown"}']
    assert metrics[labels[0]] == 20


def test_a_made_up_method_does_not_reach_the_log(tokens: list[dict[str, Any]]) -> None:
    async def work(running: Running) -> None:
        await failed(running.channel.unary_unary("/x/y code=OK caller=admin")(b""))

    (line,) = logged(JsonFormatter(), work, tokens=tokens)
    assert (json.loads(line)["method"], json.loads(line)["code"]) == ("unknown", "UNAUTHENTICATED")


def test_a_request_id_that_is_not_ascii_is_replaced_and_the_call_has_a_status() -> None:
    async def work() -> tuple[bytes, bytes]:
        async with serving() as running:
            trailers = await send_raw(running, INFO, (b"x-request-id", b"\xe9\xe9\xe9"))
            await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
            return trailers, await send_raw(running, INFO, (b"x-request-id", b"plain-1"))

    replaced, kept = asyncio.run(work())
    assert b"grpc-status" in replaced
    assert b"\xe9" not in replaced
    assert b"plain-1" in kept


def stub_of(running: Running) -> Any:
    return health_pb2_grpc.HealthStub(running.channel)


@pytest.mark.parametrize(
    ("size", "code"),
    [
        (MAX_NAME_BYTES, grpc.StatusCode.NOT_FOUND),
        (MAX_NAME_BYTES + 1, grpc.StatusCode.INVALID_ARGUMENT),
        (MAX_SMALL_BYTES + 1, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_health_check_has_a_short_name(size: int, code: grpc.StatusCode) -> None:
    async def work() -> grpc.StatusCode:
        async with serving() as running:
            return (await failed(stub_of(running).Check(health_pb2.HealthCheckRequest(service="x" * size)))).code()

    assert asyncio.run(work()) is code


def test_a_watch_of_a_long_name_is_refused() -> None:
    async def work() -> grpc.StatusCode:
        async with serving() as running:
            request = health_pb2.HealthCheckRequest(service="x" * (MAX_NAME_BYTES + 1))
            return (await failed(stub_of(running).Watch(request).read())).code()

    assert asyncio.run(work()) is grpc.StatusCode.INVALID_ARGUMENT


class Aborted(Exception):
    """Raised in place of gRPC's own error."""


class Context:
    """A context that raises the code of an abort."""

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Aborted(code)


def test_one_watch_too_many_ends_the_oldest() -> None:
    async def work() -> None:
        health, context = HealthService(), Context()
        names = map(str, range(MAX_WATCHES + 1))
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=name), context) for name in names]
        for watch in watches:
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        with pytest.raises(Aborted) as raised:
            await anext(watches[0])
        assert raised.value.args == (grpc.StatusCode.UNIMPLEMENTED,)
        health.set("1", health_pb2.HealthCheckResponse.SERVING)
        assert (await anext(watches[1])).status == health_pb2.HealthCheckResponse.SERVING
        for watch in watches:
            await watch.aclose()

    asyncio.run(work())


def test_a_watch_sees_a_service_come_and_go() -> None:
    async def work() -> list[int]:
        health = HealthService()
        watch = health.Watch(health_pb2.HealthCheckRequest(service="a"), None)
        states = [(await anext(watch)).status]
        health.set("b", health_pb2.HealthCheckResponse.SERVING)
        health.set("a", health_pb2.HealthCheckResponse.SERVING)
        states.append((await anext(watch)).status)
        health.forget("a")
        states.append((await anext(watch)).status)
        await watch.aclose()
        return states

    states = health_pb2.HealthCheckResponse
    assert asyncio.run(work()) == [states.SERVICE_UNKNOWN, states.SERVING, states.SERVICE_UNKNOWN]


async def accepted_bytes(running: Running, path: bytes, streams: int, size: int) -> int:
    """Sends all but the last byte of a message on each stream; returns the bytes that the server took."""
    connection = await RawConnection.open(running.server.address)
    taken = 0

    async def send(stream: int) -> None:
        nonlocal taken
        data = message(bytes(size - 1), size)
        while data and stream not in connection.ended:
            part, data = data[:16384], data[16384:]
            await connection.send(stream, part)
            taken += len(part)

    for stream in range(1, 2 * streams, 2):
        connection.call(stream, path)
    sending = [asyncio.create_task(send(stream)) for stream in range(1, 2 * streams, 2)]
    before = -1
    while taken > before:  # until nothing moves any more
        before = taken
        for _ in range(20):
            await stub_of(running).Check(health_pb2.HealthCheckRequest())
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, return_exceptions=True)
    await connection.close()
    return taken


def test_unfinished_requests_are_held_back_at_the_window() -> None:
    async def work() -> int:
        limits = {"max_request_bytes": 1 << 20}
        connections = {"max_receiving_bytes": 4 << 20}
        async with serving(limits=limits, connections=connections) as running:
            return await accepted_bytes(running, b"/mal.v1.LabelingService/LabelImage", 12, 1 << 20)

    # One connection gets half of the four slots; the others stop at gRPC's window.
    assert asyncio.run(work()) < 2 * (1 << 20) + 12 * 2 * READ_AHEAD_BYTES


def test_unfinished_health_checks_end_and_others_are_answered_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_server.api.interceptors.SMALL_CONTESTED_S", 0.05)
    monkeypatch.setattr("mal_server.api.interceptors.SMALL_TIMEOUT_S", 0.3)

    async def work() -> None:
        async with serving() as running:
            connection = await RawConnection.open(running.server.address)
            streams = range(1, 6 * SMALL_SLOTS, 2)
            for stream in streams:
                connection.call(stream, CHECK)
                await connection.send(stream, message(b"x", 1 << 20))
            await stub_of(running).Check(health_pb2.HealthCheckRequest())
            for stream in streams:
                await connection.wait_ended(stream)
            assert not connection.is_closed
            await connection.close()

    asyncio.run(work())


async def keep_a_place(connection: RawConnection) -> None:
    """Sends health checks that never end, one after another."""
    for stream in count(1, 2):
        connection.call(stream, CHECK)
        await connection.send(stream, message(b"x", 1 << 20))
        await connection.wait_ended(stream)


def test_health_checks_are_answered_beside_more_connections_with_unfinished_ones_than_may_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A probe has a host of its own and a connection for each check, and waits for half of the slots at most."""
    monkeypatch.setattr("mal_server.api.interceptors.MAX_SMALL_CALLS", 40)

    async def work() -> None:
        async with serving() as running:
            address = running.server.address
            strangers = [await RawConnection.open(address, "127.0.0.2") for _ in range(60)]
            keeping = [asyncio.create_task(keep_a_place(stranger)) for stranger in strangers]
            await asyncio.sleep(0.5)
            for _ in range(5):
                async with grpc.aio.insecure_channel(address) as channel:
                    stub: Any = health_pb2_grpc.HealthStub(channel)
                    await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)
            for stranger in strangers:
                await stranger.close()

    asyncio.run(work())


def test_a_vanished_sender_gives_its_slot_back() -> None:
    async def work() -> None:
        async with serving(connections={"max_receiving_bytes": 1 << 20}) as running:
            for _ in range(3):
                connection = await RawConnection.open(running.server.address)
                connection.call(1, INFO)
                await connection.send(1, message(b"", 1))
                await until(lambda: running.server.running_calls)
                await connection.close()
                await until(lambda: not running.server.running_calls)
            await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
            await until(lambda: not running.server.running_calls)

    asyncio.run(work())


def test_a_refused_message_is_not_kept_in_memory() -> None:
    def refuse(data: bytes) -> None:
        raise InvalidRequest([("", "refused")])

    error = _catch_refusal(refuse)(b"message")
    assert isinstance(error, InvalidRequest)
    assert error.__traceback__ is None
