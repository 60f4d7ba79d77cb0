"""Tests that need the CVAT SDK: its mask encoding, its types, and its calls to a fake CVAT server."""

import gzip
import json
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cvat_sdk", reason="the CVAT SDK is not installed; run: pip install 'mask-auto-labeler[cvat]'")

import cvat_sdk.auto_annotation as cvataa
from aiohttp import web
from cvat_sdk import models
from cvat_sdk.masks import decode_mask, encode_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from mal_client.cli.main import main
from mal_client.client import Client
from mal_client.integrations.cvat.client import CvatError, SdkClient
from mal_client.integrations.cvat.interactor import BoxToMask, create
from mal_client.integrations.cvat.job import label_task
from mal_client.integrations.cvat.mask_encoding import mask_points
from mal_client.types import LabelOptions
from PIL import Image

from deploy.demo.baselines import box_filled
from mal_train.core.errors import ConfigError, InputError
from mal_train.core.masks.rle import decode_mask as decode_rle
from mal_train.core.masks.rle import encode_mask as encode_rle
from tests.mal_client.fake_server import FakeServer, serving
from tests.mal_client.integrations.cvat.cvat_http import TOKEN, CvatHttp
from tests.mal_client.integrations.cvat.cvat_task import TaskInMemory, rectangle
from tests.mal_client.integrations.cvat.test_job import sample_task
from tests.mal_client.integrations.http_app import running
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import bright_disc
from tests.proxy import recording_proxy

