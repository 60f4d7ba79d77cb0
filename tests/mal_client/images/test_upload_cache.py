"""Claims about the images that are sent as a hash."""

from itertools import cycle

import numpy as np
import pytest
from mal_client.images.image_input import EncodedImage
from mal_client.images.upload_cache import MIN_BYTES, UploadCache, UploadedImage

CALLS = 200


def image(size: int = MIN_BYTES) -> EncodedImage:
    return EncodedImage(np.random.default_rng(0).bytes(size), 10, 10)


def entry() -> UploadedImage:
    found = UploadCache().entry(image())
    assert found is not None
    return found


def calls_in_turn(upload: UploadedImage, servers: int) -> tuple[int, int]:
    """Labels one image again and again on servers in turn; returns the numbers of uploads and of unknown hashes."""
    turn = cycle([set[str]() for _ in range(servers)])
    uploads = misses = 0
    for _ in range(CALLS):
        server, is_hash = next(turn), upload.is_known
        if is_hash and upload.sha256 not in server:
            misses += 1
            upload.discard()
            # The same call is sent again, to the next server.
            server, is_hash = next(turn), False
        uploads += not is_hash
        server.add(upload.sha256)
        upload.add(was_hash=is_hash)
    return uploads, misses


@pytest.mark.parametrize(("servers", "uploads", "misses"), [(1, 1, 0), (2, 3, 1), (3, 7, 2), (10, 31, 4)])
def test_an_image_is_sent_until_every_server_has_it(servers: int, uploads: int, misses: int) -> None:
    counts = calls_in_turn(entry(), servers)
    assert counts[0] <= uploads
    assert counts[1] <= misses


def test_one_server_that_forgets_an_image_gets_it_once() -> None:
    upload = entry()
    upload.add(was_hash=False)
    upload.add(was_hash=True)
    upload.discard()
    assert not upload.is_known
    upload.add(was_hash=False)
    upload.add(was_hash=False)
    assert upload.is_known


def test_a_small_image_has_no_entry() -> None:
    assert UploadCache().entry(image(MIN_BYTES - 1)) is None
