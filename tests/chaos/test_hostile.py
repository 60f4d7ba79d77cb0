"""Malformed images and requests by the thousand: each gets a clear status, fast, with little memory."""

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mal.v1 import labeling_pb2
from PIL import Image

from mal_server.api.service import LabelingService
from mal_train.core.errors import BadImage
from mal_train.core.images.decoder import decode_image
from mal_train.core.images.header import DEFAULT_LIMITS
from tests.form import FORM, Form
from tests.mal_server.calls import bulk
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, Running, label, label_request, serving
from tests.mal_server.inference.test_bad_images import ACCEPTED, REFUSED, saved
from tests.mal_server.random_requests import REQUESTS
from tests.mal_server.security.test_auth import NOTHING, Certificates, calls_of, outcomes, reached
from tests.mal_train.core.images.hostile import HOSTILE
from tests.paths import ROOT

Record = Callable[..., None]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_S = 2.0
MAX_MIB = 256
LARGE_ONE_IN = 200


def corpus() -> list[bytes]:
    """Returns valid files, the invalid ones of test_bad_images, files made of headers, and one of too many pixels."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    valid = [saved(image, image_format) for image_format in FORMATS]
    invalid = [content for content, _ in REFUSED.values() if content]
    # Those of another size than asked for take long to decode, which is another test.
    headers = [content for make in HOSTILE.values() if len(content := make(3000)) < 20_000]
    # 18 KB; decoded, it would take more than MAX_MIB, and Pillow itself refuses only larger ones.
    too_large = saved(Image.new("1", (12_000, 12_000)), "PNG")
    return [*valid, *ACCEPTED.values(), *invalid, *headers, too_large]


def large(chance: random.Random, max_bytes: int) -> bytes:
    """Returns a file made of headers."""
    return chance.choice(list(HOSTILE.values()))(chance.randint(10_000, max_bytes))


def mutant(chance: random.Random, seeds: list[bytes]) -> bytes:
    """Returns a file with random edits: overwritten, truncated, repeated, spliced, or with a forged length."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data)) if data else 0
        match chance.randrange(6):
            case 0:
                data[at : at + chance.randint(1, 8)] = chance.randbytes(chance.randint(0, 8))
            case 1:
                del data[at:]
            case 2:
                data[at:at] = data[at : at + chance.randint(1, 64)]
            case 3:
                other = chance.choice(seeds)
                data[at:] = other[chance.randrange(len(other)) :]
            case 4:
                data[at : at + 4] = chance.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4, b"\xff\xff\xff\xf0"))
            case _:
                data[at : at + 1] = bytes([chance.randrange(256)])
    return bytes(data)


def status_mib(field: str) -> float:
    """Returns a size of this process, such as VmRSS."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) / 2**10


def begin_peak() -> float:
    """Makes the current memory the peak (VmHWM), and returns it in MiB: making a file may take more than reading it."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")


@pytest.mark.promise("images", "A damaged image is decoded or refused, each within 2 s of CPU time, with little memory")
def test_mutated_images_are_decoded_or_refused_fast_with_little_memory(form: Form, record: Record) -> None:
    chance, seeds, count = random.Random(form.seed), corpus(), form.pick(2000, 100_000)
    max_bytes = form.pick(2_000_000, DEFAULT_LIMITS.max_bytes - 100_000)
    outcomes: Counter[str] = Counter()
    slowest = growth = 0.0
    for number in range(count):
        data = mutant(chance, [large(chance, max_bytes)] if number % LARGE_ONE_IN == 0 else seeds)
        data = seeds[number] if number < len(seeds) else data
        before, began = begin_peak(), time.thread_time()
        try:
            image = decode_image(data)
            assert image.ndim == 3
            assert image.dtype == np.uint8
            outcomes["decoded"] += 1
        except BadImage as error:
            outcomes[error.reason] += 1
        slowest = max(slowest, time.thread_time() - began)
        growth = max(growth, status_mib("VmHWM") - before)
    record("mutated images", cases=count, growth_mib=growth, slowest_ms=slowest * 1000, **outcomes)
    assert sum(outcomes.values()) == count
    assert outcomes["decoded"] > 0
    assert growth <= MAX_MIB
    assert slowest <= MAX_S


# Prints CPU seconds, peak bytes and outcome of each file. The parent makes it; a child decodes it, whose peak starts at
# its memory then.
COSTS = """
import os, sys
from mal_train.core.errors import BadImage
from mal_train.core.images.decoder import decode_image
from mal_train.core.images.header import DEFAULT_LIMITS
from tests.mal_train.core.images.hostile import HOSTILE

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def cpu_s():
    times = os.times()
    return times.user + times.system

decode_image(HOSTILE["JPEG of comments"](100))
for make in HOSTILE.values():
    data = make(int(sys.argv[1]))
    if os.fork() == 0:
        memory, cpu = kilobytes("VmRSS"), cpu_s()
        try:
            decode_image(data)
            outcome = "decoded"
        except BadImage as error:
            outcome = error.reason
        print(cpu_s() - cpu, (kilobytes("VmHWM") - memory) * 1024, outcome, flush=True)
        os._exit(0)
    os.wait()
"""


class Cost(NamedTuple):
    cpu_s: float
    peak_bytes: int
    outcome: str


