"""Images by hash and by file name: the cache and its bound, and files outside the folders, which are never read."""

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

from mal_server.inference import image_store
from mal_server.inference.image_store import ENTRY_OVERHEAD_BYTES, ImageCache
from tests.mal_server.calls import fields_of, reason_of, status_details, with_server
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, Running, bright_disc, encoded, label, label_request, serving

SHA256 = hashlib.sha256(DISC_PNG).hexdigest()


def request_for(**source: Any) -> labeling_pb2.LabelImageRequest:
    """Returns a request for the disc with another image source."""
    request = label_request(DISC_BOX)
    request.image.CopyFrom(types_pb2.ImageSource(**source))
    return request


async def outcome_of(running: Running, request: labeling_pb2.LabelImageRequest) -> str:
    """Returns OK, or the reason, the field or else the code of the error."""
    try:
        await label(running, request)
    except grpc.aio.AioRpcError as error:
        status = status_details(error)
        return reason_of(status) or ",".join(fields_of(status)) or error.code().name
    return "OK"


def metric(running: Running, name: str) -> float:
    value = running.server.registry.get_sample_value(name)
    assert value is not None
    return value


def test_an_image_that_was_sent_is_found_by_its_hash() -> None:
    async def work(running: Running) -> tuple[bool, float, float]:
        (inline,) = await label(running, label_request(DISC_BOX))
        (cached,) = await label(running, request_for(content_sha256=SHA256))
        return (
            inline == cached,
            metric(running, "mal_image_cache_hits_total"),
            metric(running, "mal_image_cache_misses_total"),
        )

    assert with_server(work) == (True, 1, 0)


def test_an_unknown_hash_is_refused_and_counted_as_a_miss() -> None:
    async def work(running: Running) -> tuple[str, float]:
        return await outcome_of(running, request_for(content_sha256=SHA256)), metric(
            running, "mal_image_cache_misses_total"
        )

    assert with_server(work) == ("IMAGE_NOT_CACHED", 1)


@pytest.mark.parametrize("part", [SHA256[:63], SHA256.upper(), SHA256 + "0", "", "x" * 64])
def test_only_a_complete_hash_is_accepted(part: str) -> None:
    async def work(running: Running) -> str:
        await label(running, label_request(DISC_BOX))
        return await outcome_of(running, request_for(content_sha256=part))

    assert with_server(work) == "image.content_sha256"


def test_an_image_that_cannot_be_decoded_is_not_cached() -> None:
    async def work(running: Running) -> tuple[str, str, float]:
        junk = b"GIF89a" + bytes(100)
        first = await outcome_of(running, label_request(DISC_BOX, content=junk))
        sha256 = hashlib.sha256(junk).hexdigest()
        return (
            first,
            await outcome_of(running, request_for(content_sha256=sha256)),
            metric(running, "mal_image_cache_bytes"),
        )

    assert with_server(work) == ("IMAGE_FORMAT", "IMAGE_NOT_CACHED", 0)


def test_bulk_streams_read_the_cache_but_do_not_fill_it() -> None:
    async def work(running: Running) -> tuple[str, str]:
        async def bulk(request: labeling_pb2.LabelImageRequest) -> str:
            items = iter([labeling_pb2.LabelImagesRequest(item_id="a", request=request)])
            (response,) = [response async for response in running.labeling.LabelImages(items)]
            return reason_of(response.status) or "OK"

        await bulk(label_request(DISC_BOX))
        before = await bulk(request_for(content_sha256=SHA256))
        await label(running, label_request(DISC_BOX))
        return before, await bulk(request_for(content_sha256=SHA256))

    assert with_server(work) == ("IMAGE_NOT_CACHED", "OK")


def test_the_cache_can_be_disabled_and_server_info_shows_it() -> None:
    async def work(running: Running) -> tuple[str, int]:
        await label(running, label_request(DISC_BOX))
        info = await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        return await outcome_of(running, request_for(content_sha256=SHA256)), info.limits.image_cache_bytes

    assert with_server(work, image_cache_bytes=0) == ("IMAGE_NOT_CACHED", 0)


