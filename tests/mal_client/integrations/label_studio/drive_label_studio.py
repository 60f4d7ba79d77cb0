"""Draws a rectangle in Label Studio as an annotator does, in headless Chromium; runs in an environment with playwright.

Reads a JSON object from the file in its argument (see `main`) and prints one. Imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

# Otherwise Chromium contacts hosts of its vendor, which fails in a closed network.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WAIT_MS = 60_000


def log_in(page: Page, host: str, email: str, password: str) -> None:
    page.goto(f"{host}/user/login/")
    page.fill("input[name=email]", email)
    page.fill("input[name=password]", password)
    page.click("button[type=submit]")
    page.wait_for_url(lambda url: "/user/login" not in url, timeout=WAIT_MS)


def select_the_smart_tool(page: Page) -> None:
    page.get_by_text("Auto-Annotation").click()
    page.locator(".lsf-tool_smart").first.click()
    page.locator(".lsf-label").first.click()


def draw(page: Page, box: list[float], width_px: int) -> None:
    """Draws the box x, y, w, h in px of the image, which the canvas may scale."""
    canvas = page.locator(".konvajs-content").first.bounding_box()
    assert canvas is not None
    scale = canvas["width"] / width_px
    x, y, w, h = (value * scale for value in box)
    page.mouse.move(canvas["x"] + x, canvas["y"] + y)
    page.mouse.down()
    # Label Studio begins the rectangle where the first movement ends.
    page.mouse.move(canvas["x"] + x + 1, canvas["y"] + y + 1)
    page.mouse.move(canvas["x"] + x + w / 2, canvas["y"] + y + h / 3, steps=4)
    page.mouse.move(canvas["x"] + x + w, canvas["y"] + y + h, steps=4)
    page.mouse.up()


def save_canvas(page: Page, path: str) -> None:
    page.mouse.move(5, 5)
    page.wait_for_timeout(500)
    page.locator(".konvajs-content").first.screenshot(path=path)


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Draws `box` on the page of a task, waits for a suggestion, saves screenshots, accepts and submits.

    Returns the bodies of the page's requests for suggestions.
    """
    requests: list[str | None] = []
    # Imported here, so that doctests of this file can be collected without playwright.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=task["chromium"], headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 820})
        page.on("request", lambda request: requests.append(request.post_data) if _is_suggestion(request.url) else None)
        log_in(page, task["host"], task["email"], task["password"])
        page.goto(f"{task['host']}/projects/{task['project']}/data?task={task['task']}")
        page.wait_for_selector("canvas", timeout=WAIT_MS)
        page.wait_for_timeout(2000)
        select_the_smart_tool(page)
        save_canvas(page, f"{task['screenshots']}/before.png")
        draw(page, task["box"], task["width"])
        accept = page.locator(".lsf-auto-accept__action_type_accept")
        accept.wait_for(timeout=WAIT_MS)
        save_canvas(page, f"{task['screenshots']}/suggested.png")
        page.screenshot(path=f"{task['screenshots']}/page.png")
        accept.click()
        accept.wait_for(state="detached", timeout=WAIT_MS)
        page.screenshot(path=f"{task['screenshots']}/accepted.png")
        with page.expect_response(
            lambda response: "/annotations" in response.url and response.request.method == "POST"
        ):
            page.get_by_label("Submit current annotation").click()
        browser.close()
    return {"requests": requests}


def _is_suggestion(url: str) -> bool:
    return "interactive-annotating" in url


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