BOX = (5.0, 4.0, 10.0, 8.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 1), st.integers(0, 999))
def test_the_mask_encoding_equals_that_of_the_sdk(height: int, width: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < density
    mask[height // 2, width // 3] = True
    points = mask_points(encode_rle(mask))
    assert points == [int(value) for value in encode_mask(mask)]
    assert (decode_mask(points, image_width=width, image_height=height) == mask).all()


@pytest.fixture
def client() -> Iterator[Client]:
    with serving(FakeServer()) as address, Client(address, timeout_s=10) as client:
        yield client


@pytest.fixture
def server() -> Iterator[tuple[CvatHttp, str]]:
    fake = CvatHttp(sample_task())
    with running(fake.app()) as address:
        yield fake, address


def connect(address: str) -> SdkClient:
    return SdkClient(address, 7, token=TOKEN, login=None)


def test_the_masks_of_a_task_on_a_server_equal_those_of_one_in_memory(
    server: tuple[CvatHttp, str], client: Client, tmp_path: Path
) -> None:
    http, address = server
    expected = TaskInMemory([])
    expected.content = sample_task().annotations()
    label_task(expected, client, tmp_path / "in-memory", LabelOptions())
    cvat = connect(address)
    result = label_task(cvat, client, tmp_path / "journal", LabelOptions())
    again = label_task(cvat, client, tmp_path / "journal", LabelOptions())
    cvat.close()
    assert (result.written, result.changed, again.written, again.existing) == (5, [], 0, 5)
    drop = {"id"}
    masks = [{key: row[key] for key in row.keys() - drop} for row in http.task.masks()]
    expected_masks = [{key: row[key] for key in row.keys() - drop} for row in expected.masks()]
    assert masks == expected_masks


def test_a_failed_write_raises_and_the_next_run_resumes(
    server: tuple[CvatHttp, str], client: Client, tmp_path: Path
) -> None:
    http, address = server
    http.fail_patches = 1
    cvat = connect(address)
    with pytest.raises(CvatError, match=r"5 masks .* 500 .*database unavailable"):
        label_task(cvat, client, tmp_path / "journal", LabelOptions())
    assert http.task.masks() == []
    assert label_task(cvat, client, tmp_path / "journal", LabelOptions()).written == 5
    cvat.close()


def test_a_server_on_this_machine_is_reached_directly_and_others_through_the_proxy(
    server: tuple[CvatHttp, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording_proxy() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        connect(server[1]).close()
        assert proxy.requests == []
        # Its token would be read there.
        with pytest.raises(ConfigError, match="http_proxy"):
            connect("http://cvat.example")
        assert proxy.requests == []
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//me:word@"))
        with pytest.raises(CvatError, match=f"https_proxy={proxy.url}"):
            connect("https://cvat.example")
        assert set(proxy.requests) == {"CONNECT cvat.example:443"}
        assert b"Basic bWU6d29yZA==" in proxy.read
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//me:w%E2%82%ACrd@"))
        with pytest.raises(CvatError):
            connect("https://cvat.example")
        assert f"Basic {b64encode('me:w€rd'.encode()).decode()}".encode() in proxy.read
        assert TOKEN.encode() not in proxy.read


@pytest.mark.parametrize(("token", "number"), [("wrong", 7), (TOKEN, 8)])
def test_a_wrong_token_or_task_raises(server: tuple[CvatHttp, str], token: str, number: int) -> None:
    with pytest.raises(CvatError, match=f"task {number}"):
        SdkClient(server[1], number, token=token, login=None)


class Thief:
    """Records the headers of all requests."""

    def __init__(self) -> None:
        self.headers: list[str] = []

    def app(self) -> web.Application:
        """Builds the application."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._take)
        return app

    async def _take(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(str(dict(request.headers)))
        return web.json_response({})


def test_a_redirect_to_another_host_does_not_carry_the_token(tmp_path: Path) -> None:
    fake, thief = CvatHttp(sample_task()), Thief()
    app = fake.app()

    @web.middleware
    async def move_frames(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path.endswith(("/data/", "/annotations/")):
            raise web.HTTPFound(f"{target}/x")
        response: web.StreamResponse = await handler(request)
        return response

    app.middlewares.append(move_frames)
    with running(thief.app()) as address, running(app) as source:
        target = address.replace("127.0.0.1", "localhost")
        cvat = connect(source)
        cvat.frame(0)
        cvat.annotations()
        cvat.close()
    assert len(thief.headers) == 2
    assert TOKEN not in "".join(thief.headers)


@pytest.mark.parametrize("path", ["/data/", "/annotations/"])
def test_an_answer_without_end_is_refused_at_a_limit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB of zeros in 64 KiB of gzip."""
    monkeypatch.setattr("mal_client.integrations.cvat.client.MAX_RESPONSE_BYTES", 1 << 20)
    bomb = gzip.compress(bytes(64 << 20))
    fake = CvatHttp(sample_task())
    app = fake.app()

    @web.middleware
    async def send_bomb(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path.endswith(path):
            return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})
        response: web.StreamResponse = await handler(request)
        return response

    app.middlewares.append(send_bomb)
    with running(app) as address:
        cvat = connect(address)
        with pytest.raises(CvatError):
            cvat.frame(0) if path == "/data/" else cvat.annotations()
        cvat.close()


def test_an_unavailable_cvat_server_raises() -> None:
    with pytest.raises(CvatError):
        SdkClient("http://127.0.0.1:9", 7, token=TOKEN, login=None)


def test_the_command_plans_then_writes_then_finds_nothing_to_do(
    server: tuple[CvatHttp, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    http, address = server
    http.task.content["shapes"].append(rectangle(8, 5, [5.0, 4.0, 15.0, 12.0], rotation=7.0))
    (tmp_path / "token").write_text(TOKEN + "\n")
    with serving(FakeServer()) as labeling:
        given = ["cvat", "--server", labeling, "--cvat", address, "--task", "7"]
        given += ["--cvat-token-file", str(tmp_path / "token"), "--journal", str(tmp_path / "journal")]
        assert main([*given, "--dry-run"]) == 3
        assert re.match(r"5 rectangles on 3 frames .*label 11: 5.*, 1 cannot", capsys.readouterr().out)
        assert not any(call.startswith("PATCH") for call in http.requests)
        assert main(given) == 3
        assert re.search(r": 5 masks .*, 0 already .*, 1 failed", capsys.readouterr().out)
        assert main(given) == 3
        assert re.search(r": 0 masks .*, 5 already", capsys.readouterr().out)
    (line,) = (tmp_path / "journal.errors.jsonl").read_text().splitlines()
    assert "7 degrees" in json.loads(line)["reason"]


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ([], "--cvat-token-file"),
        (["--cvat-login-file", "{folder}/secret"], "--cvat-login-file"),
        (["--cvat-login-file", "{folder}/not_ascii"], "--cvat-login-file"),
        (["--cvat-token-file", "{folder}/not_ascii"], "--cvat-token-file"),
        (["--cvat-token-file", "{folder}/secret", "--label", "cup"], "--label cup"),
    ],
)
def test_invalid_arguments_exit_2_and_are_named(
    more: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "not_ascii").write_text("user:sécret", encoding="utf-8")
    given = ["cvat", "--server", "127.0.0.1:9", "--cvat", "http://127.0.0.1:9", "--task", "7"]
    assert main([*given, *(part.format(folder=tmp_path) for part in more)]) == 2
    assert option in capsys.readouterr().err


class Prompts(cvataa.InteractionPrompts):  # type: ignore[misc]
    """Prompts of an annotator."""

    pos_points: Any = ()
    neg_points: Any = ()

    def __init__(self, box: Any, positive: Any = (), negative: Any = ()) -> None:
        self._box = box
        self.pos_points, self.neg_points = positive, negative

    @property
    def bounding_box(self) -> Any:
        """The box as two corners."""
        return self._box


def test_the_interaction_function_turns_a_box_into_a_mask(client: Client) -> None:
    function = BoxToMask(client)
    context = cvataa.InteractionFunctionContext()
    encoded = function.preprocess_image(context, Image.new("RGB", (40, 30)))
    x, y, w, h = BOX
    (shape,) = function.detect(context, encoded, Prompts(((x, y), (x + w, y + h))))
    assert (shape.type, shape.attributes) == ("mask", [models.AttributeValRequest(spec_id=0, value="0.7500")])
    mask = decode_mask(shape.points, image_width=40, image_height=30)
    assert (mask == decode_rle(box_filled(BOX, (30, 40)))).all()


@pytest.mark.parametrize("box", [None, ((90.0, 90.0), (99.0, 99.0))])
def test_a_missing_or_invalid_box_raises(client: Client, box: Any) -> None:
    function = BoxToMask(client)
    with pytest.raises(InputError):
        function.detect(None, function.preprocess_image(None, Image.new("RGB", (40, 30))), Prompts(box))


def test_the_mask_of_the_interaction_function_obeys_the_clicks() -> None:
    with served() as address, Client(address) as server:
        function = BoxToMask(server)
        encoded = function.preprocess_image(None, Image.fromarray(bright_disc()))
        prompts = Prompts(((18.0, 8.0), (42.0, 32.0)), [(20.5, 10.5)], [(30.5, 20.5)])
        (shape,) = function.detect(None, encoded, prompts)
    mask = decode_mask(shape.points, image_width=60, image_height=40)
    assert [bool(mask[10, 20]), bool(mask[20, 30])] == [True, False]


def test_the_interaction_function_needs_one_box_and_allows_points() -> None:
    spec = create("127.0.0.1:1").spec
    assert (spec.min_bounding_boxes, spec.min_pos_points, spec.min_neg_points) == (1, 0, 0)
