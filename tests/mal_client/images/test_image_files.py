"""Claims about finding image files in a folder or by a pattern."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from mal_client.cli.common import EXIT_SOME_FAILED
from mal_client.cli.main import main
from mal_client.dataset_check.check import check_dataset
from mal_client.images.image_files import ImageFiles
from mal_client.review.pages import queue_cards
from mal_client.review.queue import review_queue

from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.images.files import UrlImages, read_image_bytes
from mal_train.core.storage.hosts import AllowedHosts
from tests.mal_client.datasets import Dataset, make_dataset, with_masks
from tests.mal_client.fake_server import FakeServer, serving


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("2021/a.jpg", "2022/a.jpg", "2022/b.jpg", "c.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def test_a_name_finds_the_one_file_that_ends_in_it(photos: Path) -> None:
    files = ImageFiles(f"{photos}/**/*.jpg")
    assert files.locate("b.jpg") == photos / "2022" / "b.jpg"
    assert files.locate("2021/a.jpg") == photos / "2021" / "a.jpg"


def test_an_ambiguous_file_name_is_refused_with_its_matches(photos: Path) -> None:
    with pytest.raises(BadImage, match=r"^a\.jpg: .*2021/a\.jpg, .*2022/a\.jpg") as caught:
        ImageFiles(f"{photos}/**/*.jpg").locate("a.jpg")
    assert caught.value.reason == "IMAGE_NOT_FOUND"


@pytest.mark.parametrize("name", ["c.png", "1/a.jpg", "022/a.jpg"])
def test_a_file_name_without_a_match_is_refused(photos: Path, name: str) -> None:
    with pytest.raises(BadImage, match=f"^{re.escape(name)}: ") as caught:
        ImageFiles(f"{photos}/**/*.jpg").locate(name)
    assert caught.value.reason == "IMAGE_NOT_FOUND"


@pytest.mark.parametrize("name", ["1/b.jpg", "/x/022/B.JPG", "x\\b.jpg"])
def test_a_file_name_leads_to_the_only_match_that_it_can_mean(photos: Path, name: str) -> None:
    found = ImageFiles(f"{photos}/**/*.jpg").locate(name)
    assert Path(found).name == "b.jpg"


@pytest.mark.parametrize("name", [".", "./", ""])
def test_a_name_without_parts_has_no_match_in_a_pattern(photos: Path, name: str) -> None:
    with pytest.raises(BadImage) as caught:
        ImageFiles(photos / "**" / "*.jpg").read(name)
    assert caught.value.reason == "IMAGE_NOT_FOUND"


def test_a_pattern_without_files_is_refused_at_once(photos: Path) -> None:
    with pytest.raises(BadDataset, match=r"\*\.webp"):
        ImageFiles(f"{photos}/*.webp")


def test_a_folder_with_a_bracket_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set[1]").mkdir()
    assert ImageFiles(tmp_path / "set[1]").locate("a.jpg") == tmp_path / "set[1]" / "a.jpg"


@pytest.fixture
def private(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a file outside the photos; a link in their folder leads to it, and another one to its folder."""
    path = tmp_path_factory.mktemp("private") / "secret.jpg"
    path.write_bytes(b"private")
    (photos / "link.jpg").symlink_to(path)
    (photos / "folder").symlink_to(path.parent)
    return path


def outside_names(photos: Path, private: Path) -> list[str]:
    relative = f"../{private.parent.name}/secret.jpg"
    return [
        *(relative, str(private), "link.jpg", "folder/secret.jpg", "2021/../../x.jpg", "folder/../secret.jpg"),
        *(f"folder/../{private.parent.name}/secret.jpg", "/dev/zero", "/proc/self/environ", "a\0.jpg"),
    ]


def test_no_name_and_no_link_leads_out_of_the_folder(photos: Path, private: Path) -> None:
    for name in outside_names(photos, private):
        with pytest.raises(BadImage) as caught:
            ImageFiles(photos).locate(name)
        assert (name, caught.value.reason) == (name, "IMAGE_NOT_FOUND")


def test_a_link_inside_the_folder_and_a_linked_folder_are_followed(photos: Path, tmp_path_factory: Any) -> None:
    (photos / "again.jpg").symlink_to(photos / "2021" / "a.jpg")
    (photos / "year").symlink_to("2022")
    linked = tmp_path_factory.mktemp("links") / "photos"
    linked.symlink_to(photos)
    for name in ("again.jpg", "year/b.jpg", "2021/../c.png", "missing.jpg"):
        assert ImageFiles(linked).locate(name) == linked / name


def test_no_link_leads_out_of_the_folder_of_a_pattern(photos: Path, private: Path) -> None:
    for name in ("link.jpg", "secret.jpg"):
        with pytest.raises(BadImage, match="outside"):
            ImageFiles(f"{photos}/**/*.jpg").locate(name)


