"""Claims about the playground's HTTP side, against the real server around a predictor without a network."""

from __future__ import annotations

import asyncio
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from mal_client.client import AsyncClient, Client
from mal_client.playground import labelling
from mal_client.playground.app import PAGES, build_app
from mal_client.playground.guard import HEADERS, Guard, Refused, cookie_name
from mal_client.playground.serve import Listen, serve
from mal_client.playground.store import ImageStore
from PIL import Image

from mal_server.server import MalServer
from mal_train.errors import ConfigError
from mal_train.labeling.images import ImageHeader, decode_image
from mal_train.labeling.labeler import Label, Probability, RunOptions
from mal_train.labeling.rle import Rle
from tests.client.test_against_server import served
from tests.server.fakes import DISC_BOX, DISC_PNG, SHA256, BrightPredictor, bright_disc, encoded, serving

KEY = "the key"
DISC = bright_disc()
BOX_IN_CORNER = (0.0, 0.0, 20.0, 15.0)
HEADER = ImageHeader((1, 1))

Page = TestClient[Any, Any]


@asynccontextmanager
async def playground(address: str, *, key: str | None = KEY, timeout_s: float = 20.0) -> AsyncIterator[Page]:
    """The application on a free port, opened as the printed address does (`key` None: without)."""
    async with AsyncClient(address, timeout_s=timeout_s) as client:
        app = build_app(client, Guard(KEY))
        async with TestClient(TestServer(app, handler_cancellation=True)) as page:
            if key is not None:
                async with page.get("/", params={"key": key}) as answer:
                    await answer.read()
            yield page


def visit(work: Callable[[Page], Awaitable[Any]], predictor: BrightPredictor | None = None, **settings: Any) -> Any:
    """Runs `work` with the playground of a served disc model."""

    async def live(address: str) -> Any:
        async with playground(address) as page:
            return await work(page)

    with served(predictor, **settings) as address:
        return asyncio.run(live(address))


async def sent(page: Page, content: bytes = DISC_PNG) -> str:
    async with page.post("/api/images", data=content) as answer:
        assert answer.status == 200, await answer.text()
        return str((await answer.json())["sha256"])


def asking(*boxes: Any, thresholds: dict[int, float] | None = None, **options: Any) -> dict[str, Any]:
    rows = [{"id": f"b{at}", "box": list(box), "threshold": (thresholds or {}).get(at)} for at, box in enumerate(boxes)]
    return {"boxes": rows, "options": options}


