"""Claims about CVAT that need its SDK: the same code of masks, its types, and its calls against a stand-in server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cvat_sdk", reason="the CVAT SDK is not installed; run: pip install 'mask-auto-labeler[cvat]'")

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk import models
from cvat_sdk.masks import decode_mask, encode_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from mal_client.cli.main import main
from mal_client.client import Client
from mal_client.integrations.cvat.client import CvatFailed, SdkSite
from mal_client.integrations.cvat.interactor import BoxToMask, create
from mal_client.integrations.cvat.job import label_task
from mal_client.integrations.cvat.mask_encoding import mask_points
from mal_client.types import LabelOptions
from PIL import Image

from deploy.demo.baselines import box_filled
from mal_train.core.errors import InputError
from mal_train.core.masks.rle import decode_mask as decode_rle
from mal_train.core.masks.rle import encode_mask as encode_rle
from tests.mal_client.fake_server import FakeServer, serving
from tests.mal_client.integrations.cvat.cvat_http import TOKEN, CvatHttp
from tests.mal_client.integrations.cvat.cvat_task import TaskInMemory, rectangle
from tests.mal_client.integrations.cvat.test_job import the_task
from tests.mal_client.integrations.http_app import running

BOX = (5.0, 4.0, 10.0, 8.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 1), st.integers(0, 999))
def test_our_code_of_a_mask_is_the_sdks_in_both_directions(height: int, width: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
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
    found = CvatHttp(the_task())
    with running(found.app()) as address:
        yield found, address


def site_of(address: str) -> SdkSite:
    return SdkSite(address, 7, token=TOKEN, login=None)


def test_a_task_on_a_server_gets_its_masks(server: tuple[CvatHttp, str], client: Client, tmp_path: Path) -> None:
    http, address = server
    expected = TaskInMemory([])
    expected.content = the_task().annotations()
    label_task(expected, client, tmp_path / "in-memory", LabelOptions())
    site = site_of(address)
    result = label_task(site, client, tmp_path / "ledger", LabelOptions())
    again = label_task(site, client, tmp_path / "ledger", LabelOptions())
    site.close()
    assert (result.written, result.changed, again.written, again.already) == (5, [], 0, 5)
    drop = {"id"}
    found = [{key: row[key] for key in row.keys() - drop} for row in http.task.masks()]
    wanted = [{key: row[key] for key in row.keys() - drop} for row in expected.masks()]
    assert found == wanted


def test_a_write_that_the_server_refuses_is_said_and_the_next_run_goes_on(
    server: tuple[CvatHttp, str], client: Client, tmp_path: Path
) -> None:
    http, address = server
    http.fail_patches = 1
    site = site_of(address)
    with pytest.raises(CvatFailed, match=r"5 masks were not taken: 500 .*the database is away"):
        label_task(site, client, tmp_path / "ledger", LabelOptions())
    assert http.task.masks() == []
    assert label_task(site, client, tmp_path / "ledger", LabelOptions()).written == 5
    site.close()


@pytest.mark.parametrize(("token", "number"), [("wrong", 7), (TOKEN, 8)])
def test_a_wrong_token_or_task_is_said(server: tuple[CvatHttp, str], token: str, number: int) -> None:
    with pytest.raises(CvatFailed, match="check the address, the number and the token"):
        SdkSite(server[1], number, token=token, login=None)


def test_a_server_that_is_not_there_is_said() -> None:
    with pytest.raises(CvatFailed):
        SdkSite("http://127.0.0.1:9", 7, token=TOKEN, login=None)


def test_the_command_looks_first_then_writes_then_has_nothing_to_do(
    server: tuple[CvatHttp, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    http, address = server
    http.task.content["shapes"].append(rectangle(8, 5, [5.0, 4.0, 15.0, 12.0], rotation=7.0))
    (tmp_path / "token").write_text(TOKEN + "\n")
    with serving(FakeServer()) as labeling:
        given = ["cvat", "--server", labeling, "--cvat", address, "--task", "7"]
        given += ["--cvat-token-file", str(tmp_path / "token"), "--ledger", str(tmp_path / "ledger")]
        assert main([*given, "--dry-run"]) == 3
        assert "5 rectangles on 3 frames would get a mask (label 11: 5), 1 cannot" in capsys.readouterr().out
        assert not any(call.startswith("PATCH") for call in http.asked)
        assert main(given) == 3
        assert "5 masks written, 0 were there, 1 failed" in capsys.readouterr().out
        assert main(given) == 3
        assert "0 masks written, 5 were there" in capsys.readouterr().out
    (line,) = (tmp_path / "ledger.errors.jsonl").read_text().splitlines()
    assert "turned by 7 degrees" in line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "either --cvat-token-file or --cvat-login-file"),
        (["--cvat-login-file", "{folder}/word"], "USER:PASSWORD is needed"),
        (["--cvat-token-file", "{folder}/word", "--label", "cup"], "BOX=MASK is needed"),
    ],
)
def test_arguments_that_do_not_go_together_are_said(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "word").write_text("word")
    given = ["cvat", "--server", "127.0.0.1:9", "--cvat", "http://127.0.0.1:9", "--task", "7"]
    assert main([*given, *(part.format(folder=tmp_path) for part in more)]) == 2
    assert words in capsys.readouterr().err


class Prompts(cvataa.InteractionPrompts):  # type: ignore[misc]
    """What an annotator gave."""

    def __init__(self, box: Any) -> None:
        self._box = box

    pos_points = ()
    neg_points = ()

    @property
    def bounding_box(self) -> Any:
        """Two corners."""
        return self._box


def test_a_box_on_cvats_page_becomes_a_mask(client: Client) -> None:
    function = BoxToMask(client)
    context = cvataa.InteractionFunctionContext()
    picture = function.preprocess_image(context, Image.new("RGB", (40, 30)))
    x, y, w, h = BOX
    (shape,) = function.detect(context, picture, Prompts(((x, y), (x + w, y + h))))
    assert (shape.type, shape.attributes) == ("mask", [models.AttributeValRequest(spec_id=0, value="0.7500")])
    mask = decode_mask(shape.points, image_width=40, image_height=30)
    assert (mask == decode_rle(box_filled(BOX, (30, 40)))).all()


@pytest.mark.parametrize("box", [None, ((90.0, 90.0), (99.0, 99.0))])
def test_a_box_that_no_mask_can_answer_is_an_error(client: Client, box: Any) -> None:
    function = BoxToMask(client)
    with pytest.raises(InputError):
        function.detect(None, function.preprocess_image(None, Image.new("RGB", (40, 30))), Prompts(box))


def test_cvat_asks_the_annotator_for_one_box_and_no_points() -> None:
    spec = create("127.0.0.1:1").spec
    assert (spec.min_bounding_boxes, spec.min_pos_points, spec.min_neg_points) == (1, 0, None)
