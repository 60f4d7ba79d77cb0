"""Tests of the playground in a browser, with `mal-server` and a small real network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from mal_client.client import Client
from mal_client.types import BoxLabel, LabelOptions
from PIL import Image

from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tests.mal_client.playground.browser import Box, Screen, command, launched
from tests.mal_client.playground.playground_page import HeldAfterFirst
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import BrightPredictor, loaded
from tests.mal_server.test_real_model import command as server_command
from tests.networks import spread_network
from tests.scenes import write_scenes
from tests.tools import module

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LEFT: Box = (8, 20, 30, 42)
RIGHT: Box = (55, 22, 34, 40)
ONE_DONE, TWO_DONE = "1 of 1 with a mask", "2 of 2 with a mask"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as launched_browser:
        yield launched_browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes images of two ellipses, a checkpoint whose masks are neither empty nor full, and a configuration."""
    path = tmp_path_factory.mktemp("playground")
    write_scenes(path)
    network = spread_network()
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    config = LabelerConfig(crop_size=64, mask_thres=(0.5, 0.5, 0.5))
    save_checkpoint(
        path / "micro.malckpt", Checkpoint(network.config, config, weights, [{"id": 1, "name": "ellipse"}]), None
    )
    settings = {
        "checkpoint": str(path / "micro.malckpt"),
        "gpu_ids": [],
        "precision": "float32",
        "drain_delay_s": 0.0,
        "threads": 1,
        "listen": {"port": 0},
    }
    (path / "server.yaml").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def address(browser: Browser, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    del browser  # requested first, so that no server starts without a browser
    with server_command(folder, tmp_path_factory.mktemp("port") / "port") as (_, address):
        yield address


@pytest.fixture(scope="module")
def url(address: str) -> Iterator[str]:
    with command(address) as page_url:
        yield page_url


@contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[Screen]:
    """Opens a new page; exceptions of its scripts fail the test."""
    script_errors: list[str] = []
    with browser.new_context(viewport={"width": 1280, "height": 900}, **context) as fresh:
        page = fresh.new_page()
        page.on("pageerror", lambda error: script_errors.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(url)
        yield Screen(page)
    assert script_errors == []


@pytest.fixture
def screen(browser: Browser, url: str) -> Iterator[Screen]:
    with opened(browser, url) as page:
        yield page


@pytest.fixture
def image(folder: Path) -> Path:
    return folder / "images" / "0.png"


def expected_label(address: str, image: Path, box: Box, **options: Any) -> BoxLabel:
    with Client(address, timeout_s=20) as client:
        return client.label_image(image, [box], LabelOptions(**options))[0]


def test_tight_boxes_are_drawn_and_written_to_the_file(screen: Screen, image: Path, address: str) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    tight = expected_label(address, image, LEFT).mask_box
    assert tight is not None
    before = screen.page.locator("#stage").screenshot()
    screen.page.get_by_label("Tight boxes").check()
    screen.page.wait_for_timeout(200)
    assert screen.page.locator("#stage").screenshot() != before
    with screen.page.expect_download() as download:
        screen.page.click("#download")
    (row,) = json.loads(Path(download.value.path()).read_text())["annotations"]
    assert row["bbox"] == list(tight)
    assert row["bbox"] != list(LEFT)


def test_a_box_drawn_with_the_mouse_shows_the_mask_of_the_client_pixel_by_pixel(
    screen: Screen, image: Path, address: str
) -> None:
    screen.open(image)
    np.testing.assert_array_equal(screen.image(), np.asarray(Image.open(image)))
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    assert tuple(screen.numbers()) == LEFT
    expected = expected_label(address, image, LEFT)
    assert 0 < expected.area < LEFT[2] * LEFT[3]
    np.testing.assert_array_equal(screen.mask(), expected.mask)
    assert f"score {expected.score:.3f}" in screen.rows()[0]


@pytest.mark.parametrize("scope", ["threshold", "box-threshold"])
def test_the_threshold_changes_the_mask_as_in_the_client(screen: Screen, image: Path, address: str, scope: str) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    before = screen.mask()
    screen.page.locator(f"#{scope}-on").check()
    screen.page.locator(f"#{scope}").fill("0.45")
    expected = expected_label(address, image, LEFT, threshold=0.45)
    screen.page.wait_for_function(
        "text => document.querySelector('#list li').innerText.includes(text)", arg=f"score {expected.score:.3f}"
    )
    assert screen.page.locator(f"#{scope}-shown").inner_text() == "0.45"
    np.testing.assert_array_equal(screen.mask(), expected.mask)
    assert (screen.mask() != before).any()
    screen.page.locator(f"#{scope}-on").uncheck()
    # Not the status: it says the same until the page has drawn the click.
    screen.page.wait_for_function(
        "text => document.querySelector('#list li').innerText.includes(text)",
        arg=f"score {expected_label(address, image, LEFT).score:.3f}",
    )
    np.testing.assert_array_equal(screen.mask(), before)


def test_the_download_has_the_encoded_masks_of_the_client_and_the_drawn_boxes(
    screen: Screen, image: Path, address: str
) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.page.locator("#category").fill("egg")
    screen.page.locator("#category").press("Tab")
    screen.draw(RIGHT)
    screen.wait_for(TWO_DONE)
    with screen.page.expect_download() as download:
        screen.page.locator("#download").click()
    assert download.value.suggested_filename == "0.coco.json"
    file = json.loads(Path(download.value.path()).read_bytes())
    for row, box in zip(file["annotations"], (LEFT, RIGHT), strict=True):
        label = expected_label(address, image, box)
        assert label.rle is not None
        assert row["segmentation"]["counts"].encode() == label.rle.counts
        assert row["segmentation"]["size"] == [80, 96]
        assert tuple(row["bbox"]) == box
        assert row["score"] == label.score
    assert [(row["name"], row["id"]) for row in file["categories"]] == [("object", 2), ("egg", 3)]
    assert file["images"] == [{"id": 1, "file_name": "0.png", "width": 96, "height": 80}]


def test_the_error_of_a_box_is_shown_beside_it_until_the_box_is_corrected(
    screen: Screen, image: Path, address: str
) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.draw(RIGHT)
    screen.wait_for(TWO_DONE)
    screen.page.locator("#box-w").fill("0")
    screen.page.locator("#box-w").press("Enter")
    screen.wait_for("1 of 2 with a mask · 1 failed")
    first, second = screen.rows()
    assert "score" in first
    assert "width" in second
    assert "no mask" in second
    # The canvas does not show the previous mask of the box either.
    np.testing.assert_array_equal(screen.mask(), expected_label(address, image, LEFT).mask)
    screen.page.locator("#undo").click()
    screen.wait_for(TWO_DONE)
    with_both = expected_label(address, image, LEFT).mask | expected_label(address, image, RIGHT).mask
    np.testing.assert_array_equal(screen.mask(), with_both)
    screen.page.locator("#redo").click()
    screen.wait_for("1 of 2 with a mask · 1 failed")
    screen.page.locator("#box-w").fill("34")
    screen.page.locator("#box-w").press("Enter")
    screen.wait_for(TWO_DONE)
    assert screen.page.locator(".error").count() == 0


def test_boxes_survive_a_server_restart_and_are_labeled_after_it(
    browser: Browser, folder: Path, tmp_path: Path, image: Path
) -> None:
    with server_command(folder, tmp_path / "port") as (_, where):
        url = command(where)
        shown = opened(browser, url.__enter__())
        screen = shown.__enter__()
        screen.open(image)
        screen.draw(LEFT)
        screen.wait_for(ONE_DONE)
    try:
        screen.draw(RIGHT)
        screen.wait_for("1 of 2 with a mask · 1 failed")
        assert "unavailable" in screen.rows()[1]
        with server_command(folder, tmp_path / "port again", f"listen.port={where.rpartition(':')[2]}"):
            screen.wait_for(TWO_DONE)
    finally:
        shown.__exit__(None, None, None)
        url.__exit__(None, None, None)


def test_boxes_are_moved_and_resized_with_the_mouse_and_undone(screen: Screen, image: Path) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    screen.drag((20, 40), (30, 45))
    assert screen.numbers() == [18, 25, 30, 42]
    screen.drag((48, 67), (60, 70))
    assert screen.numbers() == [18, 25, 42, 45]
    screen.drag((18, 47.5), (10, 47.5))
    assert screen.numbers() == [10, 25, 50, 45]
    screen.wait_for(ONE_DONE)
    screen.page.locator("#undo").click()
    screen.page.locator("#undo").click()
    assert screen.numbers() == [18, 25, 30, 42]
    screen.page.keyboard.press("Control+Shift+z")
    assert screen.numbers() == [18, 25, 42, 45]


def test_a_box_does_not_leave_the_image_when_it_is_drawn_or_moved(screen: Screen, image: Path) -> None:
    screen.open(image)
    screen.drag((80, 60), (200, 100))
    assert screen.numbers() == [80, 60, 16, 20]
    screen.drag((88, 70), (150, 0))
    assert screen.numbers() == [80, 0, 16, 20]


def test_the_keyboard_adds_moves_resizes_selects_and_deletes_boxes(screen: Screen, image: Path) -> None:
    screen.open(image)
    keyboard = screen.page.keyboard
    screen.page.locator("#stage").focus()
    keyboard.press("n")
    screen.wait_for(ONE_DONE)
    x, y, w, h = screen.numbers()
    keyboard.press("ArrowRight")
    keyboard.press("Shift+ArrowUp")
    keyboard.press("Alt+ArrowLeft")
    assert screen.numbers() == [x + 1, y - 10, w - 1, h]
    keyboard.press("n")
    keyboard.press("[")
    assert screen.numbers() == [x + 1, y - 10, w - 1, h]
    keyboard.press("Delete")
    screen.wait_for(ONE_DONE)
    keyboard.press("Control+z")
    screen.wait_for(TWO_DONE)


def test_undo_restores_a_mask_without_a_request(screen: Screen, image: Path) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    before = screen.mask()
    screen.drag((20, 40), (30, 45))
    screen.wait_for(ONE_DONE)
    requests: list[str] = []
    screen.page.on("request", lambda request: requests.append(request.url))
    screen.page.locator("#undo").click()
    screen.wait_for(ONE_DONE)
    np.testing.assert_array_equal(screen.mask(), before)
    assert requests == []


def test_an_edit_does_not_send_the_image_again(screen: Screen, image: Path) -> None:
    screen.open(image)
    sizes: list[int] = []
    screen.page.on("request", lambda request: sizes.append(len(request.post_data_buffer or b"")))
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    assert len(sizes) == 1
    assert sizes[0] < 200 < image.stat().st_size


def test_masks_are_shown_while_others_are_pending(browser: Browser, image: Path) -> None:
    predictor = HeldAfterFirst()
    with served(predictor, max_batch_size=1) as address, command(address) as url, opened(browser, url) as screen:
        screen.open(image)
        screen.draw(LEFT)
        screen.draw(RIGHT)
        screen.wait_for(TWO_DONE)
        predictor.warmup_batches = len(predictor.batches)
        screen.page.locator("#flip").check()
        screen.wait_for("1 of 2 with a mask · 1 waiting")
        predictor.released.set()
        screen.wait_for(TWO_DONE)


def test_worst_first_sorts_failed_boxes_and_then_low_scores_first(screen: Screen, image: Path, address: str) -> None:
    screen.open(image)
    boxes: list[Box] = [LEFT, RIGHT, (0, 0, 96, 80)]
    for box in boxes:
        screen.draw(box)
        screen.page.keyboard.press("Escape")
    screen.wait_for("3 of 3 with a mask")
    screen.click(70, 10)
    screen.page.locator("#box-h").fill("-1")
    screen.page.locator("#box-h").press("Enter")
    screen.wait_for("2 of 3 with a mask · 1 failed")
    screen.page.locator("#worst").check()
    scores = [expected_label(address, image, box).score for box in boxes[:2]]
    order = [3, *(1 + np.argsort(scores))]
    screen.page.wait_for_function("() => document.querySelector('#list li').innerText.startsWith('3')")
    assert [int(row.split()[0]) for row in screen.rows()] == order


def test_agreement_and_branch_give_the_results_of_the_client(screen: Screen, image: Path, address: str) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    screen.page.locator("#branch").select_option("teacher")
    screen.page.locator("#agreement").check()
    screen.page.wait_for_selector("text=agreement 0.")
    screen.wait_for(ONE_DONE)
    expected = expected_label(address, image, LEFT, branch="teacher", agreement=True)
    assert f"agreement {expected.agreement:.3f}" in screen.rows()[0]
    np.testing.assert_array_equal(screen.mask(), expected.mask)


def test_options_that_need_two_networks_are_disabled_for_a_model_with_one(browser: Browser, image: Path) -> None:
    predictor = BrightPredictor()
    models = [{"name": name, "checkpoint": f"{name}.malckpt"} for name in ("both", "alone")]
    with (
        served(
            load=lambda plan: loaded(plan, predictor, has_teacher=plan.name == "both"), checkpoint=None, models=models
        ) as address,
        command(address) as url,
        opened(browser, url) as screen,
    ):
        screen.open(image)
        model, network, agreement = (screen.page.locator(name) for name in ("#model", "#branch", "#agreement"))
        screen.draw(LEFT)
        network.select_option("mixed")
        agreement.check()
        screen.page.wait_for_selector("text=agreement 0.")
        screen.page.evaluate(
            """() => {
              window.errors = 0;
              new MutationObserver(() => (window.errors += document.querySelectorAll(".error").length))
                .observe(document.querySelector("#list"), {childList: true, subtree: true});
            }"""
        )
        model.select_option("alone")
        screen.page.wait_for_function("() => document.querySelector('#agreement').disabled")
        screen.wait_for(ONE_DONE)
        assert not agreement.is_checked()
        assert "only one" in (screen.page.locator("label:has(#agreement)").get_attribute("title") or "")
        assert network.locator("option").all_inner_texts() == ["default (student)", "student"]
        assert network.input_value() == ""
        assert "agreement" not in screen.rows()[0]
        model.select_option("both")
        screen.page.wait_for_function("() => !document.querySelector('#agreement').disabled")
        screen.wait_for(ONE_DONE)
        assert "both networks" in (screen.page.locator("label:has(#agreement)").get_attribute("title") or "")
        assert network.locator("option").all_inner_texts()[1:] == ["student", "teacher", "mixed"]
        assert screen.page.evaluate("() => window.errors") == 0


def transfer(name: str, path: Path) -> str:
    """Returns JavaScript that creates a DataTransfer with a file."""
    data = list(path.read_bytes())
    file = f"new File([new Uint8Array({data})], {name!r}, {{type: 'image/png'}})"
    return f"const transfer = new DataTransfer(); transfer.items.add({file});"


def test_images_are_opened_by_drop_and_paste(screen: Screen, image: Path) -> None:
    for name, event in [
        ("dropped.png", "new DragEvent('drop', {bubbles: true, dataTransfer: transfer})"),
        ("pasted.png", "new ClipboardEvent('paste', {bubbles: true, clipboardData: transfer})"),
    ]:
        screen.page.evaluate(f"() => {{ {transfer(name, image)} document.body.dispatchEvent({event}); }}")
        screen.page.wait_for_function(
            "name => document.querySelector('#image').selectedOptions[0]?.text === name", arg=name
        )


def test_a_file_that_is_not_an_image_is_reported_and_the_others_are_opened(
    screen: Screen, image: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "broken.png"
    bad.write_bytes(b"not an image")
    screen.open(bad, image)
    assert "broken.png: " in screen.page.locator("#notices").inner_text()
    assert screen.page.locator("#image option").all_inner_texts() == ["0.png"]


def test_an_image_with_exif_orientation_is_shown_and_labeled_as_stored(
    screen: Screen, tmp_path: Path, image: Path, address: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = tmp_path / "rotated.jpg"
    Image.open(image).convert("RGB").save(rotated, exif=exif.tobytes(), quality=95)
    screen.open(rotated)
    assert "EXIF" in screen.page.locator("#notices").inner_text()
    screen.page.locator("#notices button").click()
    np.testing.assert_array_equal(screen.image(), np.asarray(Image.open(rotated)))
    screen.draw(RIGHT)
    screen.wait_for(ONE_DONE)
    np.testing.assert_array_equal(screen.mask(), expected_label(address, rotated, RIGHT).mask)


def test_the_wheel_zooms_around_the_pointer_and_the_right_button_moves_the_view(screen: Screen, image: Path) -> None:
    screen.open(image)
    fitted = screen.scale()
    point = screen.at(20, 30)
    screen.page.mouse.move(*point)
    screen.page.mouse.wheel(0, -400)
    screen.page.wait_for_function(
        "text => document.querySelector('#zoom').textContent !== text", arg=f"{100 * fitted:.0f} %"
    )
    assert screen.scale() > fitted
    factor = screen.scale()
    # The pixel under the pointer is unchanged: a box drawn from there starts at it.
    screen.page.mouse.down()
    screen.page.mouse.move(point[0] + 10 * factor, point[1] + 12 * factor, steps=4)
    screen.page.mouse.up()
    assert screen.numbers() == [20, 30, 10, 12]
    screen.page.mouse.move(point[0] + 200, point[1] + 200)
    screen.page.mouse.down(button="right")
    screen.page.mouse.move(point[0] + 230, point[1] + 240, steps=3)
    screen.page.mouse.up(button="right")
    screen.page.keyboard.press("Escape")
    screen.page.mouse.move(point[0] + 30, point[1] + 40)
    screen.page.mouse.down()
    screen.page.mouse.move(point[0] + 30 + 10 * factor, point[1] + 40 + 12 * factor, steps=4)
    screen.page.mouse.up()
    assert screen.numbers() == [20, 30, 10, 12]


def test_one_finger_draws_and_two_zoom(browser: Browser, url: str, image: Path) -> None:
    with opened(browser, url, has_touch=True) as screen:
        screen.open(image)
        touch = screen.page.context.new_cdp_session(screen.page)

        def send(event: str, *points: tuple[float, float]) -> None:
            fingers = [{"x": x, "y": y, "id": index} for index, (x, y) in enumerate(points)]
            touch.send("Input.dispatchTouchEvent", {"type": event, "touchPoints": fingers})

        send("touchStart", screen.at(8, 20))
        send("touchMove", screen.at(20, 40))
        send("touchMove", screen.at(38, 62))
        send("touchEnd")
        screen.wait_for(ONE_DONE)
        assert tuple(screen.numbers()) == LEFT
        before = screen.scale()
        x, y = screen.at(70, 40)
        send("touchStart", (x - 20, y), (x + 20, y))
        send("touchMove", (x - 40, y), (x + 40, y))
        send("touchEnd")
        screen.page.wait_for_function(
            "text => document.querySelector('#zoom').textContent !== text", arg=f"{100 * before:.0f} %"
        )
        assert screen.scale() == pytest.approx(2 * before, rel=0.02)
        assert len(screen.rows()) == 1


def test_the_key_is_removed_from_the_address_bar(screen: Screen) -> None:
    screen.page.wait_for_function("() => !location.search")
    screen.page.reload()
    screen.page.wait_for_function("() => document.querySelector('#server').textContent.includes('micro')")


@pytest.mark.parametrize("width", [1280, 700, 360])
def test_no_control_is_cut_off_and_the_page_does_not_scroll_sideways(screen: Screen, image: Path, width: int) -> None:
    screen.open(image)
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    screen.page.set_viewport_size({"width": width, "height": 700})
    cut = screen.page.evaluate(
        """() => [document.documentElement, ...document.querySelectorAll("button, select, input, label, output, p")]
          .filter(e => e.offsetParent !== null || e === document.documentElement)
          .filter(e => e.scrollWidth > e.clientWidth + 1 && e.id !== "server" && !e.matches("input, output, select")
                       && getComputedStyle(e).display !== "inline")
          .map(e => e.id || e.outerHTML.slice(0, 80))"""
    )
    assert cut == []


def test_the_list_does_not_move_while_boxes_are_selected_and_labeled(screen: Screen, image: Path) -> None:
    screen.open(image)
    before = screen.page.locator("#list").bounding_box()
    screen.draw(LEFT)
    screen.wait_for(ONE_DONE)
    screen.page.keyboard.press("Escape")
    after = screen.page.locator("#list").bounding_box()
    assert before is not None
    assert after is not None
    assert (before["x"], before["y"], before["width"]) == (after["x"], after["y"], after["width"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_accessibility_violations(screen: Screen, image: Path, tmp_path: Path, scheme: Any) -> None:
    axe = module("axe_playwright_python.sync_playwright")
    screen.page.emulate_media(color_scheme=scheme)
    assert axe.Axe().run(screen.page).violations_count == 0
    (tmp_path / "broken.png").write_bytes(b"not an image")
    screen.open(tmp_path / "broken.png", image)
    screen.draw(LEFT)
    screen.draw(RIGHT)
    screen.wait_for(TWO_DONE)
    screen.page.locator("#box-w").fill("0")
    screen.page.locator("#box-w").press("Enter")
    screen.wait_for("1 of 2 with a mask · 1 failed")
    result = axe.Axe().run(screen.page)
    assert result.violations_count == 0, result.generate_report()
    screen.page.locator("#help-button").click()
    result = axe.Axe().run(screen.page)
    assert result.violations_count == 0, result.generate_report()
