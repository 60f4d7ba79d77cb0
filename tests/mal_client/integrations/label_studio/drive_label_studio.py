"""Draws a rectangle in Label Studio as an annotator does, in a headless Chromium; run by the environment that has it.

Reads a JSON object from its argument (see `main`) and prints one. Imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

# Without them Chromium looks for its maker's hosts, which a closed network refuses many at a time.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WAIT_MS = 60_000


def log_in(page: Page, host: str, email: str, password: str) -> None:
    page.goto(f"{host}/user/login/")
    page.fill("input[name=email]", email)
    page.fill("input[name=password]", password)
    page.click("button[type=submit]")
    page.wait_for_url(lambda url: "/user/login" not in url, timeout=WAIT_MS)


def choose_the_detecting_tool(page: Page) -> None:
    page.get_by_text("Auto-Annotation").click()
    page.locator(".lsf-tool_smart").first.click()
    page.locator(".lsf-label").first.click()


def draw(page: Page, box: list[float], width_px: int) -> None:
    """Draws x, y, w, h in px of the picture, whose canvas may have another size."""
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


def shoot_canvas(page: Page, path: str) -> None:
    page.mouse.move(5, 5)
    page.wait_for_timeout(500)
    page.locator(".konvajs-content").first.screenshot(path=path)


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Draws `box` on the task's page, waits for a suggestion, takes pictures, accepts, submits.

    Returns the bodies of the requests that the page made for suggestions.
    """
    asked: list[str | None] = []
    # Here, so that an environment without browsers may look for doctests in this file.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=task["chromium"], headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 820})
        page.on("request", lambda request: asked.append(request.post_data) if _is_ours(request.url) else None)
        log_in(page, task["host"], task["email"], task["password"])
        page.goto(f"{task['host']}/projects/{task['project']}/data?task={task['task']}")
        page.wait_for_selector("canvas", timeout=WAIT_MS)
        page.wait_for_timeout(2000)
        choose_the_detecting_tool(page)
        shoot_canvas(page, f"{task['pictures']}/before.png")
        draw(page, task["box"], task["width"])
        accept = page.locator(".lsf-auto-accept__action_type_accept")
        accept.wait_for(timeout=WAIT_MS)
        shoot_canvas(page, f"{task['pictures']}/suggested.png")
        page.screenshot(path=f"{task['pictures']}/page.png")
        accept.click()
        accept.wait_for(state="detached", timeout=WAIT_MS)
        page.screenshot(path=f"{task['pictures']}/accepted.png")
        with page.expect_response(lambda answer: "/annotations" in answer.url and answer.request.method == "POST"):
            page.get_by_label("Submit current annotation").click()
        browser.close()
    return {"asked": asked}


def _is_ours(url: str) -> bool:
    return "interactive-annotating" in url


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
