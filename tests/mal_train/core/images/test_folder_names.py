"""File names of annotations that the folder spells in another way, and names that could mean several files."""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

from mal_train.core.errors import BadImage
from mal_train.core.images import folder_names
from mal_train.core.images.files import ImageFolder, NewFindings, add_findings, respelling_note
from mal_train.core.images.folder_names import AmbiguousName, FolderNames, RepeatedNames
from mal_train.core.images.pixels import PixelFormat

NFD = unicodedata.normalize("NFD", "Gr\u00fc\u00dfe.jpg")


def folder_with(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


@pytest.mark.parametrize(
    ("on_disk", "name"),
    [
        ("a.jpg", "a.JPG"),
        ("Sub/A.jpg", "sub\\a.JPG"),
        ("a.jpg", "images\\a.jpg"),
        ("a.jpg", "D:\\x\\a.jpg"),
        ("a.jpg", "/x/y/a.jpg"),
        ("a.jpg", "./x//a.jpg"),
        ("p8/a.jpg", "images/v1/p8/a.jpg"),
        ("a b+c#.jpg", "a%20b%2Bc%23.jpg"),
        (NFD, "Gr\u00fc\u00dfe.jpg"),
        ("Gr\u00fc\u00dfe.jpg", NFD),
        (NFD, "Gr%C3%BC%C3%9Fe.JPG"),
        ("100%25.jpg", "x/100%25.jpg"),
        ("a.jpg", "x/../../y/a.jpg"),
    ],
)
def test_a_name_leads_to_the_file_that_it_means(tmp_path: Path, on_disk: str, name: str) -> None:
    folder = ImageFolder(folder_with(tmp_path, on_disk, "other.jpg"))
    assert folder.locate(name) == tmp_path / on_disk
    assert FolderNames(tmp_path).name_in_folder(name) == on_disk
    assert respelling_note(folder) is not None


@pytest.mark.parametrize("name", ["b.jpg", "b", "", ".", "..", "a.jpg/b", "%", "%00.jpg", "sub"])
def test_a_name_that_means_no_file_stays_as_it_is(tmp_path: Path, name: str) -> None:
    folder = ImageFolder(folder_with(tmp_path, "a.jpg", "sub/c.jpg"))
    assert folder.locate(name) == tmp_path / name
    assert FolderNames(tmp_path).name_in_folder(name) == name


def test_the_exact_name_wins(tmp_path: Path) -> None:
    folder = ImageFolder(folder_with(tmp_path, "a%20b.jpg", "a b.jpg", "A.jpg", "a.jpg"))
    assert folder.locate("a%20b.jpg") == tmp_path / "a%20b.jpg"
    assert folder.locate("a.jpg") == tmp_path / "a.jpg"
    assert respelling_note(folder) is None


def test_several_files_of_equal_spelling_are_an_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "A.jpg", "a.JPG")
    with pytest.raises(AmbiguousName, match=r"A\.jpg.*a\.JPG"):
        FolderNames(folder).find("a.jpg")
    with pytest.raises(BadImage) as caught:
        ImageFolder(folder).locate("a.jpg")
    assert caught.value.reason == "IMAGE_NOT_FOUND"


def test_a_file_that_two_names_of_the_annotations_can_mean_is_an_error(tmp_path: Path) -> None:
    names = ["cam0/f.jpg", "cam1/f.jpg", "cam1/g.jpg", "x/c/h.jpg", "y/c/H.jpg"]
    folder = ImageFolder(folder_with(tmp_path, "f.jpg", "g.jpg", "c/h.jpg", "h.jpg")).of_names(lambda: names)
    for name in ("cam0/f.jpg", "cam1/f.jpg", "x/c/h.jpg", "y/c/H.jpg"):
        with pytest.raises(BadImage, match=name):
            folder.locate(name)
    assert folder.locate("cam1/g.jpg") == tmp_path / "g.jpg"


