"""Latency of one caller beside idle connections, and beside callers without a token at full speed.

Prints the memory and the file descriptors of the server, the latency of a health check, and that of a LabelImage call
with one box and a fake model. Run it on an otherwise idle machine: python -m benchmarks.strangers
"""

import argparse
import asyncio
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mal.v1 import labeling_pb2_grpc

from tests.mal_server.fakes import DISC_BOX, label_request

TOKEN = secrets.token_hex(16)
SERVER = """
import asyncio, sys
from tests.mal_server.fakes import serving
async def main():
    tokens = [{"name": "a", "token": "env:MAL_BENCH_TOKEN", "scopes": ["label"]}]
    async with serving(tokens=tokens) as running:
        print(running.server.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
asyncio.run(main())
"""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"
ACK = b"\0\0\0\x04\x01\0\0\0\0"


@contextmanager
def served() -> Iterator[tuple[int, str]]:
    """Runs a server with a token in a process of its own; yields its process id and address."""
    environment = os.environ | {"MAL_BENCH_TOKEN": TOKEN}
    command = [sys.executable, "-c", SERVER]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.pid, process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(30)


def resources(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]
    return f"{int(status) / 1024:.0f} MiB, {len(os.listdir(f'/proc/{pid}/fd'))} descriptors"


async def latencies(call: Callable[[], Awaitable[Any]], count: int) -> str:
    """Returns median and 99th percentile of some calls, one after another."""
    times_ms = []
    for _ in range(count):
        begun = time.perf_counter()
        await call()
        times_ms.append((time.perf_counter() - begun) * 1000)
    return f"p50 {statistics.median(times_ms):.1f} ms, p99 {statistics.quantiles(times_ms, n=100)[98]:.1f} ms"


async def measure(name: str, pid: int, address: str, calls: int) -> None:
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    async with grpc.aio.insecure_channel(address) as channel:
        labeling: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)

        async def label() -> None:
            async for _ in labeling.LabelImage(label_request(DISC_BOX), metadata=metadata):
                pass

        await label()
        print(f"{name}: {resources(pid)}")
        print(f"  LabelImage  {await latencies(label, calls)}")
        print(f"  health      {await latencies(lambda: health.Check(health_pb2.HealthCheckRequest()), calls)}")


async def stranger(address: str) -> None:
    """Calls labeling, health and made-up methods without a token, as fast as the server answers."""
    async with grpc.aio.insecure_channel(address) as opened:
        channel: Any = opened
        paths = ("/mal.v1.LabelingService/LabelImage", "/grpc.health.v1.Health/Check", "/made/up")
        index = 0
        while True:
            index += 1
            call = channel.unary_unary(paths[index % 3] + (str(index) if index % 3 == 2 else ""))
            try:
                await call(b"")
            except grpc.aio.AioRpcError:
                continue


async def run(pid: int, address: str, connections: int, strangers: int, calls: int) -> None:
    await measure("alone", pid, address, calls)
    host, _, port = address.rpartition(":")
    opened = [await asyncio.open_connection(host, int(port)) for _ in range(connections)]
    for _, writer in opened:
        writer.write(PREFACE + ACK)
    await measure(f"beside {connections} idle connections", pid, address, calls)
    for _, writer in opened:
        writer.close()
    flood = [asyncio.create_task(stranger(address)) for _ in range(strangers)]
    await measure(f"beside {strangers} strangers at full speed", pid, address, calls)
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--strangers", type=int, default=8)
    parser.add_argument("--calls", type=int, default=500)
    args = parser.parse_args()
    with served() as (pid, address):
        asyncio.run(run(pid, address, args.connections, args.strangers, args.calls))


if __name__ == "__main__":
    main()
