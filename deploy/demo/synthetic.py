"""Draws small scenes with boxes and writes them as a COCO set: the world of the demo and of the end-to-end tests.

Textured objects of seven shapes lie over a textured background. All surfaces of a scene show the same two colors, so
color tells little and texture much; objects overlap and leave the image. Training files hold boxes only. No torch.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mal_train.core.coco.output import write_json_atomic
from mal_train.core.errors import OutputError
from mal_train.core.masks.rle import encode_mask

Field = NDArray[np.float32]
"""A texture's pattern (H, W) in [0, 1]: 0 shows the surface's first color and 1 its last."""

TINT = 6.0
"""Standard deviation of a surface's colors around those of the scene, for each channel of 255."""

GRAY = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""

_SUBPIXEL_BITS = 4
"""cv2.fillPoly reads vertices in sixteenths of a pixel."""


@dataclass(frozen=True)
class SceneSettings:
    """Appearance of scenes; sizes in px.

    Attributes:
        width, height: of the image.
        min_objects, max_objects: how many objects are tried for; a scene holds at least one.
        min_radius, max_radius: range of the radius of the circle round an object before it is squeezed.
        min_visible: smallest share of an object that must stay visible, in the image and not covered, in (0, 1].
        min_area: smallest visible area of an object in px².
    """

    width: int = 320
    height: int = 240
    min_objects: int = 2
    max_objects: int = 6
    min_radius: float = 20.0
    max_radius: float = 64.0
    min_visible: float = 0.45
    min_area: int = 150


@dataclass(frozen=True)
class SceneObject:
    """One object: its category (1-based position in SHAPES) and its visible pixels, bool (H, W)."""

    category_id: int
    visible: NDArray[np.bool_]

    def box_xywh(self) -> tuple[float, float, float, float]:
        """The tight box around the visible pixels, whole numbers of px."""
        rows = np.flatnonzero(self.visible.any(axis=1))
        cols = np.flatnonzero(self.visible.any(axis=0))
        x, y = int(cols[0]), int(rows[0])
        return float(x), float(y), float(int(cols[-1]) + 1 - x), float(int(rows[-1]) + 1 - y)


@dataclass(frozen=True)
class Scene:
    """RGB uint8 image (H, W, 3) and its objects, the hindmost first."""

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class CocoSplit:
    """A written part of a set: where its annotations and images lie."""

    annotations: Path
    images: Path


def draw_scene(rng: np.random.Generator, settings: SceneSettings | None = None) -> Scene:
    """One scene; equal generators give equal scenes (for one version of numpy and cv2)."""
    settings = settings or SceneSettings()
    hw = (settings.height, settings.width)
    palette = _palette(rng)
    image = _surface(rng, hw, palette, BACKGROUND_TEXTURES)
    placed: list[_Placed] = []
    for _ in range(int(rng.integers(settings.min_objects, settings.max_objects + 1))):
        placed = _place_one_more(rng, settings, placed)
    for one in placed:
        texture = _surface(rng, hw, palette, OBJECT_TEXTURES)
        image = image + one.alpha[..., None] * (texture - image)
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Scene(pixels, tuple(SceneObject(one.category_id, one.visible) for one in placed))


def write_split(
    folder: Path, name: str, scenes: int, seed: int, *, masks: bool, settings: SceneSettings | None = None
) -> CocoSplit:
    """Write `scenes` images to folder/name/ and their annotations to folder/name.json.

    Scene i of a split depends on (seed, name, i) alone, so a longer split begins with the shorter one. With `masks` the
    annotations carry the visible part as RLE and its area; without, there is no `segmentation` and `area` is the box's.

    Raises OutputError when the folder cannot be written.
    """
    split = CocoSplit(folder / f"{name}.json", folder / name)
    rows = _Rows()
    try:
        split.images.mkdir(parents=True, exist_ok=True)
        for index in range(scenes):
            # The name's bytes make the splits differ without a table of offsets.
            scene = draw_scene(np.random.default_rng([seed, *name.encode(), index]), settings)
            file_name = f"{index + 1:05d}.jpg"
            # Full chroma: halved, as is usual, it would blur textures whose colors differ in hue alone.
            Image.fromarray(scene.image).save(split.images / file_name, quality=95, subsampling=0)
            rows.add(scene, file_name, masks)
    except OSError as error:
        raise OutputError(f"{split.images}: cannot write the scenes ({error}); choose another folder") from error
    categories = [{"id": i, "name": shape} for i, shape in enumerate(SHAPES, start=1)]
    write_json_atomic(
        split.annotations, {"images": rows.images, "annotations": rows.annotations, "categories": categories}
    )
    return split