async def lines_of(page: Page, sha256: str, body: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The answers by the page's id; each exactly once, and the end said."""
    async with page.post(f"/api/images/{sha256}/labels", json=body) as answer:
        assert answer.status == 200, await answer.text()
        *lines, last = [json.loads(text) for text in (await answer.text()).splitlines()]
    assert last == {"done": True}
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


async def refusal(answer_of: Any) -> tuple[int, dict[str, Any]]:
    async with answer_of as answer:
        return answer.status, (await answer.json())["error"]


def kernel(box: tuple[float, ...], *, threshold: float | None = None, **options: Any) -> Label:
    found = BrightPredictor().label(DISC, [box], RunOptions(**options), threshold=threshold)[0]
    assert isinstance(found, Label)
    return found


# --- who may talk to it ---


@pytest.mark.parametrize(
    ("host", "loopback", "is_ours"),
    [
        ("127.0.0.1:8765", True, True),
        ("localhost:8765", True, True),
        ("LOCALHOST", True, True),
        ("[::1]:8765", True, True),
        ("studio.example:80", True, True),
        ("evil.example:8765", True, False),
        ("127.0.0.1.evil.example", True, False),
        ("192.168.1.5:8765", True, False),
        ("192.168.1.5:8765", False, True),
        ("evil.example", False, False),
        ("", True, False),
        ("[::1", True, False),
        ("user@localhost", True, True),
    ],
)
def test_a_host_that_could_be_rebound_is_refused(host: str, loopback: bool, is_ours: bool) -> None:
    guard = Guard(KEY, {"studio.example"}, loopback)
    if is_ours:
        guard.check({"Host": host}, is_page=False)
    else:
        with pytest.raises(Refused, match="not this playground"):
            guard.check({"Host": host}, is_page=False)


@pytest.mark.parametrize(
    ("headers", "is_page", "is_ours"),
    [
        ({"Origin": "http://127.0.0.1:8765"}, False, True),
        ({"Origin": "http://127.0.0.1:9999"}, False, False),
        ({"Origin": "https://evil.example"}, False, False),
        ({"Origin": "null"}, False, False),
        ({"Origin": "http://["}, False, False),
        ({"Origin": "https://evil.example"}, True, False),
        ({"Sec-Fetch-Site": "same-origin"}, False, True),
        ({"Sec-Fetch-Site": "none"}, True, True),
        ({"Sec-Fetch-Site": "cross-site"}, True, True),
        ({"Sec-Fetch-Site": "cross-site"}, False, False),
        ({"Sec-Fetch-Site": "same-site"}, False, False),
    ],
)
def test_what_another_page_sends_is_refused(headers: dict[str, str], is_page: bool, is_ours: bool) -> None:
    given = {"Host": "127.0.0.1:8765", **headers}
    if is_ours:
        Guard(KEY).check(given, is_page=is_page)
    else:
        with pytest.raises(Refused, match="other pages"):
            Guard(KEY).check(given, is_page=is_page)


def test_nothing_is_given_without_the_key() -> None:
    async def knock(address: str) -> list[int]:
        async with playground(address, key=None) as page:
            wrong = [page.get("/"), page.get("/", params={"key": "wrong"}), page.get("/main.js"), page.get("/?key=%ff")]
            wrong += [page.get("/api/server"), page.post("/api/images", data=DISC_PNG), page.post("/api/coco", json={})]
            return [(await refusal(answer))[0] for answer in wrong]

    with served() as address:
        assert asyncio.run(knock(address)) == [403] * 7


def test_the_printed_address_hands_out_a_cookie_that_no_script_and_no_other_site_gets() -> None:
    async def open_page(page: Page) -> Any:
        async with page.get("/", params={"key": KEY}) as answer:
            return answer.cookies[cookie_name(f"127.0.0.1:{page.port}")]

    cookie = visit(open_page)
    assert cookie.value == KEY
    assert cookie["httponly"]
    assert cookie["samesite"] == "Strict"


def test_foreign_host_and_origin_are_refused_with_the_key_in_hand() -> None:
    async def try_both(page: Page) -> list[tuple[int, dict[str, Any]]]:
        return [
            await refusal(page.get("/api/server", headers={"Host": "evil.example"})),
            await refusal(page.post("/api/images", data=DISC_PNG, headers={"Origin": "https://evil.example"})),
        ]

    for status, error in visit(try_both):
        assert (status, error["reason"]) == (403, "NOT_OUR_PAGE")


@pytest.mark.parametrize("path", ["/", "/main.js", "/api/server", "/nothing", "/api/images/00/pixels"])
def test_every_answer_carries_the_headers_that_lock_the_page(path: str) -> None:
    async def headers(page: Page) -> dict[str, str]:
        async with page.get(path) as answer:
            return dict(answer.headers)

    found = visit(headers)
    assert {name: found.get(name) for name in HEADERS} == HEADERS


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script_of_its_text() -> None:
    folder = Path(labelling.__file__).parent / "static"
    assert {path.name for path in folder.iterdir()} == set(PAGES)
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|[\"'(]//|@import|eval\(|innerHTML", text), path.name
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script>" not in index
    assert "style=" not in index


# --- pictures ---


def test_a_picture_above_the_servers_limits_is_refused_before_it_is_sent_on() -> None:
    async def send(page: Page) -> list[tuple[int, dict[str, Any]]]:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield bytes(100_000)

        wide = encoded(np.zeros((2, 300, 3), np.uint8))
        contents: list[Any] = [bytes(1024 * 1024), pieces(), wide]
        return [await refusal(page.post("/api/images", data=content)) for content in contents]

    limits = {"max_request_bytes": 1024 * 1024, "max_side": 200}
    for status, error in visit(send, limits=limits):
        assert (status, error["reason"]) == (413, "IMAGE_TOO_LARGE")


@pytest.mark.parametrize("content", [b"", b"no picture", DISC_PNG[:30]])
def test_what_is_no_picture_is_refused_with_its_reason(content: bytes) -> None:
    status, error = visit(lambda page: refusal(page.post("/api/images", data=content)))
    assert status == 400
    assert error["reason"] in {"IMAGE_FORMAT", "IMAGE_DECODE_FAILED"}
    assert error["message"].startswith("image: ")


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(DISC, "JPEG", exif=exif.tobytes())


@pytest.mark.parametrize(
    ("content", "browser_shows_it"),
    [
        (encoded(DISC, "JPEG"), True),
        (turned_jpeg(), False),
        (encoded(DISC, "TIFF"), False),
        (DISC_PNG, False),
    ],
    ids=["jpeg", "turned", "tiff", "png"],
)
def test_the_page_shows_the_pixels_that_the_network_sees(content: bytes, browser_shows_it: bool) -> None:
    async def look(page: Page) -> tuple[dict[str, Any], bytes]:
        async with page.post("/api/images", data=content) as answer:
            known = await answer.json()
        async with page.get(f"/api/images/{known['sha256']}/pixels") as answer:
            return known, await answer.read()

    known, png = visit(look)
    assert (known["width"], known["height"], known["browser_shows_it"]) == (60, 40, browser_shows_it)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), decode_image(content))


