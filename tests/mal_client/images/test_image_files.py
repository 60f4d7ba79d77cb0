"""Claims about finding image files in a folder or by a pattern."""

import re
from pathlib import Path

import pytest
from mal_client.cli.main import main
from mal_client.images.image_files import ImageFiles

from mal_train.core.errors import BadDataset, BadImage
from tests.mal_client.datasets import make_dataset
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
    assert files.path("b.jpg") == photos / "2022" / "b.jpg"
    assert files.path("2021/a.jpg") == photos / "2021" / "a.jpg"


def test_an_ambiguous_file_name_is_refused_with_its_matches(photos: Path) -> None:
    with pytest.raises(BadImage, match=r"^a\.jpg: .*2021/a\.jpg, .*2022/a\.jpg") as caught:
        ImageFiles(f"{photos}/**/*.jpg").path("a.jpg")
    assert caught.value.reason == "IMAGE_NOT_FOUND"


@pytest.mark.parametrize("name", ["c.png", "1/b.jpg", "022/b.jpg"])
def test_a_file_name_without_a_match_is_refused(photos: Path, name: str) -> None:
    with pytest.raises(BadImage, match=f"^{re.escape(name)}: ") as caught:
        ImageFiles(f"{photos}/**/*.jpg").path(name)
    assert caught.value.reason == "IMAGE_NOT_FOUND"


def test_a_pattern_without_files_is_refused_at_once(photos: Path) -> None:
    with pytest.raises(BadDataset, match=r"\*\.webp"):
        ImageFiles(f"{photos}/*.webp")


def test_a_folder_with_a_bracket_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set[1]").mkdir()
    assert ImageFiles(tmp_path / "set[1]").path("a.jpg") == tmp_path / "set[1]" / "a.jpg"


def test_label_takes_a_pattern(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    deeper = dataset.images_dir / "deeper"
    deeper.mkdir()
    (dataset.images_dir / "image_1.png").rename(deeper / "image_1.png")
    command = ["label", "--annotations", str(dataset.json_path), "--output", str(dataset.output)]
    with serving(FakeServer()) as address:
        assert main([*command, "--server", address, "--image-glob", f"{tmp_path}/**/*.png"]) == 0
    assert all(row["area"] for row in dataset.labeled().values())
