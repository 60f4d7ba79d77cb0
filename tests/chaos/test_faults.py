"""Cancelled calls, devices that are too small, servers that shut down: no accepted call is lost or answered wrongly."""

import asyncio
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.load.client import Plan
from benchmarks.load.fake_server import FakePredictor
from benchmarks.load.images import LoadImage, load_images
from benchmarks.load.run import ROOT, all_samples, environment, run_clients, wait_for_address
from mal_train.core.errors import OutOfDeviceMemory
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions
from tests.form import Form
from tests.mal_server.calls import bulk, until
from tests.mal_server.fakes import (
    DISC_BOX,
    BrightPredictor,
    Running,
    bright_disc,
    encoded,
    label,
    label_request,
    serving,
)

Record = Callable[..., None]

QUEUED, CANCELLED, BATCH = 200, 190, 16


@pytest.mark.promise("faults", "Work of cancelled calls does not reach the device, but for one batch")
def test_cancelled_calls_release_the_device(form: Form, record: Record) -> None:
    gate, predictor = threading.Event(), BrightPredictor()

    async def code_of(call: Any) -> tuple[str, float]:
        try:
            await call.read()
        except asyncio.CancelledError:
            return "CANCELLED", time.monotonic()
        return "OK", 0.0

    async def work() -> tuple[Counter[str], float, float]:
        predictor.gate = gate
        async with serving(predictor, max_batch_size=BATCH) as running:
            busy = asyncio.create_task(label(running, label_request(DISC_BOX)))
            while not predictor.batches:
                await asyncio.sleep(0.001)
            calls = [running.labeling.LabelImage(label_request(DISC_BOX)) for _ in range(QUEUED)]
            ends = [asyncio.create_task(code_of(call)) for call in calls]
            while running.server.waiting < QUEUED:
                await asyncio.sleep(0.005)
            began = time.monotonic()
            for call in random.Random(form.seed).sample(calls, CANCELLED):
                call.cancel()
            while running.server.waiting > QUEUED - CANCELLED:
                await asyncio.sleep(0.001)
            freed_s = time.monotonic() - began
            gate.set()
            await busy
            outcomes = await asyncio.gather(*ends)
            noticed_s = max(at for _, at in outcomes) - began
            return Counter(code for code, _ in outcomes), freed_s, noticed_s

    codes, freed_s, noticed_s = asyncio.run(asyncio.wait_for(work(), 120))
    ran = sum(size for _, size in predictor.batches) - 1
    record(
        "cancel",
        queued=QUEUED,
        cancelled=CANCELLED,
        reached_the_device=ran - (QUEUED - CANCELLED),
        freed_ms=freed_s * 1000,
        noticed_ms=noticed_s * 1000,
    )
    assert codes == {"OK": QUEUED - CANCELLED, "CANCELLED": CANCELLED}
    assert ran - (QUEUED - CANCELLED) <= BATCH
    if form.is_full:
        assert noticed_s < 0.1
        assert freed_s < 0.5


@pytest.mark.promise("faults", "The server answers after a burst of cancelled calls")
def test_the_server_survives_a_burst_of_cancelled_calls(form: Form, record: Record) -> None:
    count = form.pick(500, 20_000)

    async def work() -> tuple[float, int]:
        async with serving(BrightPredictor(), max_batch_size=BATCH) as running:
            began = time.monotonic()
            for start in range(0, count, 500):
                calls = [running.labeling.LabelImage(label_request(DISC_BOX)) for _ in range(min(500, count - start))]
                await asyncio.sleep(0)
                for call in calls:
                    call.cancel()
            took_s = time.monotonic() - began
            assert len(await label(running, label_request(DISC_BOX))) == 1
            while running.server.waiting:
                await asyncio.sleep(0.01)
            return took_s, sum(size for _, size in running.predictor.batches)

    took_s, ran = asyncio.run(asyncio.wait_for(work(), 600))
    record("cancel burst", calls=count, seconds=took_s, crops_run=ran)
    assert ran <= count + 1