def test_longer_paths_that_fit_tell_equal_names_apart(tmp_path: Path) -> None:
    names = ["images/cam0/f.jpg", "images/cam1/f.jpg"]
    folder = ImageFolder(folder_with(tmp_path, "cam0/f.jpg", "cam1/f.jpg")).of_names(lambda: names)
    assert [folder.locate(name) for name in names] == [tmp_path / "cam0/f.jpg", tmp_path / "cam1/f.jpg"]


def test_only_names_with_a_common_last_part_are_kept() -> None:
    assert RepeatedNames(lambda: ["a/x.jpg", "b/X.JPG", "c/y.jpg", "c/y.jpg"]).listed == ("a/x.jpg", "b/X.JPG")


def test_many_names_of_one_last_part_are_compared_without_reading_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 300
    names = [f"old/cam{n}/frame.jpg" for n in range(count)]
    folder = ImageFolder(folder_with(tmp_path, *(f"cam{n}/frame.jpg" for n in range(count)))).of_names(lambda: names)
    calls = Counter[str]()
    original = folder_names.readings

    def counted(name: str) -> Iterator[list[str]]:
        calls[name] += 1
        return original(name)

    monkeypatch.setattr(folder_names, "readings", counted)
    for n, name in enumerate(names):
        assert folder.locate(name) == tmp_path / f"cam{n}/frame.jpg"
    assert max(calls.values()) <= 4


def test_images_can_be_pickled_with_the_names_of_their_annotations(tmp_path: Path) -> None:
    names = ["cam0/f.jpg", "cam1/f.jpg", "cam1/g.jpg"]
    folder = ImageFolder(folder_with(tmp_path, "f.jpg", "g.jpg")).of_names(lambda: names)
    copy = ForkingPickler.loads(ForkingPickler.dumps(folder))
    assert copy.repeated.listed == ("cam0/f.jpg", "cam1/f.jpg")
    assert copy.locate("cam1/g.jpg") == tmp_path / "g.jpg"
    with pytest.raises(BadImage):
        copy.locate("cam0/f.jpg")


def test_what_another_process_found_is_added_once(tmp_path: Path) -> None:
    folder, other = (ImageFolder(folder_with(tmp_path, "a.jpg", "b.jpg")) for _ in range(2))
    new = NewFindings(other)
    other.locate("A.jpg")
    other.formats.add("a.jpg", PixelFormat(bits=16))
    assert new.take() == {"respelled": {"A.jpg": "a.jpg"}, "stretched": ["a.jpg"], "dropped": []}
    assert new.take() == {"respelled": {}, "stretched": [], "dropped": []}
    other.locate("x/b.jpg")
    other.formats.add("b.jpg", PixelFormat(bands=4, dropped_bands=1))
    add_findings(folder, new.take())
    assert folder.respelled == {"x/b.jpg": "b.jpg"}
    assert (folder.formats.stretched, folder.formats.dropped) == (set(), {"b.jpg"})


def test_a_file_in_a_folder_of_the_folder_is_named(tmp_path: Path) -> None:
    folder = ImageFolder(folder_with(tmp_path, "default/a.jpg", "other/b.jpg"))
    with pytest.raises(BadImage, match=r"default/a\.jpg") as caught:
        folder.locate("x/A.jpg")
    assert caught.value.reason == "IMAGE_NOT_FOUND"
    assert folder.locate("c.jpg") == tmp_path / "c.jpg"


def test_names_that_look_alike_are_shown_with_escapes(tmp_path: Path) -> None:
    composed, decomposed = "\u00e9.jpg", "e\u0301.jpg"
    folder = ImageFolder(folder_with(tmp_path, composed))
    folder.locate(decomposed)
    note = respelling_note(folder)
    assert note is not None
    assert r"\xe9.jpg for e\u0301.jpg" in note


def test_a_file_with_another_suffix_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"did you mean a\.png"):
        ImageFolder(folder_with(tmp_path, "a.png")).locate("x/a.jpg")