@dataclass(frozen=True)
class _Rows:
    """The lists of a COCO file while they grow."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, scene: Scene, file_name: str, masks: bool) -> None:
        height, width = scene.image.shape[:2]
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for one in scene.objects:
            box = one.box_xywh()
            row: dict[str, Any] = {
                "id": len(self.annotations) + 1,
                "image_id": image_id,
                "category_id": one.category_id,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            if masks:
                row |= {"segmentation": encode_mask(one.visible).to_coco(), "area": int(one.visible.sum())}
            self.annotations.append(row)


# --- surfaces -------------------------------------------------------------------------------------------------------


def _palette(rng: np.random.Generator) -> Field:
    """The two RGB colors (2, 3) of a scene in [0, 255], far enough apart, in gray too, to make a pattern visible."""
    while True:
        colors = rng.uniform(30, 225, size=(2, 3)).astype(np.float32)
        difference = colors[0] - colors[1]
        if np.linalg.norm(difference) < 170 and abs(difference @ GRAY) > 40:
            return colors


def _surface(
    rng: np.random.Generator, hw: tuple[int, int], palette: Field, textures: Sequence[Callable[..., Field]]
) -> Field:
    """A full image (H, W, 3) float32 of one texture in the palette's colors, with light and grain of its own."""
    pattern = textures[int(rng.integers(len(textures)))](rng, hw)
    first, second = palette + rng.normal(0.0, TINT, size=(2, 3))
    color = first + pattern[..., None] * (second - first)
    light = 1.0 + 0.25 * (_smooth_noise(rng, hw, 60.0) - 0.5)
    grain = rng.normal(0.0, 6.0, size=(*hw, 3))
    return np.asarray(color * light[..., None] + grain, dtype=np.float32)


def _smooth_noise(rng: np.random.Generator, hw: tuple[int, int], scale_px: float, stretch: float = 1.0) -> Field:
    """Noise (H, W) over [0, 1] whose features are about scale_px wide and scale_px · stretch long (along x)."""
    rows = max(2, int(np.ceil(hw[0] / scale_px)) + 1)
    cols = max(2, int(np.ceil(hw[1] / (scale_px * stretch))) + 1)
    coarse = rng.random((rows, cols)).astype(np.float32)
    fine = cv2.resize(coarse, (hw[1], hw[0]), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(fine, 0.0, 1.0), dtype=np.float32)


def _turned_grid(rng: np.random.Generator, hw: tuple[int, int]) -> tuple[Field, Field]:
    """Coordinates (u, v) in px of a grid turned by a random angle, with a random origin."""
    y, x = np.mgrid[0 : hw[0], 0 : hw[1]].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    u = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 100)
    v = -x * np.sin(angle) + y * np.cos(angle) + rng.uniform(0, 100)
    return u.astype(np.float32), v.astype(np.float32)


def _wave(phase: Field) -> Field:
    """A soft square wave of the phase in radians, in [0, 1]."""
    return np.asarray(0.5 + 0.5 * np.tanh(3.0 * np.sin(phase)), dtype=np.float32)


def _stripes(rng: np.random.Generator, hw: tuple[int, int]) -> Field:
    u, _ = _turned_grid(rng, hw)
    return _wave(u * (2 * np.pi / rng.uniform(5, 10)))


def _checks(rng: np.random.Generator, hw: tuple[int, int]) -> Field:
    u, v = _turned_grid(rng, hw)
    step = 2 * np.pi / rng.uniform(7, 13)
    return np.asarray(0.5 + 0.5 * np.tanh(4.0 * np.sin(u * step) * np.sin(v * step)), dtype=np.float32)


