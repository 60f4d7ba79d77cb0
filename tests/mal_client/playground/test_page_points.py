"""Tests of points in the browser: clicks that correct the mask of the selected box."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from mal_client.client import Client
from mal_client.types import BoxLabel, Point
from PIL import Image

from tests.mal_client.playground.browser import Box, Screen
from tests.mal_client.playground.test_page import (
    LEFT,
    ONE_DONE,
    RIGHT,
    TWO_DONE,
    address,
    browser,
    folder,
    opened,
    screen,
    url,
)
from tests.tools import module

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["address", "browser", "folder", "screen", "url"]

OBJECT, BACKGROUND = (10, 24), (23, 41)
"""Pixels in the left box: a corner beside the ellipse, and its center."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Returns an image of two ellipses whose file is large enough for the client to send its hash."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:80, 0:96]
    pixels = rng.integers(0, 60, (80, 96, 3)).astype(np.uint8)
    for center in (23, 72):
        pixels[((x - center) / 13) ** 2 + ((y - 41) / 18) ** 2 <= 1] = (200, 180, 160)
    path = tmp_path / "two.png"
    Image.fromarray(pixels).save(path)
    assert path.stat().st_size > 4096
    return path


def click(screen: Screen, pixel: tuple[int, int], *, alt: bool = False) -> None:
    """Clicks on the middle of a pixel."""
    if alt:
        screen.page.keyboard.down("Alt")
    screen.click(pixel[0] + 0.5, pixel[1] + 0.5)
    if alt:
        screen.page.keyboard.up("Alt")


def wait_for_points(screen: Screen, text: str, row: int = 0) -> None:
    """Waits until a row of the list has a mask for this number of points."""
    screen.page.wait_for_function(
        "([text, row]) => document.querySelectorAll('#list li')[row].innerText.includes(text)", arg=[text, row]
    )


def points_of_label(address: str, image: Path, box: Box, *points: Point) -> BoxLabel:
    with Client(address, timeout_s=20) as client:
        return client.label_image(image, [box], points=[points])[0]


def downloaded(screen: Screen) -> list[dict[str, Any]]:
    with screen.page.expect_download() as download:
        screen.page.locator("#download").click()
    rows: list[dict[str, Any]] = json.loads(Path(download.value.path()).read_text())["annotations"]
    return rows


def center(pixel: tuple[int, int], *, is_positive: bool) -> Point:
    return Point(pixel[0] + 0.5, pixel[1] + 0.5, is_positive)


def test_clicks_in_the_selected_box_correct_its_mask(screen: Screen, image: Path, address: str) -> None:
    screen.open(image)
    screen.draw(RIGHT)
    screen.draw(LEFT)
    screen.wait_for(TWO_DONE)
    sizes: list[int] = []
    screen.page.on("request", lambda request: sizes.append(len(request.post_data_buffer or b"")))
    click(screen, OBJECT)
    wait_for_points(screen, "1 point", 1)
    click(screen, BACKGROUND, alt=True)
    wait_for_points(screen, "2 points", 1)
    points = (center(OBJECT, is_positive=True), center(BACKGROUND, is_positive=False))
    expected = points_of_label(address, image, LEFT, *points).mask
    shown = screen.mask()
    assert [bool(shown[y, x]) for x, y in (OBJECT, BACKGROUND)] == [True, False]
    np.testing.assert_array_equal(shown, expected | points_of_label(address, image, RIGHT).mask)
    assert len(sizes) == 2
    assert max(sizes) < 300


def test_the_last_point_is_undone_and_removed(screen: Screen, image: Path) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    plain = screen.mask()
    rows, columns = np.nonzero(~plain[26:56, 14:32])
    click(screen, (14 + int(columns[0]), 26 + int(rows[0])))
    wait_for_points(screen, "1 point")
    corrected = screen.mask()
    assert (corrected != plain).any()
    screen.page.locator("#stage").focus()
    screen.page.keyboard.press("Control+z")
    np.testing.assert_array_equal(screen.mask(), plain)
    screen.page.locator("#stage").focus()
    screen.page.keyboard.press("Control+Shift+z")
    np.testing.assert_array_equal(screen.mask(), corrected)
    screen.page.locator("#point-last").click()
    np.testing.assert_array_equal(screen.mask(), plain)
    assert screen.page.locator("#points").inner_text() == "No points"


def test_a_click_outside_selects_and_escape_makes_way_for_a_nested_box(screen: Screen, image: Path) -> None:
    screen.open(image)
    nested: Box = (16, 30, 12, 20)
    for box in (LEFT, nested, RIGHT):
        screen.draw(box)
        screen.page.keyboard.press("Escape")
    screen.wait_for("3 of 3 with a mask")
    screen.click(12, 25)
    assert tuple(screen.numbers()) == LEFT
    screen.click(70, 40)
    assert tuple(screen.numbers()) == RIGHT
    screen.click(20, 35)
    assert tuple(screen.numbers()) == nested
    screen.page.keyboard.down("Shift")
    screen.click(20, 35)
    screen.page.keyboard.up("Shift")
    assert tuple(screen.numbers()) == LEFT
    assert all("point" not in row for row in screen.rows())


