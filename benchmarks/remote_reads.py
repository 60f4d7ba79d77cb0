"""Measures how many remote images are read in a second: one after another, and ahead in threads, by the latency.

A web server in a process of its own answers each request after a pause, as a store does that is some milliseconds away;
an S3 server (moto) shows what the library of S3 adds. The ratio of the two ways does not depend much on the machine.

    python -m benchmarks.remote_reads [--images N] [--json FILE]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.timing import Table
from mal_train.core.storage.read_ahead import READERS, ReadAhead
from mal_train.core.storage.reading import read_bytes
from tests.object_store import S3, moto_server

LATENCIES_MS = (5, 20, 80)
IMAGE_BYTES = 100_000
LEAST_RATIO = 4.0
"""Bound of the gain at the longest latency; 16 readers could give 16."""

SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    body = bytes(int(sys.argv[2]))

    def do_GET(self):
        time.sleep(float(sys.argv[1]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass

class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@contextmanager
def slow_server(latency_ms: int) -> Iterator[str]:
    """Runs a web server during the block; yields its address."""
    command = [sys.executable, "-c", SERVER, str(latency_ms / 1000), str(IMAGE_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


def one_by_one(addresses: Sequence[str]) -> None:
    """Reads every address in this thread."""
    for address in addresses:
        assert len(read_bytes(address, IMAGE_BYTES)) == IMAGE_BYTES


def ahead(addresses: Sequence[str]) -> None:
    """Reads every address ahead, as jobs do."""
    with ReadAhead(addresses, lambda address: read_bytes(address, IMAGE_BYTES), len, str) as items:
        for address in items:
            assert len(items.take(address)) == IMAGE_BYTES


def rate(read: Callable[[Sequence[str]], None], addresses: Sequence[str]) -> float:
    """Returns the images per second, with open connections."""
    read(addresses[:READERS])
    begin = time.monotonic()
    read(addresses)
    return len(addresses) / (time.monotonic() - begin)


def add_rows(table: Table, name: str, addresses: Sequence[str], least: float | None = None) -> None:
    """Adds the rates of both ways, and their ratio."""
    alone, together = rate(one_by_one, addresses), rate(ahead, addresses)
    table.add(f"{name}: one by one", alone, "images/s")
    table.add(f"{name}: {READERS} readers ahead", together, "images/s")
    table.add(f"{name}: gain", together / alone, "times", least=least)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, metavar="N", help="images of a row (default: 300)")
    table = Table("remote_reads", f"Remote images of {IMAGE_BYTES} bytes", parser)
    numbers = range(table.arguments.images)
    for latency_ms in LATENCIES_MS:
        with slow_server(latency_ms) as base:
            least = LEAST_RATIO if latency_ms == max(LATENCIES_MS) else None
            add_rows(table, f"http, {latency_ms} ms", [f"{base}/{number}" for number in numbers], least)
    with tempfile.TemporaryDirectory() as folder, moto_server(Path(folder) / "log") as address:
        s3 = S3(address)
        s3.reset()
        os.environ.update({**s3.environment(), "AWS_ENDPOINT_URL": f"http://{address}"})
        for number in numbers:
            s3.put(str(number), bytes(IMAGE_BYTES))
        add_rows(table, "S3 (moto, no latency)", [s3.address(str(number)) for number in numbers])
        s3.close()
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