@pytest.fixture(scope="module")
def costs(form: Form) -> dict[str, Cost]:
    """Returns what decoding or refusing each file costs."""
    size = form.pick(8_000_000, DEFAULT_LIMITS.max_bytes - 100_000)
    done = subprocess.run(
        [sys.executable, "-c", COSTS, str(size)], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    return {
        name: Cost(float(cpu), int(peak), outcome) for name, (cpu, peak, outcome) in zip(HOSTILE, rows, strict=True)
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_of_headers_costs_at_most_two_seconds_and_256_mib(
    name: str, costs: dict[str, Cost], record: Record
) -> None:
    record(name, **costs[name]._asdict())
    assert costs[name].cpu_s <= MAX_S
    assert costs[name].peak_bytes <= MAX_MIB * 2**20
    assert costs[name].outcome in {"decoded", "IMAGE_TOO_LARGE", "IMAGE_DECODE_FAILED"}


def named(codes: Counter[int]) -> dict[str, int]:
    """Returns counts of status codes by name."""
    return {code_pb2.Code.Name(code): count for code, count in codes.items()}


@pytest.mark.promise("images", "No damaged image causes a server error")
def test_no_mutated_image_causes_a_server_error(form: Form, record: Record) -> None:
    chance, seeds, count = random.Random(form.seed + 1), corpus(), form.pick(200, 5000)

    async def work() -> Counter[int]:
        async with serving(max_batch_size=16) as running:
            requests = [label_request(DISC_BOX, content=mutant(chance, seeds)) for _ in range(count)]
            items = await bulk(running, *requests)
            assert len(await label(running, label_request(DISC_BOX))) == 1
            return Counter(item.status.code for item in items.values())

    codes = asyncio.run(asyncio.wait_for(work(), 600))
    record("mutated images, served", cases=count, codes=named(codes))
    assert set(codes) <= {code_pb2.OK, code_pb2.INVALID_ARGUMENT}
    assert sum(codes.values()) == count


ROUNDS = FORM.pick(10, 1000)


@given(st.lists(REQUESTS, min_size=20, max_size=20), st.binary(max_size=200))
@settings(max_examples=ROUNDS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def hostile_round(
    running: Running, loop: asyncio.AbstractEventLoop, seen: Counter[int], requests: Any, junk: Any
) -> None:
    async def work() -> None:
        for item in (await bulk(running, *requests)).values():
            seen[item.status.code] += 1
            seen.update(result.status.code for result in item.response.results)
        path = "/mal.v1.LabelingService/LabelImage"
        call: Any = running.channel.unary_stream(path)(junk)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            seen[error.code().value[0]] += 1
        assert len(await label(running, label_request(DISC_BOX, content=DISC_PNG))) == 1

    asyncio.run_coroutine_threadsafe(work(), loop).result(120)


@pytest.mark.promise("requests", "A random request is answered or refused as invalid, and the next call works")
def test_no_random_request_causes_a_server_error_or_breaks_the_next_call(form: Form, record: Record) -> None:
    seen: Counter[int] = Counter()

    async def work() -> None:
        async with serving() as running:
            await asyncio.to_thread(hostile_round, running, asyncio.get_running_loop(), seen)

    asyncio.run(work())
    record("random requests", cases=ROUNDS * 21, codes=named(seen))
    assert set(seen) <= {code_pb2.OK, code_pb2.INVALID_ARGUMENT}
    assert sum(seen.values()) >= ROUNDS * 20


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that receives an entry for each call that reaches a handler."""
    found: list[str] = []
    inner = LabelingService.LabelImage

    def counted(self: LabelingService, request: labeling_pb2.LabelImageRequest, context: Any) -> Any:
        found.append("LabelImage")
        return inner(self, request, context)

    monkeypatch.setattr(LabelingService, "LabelImage", counted)
    return found


@pytest.mark.promise("access", "No call without a valid certificate and token reaches a handler")
def test_calls_without_a_valid_certificate_and_token_reach_no_handler(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, entries: list[str], form: Form, record: Record
) -> None:
    monkeypatch.setenv("MAL_TEST_LABEL", "label-0123456789abcdef")
    tokens = [{"name": "label", "token": "env:MAL_TEST_LABEL", "scopes": ["label"]}]
    known = {"tls_ca": certificates.authority}
    strangers: list[dict[str, Any]] = [
        {"tls_ca": certificates.other_authority, "client_cert": certificates.client},
        {**known, "client_cert": certificates.expired},
        {**known, "client_cert": certificates.foreign},
        known,
        {},
    ]
    rounds = form.pick(1, 20)

    async def work() -> tuple[Counter[str], Counter[str], int, dict[str, str]]:
        refused: Counter[str] = Counter()
        shown: Counter[str] = Counter()
        async with serving(listen=certificates.listen(mutual=True), tokens=tokens) as running:
            for _ in range(rounds):
                for way in strangers:
                    async with reached(running.server.address, **way) as channel:
                        calls = calls_of(channel, "label-0123456789abcdef")
                        refused.update((await outcomes({"label": calls["label"]})).values())
                async with reached(running.server.address, **known, client_cert=certificates.client) as channel:
                    for token in (None, "", "wrong-0123456789abcdef", "label-0123456789abcde"):
                        found = await outcomes(calls_of(channel, token))
                        assert found == NOTHING
                        shown.update(found.values())
            before = len(entries)
            async with reached(running.server.address, **known, client_cert=certificates.client) as channel:
                valid = await outcomes({"label": calls_of(channel, "label-0123456789abcdef")["label"]})
        return refused, shown, before, valid

    refused, shown, before, valid = asyncio.run(asyncio.wait_for(work(), 600))
    record("certificates", rounds=rounds, handshakes=dict(refused), tokens=dict(shown), handler_entries=before)
    assert refused == {"UNAVAILABLE": rounds * len(strangers)}
    assert before == 0
    assert (valid, len(entries)) == ({"label": "OK"}, 1)
