"""Callers who leave, devices that are too small, servers that are told to end: nothing accepted is lost or wrong."""

import asyncio
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.load.caller import Plan
from benchmarks.load.deck import Picture, load_deck
from benchmarks.load.run import ROOT, environment, loading, samples_of, wait_for_address
from benchmarks.load.stand_in import StandIn
from tests.chaos.conftest import Form
from tests.mal_server.calls import bulk
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, Running, label, label_request, serving

Say = Callable[..., None]

QUEUED, CANCELLED, BATCH = 200, 190, 16


def test_cancelled_calls_free_the_device(form: Form, say: Say) -> None:
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
            found = await asyncio.gather(*ends)
            told_s = max(at for _, at in found) - began
            return Counter(code for code, _ in found), freed_s, told_s

    codes, freed_s, told_s = asyncio.run(asyncio.wait_for(work(), 120))
    ran = sum(size for _, size in predictor.batches) - 1
    say(
        "cancel",
        queued=QUEUED,
        cancelled=CANCELLED,
        reached_the_device=ran - (QUEUED - CANCELLED),
        freed_ms=freed_s * 1000,
        told_ms=told_s * 1000,
    )
    assert codes == {"OK": QUEUED - CANCELLED, "CANCELLED": CANCELLED}
    assert ran - (QUEUED - CANCELLED) <= BATCH
    if form.is_full:
        assert told_s < 0.1
        assert freed_s < 0.5


def test_a_storm_of_cancelled_calls_is_survived(form: Form, say: Say) -> None:
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
    say("cancel storm", calls=count, seconds=took_s, crops_run=ran)
    assert ran <= count + 1


def test_a_device_too_small_for_its_batches_gives_every_right_mask(form: Form, deck_folder: Path, say: Say) -> None:
    deck = load_deck(deck_folder)[: form.pick(3, 16)]
    answered = 0

    async def work(fits: int) -> int:
        async with serving(StandIn(fits=fits), max_batch_size=16) as running:
            return sum(await asyncio.gather(*(right_answers(running, picture) for picture in deck)))

    for fits in range(1, 17):
        found = asyncio.run(work(fits))
        answered += found
        assert found == sum(len(picture.boxes) for picture in deck), f"{fits} crops fit"
    say("out of memory", fits="1..16", boxes=answered, wrong=0)


async def right_answers(running: Running, picture: Picture) -> int:
    request = label_request(*picture.boxes, content=picture.content)
    results = await label(running, request)
    return sum(picture.is_right(place, result) for place, result in enumerate(results))


def test_a_crop_that_never_fits_fails_alone_in_a_stream(say: Say) -> None:
    async def work() -> Counter[int]:
        async with serving(StandIn()) as running:
            running.predictor.fits = 0  # not before: a device without room for one crop fails its warm-up
            answers = await bulk(running, *[label_request(DISC_BOX) for _ in range(20)])
            return Counter(result.status.code for answer in answers.values() for result in answer.response.results)

    codes = asyncio.run(work())
    say("out of memory at one crop", codes=dict(codes))
    assert codes == {grpc.StatusCode.INTERNAL.value[0]: 20}


def start(folder: Path, *arguments: str) -> "tuple[subprocess.Popen[bytes], str]":
    """A stand-in server that logs every call, and its address."""
    port_file = folder / "port"
    command = [sys.executable, "-m", "benchmarks.load.stand_in", "--port-file", str(port_file), "--log-level", "INFO"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *arguments], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log
        )
    return process, wait_for_address(process, port_file)