@pytest.mark.promise("faults", "A device with too little memory for its batches returns the right masks")
def test_a_device_too_small_for_its_batches_returns_correct_masks(
    form: Form, deck_folder: Path, record: Record
) -> None:
    deck = load_images(deck_folder)[: form.pick(3, 16)]
    labeled = 0

    async def work(fits: int) -> int:
        async with serving(FakePredictor(fits=fits), max_batch_size=16) as running:
            return sum(await asyncio.gather(*(correct_masks(running, image) for image in deck)))

    for fits in range(1, 17):
        correct = asyncio.run(work(fits))
        labeled += correct
        assert correct == sum(len(image.boxes) for image in deck), f"{fits} crops fit"
    record("out of memory", fits="1..16", boxes=labeled, wrong=0)


async def correct_masks(running: Running, image: LoadImage) -> int:
    request = label_request(*image.boxes, content=image.content)
    results = await label(running, request)
    return sum(image.is_right(index, result) for index, result in enumerate(results))


NEVER_FITS_HW = (44, 66)
"""Size of the images whose crops do not fit on the device."""


class SmallDevice(BrightPredictor):
    """Raises OutOfDeviceMemory for every batch with a crop of such an image."""

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        if any(crop.image_hw == NEVER_FITS_HW for crop in crops):
            raise OutOfDeviceMemory(f"a crop among {len(crops)} does not fit")
        return super().predict(crops, options)


@pytest.mark.promise("faults", "A crop that never fits on the device fails alone")
def test_a_crop_that_never_fits_fails_alone_in_a_stream(record: Record) -> None:
    predictor = SmallDevice(gate=threading.Event())
    large = label_request(DISC_BOX, content=encoded(bright_disc(*NEVER_FITS_HW)))
    requests = [large if number in (1, 4) else label_request(DISC_BOX) for number in range(20)]

    async def work() -> dict[str, int]:
        async with serving(predictor, max_batch_size=BATCH) as running:
            busy = asyncio.create_task(label(running, label_request(DISC_BOX)))
            await until(lambda: predictor.batches)
            stream = asyncio.create_task(bulk(running, *requests))
            await until(lambda: running.server.waiting >= 6)  # the next batch, with both large crops
            assert predictor.gate is not None
            predictor.gate.set()
            await busy
            return {
                name: result.status.code for name, item in (await stream).items() for result in item.response.results
            }

    codes = asyncio.run(asyncio.wait_for(work(), 120))
    failed = {name for name, code in codes.items() if code == grpc.StatusCode.INTERNAL.value[0]}
    record("out of memory at one crop", requests=len(codes), internal=len(failed))
    assert failed == {"item 1", "item 4"}
    assert Counter(codes.values()) == {0: 18, grpc.StatusCode.INTERNAL.value[0]: 2}


def start(folder: Path, *arguments: str) -> "tuple[subprocess.Popen[bytes], str]":
    """Starts a stand-in server that logs every call; returns it and its address."""
    port_file = folder / "port"
    command = [
        sys.executable,
        "-m",
        "benchmarks.load.fake_server",
        "--port-file",
        str(port_file),
        "--log-level",
        "INFO",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *arguments], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log
        )
    return process, wait_for_address(process, port_file)


def first_not_serving(address: str) -> float:
    """Returns the time of the first NOT_SERVING of a health stream; it must come before the stream ends."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for response in stub.Watch(health_pb2.HealthCheckRequest()):
            if response.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                return time.monotonic()
    raise AssertionError("health: the stream ended without NOT_SERVING")


def drained(folder: Path, deck: Path, seed: int, delay_s: float) -> dict[str, Any]:
    """Sends SIGTERM under load; returns what the clients and the server's log recorded."""
    folder.mkdir()
    process, address = start(folder, "--batch-ms", "20", f"drain_delay_s={delay_s}", "grace_s=30.0")
    try:
        plan = Plan(address, clients=8, seconds=60.0, boxes=2, stops_at_failure=True, seed=seed)
        with run_clients([plan], deck) as load:
            health: list[float] = []
            watch = threading.Thread(target=lambda: health.append(first_not_serving(address)))
            watch.start()
            until = time.monotonic() + 120
            while "LabelImage code=OK" not in (folder / "log").read_text():
                assert time.monotonic() < until, "no client called"
                time.sleep(0.01)
            time.sleep(random.Random(seed).uniform(0.0, 0.7))
            process.send_signal(signal.SIGTERM)
            signaled = time.monotonic()
            code = process.wait(60)
            ended_s = time.monotonic() - signaled
            samples = all_samples(load.wait(120))
            watch.join(10)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    logged = Counter(re.findall(r"LabelImage code=(\w+)", (folder / "log").read_text()))
    return {
        "exit": code,
        "ended_s": ended_s,
        "logged": logged,
        "answered": sum(one.code == "OK" and one.right == one.boxes for one in samples),
        "others": Counter(one.code for one in samples if one.code != "OK"),
        "wrong": sum(one.wrong for one in samples),
        "first_refused": min(one.end for one in samples if one.code != "OK"),
        "not_serving": health[0],
    }