def test_a_picture_that_is_not_there_is_asked_for_again() -> None:
    status, error = visit(lambda page: refusal(page.post(f"/api/images/{'0' * 64}/labels", json=asking(DISC_BOX))))
    assert (status, error["reason"]) == (404, "IMAGE_UNKNOWN")


def test_pictures_that_were_used_longest_ago_go_first() -> None:
    store = ImageStore(30)
    first, second = store.add(bytes(10), HEADER), store.add(bytes(11), HEADER)
    store.get(first.sha256)
    third = store.add(bytes(15), HEADER)
    assert [store.get(image.sha256) is not None for image in (first, second, third)] == [True, False, True]
    store.add(bytes(15), HEADER)
    assert store.get(first.sha256) is not None
    only = store.add(bytes(100), HEADER)
    assert [store.get(image.sha256) is not None for image in (first, third, only)] == [False, False, True]


# --- masks ---


def test_each_box_gets_the_kernels_mask() -> None:
    async def ask(page: Page) -> dict[str, dict[str, Any]]:
        return await lines_of(
            page, await sent(page), asking(DISC_BOX, BOX_IN_CORNER, (-9, 0, 40.5, 40), agreement=True)
        )

    found = visit(ask, max_batch_size=2)
    for key, box in [("b0", DISC_BOX), ("b1", BOX_IN_CORNER), ("b2", (-9.0, 0.0, 40.5, 40.0))]:
        expected = kernel(box, agreement=True)
        assert found[key]["rle"] == expected.rle.to_coco()
        assert found[key]["score"] == expected.score
        assert found[key]["agreement"] == expected.agreement
        assert found[key]["flags"] == [str(flag) for flag in expected.flags]
        assert found[key]["model"]["checkpoint_sha256"] == SHA256


