"""Tests of Label Studio's rectangles, masks and labeling configurations."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mal_client.integrations.label_studio.label_config import Control, read_label_config
from mal_client.integrations.label_studio.regions import (
    box_to_percent,
    check_image,
    mask_regions,
    percent_to_box,
    read_rectangle,
)
from mal_client.types import BoxLabel

from mal_train.core.errors import BadBox, BadImage, ConfigError
from mal_train.core.images.container import ImageHeader
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
    """Returns a rectangle as Label Studio 1.23 sends it, on an image of 640 x 480 px."""
    value = {"x": 25.0, "y": 50.0, "width": 12.5, "height": 10.0, "rotation": 0, "rectanglelabels": ["cup"]}
    fields = {
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
    return fields | change


@given(st.integers(1, 9000), st.integers(1, 9000), st.data())
def test_percent_and_back_keeps_integers_and_halves(width: int, height: int, data: st.DataObject) -> None:
    x, y = data.draw(st.integers(0, 2 * width)) / 2, data.draw(st.integers(0, 2 * height)) / 2
    box = (x, y, width - x, height - y)
    assert percent_to_box(box_to_percent(box, (width, height)), (width, height)) == box


def test_a_rectangle_is_read_in_pixels_of_the_image() -> None:
    rectangle = read_rectangle(region())
    assert rectangle.box == (160.0, 240.0, 80.0, 48.0)
    assert (rectangle.labels, rectangle.size_wh, rectangle.from_name) == (("cup",), (640, 480), "box")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rotation": 30}, r"\brotation\b.*\b30\b"),
        ({"image_rotation": 90}, r"\bimage_rotation\b.*\b90\b"),
        ({"x": None}, r"\bx\b.*None"),
        ({"width": float("nan")}, r"\bwidth\b.*nan"),
        ({"original_width": 0}, r"\boriginal_width\b.*\b0\b"),
        ({"value": "x"}, r"\bvalue\b"),
    ],
)
def test_an_invalid_rectangle_is_refused_with_the_name_of_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(BadBox, match=field):
        read_rectangle(region(**change))


@pytest.mark.parametrize("degrees", [360, 1e-7, 360 - 1e-7, -1e-7])
def test_a_rotation_that_moves_no_corner_is_none(degrees: float) -> None:
    assert read_rectangle(region(rotation=degrees)).box == (160.0, 240.0, 80.0, 48.0)


@pytest.mark.parametrize("degrees", [180, 0.1])
def test_half_a_turn_about_the_first_corner_moves_the_rectangle(degrees: float) -> None:
    with pytest.raises(BadBox, match="rotation"):
        read_rectangle(region(rotation=degrees))


@pytest.mark.parametrize(
    ("header", "values"),
    [
        (ImageHeader((640, 480), orientation=3), "EXIF orientation 3"),
        (ImageHeader((480, 640), orientation=6), "EXIF orientation 6"),
        (ImageHeader((641, 480)), "640x480 .*641x480"),
    ],
)
def test_an_image_that_the_browser_displayed_differently_is_refused(header: ImageHeader, values: str) -> None:
    with pytest.raises(BadImage, match=values) as refused:
        check_image(read_rectangle(region()), header)
    assert refused.value.reason == "IMAGE_SIZE_MISMATCH"
    check_image(read_rectangle(region()), ImageHeader((640, 480)))


def ring() -> BoxLabel:
    """Returns a label with a hole and a second component, 40 x 30 px."""
    drawn = np.zeros((30, 40), dtype=bool)
    drawn[5:19, 7:30] = True
    drawn[8:12, 10:20] = False
    drawn[25, 3] = True
    return BoxLabel(0, (0, 0, 1, 1), rle=encode_mask(drawn), score=0.5, area=92, flags=("MULTI_PART",))


def test_a_mask_becomes_a_brush_region_of_the_same_size() -> None:
    control, names = read_label_config(CONFIG).mask_control("image", ("cup",))
    label = ring()
    (row,) = mask_regions(label, control, names, "a-mask", 0.75)
    assert (row["type"], row["from_name"], row["to_name"], row["score"]) == (
        "brushlabels",
        "mask",
        "image",
        0.5,
    )
    assert (row["original_width"], row["original_height"], row["meta"]) == (40, 30, {"text": ["MULTI_PART"]})
    assert row["value"]["brushlabels"] == ["cup"]
    assert (decode_brush(row["value"]["rle"], 30, 40) == label.mask).all()


def test_a_mask_becomes_a_polygon_for_each_component_and_keeps_its_hole() -> None:
    control = Control("outline", "image", "polygonlabels", ("cup",))
    label = ring()
    regions = mask_regions(label, control, ("cup",), "a-mask", 0.0)
    assert [row["id"] for row in regions] == ["a-mask", "a-mask-1"]
    assert {row["type"] for row in regions} == {"polygonlabels"}
    lines = [np.array(row["value"]["points"]) * [40, 30] / 100 for row in regions]
    filled = fill(lines, 30, 40)
    assert (filled == label.mask).all()


def test_brushes_are_preferred_to_polygons_in_any_order() -> None:
    config = read_label_config(CONFIG)
    assert config.masks["image"].region_type == "brushlabels"
    assert config.image_fields == {"image": "photo"}
    assert config.boxes["box"].labels == ("cup", "plate")


def test_a_box_without_a_label_gets_the_only_one() -> None:
    assert read_label_config(CONFIG).mask_control("image", ())[1] == ("cup",)


def test_many_labels_are_looked_up_in_many_classes_one_by_one() -> None:
    classes = tuple(f"class {number}" for number in range(40_000))
    control = Control("mask", "image", "brushlabels", classes)
    config = replace(read_label_config(CONFIG), masks={"image": control})
    started = time.process_time()
    _, known = config.mask_control("image", ("unknown",) * 20_000 + classes[-1:])
    # Comparing each with each takes 17 s.
    assert (known, time.process_time() - started < 4) == (classes[-1:], True)


@pytest.mark.parametrize(
    ("labels", "to_name", "names"),
    [(("plate",), "image", "'mask'.*plate"), (("cup",), "other", "'other'.*<BrushLabels")],
)
def test_masks_without_a_control_are_refused(labels: tuple[str, ...], to_name: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        read_label_config(CONFIG).mask_control(to_name, labels)


@pytest.mark.parametrize(
    ("xml", "name"), [("<View>", "XML"), ("<View><Image name='a' value='$b'/></View>", "<RectangleLabels>")]
)
def test_a_configuration_without_boxes_is_refused(xml: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read_label_config(xml)
