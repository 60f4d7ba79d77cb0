"""Tests of the ML backend for Label Studio over HTTP, with a fake labeling server and fake images."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.client import Client
from mal_client.errors import InvalidRequest
from mal_client.integrations.label_studio import app
from mal_client.integrations.label_studio.app import MAX_REQUESTS, MAX_RUNNING, build_app
from mal_client.integrations.label_studio.label_config import MAX_CONFIG_CHARS
from mal_client.integrations.label_studio.predictor import (
    MAX_MESSAGE_CHARS,
    MAX_PREDICT_S,
    MAX_RECTANGLES,
    MAX_TASKS,
    Predictor,
    read_predict_request,
)
from mal_client.integrations.label_studio.regions import read_rectangle
from mal_client.types import LabelOptions
from mal_client.web_guard import WebGuard
from PIL import Image

from deploy.demo.baselines import box_filled
from mal_train.core.errors import BadImage
from mal_train.core.masks.rle import decode_mask, encode_mask, to_box
from mal_train.core.settings import Branch
from tests.mal_client.fake_server import SHA, FakeServer, serving
from tests.mal_client.integrations.http_app import running
from tests.mal_client.integrations.label_studio.rle_pack import decode_brush
from tests.mal_client.integrations.label_studio.test_regions import CONFIG, region

WIDTH, HEIGHT = 640, 480
JSON = {"Content-Type": "application/json"}
VERSION = f"fake-{SHA[:12]}-student"


class FakeImages:
    """Images by URL."""

    def __init__(self) -> None:
        image = Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 3
        self.urls: list[str] = []
        self._images = {"/data/upload/1/a.png": image, "/data/upload/1/rotated.png": image}
        self._exif = {"/data/upload/1/rotated.png": exif}

    def read(self, address: str) -> bytes:
        """Returns the encoded image."""
        self.urls.append(address)
        if address not in self._images:
            raise BadImage(f"{address}: no such image", "IMAGE_NOT_FOUND")
        buffer = io.BytesIO()
        self._images[address].save(buffer, format="PNG", exif=self._exif.get(address, Image.Exif()))
        return buffer.getvalue()


class Backend:
    """The application and its dependencies."""

    def __init__(self, fake: FakeServer, client: Client, images: FakeImages, http: httpx2.Client) -> None:
        self.fake, self.client, self.images, self.http = fake, client, images, http

    def predict(self, *tasks: dict[str, Any], context: Any = None, config: str = CONFIG) -> Any:
        """Sends a prediction request and returns its results."""
        body = {"tasks": list(tasks), "project": "1.1764098131", "label_config": config}
        response = self.http.post("/predict", json=body | {"params": {"login": None, "context": context}})
        assert response.status_code == 200, response.text
        return response.json()["results"]


@contextmanager
def backend_at(address: str, fake: FakeServer, *, tight_boxes: bool = False, **more: Any) -> Iterator[Backend]:
    """Runs the backend for a labeling server; passes further arguments to `build_app`."""
    images = FakeImages()
    with Client(address, timeout_s=20) as client:
        options = LabelOptions(threshold=0.4)
        predictor = Predictor(client, images, options, tolerance_px=0.5, tight_boxes=tight_boxes)
        with running(build_app(predictor, **more)) as url, httpx2.Client(base_url=url, timeout=60) as http:
            yield Backend(fake, client, images, http)


@pytest.fixture
def backend() -> Iterator[Backend]:
    fake = FakeServer()
    with serving(fake) as address, backend_at(address, fake) as backend:
        yield backend


def task(number: int = 1, photo: str = "/data/upload/1/a.png", **more: Any) -> dict[str, Any]:
    return {"id": number, "project": 1, "data": {"photo": photo}, "annotations": [], "predictions": [], **more}


def annotated(*regions: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"result": list(regions), "was_cancelled": False, "updated_at": "2026-01-02T00:00:00Z", **more}


def test_a_drawn_rectangle_becomes_its_mask(backend: Backend) -> None:
    (result,) = backend.predict(task(), context={"result": [region()]})
    (mask,) = result["result"]
    assert (result["score"], result["model_version"]) == (0.75, VERSION)
    assert (mask["id"], mask["type"], mask["value"]["brushlabels"]) == (
        "gyqsvQ4tvz-mask",
        "brushlabels",
        ["cup"],
    )
    expected = decode_mask(box_filled((160.0, 240.0, 80.0, 48.0), (HEIGHT, WIDTH)))
    assert (decode_brush(mask["value"]["rle"], HEIGHT, WIDTH) == expected).all()
    assert backend.fake.label_requests[0].options.threshold == 0.4


def test_a_tight_box_is_predicted_with_its_mask() -> None:
    fake = FakeServer()
    with serving(fake) as address, backend_at(address, fake, tight_boxes=True) as backend:
        (result,) = backend.predict(task(), context={"result": [region(x=25.1)]})
    mask, box = result["result"]
    drawn = read_rectangle(region(x=25.1))
    assert (mask["id"], box["id"]) == ("gyqsvQ4tvz-mask", "gyqsvQ4tvz-box")
    assert (box["type"], box["from_name"]) == ("rectanglelabels", drawn.from_name)
    found = read_rectangle(box)
    assert found.box == to_box(encode_mask(decode_brush(mask["value"]["rle"], HEIGHT, WIDTH)))
    assert found.box != drawn.box
    assert found.labels == drawn.labels == ("cup",)


def test_the_tight_boxes_of_earlier_predictions_are_not_labeled() -> None:
    fake = FakeServer()
    with serving(fake) as address, backend_at(address, fake, tight_boxes=True) as backend:
        (first,) = backend.predict(task(annotations=[annotated(region(id="a"))]))
        kept = [region(id="a"), *first["result"], region(id="own-box", x=0.0)]
        (again,) = backend.predict(task(annotations=[annotated(*kept)]))
        (alone,) = backend.predict(task(predictions=[annotated(*first["result"])]))
    assert [row["id"] for row in again["result"]] == ["a-mask", "a-box", "own-box-mask", "own-box-box"]
    assert alone == []


def test_a_batch_labels_each_task_by_its_own_rectangles(backend: Backend) -> None:
    old = annotated(region(id="old"), updated_at="2025-01-01T00:00:00Z")
    skipped = annotated(region(id="skipped"), was_cancelled=True, updated_at="2026-05-05T00:00:00Z")
    results = backend.predict(
        task(1, annotations=[annotated(region(id="a"), region(id="b", x=0.0)), old, skipped]),
        task(2),
        task(3, predictions=[annotated(region(id="c"))]),
        task(4, photo="/missing.png", annotations=[annotated(region())]),
    )
    assert [row["id"] for row in results[0]["result"]] == ["a-mask", "b-mask"]
    assert results[1] == [], "no prediction is stored for a task without rectangles"
    assert [row["id"] for row in results[2]["result"]] == ["c-mask"]
    assert results[3] == {"error": "/missing.png: no such image"}
    assert len(backend.fake.label_requests) == 2, "one call per image for any number of rectangles"


POINT_CONFIG = CONFIG.replace(
    "</View>",
    '<KeyPointLabels name="fix" toName="image"><Label value="Object"/><Label value="background"/></KeyPointLabels>'
    '<KeyPointLabels name="pose" toName="image"><Label value="nose"/></KeyPointLabels></View>',
)


def key_point(x: float, y: float, label: str = "Object", **more: Any) -> dict[str, Any]:
    """Returns a key point as Label Studio 1.23 sends it, at a place in percent."""
    value = {"x": x, "y": y, "width": 0.3, "keypointlabels": [label]}
    return region() | {"id": "k", "from_name": "fix", "type": "keypointlabels", "value": value} | more


def points_sent(backend: Backend) -> list[list[tuple[float, float, int]]]:
    """Returns x, y and label of the points of each rectangle in the last call."""
    instances = backend.fake.label_requests[-1].instances
    return [[(point.x, point.y, point.label) for point in instance.points] for instance in instances]


def test_key_points_correct_the_smallest_rectangle_around_them(backend: Backend) -> None:
    regions = [
        region(id="large", x=20.0, y=40.0, width=50.0, height=50.0),
        region(id="small"),
        key_point(30, 55),
        key_point(31, 56, "background"),
        key_point(60, 80),
        key_point(30, 55, "nose", from_name="pose"),
    ]
    (result,) = backend.predict(task(annotations=[annotated(*regions)]), config=POINT_CONFIG)
    assert [row["id"] for row in result["result"]] == ["large-mask", "small-mask"]
    assert points_sent(backend) == [[(384, 384, 1)], [(192, 264, 1), (198.4, 268.8, 2)]]


def test_without_a_control_for_corrections_key_points_are_left_alone(backend: Backend) -> None:
    (result,) = backend.predict(task(annotations=[annotated(region(), key_point(30, 55))]))
    assert [row["id"] for row in result["result"]] == ["gyqsvQ4tvz-mask"]
    assert points_sent(backend) == [[]]


@pytest.mark.parametrize(
    "point",
    [
        key_point(1, 1),
        key_point(30, 55, "other"),
        key_point(30, 55, to_name="elsewhere"),
        key_point(30, 55, value={"x": 30, "keypointlabels": ["Object"]}),
        key_point(30, 55, image_rotation=90),
    ],
    ids=["in no rectangle", "other label", "other image", "no y", "rotated view"],
)
def test_a_key_point_that_corrects_nothing_is_logged(
    backend: Backend, caplog: pytest.LogCaptureFixture, point: dict[str, Any]
) -> None:
    (result,) = backend.predict(task(7, annotations=[annotated(region(), point)]), config=POINT_CONFIG)
    assert len(result["result"]) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.name == "mal_client.label_studio"]
    assert all(name in line for name in ("task 7", "'k'"))
    assert points_sent(backend) == [[]]


def test_the_rectangles_of_many_key_points_are_found_in_time(backend: Backend) -> None:
    places = [(index % 100, index // 100) for index in range(MAX_RECTANGLES)]
    boxes = [region(id=f"{x}-{y}", x=x, y=y, width=1.0, height=1.0) for x, y in places]
    marks = [key_point(x + 0.5, y + 0.5) for x, y in places]
    request = read_predict_request(
        {"tasks": [task(photo="/missing.png", annotations=[annotated(*boxes, *marks)])], "label_config": POINT_CONFIG}
    )
    predictor = Predictor(backend.client, backend.images, LabelOptions(), tolerance_px=0.5)
    started = time.process_time()
    (result,) = predictor.predict(request)["results"]
    # Building an array of the rectangles for each key point takes 20 s.
    assert (result, time.process_time() - started < 8) == ({"error": "/missing.png: no such image"}, True)


def test_invalid_rectangles_are_logged_and_the_others_are_labeled(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    regions = [region(id="a", rotation=10), region(id="b"), region(id="c", x=150.0)]
    (result,) = backend.predict(task(7, annotations=[annotated(*regions)]))
    assert [row["id"] for row in result["result"]] == ["b-mask"]
    lines = [record.getMessage() for record in caplog.records if record.name == "mal_client.label_studio"]
    assert len(lines) == 2
    assert all(name in lines[0] for name in ("task 7", "region 'a'", "10 degrees"))
    assert all(name in lines[1] for name in ("task 7", "region 'c'"))


@pytest.mark.parametrize("photo", ["/data/upload/1/rotated.png", 5])
def test_a_task_with_an_invalid_image_has_no_prediction(backend: Backend, photo: Any) -> None:
    (result,) = backend.predict(task(photo=photo, annotations=[annotated(region())]))
    assert set(result) == {"error"}
    assert not backend.fake.label_requests


@pytest.mark.parametrize(
    ("data", "stated"),
    [
        ({}, "missing"),
        ({"image": "/a.png"}, "missing"),
        ({"photo": None}, "missing"),
        ({"photo": ["/a.png"]}, '["/a.png"]'),
    ],
)
def test_the_error_of_a_task_without_its_image_field_names_it(
    backend: Backend, data: dict[str, Any], stated: str
) -> None:
    one = {**task(annotations=[annotated(region())]), "data": data}
    whole = task(annotations=[annotated(region())])
    error, labeled = backend.predict(one, whole)
    assert all(text in error["error"] for text in ("'photo'", stated, *data))
    assert labeled["result"]
    assert len(backend.images.urls) == 1


def test_a_region_on_an_image_that_the_configuration_lacks_is_named(backend: Backend) -> None:
    (result,) = backend.predict(task(annotations=[annotated(region(to_name="elsewhere"))]))
    assert "'elsewhere'" in result["error"]


def test_other_regions_and_other_controls_are_ignored(backend: Backend) -> None:
    brush = {"type": "brushlabels", "from_name": "mask", "value": {}}
    (result,) = backend.predict(task(annotations=[annotated(brush, region(from_name="elsewhere"))]))
    assert result == []
    assert backend.images.urls == []


def test_a_class_without_a_mask_control_fails_before_the_image_is_fetched(backend: Backend) -> None:
    (result,) = backend.predict(task(annotations=[annotated(region(rectanglelabels=["plate"]))]))
    assert "'mask'" in result["error"]
    assert "plate" in result["error"]
    assert backend.images.urls == []


def test_a_message_that_names_many_classes_is_cut(backend: Backend) -> None:
    rectangle = region(rectanglelabels=[f"class {number}" for number in range(10_000)])
    results = backend.predict(*[task(annotations=[annotated(rectangle)])] * 3)
    assert [len(result["error"]) for result in results] == [MAX_MESSAGE_CHARS] * 3


def test_health_setup_and_versions_return_the_model_version(backend: Backend) -> None:
    assert backend.http.get("/health").json()["status"] == "UP"
    setup = {"project": "1.1764098131", "schema": CONFIG, "hostname": "http://localhost:8080", "access_token": "x"}
    assert backend.http.post("/setup", json=setup).json() == {"model_version": VERSION}
    assert backend.http.get("/versions").json() == {"versions": [VERSION]}


def test_the_version_contains_the_requested_branch(backend: Backend) -> None:
    options = LabelOptions(branch=Branch.TEACHER)
    version = Predictor(backend.client, backend.images, options, tolerance_px=0.0).model_version()
    assert version == f"{VERSION.rpartition('-')[0]}-teacher"
    with pytest.raises(InvalidRequest, match="'dogs'"):
        Predictor(backend.client, backend.images, LabelOptions(model="dogs"), tolerance_px=0.0).model_version()


def test_event_calls_of_a_project_are_accepted(backend: Backend) -> None:
    assert [backend.http.post(path, json={}).status_code for path in ("/webhook", "/train", "/delete")] == [200] * 3


def test_a_project_without_boxes_cannot_be_connected(backend: Backend) -> None:
    refused = backend.http.post("/setup", json={"schema": "<View><Image name='a' value='$b'/></View>"})
    assert (refused.status_code, "<RectangleLabels>" in refused.json()["error"]) == (400, True)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"label_config": "<View>"}'])
def test_an_invalid_request_is_refused_and_the_next_one_succeeds(backend: Backend, content: bytes) -> None:
    assert backend.http.post("/predict", content=content, headers=JSON).status_code == 400
    assert backend.predict(task()) == [[]]


def test_a_request_above_the_size_limit_is_refused_and_the_next_one_succeeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(FakeServer()) as address, backend_at(address, FakeServer(), max_request_bytes=4096) as backend:
        for body in (b" " * 4097, iter([b" " * 3000] * 2)):  # with its length stated, and in chunks
            refused = backend.http.post("/predict", content=body, headers=JSON)
            assert (refused.status_code, "4096 bytes" in refused.json()["error"]) == (413, True)
        assert "/predict: " in caplog.text
        assert "4096 bytes" in caplog.text
        assert backend.predict(task()) == [[]]


def test_unknown_paths_and_methods_are_refused_as_json(backend: Backend) -> None:
    for method, path, status in (("GET", "/predict", 405), ("POST", "/nothing", 404)):
        refused = backend.http.request(method, path)
        assert (refused.status_code, list(refused.json())) == (status, ["error"])


def test_health_responds_while_every_worker_is_busy(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(backend.images, "read", lambda _: gate.wait(60) and FakeImages().read("/data/upload/1/a.png"))
    body = {"tasks": [task(annotations=[annotated(region())])], "label_config": CONFIG}
    statuses: list[int] = []

    def send() -> None:
        statuses.append(backend.http.post("/predict", json=body, timeout=120).status_code)

    threads = [threading.Thread(target=send) for _ in range(MAX_RUNNING + 2)]
    for thread in threads:
        thread.start()
    try:
        assert backend.http.get("/health").status_code == 200
        assert statuses == []
    finally:
        gate.set()
        for thread in threads:
            thread.join()
    assert statuses == [200] * len(threads)


def test_requests_above_the_limit_get_retry_after_and_the_others_succeed(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, received = threading.Event(), threading.Semaphore(0)
    inner = app._Backend._in_thread

    async def counted(backend: app._Backend, job: Callable[[], Any]) -> Any:
        received.release()
        return await inner(backend, job)

    monkeypatch.setattr(app._Backend, "_in_thread", counted)
    monkeypatch.setattr(backend.images, "read", lambda _: gate.wait(60) and FakeImages().read("/data/upload/1/a.png"))
    body = {"tasks": [task(annotations=[annotated(region())])], "label_config": CONFIG}
    limits = httpx2.Limits(max_connections=MAX_REQUESTS + 1)
    statuses: list[int] = []
    with httpx2.Client(base_url=backend.http.base_url, timeout=120, limits=limits) as http:

        def send() -> None:
            statuses.append(http.post("/predict", json=body).status_code)

        threads = [threading.Thread(target=send) for _ in range(MAX_REQUESTS)]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                assert received.acquire(timeout=60)
            for method, path in (("POST", "/predict"), ("POST", "/setup"), ("GET", "/versions")):
                refused = http.request(method, path)
                assert (refused.status_code, int(refused.headers["Retry-After"]) > 0) == (503, True)
                assert str(MAX_REQUESTS) in refused.json()["error"]
            assert http.get("/health").status_code == 200
        finally:
            gate.set()
            for thread in threads:
                thread.join()
    assert statuses == [200] * MAX_REQUESTS
    assert backend.predict(task()) == [[]]


def test_incomplete_requests_time_out_and_free_their_slots(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.web_server.RECEIVE_TIMEOUT_S", 0.01)
    url = backend.http.base_url
    for path in ("/predict", "/setup"):
        for _ in range(MAX_REQUESTS):
            with socket.create_connection((url.host, url.port), timeout=60) as connection:
                headers = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 9"
                connection.sendall(f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
                assert connection.recv(12) == b"HTTP/1.1 408"
    monkeypatch.undo()
    assert backend.predict(task()) == [[]]


def test_an_unavailable_labeling_server_is_an_error_that_stores_no_prediction() -> None:
    with ExitStack() as stack:
        with serving(FakeServer()) as address:
            backend = stack.enter_context(backend_at(address, FakeServer()))
            assert backend.http.get("/health").status_code == 200
        body = {"tasks": [task(annotations=[annotated(region())])], "label_config": CONFIG}
        assert backend.http.get("/health").status_code == 503
        refused = backend.http.post("/predict", json=body)
        assert (refused.status_code, "unavailable" in refused.json()["error"]) == (503, True)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "attacker.example:9090"}, 403),
        ({"Host": "attacker.example:9090", "Origin": "http://attacker.example:9090"}, 403),
        ({"Origin": "http://attacker.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Host": "studio.example:9090"}, 200),
        ({"Host": "localhost"}, 200),
        ({}, 200),
    ],
)
def test_a_web_page_cannot_use_the_backend_and_label_studio_can(headers: dict[str, str], status: int) -> None:
    fake, guard = FakeServer(), WebGuard({"studio.example"})
    body = json.dumps({"tasks": [task(annotations=[annotated(region())])], "label_config": CONFIG}).encode()
    with serving(fake) as address, backend_at(address, fake, guard=guard) as backend:
        answer = backend.http.post("/predict", content=body, headers=JSON | headers)
        assert answer.status_code == status
        assert bool(backend.images.urls) == (status == 200), "no image was fetched for a page"
        if "Content-Type" not in headers:
            assert backend.http.get("/health", headers=headers).status_code == status


@pytest.mark.parametrize(
    "request_text",
    [
        b"BREW /predict HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: 2\r\n\r\n{}",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nno number\r\n{}\r\n",
    ],
    ids=["method", "TLS", "compressed", "chunk"],
)
def test_a_request_that_is_no_http_fails_without_a_traceback(
    backend: Backend, request_text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    url = backend.http.base_url
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(request_text)
        assert connection.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.0 400")
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    assert backend.predict(task()) == [[]]


def test_all_bodies_together_have_a_limit_that_is_given_back(backend: Backend) -> None:
    fake = backend.fake
    with backend_at(str(backend.client.address), fake, max_received_bytes=4096) as small:
        for _ in range(2):
            assert small.http.post("/predict", content=b" " * 5000, headers=JSON).status_code == 503
        assert small.predict(task()) == [[]]


@pytest.mark.parametrize(
    "body",
    [
        {"tasks": [{}] * (MAX_TASKS + 1)},
        {"tasks": [task(annotations=[annotated(*[region()] * (MAX_RECTANGLES // 2 + 1))])] * 2},
        {"tasks": [task()], "label_config": " " * (MAX_CONFIG_CHARS + 1)},
        {"tasks": [task()], "label_config": "<View a='\ud800'/>"},
    ],
    ids=["tasks", "rectangles", "config", "surrogate"],
)
def test_a_request_with_too_much_is_refused_before_any_image_is_fetched(backend: Backend, body: Any) -> None:
    content = json.dumps({"label_config": CONFIG} | body).encode()
    assert backend.http.post("/predict", content=content, headers=JSON).status_code == 400
    assert backend.images.urls == []


def test_images_of_a_request_that_takes_too_long_are_not_fetched(backend: Backend) -> None:
    times = iter([0.0, 0.0, MAX_PREDICT_S + 1.0])
    predictor = Predictor(backend.client, backend.images, LabelOptions(), tolerance_px=0.5, clock=lambda: next(times))
    tasks = [task(number, annotations=[annotated(region())]) for number in (1, 2)]
    results = predictor.predict(read_predict_request({"tasks": tasks, "label_config": CONFIG}))["results"]
    assert sorted("error" in result for result in results) == [False, True]
    assert len(backend.images.urls) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"original_width": 10**300},
        {"x": 10**400},
        {"width": 1e300},
        {"rotation": {"deep": []}},
        {"rectanglelabels": 5},
        {"rectanglelabels": [["cup"]]},
        {"id": [[]]},
        {"to_name": {"a": 1}},
        {"from_name": ["box"]},
    ],
    ids=str,
)
def test_a_region_with_any_json_in_a_field_fails_alone(backend: Backend, change: dict[str, Any]) -> None:
    (result,) = backend.predict(task(annotations=[annotated(region(**change), region(id="good"))]))
    assert "good-mask" in [row["id"] for row in result["result"]]


def test_credentials_are_required_except_for_health() -> None:
    with serving(FakeServer()) as address, backend_at(address, FakeServer(), credentials="studio:secret") as backend:
        assert backend.http.get("/health").status_code == 200
        assert backend.http.get("/versions").status_code == 401
        for sent, status in (("studio:secret", 200), ("studio:wrong", 401)):
            value = base64.b64encode(sent.encode()).decode()
            assert backend.http.get("/versions", headers={"Authorization": f"Basic {value}"}).status_code == status
        assert backend.http.get("/versions", headers={"Authorization": "Basic ###"}).status_code == 401


@pytest.mark.parametrize("option", ["--api-key-file", "--credentials-file"])
def test_a_secret_that_is_not_ascii_exits_2(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_text("usér:secret", encoding="utf-8")
    assert main(["label-studio", "--server", "127.0.0.1:1", "--port", "0", option, str(tmp_path / "secret")]) == 2
    assert f"{option}: {tmp_path / 'secret'}" in capsys.readouterr().err


def test_the_command_requires_credentials_unless_it_listens_on_loopback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label-studio", "--server", "127.0.0.1:1", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "--credentials-file" in capsys.readouterr().err