def test_a_box_with_a_threshold_of_its_own_is_labelled_with_it_and_the_others_with_the_images() -> None:
    async def ask(page: Page) -> dict[str, dict[str, Any]]:
        body = asking(DISC_BOX, DISC_BOX, DISC_BOX, thresholds={1: 0.03}, threshold=0.95)
        return await lines_of(page, await sent(page), body)

    found = visit(ask)
    assert found["b0"]["rle"] == found["b2"]["rle"] == kernel(DISC_BOX, threshold=0.95).rle.to_coco()
    assert found["b1"]["rle"] == kernel(DISC_BOX, threshold=0.03).rle.to_coco()
    assert found["b0"]["rle"] != found["b1"]["rle"]


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (900, 0, 5, 5), (None, 1, 2, 3), (1, 2, 3), ("a", 1, 2, 3)])
def test_a_bad_box_is_an_error_of_its_own_and_does_not_number_boxes(box: Any) -> None:
    async def ask(page: Page) -> dict[str, dict[str, Any]]:
        return await lines_of(page, await sent(page), asking(DISC_BOX, box))

    found = visit(ask)
    assert found["b0"]["rle"] == kernel(DISC_BOX).rle.to_coco()
    assert found["b1"]["error"]["reason"] == "BAD_BOX"
    assert not found["b1"]["error"]["message"].startswith("box ")


