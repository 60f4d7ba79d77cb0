"""Images by the names in annotation files."""

import unicodedata

import pytest
from mal_client.formats.boxes import RowError
from mal_client.formats.label_files import ImageNames, only_image


@pytest.mark.parametrize("folder", ["", "cam0"])
def test_an_exact_name_wins_over_one_without_its_suffix(folder: str) -> None:
    images = ImageNames(["a.jpg", "a.jpg.png"])
    assert images.find("a.jpg", folder) == ["a.jpg"]
    assert images.find("a.jpg.png", folder) == ["a.jpg.png"]
    assert images.find("a", folder) == ["a.jpg"]
    assert images.at("a.jpg") == ["a.jpg"]


def test_of_two_normal_forms_the_stated_one_is_meant() -> None:
    forms = [unicodedata.normalize(form, "sub/Gr\u00fc\u00dfe.png") for form in ("NFC", "NFD")]
    images = ImageNames(forms)
    for name in forms:
        for stated in (name, name.removesuffix(".png"), name.replace("/", "\\"), f"../images/{name}"):
            assert only_image("x", stated, images.find(stated)) == name
    apart = ImageNames([f"cam{number}/{name}" for number, name in enumerate(forms)])
    assert isinstance(only_image("x", forms[0], apart.find(forms[0])), RowError)
