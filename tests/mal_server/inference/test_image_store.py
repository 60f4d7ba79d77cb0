"""Pictures by hash and by name: what is kept, what is bounded, and that nothing outside of the folders is ever read."""

import asyncio
import hashlib
import os
import random
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from mal.v1 import labeling_pb2, model_pb2, types_pb2
from mal_client.client import AsyncClient

from mal_server.inference.image_store import ENTRY_BYTES, ImageCache
from tests.mal_server.calls import fields_of, reason_of, status_details, with_server
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, Running, bright_disc, encoded, label, label_request, serving

SHA256 = hashlib.sha256(DISC_PNG).hexdigest()


def by(**source: Any) -> labeling_pb2.LabelImageRequest:
    """A request for the disc with another source of its picture."""
    request = label_request(DISC_BOX)
    request.image.CopyFrom(types_pb2.ImageSource(**source))
    return request


async def outcome(running: Running, request: labeling_pb2.LabelImageRequest) -> str:
    """OK, or the reason, the field at fault or the code of the refusal."""
    try:
        await label(running, request)
    except grpc.aio.AioRpcError as error:
        status = status_details(error)
        return reason_of(status) or ",".join(fields_of(status)) or error.code().name
    return "OK"


def figure(running: Running, name: str) -> float:
    value = running.server.registry.get_sample_value(name)
    assert value is not None
    return value


def test_a_picture_that_was_sent_is_found_by_its_hash() -> None:
    async def work(running: Running) -> tuple[bool, float, float]:
        (sent,) = await label(running, label_request(DISC_BOX))
        (named,) = await label(running, by(content_sha256=SHA256))
        return (
            sent == named,
            figure(running, "mal_image_cache_hits_total"),
            figure(running, "mal_image_cache_misses_total"),
        )

    assert with_server(work) == (True, 1, 0)


def test_a_hash_that_is_not_held_is_not_found_and_counted() -> None:
    async def work(running: Running) -> tuple[str, float]:
        return await outcome(running, by(content_sha256=SHA256)), figure(running, "mal_image_cache_misses_total")

    assert with_server(work) == ("IMAGE_NOT_CACHED", 1)


@pytest.mark.parametrize("part", [SHA256[:63], SHA256.upper(), SHA256 + "0", "", "x" * 64])
def test_a_part_of_a_hash_opens_nothing(part: str) -> None:
    async def work(running: Running) -> str:
        await label(running, label_request(DISC_BOX))
        return await outcome(running, by(content_sha256=part))

    assert with_server(work) == "image.content_sha256"


def test_what_is_no_picture_is_not_kept() -> None:
    async def work(running: Running) -> tuple[str, str, float]:
        junk = b"GIF89a" + bytes(100)
        first = await outcome(running, label_request(DISC_BOX, content=junk))
        sha256 = hashlib.sha256(junk).hexdigest()
        return first, await outcome(running, by(content_sha256=sha256)), figure(running, "mal_image_cache_bytes")

    assert with_server(work) == ("IMAGE_FORMAT", "IMAGE_NOT_CACHED", 0)


def test_bulk_streams_use_handles_and_fill_no_cache() -> None:
    async def work(running: Running) -> tuple[str, str]:
        async def bulk(request: labeling_pb2.LabelImageRequest) -> str:
            items = iter([labeling_pb2.LabelImagesRequest(item_id="a", request=request)])
            (answer,) = [one async for one in running.labeling.LabelImages(items)]
            return reason_of(answer.status) or "OK"

        await bulk(label_request(DISC_BOX))
        before = await bulk(by(content_sha256=SHA256))
        await label(running, label_request(DISC_BOX))
        return before, await bulk(by(content_sha256=SHA256))

    assert with_server(work) == ("IMAGE_NOT_CACHED", "OK")


def test_the_cache_can_be_switched_off_and_says_so() -> None:
    async def work(running: Running) -> tuple[str, int]:
        await label(running, label_request(DISC_BOX))
        info = await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        return await outcome(running, by(content_sha256=SHA256)), info.limits.image_cache_bytes

    assert with_server(work, image_cache_bytes=0) == ("IMAGE_NOT_CACHED", 0)


def test_the_longest_unused_picture_goes_first() -> None:
    cache = ImageCache(3 * (100 + ENTRY_BYTES))
    pictures = [bytes([nth]) * 100 for nth in range(4)]
    for content in pictures[:3]:
        cache.put(content)
    assert cache.get(hashlib.sha256(pictures[0]).hexdigest()) == pictures[0]
    cache.put(pictures[3])
    held = [cache.get(hashlib.sha256(content).hexdigest()) is not None for content in pictures]
    assert held == [True, False, True, True]