def _dots(rng: np.random.Generator, hw: tuple[int, int]) -> Field:
    u, v = _turned_grid(rng, hw)
    step = 2 * np.pi / rng.uniform(6, 11)
    return np.asarray(0.5 + 0.5 * np.tanh(3.0 * (np.cos(u * step) + np.cos(v * step) - 0.7)), dtype=np.float32)


def _zigzag(rng: np.random.Generator, hw: tuple[int, int]) -> Field:
    u, v = _turned_grid(rng, hw)
    period = rng.uniform(10, 18)
    fold = np.abs((v / period) % 1.0 - 0.5) * period
    return _wave((u + fold) * (2 * np.pi / rng.uniform(6, 10)))


def _clouds(rng: np.random.Generator, hw: tuple[int, int]) -> Field:
    scale = rng.uniform(12, 40)
    octaves = [_smooth_noise(rng, hw, scale / 2**i) / 2**i for i in range(3)]
    return _spread(sum(octaves[1:], octaves[0]))


def _speckle(rng: np.random.Generator, hw: tuple[int, int]) -> Field:
    return _spread(cv2.GaussianBlur(rng.random(hw).astype(np.float32), (0, 0), rng.uniform(0.8, 2.0)))


def _fibres(rng: np.random.Generator, hw: tuple[int, int]) -> Field:
    side = int(np.ceil(np.hypot(*hw)))
    noise = _smooth_noise(rng, (side, side), rng.uniform(3, 6), stretch=rng.uniform(8, 20))
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), float(rng.uniform(0, 180)), 1.0)
    turned = cv2.warpAffine(noise, turn, (side, side), borderMode=cv2.BORDER_REFLECT)
    top, left = (side - hw[0]) // 2, (side - hw[1]) // 2
    return _spread(turned[top : top + hw[0], left : left + hw[1]])


def _spread(noise: NDArray[Any]) -> Field:
    """Stretch noise so that both colors of the surface are seen about equally."""
    centered = (noise - noise.mean()) / (noise.std() + 1e-6)
    return np.asarray(0.5 + 0.5 * np.tanh(1.2 * centered), dtype=np.float32)


OBJECT_TEXTURES: tuple[Callable[..., Field], ...] = (_stripes, _checks, _dots, _zigzag)
BACKGROUND_TEXTURES: tuple[Callable[..., Field], ...] = (_clouds, _speckle, _fibres)

# --- shapes and places ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Placed:
    """An object on its way into a scene: coverage (H, W) in [0, 1], whole area in px², visible pixels (H, W)."""

    category_id: int
    alpha: Field
    whole_area: float
    visible: NDArray[np.bool_]


def _ellipse(rng: np.random.Generator) -> NDArray[np.float64]:
    return _polar(np.linspace(0, 2 * np.pi, 72, endpoint=False), np.ones(72))


def _triangle(rng: np.random.Generator) -> NDArray[np.float64]:
    return _polar(np.array([0, 2, 4]) * np.pi / 3 + rng.uniform(-0.35, 0.35, 3), np.ones(3))


def _star(rng: np.random.Generator) -> NDArray[np.float64]:
    points = int(rng.integers(4, 8))
    radii = np.where(np.arange(2 * points) % 2, rng.uniform(0.4, 0.65), 1.0)
    return _polar(np.linspace(0, 2 * np.pi, 2 * points, endpoint=False), radii)


def _blob(rng: np.random.Generator) -> NDArray[np.float64]:
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    radii = np.ones(90)
    for wave in range(2, 6):
        radii += rng.uniform(-0.9, 0.9) / wave * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
    return _polar(angles, np.clip(radii / radii.max(), 0.2, 1.0))


def _polygon(rng: np.random.Generator) -> NDArray[np.float64]:
    corners = int(rng.integers(4, 8))
    angles = (np.arange(corners) + rng.uniform(-0.35, 0.35, corners)) * 2 * np.pi / corners
    return _polar(angles, rng.uniform(0.75, 1.0, corners))


