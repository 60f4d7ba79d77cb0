"""Images at the URLs of a COCO file: read from the allowed hosts only."""

from pathlib import Path

import pytest

from mal_train.core.errors import BadImage
from mal_train.core.images.files import ImageFolder, UrlImages, images_of
from mal_train.core.storage.hosts import AllowedHosts
from tests.mal_train.core.storage.test_web import serving

LIMIT = 1000


def test_urls_without_a_rule_for_hosts_cannot_be_described() -> None:
    with pytest.raises(TypeError):
        UrlImages({"a.png": "https://host/a.png"})  # type: ignore[call-arg]


def test_an_image_at_a_url_is_read_from_an_allowed_host_only() -> None:
    with serving() as web:
        web.files["/a.png"] = b"x"
        urls = {"a.png": web.url("/a.png")}
        assert UrlImages(urls, AllowedHosts.parse(["127.0.0.1"], "x")).read("a.png", LIMIT) == b"x"
        web.requests.clear()
        for refused in (UrlImages(urls, AllowedHosts()), UrlImages(urls, AllowedHosts.parse(["*"], "x"))):
            with pytest.raises(BadImage) as raised:
                refused.read("a.png", LIMIT)
            assert raised.value.reason == "IMAGE_NOT_FOUND"
        assert web.requests == []


def test_a_row_without_a_url_has_no_image() -> None:
    with pytest.raises(BadImage) as raised:
        UrlImages({}, AllowedHosts()).locate("a.png")
    assert raised.value.reason == "IMAGE_NOT_FOUND"


def test_images_are_named_without_their_urls() -> None:
    assert "0f3c" not in UrlImages({"a": "https://host/a?sig=0f3c"}, AllowedHosts(frozenset({"host"}))).name
    assert "0f3c" not in ImageFolder("https://host/images?sig=0f3c").name


def test_a_folder_becomes_its_images_and_images_stay(tmp_path: Path) -> None:
    urls = UrlImages({}, AllowedHosts())
    assert images_of(tmp_path) == ImageFolder(tmp_path)
    assert images_of(urls) is urls
