"""Data of one token: the images that it sent, and the folders of the server that it may name."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from mal.v1 import evaluation_pb2, labeling_pb2, model_pb2, types_pb2

from mal_train.core.errors import ConfigError
from tests.mal_server.calls import collect, reason_of, status_details, until_sent
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, Running, config_of, label_request, serving

TOKENS = {name: f"{name}-0123456789abcdef" for name in ("a", "b")}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns settings with the tokens a, which may name one of two folders, and b, which may name both."""
    for name, token in TOKENS.items():
        monkeypatch.setenv(f"MAL_TEST_{name}", token)
    for name in ("photos", "scans"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "disc.png").write_bytes(DISC_PNG)
    tokens: list[dict[str, Any]] = [
        {"name": name, "token": f"env:MAL_TEST_{name}", "scopes": ["label", "evaluate"]} for name in TOKENS
    ]
    tokens[0]["data_folders"] = ["photos"]
    return {
        "tokens": tokens,
        "data_folders": [{"name": name, "path": str(tmp_path / name)} for name in ("photos", "scans")],
    }


def with_tokens(work: Callable[[Running], Awaitable[Any]], settings: dict[str, Any]) -> Any:
    async def run() -> Any:
        async with serving(**settings) as running:
            return await work(running)

    return asyncio.run(run())


def credentials(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[name]}"),)


async def outcome(call: Callable[[], Any]) -> str:
    """Returns OK, or the reason or else the code of the error."""
    try:
        await until_sent(lambda: collect(call()))
    except grpc.aio.AioRpcError as error:
        return reason_of(status_details(error)) or error.code().name
    return "OK"


def image_request(**source: Any) -> labeling_pb2.LabelImageRequest:
    request = label_request(DISC_BOX)
    request.image.CopyFrom(types_pb2.ImageSource(**source))
    return request


def test_an_image_in_the_cache_is_found_only_by_the_token_that_sent_it(settings: dict[str, Any]) -> None:
    async def work(running: Running) -> list[str]:
        by_hash = image_request(content_sha256=hashlib.sha256(DISC_PNG).hexdigest())
        label = running.labeling.LabelImage
        first = await outcome(lambda: label(label_request(DISC_BOX), metadata=credentials("a")))
        return [first, *[await outcome(partial(label, by_hash, metadata=credentials(name))) for name in "ab"]]

    assert with_tokens(work, settings) == ["OK", "OK", "IMAGE_NOT_CACHED"]


def test_a_token_names_only_its_folders(settings: dict[str, Any]) -> None:
    async def work(running: Running) -> dict[tuple[str, str], str]:
        found = {}
        for name in "ab":
            for folder in ("photos", "scans", "none"):
                request = image_request(uri=f"{folder}/disc.png")
                call = partial(running.labeling.LabelImage, request, metadata=credentials(name))
                found[name, folder] = await outcome(call)
        return found

    assert with_tokens(work, settings) == {
        ("a", "photos"): "OK",
        ("a", "scans"): "FOLDER_DENIED",
        ("a", "none"): "FOLDER_DENIED",
        ("b", "photos"): "OK",
        ("b", "scans"): "OK",
        ("b", "none"): "FOLDER_NOT_FOUND",
    }


@pytest.mark.parametrize(("annotations", "images"), [("photos/a.json", "scans/a"), ("scans/a.json", "photos/a")])
def test_a_token_evaluates_only_in_its_folders(settings: dict[str, Any], annotations: str, images: str) -> None:
    dataset = evaluation_pb2.DatasetSource(annotations=annotations, images=images)
    options = evaluation_pb2.EvaluateOptions(dataset=dataset)

    async def work(running: Running) -> list[str]:
        requests = [evaluation_pb2.EvaluateRequest(options=options)]
        evaluate = running.evaluation.Evaluate
        return [await outcome(partial(evaluate, requests, metadata=credentials(name))) for name in "ab"]

    assert with_tokens(work, settings) == ["FOLDER_DENIED", "FILE_NOT_FOUND"]


def test_an_image_of_another_folder_fails_alone_in_a_stream_of_ground_truth(settings: dict[str, Any]) -> None:
    image = evaluation_pb2.EvaluateImage(item_id="1", image=types_pb2.ImageSource(uri="scans/disc.png"))
    image.ground_truth.add().instance.box.width = 9.0
    requests = [
        evaluation_pb2.EvaluateRequest(options=evaluation_pb2.EvaluateOptions()),
        evaluation_pb2.EvaluateRequest(image=image),
    ]

    async def work(running: Running) -> dict[str, int]:
        responses = await collect(running.evaluation.Evaluate(iter(requests), metadata=credentials("a")))
        return {row.reason: row.instances for row in responses[-1].result.skipped}

    assert with_tokens(work, settings) == {"REQUEST_REFUSED": 1}


def test_a_client_sees_the_folders_that_it_may_name(settings: dict[str, Any]) -> None:
    async def work(running: Running) -> list[list[str]]:
        infos = [
            await running.model.GetServerInfo(model_pb2.GetServerInfoRequest(), metadata=credentials(name))
            for name in "ab"
        ]
        return [list(info.data_folders) for info in infos]

    assert with_tokens(work, settings) == [["photos"], ["photos", "scans"]]


def test_a_folder_of_a_token_must_be_one_of_the_server(settings: dict[str, Any]) -> None:
    settings["tokens"][0]["data_folders"] = ["drawings"]
    with pytest.raises(ConfigError, match=r"tokens 'a'.*'drawings'"):
        config_of(**settings)