def first_not_serving(address: str) -> float:
    """When health first said NOT_SERVING; the stream must say it before it ends."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for answer in stub.Watch(health_pb2.HealthCheckRequest()):
            if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                return time.monotonic()
    raise AssertionError("health never said NOT_SERVING")


def drained(folder: Path, deck: Path, seed: int, delay_s: float) -> dict[str, Any]:
    """One SIGTERM under load: what clients and the server's log say."""
    folder.mkdir()
    process, address = start(folder, "--batch-ms", "20", f"drain_delay_s={delay_s}", "grace_s=30.0")
    try:
        plan = Plan(address, clients=8, seconds=60.0, boxes=2, stops_at_failure=True, seed=seed)
        with loading([plan], deck) as load:
            health: list[float] = []
            watch = threading.Thread(target=lambda: health.append(first_not_serving(address)))
            watch.start()
            until = time.monotonic() + 120
            while "LabelImage code=OK" not in (folder / "log").read_text():
                assert time.monotonic() < until, "no client called"
                time.sleep(0.01)
            time.sleep(random.Random(seed).uniform(0.0, 0.7))
            process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            code = process.wait(60)
            ended_s = time.monotonic() - told
            samples = samples_of(load.wait(120))
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


def test_a_server_that_is_told_to_end_answers_what_it_accepted(
    form: Form, deck_folder: Path, tmp_path: Path, say: Say
) -> None:
    # In the short form so long that health is heard before the first refusal on any machine.
    delay_s = form.pick(5.0, 0.3)
    runs = [drained(tmp_path / str(at), deck_folder, form.seed + at, delay_s) for at in range(form.pick(1, 50))]
    lost = sum(sum(run["logged"].values()) - run["answered"] for run in runs)
    slowest = max(run["ended_s"] for run in runs)
    say("drain", repeats=len(runs), answered=sum(run["answered"] for run in runs), lost=lost, slowest_s=slowest)
    for run in runs:
        assert run["exit"] == 0
        # Every call that reached a handler ended with OK there, and arrived with all its masks at the client.
        assert run["logged"] == {"OK": run["answered"]}
        # CANCELLED: gRPC took the call off the wire as the server closed, and no handler ever saw it.
        assert set(run["others"]) <= {"UNAVAILABLE", "CANCELLED"}
        assert run["wrong"] == 0
        assert run["not_serving"] < run["first_refused"]
    if form.is_full:
        assert slowest < 31


def test_callers_leave_in_every_way_and_the_rest_get_their_masks(form: Form, deck_folder: Path, say: Say) -> None:
    """Cancelled before and after the first message, past the deadline, half a stream: beside calls that are checked."""
    deck, chance = load_deck(deck_folder), random.Random(form.seed)
    seconds = form.pick(1.0, 60.0)
    counts: Counter[str] = Counter()

    async def rude(running: Running) -> None:
        picture = chance.choice(deck)
        request = label_request(*picture.boxes, content=picture.content)
        way = chance.choice(("cancel at once", "cancel later", "deadline", "half a stream", "no picture"))
        counts[way] += 1
        try:
            if way == "half a stream":
                call = running.labeling.LabelImages(iter([]))
                call.cancel()
                return
            if way == "no picture":
                request.image.content = picture.content[: chance.randrange(1, len(picture.content))]
            call = running.labeling.LabelImage(request, timeout=0.02 if way == "deadline" else None)
            if way.startswith("cancel"):
                await asyncio.sleep(0 if way == "cancel at once" else chance.uniform(0, 0.1))
                call.cancel()
            async for _ in call:
                pass
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            return

    async def work() -> tuple[int, int]:
        right = asked = 0
        async with serving(StandIn(batch_s=0.005), max_batch_size=8) as running:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                pictures = chance.choices(deck, k=4)
                rudes = [asyncio.create_task(rude(running)) for _ in range(8)]
                right += sum(await asyncio.gather(*(right_answers(running, picture) for picture in pictures)))
                asked += sum(len(picture.boxes) for picture in pictures)
                await asyncio.gather(*rudes)
            assert running.server.waiting == 0
        return right, asked

    right, asked = asyncio.run(asyncio.wait_for(work(), 600))
    say("rude callers", right=right, asked=asked, **{key.replace(" ", "_"): n for key, n in counts.items()})
    assert right == asked > 0
