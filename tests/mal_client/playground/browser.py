"""Drives the playground in headless Chromium: starts it, draws with the mouse, reads the pixels of the screen."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.tools import module, program

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Chromium's sandbox does not start as root or in containers; the page under test is trusted.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
WAIT_MS = 120_000

Box = tuple[float, float, float, float]


@contextmanager
def launched() -> Iterator[Browser]:
    """Launches a browser for the block."""
    sync_api = module("playwright.sync_api")
    executable = os.environ.get("MAL_CHROMIUM") or program("chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def command(address: str) -> Iterator[str]:
    """Runs `mal-client playground` as a process; yields the URL that it prints."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mal_client.cli.main",
            "playground",
            "--server",
            address,
            "--port",
            "0",
            "--timeout",
            "20",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("playground: ").strip()
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out


class Screen:
    """One page, used through mouse and keyboard. Points and boxes are in px of the image, which must be fitted."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.size_wh = (0, 0)
        page.set_default_timeout(WAIT_MS)

    def open(self, *paths: Path) -> None:
        """Opens files and waits for the last one."""
        self.page.set_input_files("#files", [str(path) for path in paths])
        self.page.wait_for_function(
            "name => document.querySelector('#image').selectedOptions[0]?.text === name", arg=paths[-1].name
        )
        with Image.open(paths[-1]) as image:
            self.size_wh = image.size

    def scale(self) -> float:
        """Returns the screen px per image px."""
        return float(self.page.locator("#zoom").inner_text().split()[0]) / 100

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Returns the position of an image point on the screen."""
        corner, scale = self._corner(), self.scale()
        area = self._area()
        return area["x"] + corner[0] + x * scale, area["y"] + corner[1] + y * scale

    def drag(self, start: Sequence[float], end: Sequence[float], **options: Any) -> None:
        """Drags the mouse from one image point to another."""
        mouse = self.page.mouse
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        mouse.move(*self.at(*start))
        mouse.down(**options)
        mouse.move(*self.at(*middle))
        mouse.move(*self.at(*end))
        mouse.up(**options)

    def draw(self, box: Box) -> None:
        """Draws a box, from its top left corner."""
        x, y, w, h = box
        self.drag((x, y), (x + w, y + h))

    def click(self, x: float, y: float) -> None:
        """Clicks on an image point."""
        self.page.mouse.click(*self.at(x, y))

    def wait_for(self, status: str) -> None:
        """Waits for a text of the status line above the list."""
        self.page.wait_for_function("text => document.querySelector('#status').textContent === text", arg=status)

    def rows(self) -> list[str]:
        """Returns the rows of the list of boxes, as text."""
        return [text.replace("\n", " ") for text in self.page.locator("#list li").all_inner_texts()]

    def numbers(self) -> list[float]:
        """Returns x, y, width, height of the selected box, after pending changes are drawn."""
        self.page.evaluate("() => new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        return [float(self.page.locator(f"#box-{name}").input_value()) for name in "xywh"]

    def mask(self) -> NDArray[np.bool_]:
        """Returns the masks on the screen, (H, W), as the difference of two screenshots with and without masks."""
        self.page.locator("#show-boxes").uncheck()
        with_masks = self._pixels()
        self.page.locator("#show-masks").uncheck()
        without = self._pixels()
        self.page.locator("#show-masks").check()
        self.page.locator("#show-boxes").check()
        return np.asarray((with_masks != without).any(axis=2))

    def image(self) -> NDArray[np.uint8]:
        """Returns the image on the screen without boxes and masks, (H, W, 3)."""
        self.page.locator("#show-boxes").uncheck()
        self.page.locator("#show-masks").uncheck()
        pixels = self._pixels()
        self.page.locator("#show-masks").check()
        self.page.locator("#show-boxes").check()
        return pixels

    def color(self, x: float, y: float) -> tuple[int, int, int]:
        """Returns the mean color, RGB, of 9 x 9 px of the screen around a position."""
        self._settle()
        shot = self.page.screenshot(clip={"x": round(x) - 4, "y": round(y) - 4, "width": 9, "height": 9})
        red, green, blue = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).reshape(-1, 3).mean(axis=0)
        return int(red), int(green), int(blue)

    def _pixels(self) -> NDArray[np.uint8]:
        """Returns the image pixels on the screen, sampled at the center of each enlarged pixel."""
        self._settle()
        shot = self.page.screenshot(clip=self._area())
        pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))
        scale = int(self.scale())
        assert scale == self.scale() >= 1, "the scale must be an integer; choose another image"
        (left, top), (width, height) = self._corner(), self.size_wh
        rows = int(top) + scale * np.arange(height) + scale // 2
        columns = int(left) + scale * np.arange(width) + scale // 2
        return np.asarray(pixels[rows][:, columns])

    def _settle(self) -> None:
        """Waits for two frames, so that pending changes are drawn."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def _area(self) -> Any:
        return self.page.locator("#stage").bounding_box()

    def _corner(self) -> tuple[float, float]:
        area, scale, (width, height) = self._area(), self.scale(), self.size_wh
        # As the page does: centered and rounded to pixels (JavaScript rounds halves up).
        return (
            float(np.floor((area["width"] - width * scale) / 2 + 0.5)),
            float(np.floor((area["height"] - height * scale) / 2 + 0.5)),
        )
