"""Images by the names in annotation files."""

import pytest
from mal_client.formats.label_files import ImageNames


@pytest.mark.parametrize("folder", ["", "cam0"])
def test_an_exact_name_wins_over_one_without_its_suffix(folder: str) -> None:
    images = ImageNames(["a.jpg", "a.jpg.png"])
    assert images.find("a.jpg", folder) == ["a.jpg"]
    assert images.find("a.jpg.png", folder) == ["a.jpg.png"]
    assert images.find("a", folder) == ["a.jpg"]
    assert images.at("a.jpg") == ["a.jpg"]