def _cross(rng: np.random.Generator) -> NDArray[np.float64]:
    half_arm = rng.uniform(0.25, 0.42)
    arm = np.array([[0.9, -half_arm], [0.9, half_arm], [half_arm, half_arm]])
    return np.concatenate([arm @ _rotation(quarter * np.pi / 2) for quarter in range(4)])


def _crescent(rng: np.random.Generator) -> NDArray[np.float64]:
    reach, depth = np.deg2rad(rng.uniform(100, 130)), rng.uniform(0.3, 0.6)
    outer = np.linspace(-reach, reach, 48)
    # The hollow is an ellipse through both tips that leaves `depth` of the middle.
    tip_x, tip_y = np.cos(reach), np.sin(reach)
    inner = np.linspace(np.pi / 2, -np.pi / 2, 48)
    hollow = np.stack([tip_x + (1 - depth - tip_x) * np.cos(inner), tip_y * np.sin(inner)], axis=1)
    return np.concatenate([_polar(outer, np.ones(48)), hollow[1:-1]])


SHAPES: dict[str, Callable[[np.random.Generator], NDArray[np.float64]]] = {
    "ellipse": _ellipse,
    "triangle": _triangle,
    "star": _star,
    "blob": _blob,
    "polygon": _polygon,
    "cross": _cross,
    "crescent": _crescent,
}
"""Category names and what draws their outlines: vertices (K, 2) within the unit circle, in order around the shape."""


def _polar(angles: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _coverage(rng: np.random.Generator, settings: SceneSettings, vertices: NDArray[np.float64]) -> tuple[Field, float]:
    """Coverage (H, W) in [0, 1] of one outline, turned, squeezed and placed at random; and its whole area in px²."""
    turn, squeeze = _rotation(rng.uniform(0, 2 * np.pi)), rng.uniform(0.55, 1.0)
    radius = np.exp(rng.uniform(np.log(settings.min_radius), np.log(settings.max_radius)))
    # Centers may lie a little outside the image: some objects are cut by its edge.
    center = np.array([rng.uniform(-0.03, 1.03) * settings.width, rng.uniform(-0.03, 1.03) * settings.height])
    points = ((vertices * [1.0, squeeze]) @ turn) * radius + center
    x, y = points.T
    area = 0.5 * abs(float(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))))
    canvas = np.zeros((settings.height, settings.width), dtype=np.uint8)
    fixed = np.rint(points * 2**_SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], 255, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)
    return canvas.astype(np.float32) / 255.0, area


def _place_one_more(rng: np.random.Generator, settings: SceneSettings, placed: list[_Placed]) -> list[_Placed]:
    """The objects with a new one in front, or unchanged when no place leaves all of them visible enough."""
    outlines = list(SHAPES.values())
    for _ in range(30):
        index = int(rng.integers(len(outlines)))
        alpha, area = _coverage(rng, settings, outlines[index](rng))
        solid = alpha >= 0.5
        behind = [_Placed(one.category_id, one.alpha, one.whole_area, one.visible & ~solid) for one in placed]
        candidates = [*behind, _Placed(index + 1, alpha, area, solid)]
        if all(_seen_enough(one, settings) for one in candidates):
            return candidates
    return placed


def _seen_enough(one: _Placed, settings: SceneSettings) -> bool:
    seen = int(one.visible.sum())
    return seen >= settings.min_area and seen >= settings.min_visible * one.whole_area


def main() -> None:
    """`python -m deploy.demo.synthetic FOLDER`: a training split of boxes, and a held-out one with masks."""
    parser = argparse.ArgumentParser(description="Write synthetic scenes as a COCO set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=300, help="scenes with boxes only (default 300)")
    parser.add_argument("--heldout", type=int, default=60, help="scenes with masks (default 60)")
    parser.add_argument("--seed", type=int, default=7)
    chosen = parser.parse_args()
    for name, scenes in (("train", chosen.train), ("heldout", chosen.heldout)):
        split = write_split(chosen.folder, name, scenes, chosen.seed, masks=name == "heldout")
        print(f"{split.annotations}: {scenes} scenes, images in {split.images}")


if __name__ == "__main__":
    main()