def test_the_buttons_and_the_key_choose_what_a_click_means(screen: Screen, image: Path) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    screen.page.locator("#point-0").click()
    click(screen, BACKGROUND)
    wait_for_points(screen, "1 point")
    click(screen, (20, 30), alt=True)
    wait_for_points(screen, "2 points")
    screen.page.keyboard.press("p")
    screen.page.wait_for_selector("#point-1[aria-pressed=true]")
    click(screen, OBJECT)
    wait_for_points(screen, "3 points")
    (row,) = downloaded(screen)
    assert row["points"] == [[23.5, 41.5, 0], [20.5, 30.5, 1], [10.5, 24.5, 1]]
    assert row["corrected"] is True


def test_a_click_on_a_point_with_the_other_meaning_replaces_it(screen: Screen, image: Path) -> None:
    screen.open(image)
    screen.draw(LEFT)
    click(screen, BACKGROUND)
    wait_for_points(screen, "1 point")
    click(screen, BACKGROUND, alt=True)
    screen.page.wait_for_function("() => document.querySelector('#points').title === 'background at 23, 41'")
    wait_for_points(screen, "1 point")
    assert downloaded(screen)[0]["points"] == [[23.5, 41.5, 0]]


def test_a_box_that_leaves_points_of_the_object_behind_loses_them_until_undo(screen: Screen, image: Path) -> None:
    screen.open(image)
    screen.draw(LEFT)
    click(screen, OBJECT)
    wait_for_points(screen, "1 point")
    click(screen, (11, 30), alt=True)
    wait_for_points(screen, "2 points")
    screen.drag((20, 40), (40, 40))
    wait_for_points(screen, "1 point")
    screen.wait_for(ONE_DONE)
    assert "1 point of the object" in screen.page.locator("#notices").inner_text()
    (row,) = downloaded(screen)
    assert row["points"] == [[11.5, 30.5, 0]]
    assert "corrected" not in row
    screen.page.locator("#undo").click()
    wait_for_points(screen, "2 points")
    assert tuple(screen.numbers()) == LEFT
    assert downloaded(screen)[0]["points"] == [[10.5, 24.5, 1], [11.5, 30.5, 0]]


def test_a_smaller_box_keeps_the_points_in_it(screen: Screen, image: Path) -> None:
    screen.open(image)
    screen.draw(LEFT)
    click(screen, OBJECT)
    wait_for_points(screen, "1 point")
    click(screen, BACKGROUND)
    wait_for_points(screen, "2 points")
    screen.drag(LEFT[:2], (OBJECT[0] + 4, OBJECT[1] + 4))
    wait_for_points(screen, "1 point")
    screen.wait_for(ONE_DONE)
    assert downloaded(screen)[0]["points"] == [[23.5, 41.5, 1]]


def test_points_are_drawn_and_named_for_screen_readers(screen: Screen, image: Path) -> None:
    screen.open(image)
    screen.draw(LEFT)
    click(screen, OBJECT)
    wait_for_points(screen, "1 point")
    click(screen, BACKGROUND, alt=True)
    wait_for_points(screen, "2 points")
    points = "object at 10, 24, background at 23, 41"
    screen.page.wait_for_selector(f"[aria-label='two.png: 1 of 1 with a mask; points of box 1: {points}']")
    screen.page.locator("#show-masks").uncheck()
    colors = [screen.color(*screen.at(x + 0.5, y + 0.5)) for x, y in (OBJECT, BACKGROUND)]
    assert ["green" if g > r else "red" for r, g, _ in colors] == ["green", "red"]


def test_a_tap_adds_the_point_that_the_buttons_say(browser: Browser, url: str, image: Path) -> None:
    with opened(browser, url, has_touch=True) as screen:
        screen.open(image)
        screen.draw(LEFT)
        screen.wait_for(ONE_DONE)
        screen.page.locator("#point-0").tap()
        screen.page.touchscreen.tap(*screen.at(BACKGROUND[0] + 0.5, BACKGROUND[1] + 0.5))
        wait_for_points(screen, "1 point")
        assert downloaded(screen)[0]["points"] == [[23.5, 41.5, 0]]


def test_a_server_without_points_leaves_the_clicks_to_the_selection(screen: Screen, image: Path) -> None:
    def without_points(route: Any) -> None:
        info = route.fetch().json()
        info["limits"]["max_points"] = 0
        route.fulfill(json=info)

    screen.page.route("**/api/server*", without_points)
    screen.page.reload()
    screen.open(image)
    assert screen.page.locator("#point-labels").is_hidden()
    screen.draw((4, 10, 60, 65))
    screen.page.keyboard.press("Escape")
    screen.draw(LEFT)
    screen.wait_for(TWO_DONE)
    screen.click(20, 40)
    assert screen.numbers() == [4, 10, 60, 65]


def test_axe_finds_no_violations_in_a_page_with_points(screen: Screen, image: Path) -> None:
    axe = module("axe_playwright_python.sync_playwright")
    screen.open(image)
    screen.draw(LEFT)
    click(screen, OBJECT)
    wait_for_points(screen, "1 point")
    result = axe.Axe().run(screen.page)
    assert result.violations_count == 0, result.generate_report()