@pytest.mark.promise("faults", "SIGTERM under load: health changes first, and no accepted call is lost")
def test_a_draining_server_completes_every_accepted_call(
    form: Form, deck_folder: Path, tmp_path: Path, record: Record
) -> None:
    # Long in the short form, so that even a slow client sees health change before the first refusal.
    delay_s = form.pick(5.0, 0.3)
    runs = [drained(tmp_path / str(n), deck_folder, form.seed + n, delay_s) for n in range(form.pick(1, 50))]
    lost = sum(sum(run["logged"].values()) - run["answered"] for run in runs)
    slowest = max(run["ended_s"] for run in runs)
    record("drain", repeats=len(runs), answered=sum(run["answered"] for run in runs), lost=lost, slowest_s=slowest)
    for run in runs:
        assert run["exit"] == 0
        # Every call that reached a handler ended with OK, and its client received all masks.
        assert run["logged"] == {"OK": run["answered"]}
        # CANCELLED: gRPC received the call while the server closed; it reached no handler.
        assert set(run["others"]) <= {"UNAVAILABLE", "CANCELLED"}
        assert run["wrong"] == 0
        assert run["not_serving"] < run["first_refused"]
    if form.is_full:
        assert slowest < 31


@pytest.mark.promise("faults", "Aborted calls do not affect the masks of others")
def test_aborted_calls_of_every_kind_do_not_affect_the_others(form: Form, deck_folder: Path, record: Record) -> None:
    """Aborts: cancelled at once or later, past the deadline, half a stream, a truncated image. Masks are checked."""
    deck, chance = load_images(deck_folder), random.Random(form.seed)
    seconds = form.pick(1.0, 60.0)
    counts: Counter[str] = Counter()

    async def aborted(running: Running) -> None:
        image = chance.choice(deck)
        request = label_request(*image.boxes, content=image.content)
        kind = chance.choice(("cancel at once", "cancel later", "deadline", "half a stream", "truncated image"))
        counts[kind] += 1
        try:
            if kind == "half a stream":
                call = running.labeling.LabelImages(iter([]))
                call.cancel()
                return
            if kind == "truncated image":
                request.image.content = image.content[: chance.randrange(1, len(image.content))]
            call = running.labeling.LabelImage(request, timeout=0.02 if kind == "deadline" else None)
            if kind.startswith("cancel"):
                await asyncio.sleep(0 if kind == "cancel at once" else chance.uniform(0, 0.1))
                call.cancel()
            async for _ in call:
                pass
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            return

    async def work() -> tuple[int, int]:
        correct = requested = 0
        async with serving(FakePredictor(batch_s=0.005), max_batch_size=8) as running:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                images = chance.choices(deck, k=4)
                aborts = [asyncio.create_task(aborted(running)) for _ in range(8)]
                correct += sum(await asyncio.gather(*(correct_masks(running, image) for image in images)))
                requested += sum(len(image.boxes) for image in images)
                await asyncio.gather(*aborts)
            assert running.server.waiting == 0
        return correct, requested

    correct, requested = asyncio.run(asyncio.wait_for(work(), 600))
    record(
        "aborted calls",
        correct=correct,
        requested=requested,
        aborts=dict(counts),
    )
    assert correct == requested > 0
