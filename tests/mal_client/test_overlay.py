"""Claims about the client in notebooks: within a running event loop, and with overlays as results."""

import asyncio
import io
from pathlib import Path

import numpy as np
from mal_client.client import AsyncClient, Client
from mal_client.overlay import overlay
from mal_client.types import BoxLabel
from PIL import Image

from tests.mal_client.fake_server import FakeServer, serving

PIXELS = np.zeros((30, 40, 3), np.uint8)
BOXES = [(5.0, 5.0, 10.0, 8.0), (20.0, 10.0, -3.0, 8.0)]


def test_both_clients_work_within_a_running_event_loop() -> None:
    async def cell(address: str) -> tuple[list[BoxLabel], list[BoxLabel]]:
        with Client(address, timeout_s=20) as blocking:
            first = blocking.label_image(PIXELS, BOXES)
        async with AsyncClient(address, timeout_s=20) as client:
            return first, await client.label_image(PIXELS, BOXES)

    with serving(FakeServer()) as address:
        first, second = asyncio.run(cell(address))
    assert [label.rle for label in first] == [label.rle for label in second]


def test_an_overlay_is_a_png_that_changes_only_the_surroundings_of_boxes(tmp_path: Path) -> None:
    with serving(FakeServer()) as address, Client(address, timeout_s=20) as client:
        labels = client.label_image(PIXELS, BOXES)
    shown = overlay(PIXELS, labels)
    shown.save(tmp_path / "shown.png")
    assert (tmp_path / "shown.png").read_bytes() == shown._repr_png_()
    with Image.open(io.BytesIO(shown._repr_png_())) as image:
        pixels = np.asarray(image)
    assert pixels.shape == PIXELS.shape
    assert pixels[9, 10].any(), "inside the mask"
    assert not pixels[25:, :].any(), "far from mask, box and text"
