"""Tests of the playground's images and labels, with the real server around a predictor without a network."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
from mal_client.errors import ItemError
from mal_client.playground.image_store import ImageStore
from mal_client.playground.schema import error_json
from PIL import Image

from mal_server.server import MalServer
from mal_train.core.images.container import ImageHeader
from mal_train.core.images.decoder import decode_image
from mal_train.core.masks.rle import Rle, decode_mask
from tests.mal_client.playground.playground_page import (
    BOX_IN_CORNER,
    DISC,
    HeldAfterFirst,
    Page,
    error_of,
    expected_label,
    label_body,
    lines_of,
    playground,
    send_image,
    with_playground,
)
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, SHA256, encoded, serving
from tests.proxy import recording_proxy

HEADER = ImageHeader((1, 1))


def test_an_image_above_the_limits_of_the_server_is_refused_by_the_playground() -> None:
    async def send(page: Page) -> list[tuple[int, dict[str, Any]]]:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield bytes(100_000)

        wide = encoded(np.zeros((2, 300, 3), np.uint8))
        contents: list[Any] = [bytes(1024 * 1024), chunks(), wide]
        return [await error_of(page.post("/api/images", data=content)) for content in contents]

    limits = {"max_request_bytes": 1024 * 1024, "max_side": 200}
    for status, error in with_playground(send, limits=limits):
        assert (status, error["reason"]) == (413, "IMAGE_TOO_LARGE")


def test_the_playground_reaches_a_server_on_this_machine_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    async def label(page: Page) -> dict[str, dict[str, Any]]:
        return await lines_of(page, await send_image(page), label_body(DISC_BOX))

    with recording_proxy() as proxy:
        for variable in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        assert with_playground(label).keys() == {"b0"}
        assert proxy.requests == []


@pytest.mark.parametrize("content", [b"", b"not an image", DISC_PNG[:30]])
def test_a_file_that_is_not_an_image_is_refused_with_its_reason(content: bytes) -> None:
    status, error = with_playground(lambda page: error_of(page.post("/api/images", data=content)))
    assert status == 400
    assert error["reason"] in {"IMAGE_FORMAT", "IMAGE_DECODE_FAILED"}
    assert error["message"].startswith("image: ")


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(DISC, "JPEG", exif=exif.tobytes())


@pytest.mark.parametrize(
    ("content", "browser_can_decode"),
    [
        (encoded(DISC, "JPEG"), True),
        (rotated_jpeg(), False),
        (encoded(DISC, "TIFF"), False),
        (DISC_PNG, False),
    ],
    ids=["jpeg", "rotated", "tiff", "png"],
)
def test_the_page_shows_the_pixels_that_the_network_sees(content: bytes, browser_can_decode: bool) -> None:
    async def look(page: Page) -> tuple[dict[str, Any], bytes]:
        async with page.post("/api/images", data=content) as response:
            stored = await response.json()
        async with page.get(f"/api/images/{stored['sha256']}/pixels") as response:
            return stored, await response.read()

    stored, png = with_playground(look)
    assert (stored["width"], stored["height"], stored["browser_can_decode"]) == (60, 40, browser_can_decode)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), decode_image(content))


def test_masks_obey_the_points_of_their_box() -> None:
    points = {0: [[20.5, 10.5, 1], [30.5, 20.5, 0]], 1: [[59.5, 39.5, 1]], 2: [[20.5, 10.5, 0]] * 1000}

    async def label(page: Page) -> dict[str, dict[str, Any]]:
        return await lines_of(
            page, await send_image(page), label_body(DISC_BOX, BOX_IN_CORNER, DISC_BOX, points=points)
        )

    lines = with_playground(label)
    mask = decode_mask(Rle.from_coco(lines["b0"]["rle"]))
    assert [bool(mask[10, 20]), bool(mask[20, 30])] == [True, False]
    assert [lines[name]["error"]["reason"] for name in ("b1", "b2")] == ["BAD_POINT", "BAD_POINT"]


@pytest.mark.parametrize("points", [3, [[1, 2]], [[1, 2, 5]], [["1", 2, 0]]])
def test_points_of_another_form_are_refused(points: Any) -> None:
    async def send(page: Page) -> tuple[int, dict[str, Any]]:
        sha256 = await send_image(page)
        return await error_of(page.post(f"/api/images/{sha256}/labels", json=label_body(DISC_BOX, points={0: points})))

    status, error = with_playground(send)
    assert (status, error["code"]) == (400, "INVALID_ARGUMENT")


def test_an_unknown_image_has_a_reason_of_its_own() -> None:
    status, error = with_playground(
        lambda page: error_of(page.post(f"/api/images/{'0' * 64}/labels", json=label_body(DISC_BOX)))
    )
    assert (status, error["reason"]) == (404, "IMAGE_UNKNOWN")


def test_the_least_recently_used_images_are_evicted_first() -> None:
    store = ImageStore(30)
    first, second = store.add(bytes(10), HEADER), store.add(bytes(11), HEADER)
    store.get(first.sha256)
    third = store.add(bytes(15), HEADER)
    assert [store.get(image.sha256) is not None for image in (first, second, third)] == [True, False, True]
    store.add(bytes(15), HEADER)
    assert store.get(first.sha256) is not None
    only = store.add(bytes(100), HEADER)
    assert [store.get(image.sha256) is not None for image in (first, third, only)] == [False, False, True]


def test_each_box_gets_the_mask_of_the_kernel() -> None:
    async def run(page: Page) -> dict[str, dict[str, Any]]:
        return await lines_of(
            page, await send_image(page), label_body(DISC_BOX, BOX_IN_CORNER, (-9, 0, 40.5, 40), agreement=True)
        )

    lines = with_playground(run, max_batch_size=2)
    for key, box in [("b0", DISC_BOX), ("b1", BOX_IN_CORNER), ("b2", (-9.0, 0.0, 40.5, 40.0))]:
        expected = expected_label(box, agreement=True)
        assert lines[key]["rle"] == expected.rle.to_coco()
        assert lines[key]["score"] == expected.score
        assert lines[key]["agreement"] == expected.agreement
        assert lines[key]["flags"] == [str(flag) for flag in expected.flags]
        assert lines[key]["model"]["checkpoint_sha256"] == SHA256


def test_the_threshold_of_a_box_overrides_that_of_the_image() -> None:
    async def run(page: Page) -> dict[str, dict[str, Any]]:
        body = label_body(DISC_BOX, DISC_BOX, DISC_BOX, thresholds={1: 0.03}, threshold=0.95)
        return await lines_of(page, await send_image(page), body)

    lines = with_playground(run)
    assert lines["b0"]["rle"] == lines["b2"]["rle"] == expected_label(DISC_BOX, threshold=0.95).rle.to_coco()
    assert lines["b1"]["rle"] == expected_label(DISC_BOX, threshold=0.03).rle.to_coco()
    assert lines["b0"]["rle"] != lines["b1"]["rle"]


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (900, 0, 5, 5), (None, 1, 2, 3), (1, 2, 3), ("a", 1, 2, 3)])
def test_a_bad_box_fails_alone_and_its_message_has_no_index(box: Any) -> None:
    async def run(page: Page) -> dict[str, dict[str, Any]]:
        return await lines_of(page, await send_image(page), label_body(DISC_BOX, box))

    lines = with_playground(run)
    assert lines["b0"]["rle"] == expected_label(DISC_BOX).rle.to_coco()
    assert lines["b1"]["error"]["reason"] == "BAD_BOX"
    assert not lines["b1"]["error"]["message"].startswith("box ")


def test_the_number_of_a_box_in_the_message_of_an_older_server_is_removed() -> None:
    messages = ("box 3: empty", "box -1: empty", "empty", "a box 3: empty")
    errors = [error_json(ItemError("INVALID_ARGUMENT", "BAD_BOX", message)) for message in messages]
    assert [error["message"] for error in errors] == ["empty", "empty", "empty", "a box 3: empty"]


def test_further_edits_use_the_image_cache_of_the_labeling_server() -> None:
    async def run() -> tuple[float | None, int]:
        async with serving() as running, playground(running.server.address) as page:
            name = await send_image(page, encoded(DISC, "BMP"))
            for _ in range(3):
                lines = await lines_of(page, name, label_body(DISC_BOX))
            hits = running.server.registry.get_sample_value("mal_image_cache_hits_total")
        return hits, len(lines["b0"]["rle"]["counts"])

    hits, length = asyncio.run(run())
    assert hits == 2
    assert length > 0


def test_the_selected_model_labels_and_is_the_provenance_of_the_file() -> None:
    async def run(page: Page) -> list[Any]:
        async with page.get("/api/server", params={"model": "disc"}) as response:
            server = await response.json()
        unknown = await error_of(page.get("/api/server", params={"model": "cup"}))
        name = await send_image(page)
        lines = await lines_of(page, name, label_body(DISC_BOX, model="disc"))
        wrong = await lines_of(page, name, label_body(DISC_BOX, model="cup"))
        body = {"images": [], "annotations": [], "options": {"model": "disc"}}
        async with page.post("/api/coco", json=body) as response:
            file = await response.json()
        return [
            [server["models"], server["branches"], server["can_agree"]],
            unknown[1]["reason"],
            lines["b0"]["model"]["name"],
            wrong["b0"]["error"]["code"],
            file,
        ]

    models, unknown, name, wrong, file = with_playground(run)
    assert (models, unknown, name, wrong) == (
        [["disc"], ["student", "teacher", "mixed"], True],
        "MODEL_NOT_FOUND",
        "disc",
        "INVALID_ARGUMENT",
    )
    assert file["mask_auto_labeler"]["model"] == "disc"


def test_masks_are_streamed_before_the_last_batch_is_done() -> None:
    predictor = HeldAfterFirst()

    async def run(page: Page) -> tuple[str, int]:
        name = await send_image(page)
        predictor.warmup_batches = len(predictor.batches)
        async with page.post(f"/api/images/{name}/labels", json=label_body(DISC_BOX, BOX_IN_CORNER)) as response:
            first = json.loads(await response.content.readline())
            predictor.released.set()
            return first["id"], len((await response.text()).splitlines())

    assert with_playground(run, predictor, max_batch_size=1) == ("b0", 2)


def test_a_disconnected_page_cancels_its_call() -> None:
    predictor, servers = HeldAfterFirst(), list[MalServer]()

    async def leave(page: Page) -> int:
        name = await send_image(page)
        before = predictor.warmup_batches = len(predictor.batches)
        response = await page.post(f"/api/images/{name}/labels", json=label_body(*[DISC_BOX] * 200))
        await response.content.readline()
        response.close()
        # The second batch may be held at the device; the crops queued behind it are dropped.
        while servers[0].waiting:
            await asyncio.sleep(0.005)
        predictor.released.set()
        await lines_of(page, name, label_body(BOX_IN_CORNER))
        return len(predictor.batches) - before

    assert with_playground(leave, predictor, servers=servers, max_batch_size=1) in (2, 3)  # of 201


def test_a_lost_server_is_the_error_of_every_pending_box() -> None:
    async def label_with_a_stopped_server() -> list[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            with served() as address:
                page = await stack.enter_async_context(playground(address, timeout_s=2.0))
                name = await send_image(page)
            return list((await lines_of(page, name, label_body(DISC_BOX, BOX_IN_CORNER))).values())

    lines = asyncio.run(label_with_a_stopped_server())
    assert len(lines) == 2
    assert {line["error"]["code"] for line in lines} <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        {"boxes": 3, "options": {}},
        {"boxes": [{"id": 3, "box": []}], "options": {}},
        {"boxes": [{"id": "a", "box": []}, {"id": "a", "box": []}], "options": {}},
        {"boxes": [], "options": {"branch": "both"}},
        {"boxes": [], "options": {"flip": 1}},
        {"boxes": [], "options": {"threshold": "high"}},
        {"boxes": [{"id": "a", "box": []}], "options": {"threshold": 1.5}},
        {"boxes": [{"id": str(index), "box": []} for index in range(10_001)], "options": {}},
    ],
)
def test_an_invalid_request_is_refused(body: Any) -> None:
    async def run(page: Page) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await error_of(page.post(f"/api/images/{await send_image(page)}/labels", data=data))

    status, error = with_playground(run)
    assert (status, error["code"]) == (400, "INVALID_ARGUMENT")


def test_a_body_that_does_not_arrive_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unfinished() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def work(page: Page) -> list[tuple[int, dict[str, Any]]]:
        name = await send_image(page)
        monkeypatch.setattr("mal_client.web_server.RECEIVE_TIMEOUT_S", 0.01)
        paths = ("/api/images", f"/api/images/{name}/labels", "/api/coco")
        return [await error_of(page.post(path, data=unfinished())) for path in paths]

    assert [status for status, _ in with_playground(work)] == [408] * 3