def test_the_user_may_allow_files_outside_the_folder(photos: Path, private: Path) -> None:
    for name in ("link.jpg", "folder/secret.jpg", str(private)):
        assert ImageFiles(photos, allow_outside=True).read(name) == b"private"
    assert ImageFiles(f"{photos}/**/*.jpg", allow_outside=True).read("link.jpg") == b"private"


def outside(folder: Path) -> Dataset:
    """Returns a data set whose images lie beside its image folder: by "..", an absolute name, and a link."""
    dataset = make_dataset(folder, images=3, boxes=1)
    private = folder / "private.png"
    (dataset.images_dir / "image_0.png").rename(private)
    (dataset.images_dir / "image_0.png").symlink_to(private)
    dataset.coco["images"][1]["file_name"] = "../private.png"
    dataset.coco["images"][2]["file_name"] = str(private)
    dataset.save()
    return dataset


def test_label_sends_no_image_outside_the_folder_unless_it_is_allowed(tmp_path: Path) -> None:
    dataset, fake = outside(tmp_path), FakeServer()
    files = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    with serving(fake) as address:
        command = ["label", "--server", address, *files, "--output", str(dataset.output)]
        assert main(command) == EXIT_SOME_FAILED
        assert fake.received == []
        assert {row["error"]["reason"] for row in dataset.labeled().values()} == {"IMAGE_NOT_FOUND"}
        assert main([*command, "--allow-outside-images"]) == 0
    assert all(row["area"] for row in dataset.labeled().values())


def test_evaluate_sends_no_image_outside_the_folder(tmp_path: Path) -> None:
    dataset, fake = with_masks(outside(tmp_path)), FakeServer()
    files = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    with serving(fake) as address:
        assert main(["evaluate", "--server", address, *files]) == EXIT_SOME_FAILED
    assert fake.evaluated == []


def test_check_and_review_read_no_image_outside_the_folder(tmp_path: Path) -> None:
    dataset = with_masks(outside(tmp_path))
    report = check_dataset(dataset.json_path, dataset.images_dir)
    assert report.issues["IMAGE_NOT_FOUND"].count == 3
    for row in dataset.coco["annotations"]:
        row["score"] = 0.5
    dataset.save()
    queue = review_queue(dataset.json_path)
    assert queue_cards(queue.worst, dataset.images_dir) == []
    assert len(queue_cards(queue.worst, ImageFiles(dataset.images_dir, allow_outside=True))) == 3


def test_convert_reads_no_image_outside_the_folder(tmp_path: Path) -> None:
    dataset = outside(tmp_path)
    (tmp_path / "boxes.csv").write_text(
        f"file_name,x,y,width,height\n../private.png,1,1,5,5\n{tmp_path}/private.png,1,1,5,5\nimage_0.png,1,1,5,5\n"
    )
    command = ["convert", "--from", "csv", "--labels", str(tmp_path / "boxes.csv"), "--images", str(dataset.images_dir)]
    assert main([*command, "--output", str(dataset.output)]) == EXIT_SOME_FAILED
    assert dataset.labeled() == {}
    assert main([*command, "--output", str(dataset.output), "--allow-outside-images"]) == 0


def test_a_pipe_and_a_device_are_no_image_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path("/dev/zero"), tmp_path):
        with pytest.raises(BadImage) as caught:
            read_image_bytes(path, 1000)
        assert caught.value.reason == "IMAGE_NOT_FOUND"


def test_no_more_than_the_limit_of_a_file_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(1 << 40)
    for limit in (1000, 0, -5):  # a server may state any limit
        with pytest.raises(BadImage) as caught:
            read_image_bytes(tmp_path / "large.jpg", limit)
        assert caught.value.reason == "IMAGE_TOO_LARGE"


def test_label_takes_a_pattern(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    deeper = dataset.images_dir / "deeper"
    deeper.mkdir()
    (dataset.images_dir / "image_1.png").rename(deeper / "image_1.png")
    command = ["label", "--annotations", str(dataset.json_path), "--output", str(dataset.output)]
    with serving(FakeServer()) as address:
        assert main([*command, "--server", address, "--image-glob", f"{tmp_path}/**/*.png"]) == 0
    assert all(row["area"] for row in dataset.labeled().values())


def test_images_at_urls_are_found_by_name_and_have_no_list() -> None:
    files = ImageFiles(UrlImages({"a.png": "https://host/a.png"}, AllowedHosts(frozenset({"host"}))))
    assert files.locate("a.png") == "https://host/a.png"
    assert (files.is_remote, files.is_folder) == (True, False)
    assert list(files.unlisted([])) == []
    with pytest.raises(BadImage):
        files.locate("b.png")