@pytest.mark.parametrize("max_bytes", [0, 1000])
def test_an_image_that_the_cache_cannot_hold_is_not_hashed(max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: bytes) -> str:
        raise AssertionError(f"{len(content)} bytes are hashed")

    monkeypatch.setattr(image_store, "sha256_of", refuse)
    ImageCache(max_bytes).put(bytes(1000))


def test_the_least_recently_used_image_is_evicted_first() -> None:
    cache = ImageCache(3 * (100 + ENTRY_OVERHEAD_BYTES))
    images = [bytes([index]) * 100 for index in range(4)]
    for content in images[:3]:
        cache.put(content)
    assert cache.get(hashlib.sha256(images[0]).hexdigest()) == images[0]
    cache.put(images[3])
    cached = [cache.get(hashlib.sha256(content).hexdigest()) is not None for content in images]
    assert cached == [True, False, True, True]


def test_the_cache_never_exceeds_its_limit_with_several_threads() -> None:
    limit, peak, rng = 50_000, 0, random.Random(7)
    cache = ImageCache(limit)
    sizes = [rng.randrange(1, 60_000) for _ in range(400)]

    def fill(sizes: list[int]) -> None:
        nonlocal peak
        for size in sizes:
            cache.put(os.urandom(size))
            peak = max(peak, cache.size_bytes)

    threads = [threading.Thread(target=fill, args=(sizes[index::4],)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limit / 2 < peak <= limit


def test_the_client_sends_a_hash_and_the_image_again_once_it_is_evicted() -> None:
    images = [encoded(bright_disc() ^ np.uint8(index), "BMP") for index in range(2)]
    assert all(len(content) > 4096 for content in images)

    async def work() -> tuple[list[bool], float, float]:
        # Capacity for one of the two images.
        async with serving(image_cache_bytes=len(images[0]) + ENTRY_OVERHEAD_BYTES) as running:
            async with AsyncClient(running.server.address) as client:
                labels = [(await client.label_image(images[index], [DISC_BOX]))[0] for index in (0, 0, 1, 0, 0, 0)]
            return (
                [label.ok for label in labels],
                metric(running, "mal_image_cache_hits_total"),
                metric(running, "mal_image_cache_misses_total"),
            )

    # After a miss, the client sends the image twice before it sends the hash again.
    assert asyncio.run(work()) == ([True] * 6, 2, 1)


class TestFolders:
    """ImageSource.uri."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Returns a folder with images; files beside it must stay unreadable."""
        inside = tmp_path / "photos"
        (inside / "deep").mkdir(parents=True)
        (inside / "deep" / "disc.png").write_bytes(DISC_PNG)
        (inside / "text.png").write_text("not an image")
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
        ("uri", "expected"),
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
    def test_only_files_in_the_folders_are_read(self, folder: Path, uri: str, expected: str) -> None:
        folders = [{"name": "photos", "path": str(folder)}]
        assert with_server(lambda running: outcome_of(running, request_for(uri=uri)), data_folders=folders) == expected

    def test_without_folders_no_file_is_read(self, folder: Path) -> None:
        assert (
            with_server(lambda running: outcome_of(running, request_for(uri="photos/deep/disc.png")))
            == "FOLDER_NOT_FOUND"
        )

    def test_a_file_above_the_limit_is_refused(self, folder: Path) -> None:
        (folder / "large.png").write_bytes(bytes(2 << 20))
        folders = [{"name": "photos", "path": str(folder)}]
        limits = {"max_request_bytes": 1 << 20}
        outcome = with_server(
            lambda running: outcome_of(running, request_for(uri="photos/large.png")),
            data_folders=folders,
            limits=limits,
        )
        assert outcome == "IMAGE_TOO_LARGE"

    def test_an_error_does_not_reveal_the_location_of_the_folder(self, folder: Path) -> None:
        async def work(running: Running) -> str:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await label(running, request_for(uri="photos/link_out.png"))
            return raised.value.details() or ""

        message = with_server(work, data_folders=[{"name": "photos", "path": str(folder)}])
        assert str(folder.parent) not in message