def test_the_cache_never_holds_more_than_its_limit_whatever_several_threads_put_into_it() -> None:
    limit, most, random_of = 50_000, 0, random.Random(7)
    cache = ImageCache(limit)
    sizes = [random_of.randrange(1, 60_000) for _ in range(400)]

    def fill(part: list[int]) -> None:
        nonlocal most
        for size in part:
            cache.put(os.urandom(size))
            most = max(most, cache.size_bytes)

    threads = [threading.Thread(target=fill, args=(sizes[nth::4],)) for nth in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limit / 2 < most <= limit


def test_the_client_names_a_picture_that_it_sent_and_sends_it_again_when_it_is_gone() -> None:
    pictures = [encoded(bright_disc() ^ np.uint8(nth), "BMP") for nth in range(2)]
    assert all(len(content) > 4096 for content in pictures)

    async def work() -> tuple[list[bool], float, float]:
        # Room for one of the two pictures.
        async with serving(image_cache_bytes=len(pictures[0]) + ENTRY_BYTES) as running:
            async with AsyncClient(running.server.address) as client:
                answers = [(await client.label_image(pictures[nth], [DISC_BOX]))[0] for nth in (0, 0, 1, 0, 0)]
            return (
                [answer.ok for answer in answers],
                figure(running, "mal_image_cache_hits_total"),
                figure(running, "mal_image_cache_misses_total"),
            )

    assert asyncio.run(work()) == ([True] * 5, 2, 1)


class TestFolders:
    """ImageSource.uri."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Photos, and beside them what nobody may see."""
        inside = tmp_path / "photos"
        (inside / "deep").mkdir(parents=True)
        (inside / "deep" / "disc.png").write_bytes(DISC_PNG)
        (inside / "text.png").write_text("no picture")
        (tmp_path / "secret.png").write_bytes(DISC_PNG)
        (tmp_path / "photos2").mkdir()
        (tmp_path / "photos2" / "secret.png").write_bytes(DISC_PNG)
        (inside / "link_in.png").symlink_to("deep/disc.png")
        (inside / "link_out.png").symlink_to(tmp_path / "secret.png")
        (inside / "folder_out").symlink_to(tmp_path)
        (inside / "loop.png").symlink_to("loop.png")
        os.mkfifo(inside / "pipe.png")
        return inside

    @pytest.mark.parametrize(
        ("uri", "found"),
        [
            ("photos/deep/disc.png", "OK"),
            ("photos/link_in.png", "OK"),
            ("photos/text.png", "IMAGE_FORMAT"),
            ("photos/none.png", "IMAGE_NOT_FOUND"),
            ("photos/deep", "IMAGE_NOT_FOUND"),
            ("photos/loop.png", "IMAGE_NOT_FOUND"),
            ("photos/pipe.png", "IMAGE_NOT_FOUND"),
            ("photos/link_out.png", "IMAGE_NOT_FOUND"),
            ("photos/folder_out/secret.png", "IMAGE_NOT_FOUND"),
            ("photos/folder_out/photos2/secret.png", "IMAGE_NOT_FOUND"),
            ("photos/../secret.png", "image.uri"),
            ("photos/../photos2/secret.png", "image.uri"),
            ("photos/deep/../../secret.png", "image.uri"),
            ("photos/./deep/disc.png", "image.uri"),
            ("photos//etc/passwd", "image.uri"),
            ("photos/deep/disc.png\0.txt", "image.uri"),
            ("photos/" + "a" * 5000, "image.uri"),
            ("photos/" + "a" * 300, "IMAGE_NOT_FOUND"),
            ("photos", "image.uri"),
            ("photos/", "image.uri"),
            ("", "image.uri"),
            ("/etc/passwd", "image.uri"),
            ("photos2/secret.png", "FOLDER_NOT_FOUND"),
            ("file:///etc/passwd", "FOLDER_NOT_FOUND"),
            ("http://example.org/a.png", "FOLDER_NOT_FOUND"),
            ("photos/%2e%2e/secret.png", "IMAGE_NOT_FOUND"),
            ("photos/deep\\..\\..\\secret.png", "IMAGE_NOT_FOUND"),
        ],
    )
    def test_only_files_below_the_folders_are_read(self, folder: Path, uri: str, found: str) -> None:
        folders = [{"name": "photos", "path": str(folder)}]
        assert with_server(lambda running: outcome(running, by(uri=uri)), data_folders=folders) == found

    def test_without_folders_nothing_on_the_server_is_read(self, folder: Path) -> None:
        assert with_server(lambda running: outcome(running, by(uri="photos/deep/disc.png"))) == "FOLDER_NOT_FOUND"

    def test_a_file_above_the_limit_is_refused(self, folder: Path) -> None:
        (folder / "large.png").write_bytes(bytes(2 << 20))
        folders = [{"name": "photos", "path": str(folder)}]
        limits = {"max_request_bytes": 1 << 20}
        found = with_server(
            lambda running: outcome(running, by(uri="photos/large.png")), data_folders=folders, limits=limits
        )
        assert found == "IMAGE_TOO_LARGE"

    def test_a_refusal_tells_nothing_of_where_the_folder_lies(self, folder: Path) -> None:
        async def work(running: Running) -> str:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await label(running, by(uri="photos/link_out.png"))
            return raised.value.details() or ""

        said = with_server(work, data_folders=[{"name": "photos", "path": str(folder)}])
        assert str(folder.parent) not in said