class HeldAfterFirst(BrightPredictor):
    """The first batch is answered; the others wait for `released`."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def predict(self, crops: Any, options: RunOptions = RunOptions()) -> list[Probability]:  # noqa: B008
        if len(self.batches) > self.warm:
            self.released.wait(120)
        return super().predict(crops, options)

    warm = 10_000
    """Batches before the first one of a page."""


def test_the_next_edit_sends_the_pictures_name_to_the_labelling_server_too() -> None:
    async def ask() -> tuple[float | None, int]:
        async with serving() as running, playground(running.server.address) as page:
            name = await sent(page, encoded(DISC, "BMP"))
            for _ in range(3):
                found = await lines_of(page, name, asking(DISC_BOX))
            hits = running.server.registry.get_sample_value("mal_image_cache_hits_total")
        return hits, len(found["b0"]["rle"]["counts"])

    hits, length = asyncio.run(ask())
    assert hits == 2
    assert length > 0


def test_the_chosen_model_answers_and_is_the_files_provenance() -> None:
    async def ask(page: Page) -> list[Any]:
        async with page.get("/api/server", params={"model": "disc"}) as answer:
            server = await answer.json()
        unknown = await refusal(page.get("/api/server", params={"model": "cup"}))
        name = await sent(page)
        found = await lines_of(page, name, asking(DISC_BOX, model="disc"))
        wrong = await lines_of(page, name, asking(DISC_BOX, model="cup"))
        body = {"images": [], "annotations": [], "options": {"model": "disc"}}
        async with page.post("/api/coco", json=body) as answer:
            file = await answer.json()
        return [
            server["models"],
            unknown[1]["reason"],
            found["b0"]["model"]["name"],
            wrong["b0"]["error"]["code"],
            file,
        ]

    models, unknown, answered, wrong, file = visit(ask)
    assert (models, unknown, answered, wrong) == (["disc"], "MODEL_NOT_FOUND", "disc", "INVALID_ARGUMENT")
    assert file["mask_auto_labeler"]["model"] == "disc"


def test_masks_come_before_the_last_batch_is_done() -> None:
    predictor = HeldAfterFirst()

    async def ask(page: Page) -> tuple[str, int]:
        name = await sent(page)
        predictor.warm = len(predictor.batches)
        async with page.post(f"/api/images/{name}/labels", json=asking(DISC_BOX, BOX_IN_CORNER)) as answer:
            first = json.loads(await answer.content.readline())
            predictor.released.set()
            return first["id"], len((await answer.text()).splitlines())

    assert visit(ask, predictor, max_batch_size=1) == ("b0", 2)


def test_a_page_that_goes_away_ends_its_call() -> None:
    predictor, servers = HeldAfterFirst(), list[MalServer]()

    async def leave(page: Page) -> int:
        name = await sent(page)
        before = predictor.warm = len(predictor.batches)
        answer = await page.post(f"/api/images/{name}/labels", json=asking(*[DISC_BOX] * 200))
        await answer.content.readline()
        answer.close()
        # The second batch is held at the device; what waits behind it is dropped.
        while servers[0].waiting:
            await asyncio.sleep(0.005)
        predictor.released.set()
        await lines_of(page, name, asking(BOX_IN_CORNER))
        return len(predictor.batches) - before

    assert visit(leave, predictor, servers=servers, max_batch_size=1) == 3


def test_a_server_that_goes_down_is_the_error_of_every_box_that_is_open() -> None:
    async def through_a_server_that_ends() -> list[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            with served() as address:
                page = await stack.enter_async_context(playground(address, timeout_s=2.0))
                name = await sent(page)
            return list((await lines_of(page, name, asking(DISC_BOX, BOX_IN_CORNER))).values())

    lines = asyncio.run(through_a_server_that_ends())
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
        {"boxes": [{"id": str(at), "box": []} for at in range(10_001)], "options": {}},
    ],
)
def test_a_malformed_call_is_refused(body: Any) -> None:
    async def ask(page: Page) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await refusal(page.post(f"/api/images/{await sent(page)}/labels", data=data))

    status, error = visit(ask)
    assert (status, error["code"]) == (400, "INVALID_ARGUMENT")


# --- the file ---


def drawn(box: Any, answer: Any, *, category: str = "cup", image: int = 0, threshold: float | None = None) -> Any:
    return {"image": image, "box": box, "category": category, "threshold": threshold, "answer": answer}


def exported(*annotations: Any, options: dict[str, Any] | None = None) -> Any:
    """What `annotations(lines)` gives as a file, for the lines of a disc and of a corner."""

    async def ask(page: Page) -> Any:
        found = await lines_of(page, await sent(page), asking(DISC_BOX, BOX_IN_CORNER))
        rows = [row(found) if callable(row) else row for row in annotations]
        images = [{"file_name": "disc.png", "width": 60, "height": 40}]
        body = {"images": images, "annotations": rows, "options": options or {}}
        async with page.post("/api/coco", json=body) as answer:
            return await answer.json()

    return visit(ask)


def test_the_file_holds_the_servers_codes_and_the_boxes_as_they_were_drawn() -> None:
    box = [18.25, 8, 24, 24]
    file = exported(lambda found: drawn(box, found["b0"], threshold=0.4))
    row = file["annotations"][0]
    assert row["segmentation"] == kernel(DISC_BOX).rle.to_coco()
    assert row["bbox"] == box
    assert row["area"] == kernel(DISC_BOX).area
    assert row["threshold"] == 0.4
    assert file["images"] == [{"id": 1, "file_name": "disc.png", "width": 60, "height": 40}]


def test_the_file_is_the_one_that_the_bulk_client_writes(tmp_path: Path) -> None:
    async def ask(address: str) -> Any:
        async with playground(address) as page:
            found = await lines_of(page, await sent(page), asking(DISC_BOX, BOX_IN_CORNER, (0, 0, 0, 3)))
            boxes = [[18, 8, 24, 24], [0, 0, 20, 15], [0, 0, 0, 3]]
            body = {
                "images": [{"file_name": "disc.png", "width": 60, "height": 40}],
                "annotations": [drawn(box, found[f"b{at}"]) for at, box in enumerate(boxes)],
                "options": {},
            }
            async with page.post("/api/coco", json=body) as answer:
                return await answer.json()

    with served() as address, Client(address, timeout_s=20) as client:
        page_file = asyncio.run(ask(address))
        (tmp_path / "disc.png").write_bytes(DISC_PNG)
        kept = ("id", "image_id", "category_id", "bbox", "iscrowd")
        rows = [{name: row[name] for name in kept} for row in page_file["annotations"]]
        (tmp_path / "in.json").write_text(json.dumps({**page_file, "annotations": rows}))
        client.label_dataset(tmp_path / "in.json", tmp_path, tmp_path / "out.json")
    bulk_file = json.loads((tmp_path / "out.json").read_text())
    # The message names the annotation there, and stands beside the box here.
    for file in (page_file, bulk_file):
        file["annotations"][2]["error"].pop("message")
    assert page_file == bulk_file


def test_a_box_without_a_mask_keeps_its_row_and_says_why() -> None:
    error = {"error": {"code": "UNAVAILABLE", "reason": "", "message": "nobody there"}}
    file = exported(drawn([1, 2, 3, 4], error), drawn([5, 6, 7, 8], None), drawn([None, 0, 1, 1], None))
    first, second, third = file["annotations"]
    assert first["error"] == {"reason": "UNAVAILABLE", "message": "nobody there"}
    assert second["error"]["reason"] == "NOT_ANSWERED"
    assert third["error"]["reason"] == "BAD_BOX"
    assert [row["bbox"] for row in (first, second)] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_classes_of_the_model_keep_their_ids_and_new_ones_follow() -> None:
    rows = [drawn([1, 1, 5, 5], None, category=name) for name in ("tea pot", "disc", "  ", "tea pot")]
    file = exported(*rows)
    assert {row["name"]: row["id"] for row in file["categories"]} == {"disc": 7, "tea pot": 8, "object": 9}
    assert [row["category_id"] for row in file["annotations"]] == [8, 7, 9, 8]


def test_a_mask_of_other_weights_than_the_files_says_so() -> None:
    def other(found: Any) -> Any:
        return drawn([1, 1, 5, 5], {**found["b0"], "model": {**found["b0"]["model"], "checkpoint_sha256": "cd" * 32}})

    same, changed = exported(lambda found: drawn([1, 1, 5, 5], found["b0"]), other)["annotations"]
    assert "checkpoint_sha256" not in same
    assert changed["checkpoint_sha256"] == "cd" * 32


def test_the_options_of_the_page_are_the_files_provenance() -> None:
    file = exported(drawn([1, 1, 5, 5], None), options={"branch": "teacher", "flip": True})
    assert file["mask_auto_labeler"]["branch"] == "teacher"
    assert file["mask_auto_labeler"]["flip"] is True
    assert file["mask_auto_labeler"]["checkpoint_sha256"] == SHA256


@pytest.mark.parametrize(
    "change",
    [
        {"rle": {"size": [41, 60], "counts": Rle(41, 60, b"`\\2").to_coco()["counts"]}},
        {"rle": {"size": [40, 60], "counts": "00"}},
        {"rle": None},
        {"score": 2},
        {"score": None},
        {"flags": "many"},
    ],
)
def test_a_mask_that_is_none_is_not_written(change: dict[str, Any]) -> None:
    async def ask(page: Page) -> tuple[int, dict[str, Any]]:
        found = await lines_of(page, await sent(page), asking(DISC_BOX))
        images = [{"file_name": "disc.png", "width": 60, "height": 40}]
        row = drawn([1, 1, 5, 5], {**found["b0"], **change})
        return await refusal(page.post("/api/coco", json={"images": images, "annotations": [row], "options": {}}))

    status, error = visit(ask)
    assert (status, error["code"]) == (400, "INVALID_ARGUMENT")


# --- its life ---


def test_it_says_where_it_is_and_ends_when_told() -> None:
    async def live() -> list[str]:
        told: list[str] = []
        stop = asyncio.Event()

        def tell(text: str) -> None:
            told.append(text)
            if len(told) == 2:
                stop.set()

        async with AsyncClient("127.0.0.1:1", timeout_s=1) as client:
            await serve(client, Listen(port=0), tell, stop=stop)
        return told

    where, server = asyncio.run(live())
    assert where.startswith("playground: http://127.0.0.1:")
    assert "/?key=" in where
    assert "tries again" in server


def test_a_taken_port_is_a_sentence() -> None:
    async def live() -> None:
        async with AsyncClient("127.0.0.1:1", timeout_s=1) as client:
            taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
            async with taken:
                await serve(client, Listen(port=taken.sockets[0].getsockname()[1]), lambda _: None)

    with pytest.raises(ConfigError, match="cannot listen there"):
        asyncio.run(live())


def test_without_aiohttp_the_command_prints_the_line_to_run() -> None:
    script = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from mal_client.cli import main; sys.exit(main(['playground', '--server', 'localhost:1']))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "pip install 'mask-auto-labeler[playground]'" in ended.stderr
