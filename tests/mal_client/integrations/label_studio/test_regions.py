"""Claims about Label Studio's rectangles, masks and labeling configurations."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mal_client.integrations.label_studio.label_config import Control, read_label_config
from mal_client.integrations.label_studio.regions import (
    box_of_percent,
    check_picture,
    mask_regions,
    percent_of_box,
    read_rectangle,
)
from mal_client.types import BoxLabel

from mal_train.core.errors import BadBox, BadImage, ConfigError
from mal_train.core.masks.images import ImageHeader
from mal_train.core.masks.polygons import fill
from mal_train.core.masks.rle import encode_mask
from tests.mal_client.integrations.label_studio.rle_pack import decode_brush

CONFIG = """<View>
  <Image name="image" value="$photo"/>
  <RectangleLabels name="box" toName="image" smart="true"><Label value="cup"/><Label value="plate"/></RectangleLabels>
  <PolygonLabels name="outline" toName="image"><Label value="cup"/></PolygonLabels>
  <BrushLabels name="mask" toName="image"><Label value="cup"/></BrushLabels>
</View>"""


def region(**change: Any) -> dict[str, Any]:
    """A rectangle as Label Studio 1.23 sends it, on a picture of 640 x 480 px."""
    value = {"x": 25.0, "y": 50.0, "width": 12.5, "height": 10.0, "rotation": 0, "rectanglelabels": ["cup"]}
    whole = {
        "id": "gyqsvQ4tvz",
        "from_name": "box",
        "to_name": "image",
        "type": "rectanglelabels",
        "origin": "manual",
        "original_width": 640,
        "original_height": 480,
        "image_rotation": 0,
        "value": value | {key: change.pop(key) for key in list(change) if key in value},
    }
    return whole | change


@given(st.integers(1, 9000), st.integers(1, 9000), st.data())
def test_whole_and_half_pixels_come_back_exactly(width: int, height: int, data: st.DataObject) -> None:
    x, y = data.draw(st.integers(0, 2 * width)) / 2, data.draw(st.integers(0, 2 * height)) / 2
    box = (x, y, width - x, height - y)
    assert box_of_percent(percent_of_box(box, (width, height)), (width, height)) == box


def test_a_rectangle_is_read_in_pixels_of_the_picture() -> None:
    rectangle = read_rectangle(region())
    assert rectangle.box == (160.0, 240.0, 80.0, 48.0)
    assert (rectangle.labels, rectangle.size_wh, rectangle.from_name) == (("cup",), (640, 480), "box")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotation": 30}, "turned by 30 degrees"),
        ({"image_rotation": 90}, "shown turned by 90 degrees"),
        ({"x": None}, "x is None"),
        ({"width": float("nan")}, "width is nan"),
        ({"original_width": 0}, "original_width is 0"),
        ({"value": "x"}, "holds no value"),
    ],
)
def test_what_would_land_elsewhere_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadBox, match=words):
        read_rectangle(region(**change))


def test_a_whole_turn_is_none() -> None:
    assert read_rectangle(region(rotation=360)).box == (160.0, 240.0, 80.0, 48.0)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (ImageHeader((640, 480), orientation=3), "EXIF orientation 3"),
        (ImageHeader((480, 640), orientation=6), "EXIF orientation 6"),
        (ImageHeader((641, 480)), "640x480 px but it is stored as 641x480"),
    ],
)
def test_a_picture_that_the_browser_showed_otherwise_is_refused(header: ImageHeader, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        check_picture(read_rectangle(region()), header)
    check_picture(read_rectangle(region()), ImageHeader((640, 480)))


def ring() -> BoxLabel:
    """A label with a hole and a second part, 40 x 30 px."""
    drawn = np.zeros((30, 40), dtype=bool)
    drawn[5:19, 7:30] = True
    drawn[8:12, 10:20] = False
    drawn[25, 3] = True
    return BoxLabel(0, (0, 0, 1, 1), rle=encode_mask(drawn), score=0.5, area=92, flags=("MULTI_PART",))


def test_a_mask_becomes_a_brush_region_of_the_same_size() -> None:
    tool, names = read_label_config(CONFIG).mask_tool("image", ("cup",))
    label = ring()
    (made,) = mask_regions(label, tool, names, "a-mask", 0.75)
    assert (made["type"], made["from_name"], made["to_name"], made["score"]) == ("brushlabels", "mask", "image", 0.5)
    assert (made["original_width"], made["original_height"], made["meta"]) == (40, 30, {"text": ["MULTI_PART"]})
    assert made["value"]["brushlabels"] == ["cup"]
    assert (decode_brush(made["value"]["rle"], 30, 40) == label.mask).all()


def test_a_mask_becomes_a_polygon_for_each_part_and_keeps_its_hole() -> None:
    tool = Control("outline", "image", "polygonlabels", ("cup",))
    label = ring()
    made = mask_regions(label, tool, ("cup",), "a-mask", 0.0)
    assert [row["id"] for row in made] == ["a-mask", "a-mask-1"]
    assert {row["type"] for row in made} == {"polygonlabels"}
    lines = [np.array(row["value"]["points"]) * [40, 30] / 100 for row in made]
    filled = fill(lines, 30, 40)
    assert (filled == label.mask).all()


def test_brushes_are_preferred_to_polygons_wherever_they_stand() -> None:
    config = read_label_config(CONFIG)
    assert config.masks["image"].kind == "brushlabels"
    assert config.pictures == {"image": "photo"}
    assert config.boxes["box"].labels == ("cup", "plate")


def test_a_box_without_a_label_gets_the_only_one() -> None:
    assert read_label_config(CONFIG).mask_tool("image", ())[1] == ("cup",)


@pytest.mark.parametrize(
    ("labels", "to_name", "words"),
    [(("plate",), "image", "'mask' does not offer plate"), (("cup",), "other", "nothing takes masks")],
)
def test_masks_that_no_tool_takes_are_refused_with_the_remedy(
    labels: tuple[str, ...], to_name: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_label_config(CONFIG).mask_tool(to_name, labels)


@pytest.mark.parametrize(
    ("xml", "words"), [("<View>", "not readable"), ("<View><Image name='a' value='$b'/></View>", "no boxes are drawn")]
)
def test_a_configuration_without_boxes_is_refused(xml: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_label_config(xml)
