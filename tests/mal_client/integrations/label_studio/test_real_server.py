"""Tests with a real Label Studio, a real labeling server, the ML backend and a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import yaml
from mal_client.cli.main import main
from mal_client.client import Client
from mal_client.integrations.label_studio.brush import decode_brush as decode_brush_mask
from mal_client.integrations.label_studio.regions import box_to_percent, read_rectangle
from mal_client.types import BoxXywh
from numpy.typing import NDArray
from PIL import Image

from deploy.demo.baselines import box_filled
from mal_train.core.masks.polygons import fill
from mal_train.core.masks.rle import encode_mask, iou
from mal_train.core.storage.addresses import quote_name
from tests.mal_client.integrations.label_studio.label_studio_tools import Tools, needs_label_studio
from tests.mal_client.integrations.label_studio.rle_pack import decode_brush
from tests.mal_client.integrations.test_review_export import ODD_NAMES
from tests.paths import ROOT
from tests.tools import program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EMAIL, PASSWORD, TOKEN = "annotator@example.org", "a long password", "0123456789abcdef0123456789abcdef01234567"
START_S = 400
"""Label Studio first creates its database, for minutes, unless `make tools-labelstudio` has done it."""

STOP_S = 60

WIDTH, HEIGHT = 640, 480
BOXES: list[BoxXywh] = [(120.0, 90.0, 200.0, 180.0), (380.0, 220.0, 180.0, 200.0)]
BOX_TOOL = (
    '<Image name="image" value="$image"/><RectangleLabels name="box" toName="image" smart="true" opacity="0.02">'
    '<Label value="thing" background="orange"/></RectangleLabels>'
)
BRUSHES = (
    f'<View>{BOX_TOOL}<BrushLabels name="mask" toName="image" smart="false">'
    '<Label value="thing" background="deeppink"/></BrushLabels></View>'
)
POLYGONS = (
    f'<View>{BOX_TOOL}<PolygonLabels name="outline" toName="image" smart="false">'
    '<Label value="thing" background="deeppink"/></PolygonLabels></View>'
)


@pytest.fixture(scope="module")
def tools() -> Tools:
    program("chromium")
    return needs_label_studio()


def scene(folder: Path) -> Path:
    """Writes an image of two bright discs on noise."""
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 90, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    for (x, y, w, h), color in zip(BOXES, ((240, 210, 120), (120, 200, 240)), strict=True):
        inside = ((columns - x - w / 2) / (w / 2.4)) ** 2 + ((rows - y - h / 2) / (h / 2.4)) ** 2 <= 1
        pixels[inside] = color
    path = folder / "scene.png"
    Image.fromarray(pixels).save(path)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def started(command: list[str], log: Path, pattern: str, env: Mapping[str, str]) -> Iterator[str]:
    """Runs a command until the end of the block; yields the first group of the pattern in its output."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            for _ in range(10 * START_S):
                match = re.search(pattern, log.read_text(errors="replace"))
                if match:
                    break
                assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                time.sleep(0.1)
            else:
                raise AssertionError(f"not up after {START_S} s: {log.read_text(errors='replace')[-3000:]}")
            yield match.group(1)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class Studio:
    """A running Label Studio with the ML backend."""

    address: str
    backend: str
    labeling: str
    scene: Path
    http: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx2.Client(base_url=self.address, headers={"Authorization": f"Token {TOKEN}"}, timeout=120)

    def call(self, method: str, path: str, **more: Any) -> Any:
        """Returns the body of a successful response."""
        response = self.http.request(method, path, **more)
        assert response.is_success, f"{path}: {response.status_code} {response.text[:500]}"
        return response.json() if response.content else None

    def project(self, config: str) -> tuple[int, int]:
        """Creates a project with one task and connects it to the backend; returns (project, task)."""
        project = self.call("POST", "/api/projects/", json={"title": "masks", "label_config": config})["id"]
        files = {"file": ("scene.png", self.scene.read_bytes(), "image/png")}
        self.call("POST", f"/api/projects/{project}/import", files=files)
        body = {"url": self.backend, "title": "mal", "project": project, "is_interactive": True}
        assert self.call("POST", "/api/ml/", json=body)["state"] == "CO"
        return project, self.call("GET", f"/api/tasks/?project={project}")["tasks"][0]["id"]

    def masks(self, boxes: list[BoxXywh]) -> list[NDArray[np.bool_]]:
        """Returns the masks of the labeling server itself."""
        with Client(self.labeling) as client:
            return [label.mask for label in client.label_image(self.scene, boxes)]

    def predicted(self, project: int, task: int) -> list[dict[str, Any]]:
        """The regions of the prediction that Label Studio stores for a batch of its own."""
        chosen = {"selectedItems": {"all": False, "included": [task]}}
        self.call("POST", f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}", json=chosen)
        (prediction,) = self.call("GET", f"/api/predictions/?task={task}")
        regions: list[dict[str, Any]] = prediction["result"]
        return regions


@pytest.fixture(scope="module")
def studio(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("studio")
    settings = {"checkpoint": "builtin", "gpu_ids": [], "precision": "float32", "listen": {"port": 0}}
    (folder / "server.yaml").write_text(yaml.safe_dump({**settings, "drain_delay_s": 0.0}))
    if tools.empty_data.exists():
        shutil.copytree(tools.empty_data, folder / "data")
    backend_env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Allows backends on this machine, and disables analytics.
    studio_env = os.environ | {
        "USE_DEFAULT_BANNED_SUBNETS": "false",
        "COLLECT_ANALYTICS": "false",
        "PYTHONUNBUFFERED": "1",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(folder),
    }
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    run = "import sys; from mal_server.cli import main; sys.exit(main(sys.argv[1:]))"
    serve = [sys.executable, "-c", run, "serve", "-c", str(folder / "server.yaml")]
    annotate = [str(tools.label_studio), "start", "--no-browser", "--data-dir", str(folder / "data"), "-p", str(port)]
    annotate += ["--internal-host", "127.0.0.1", "--username", EMAIL, "--password", PASSWORD, "--user-token", TOKEN]
    with (
        started(serve, folder / "serve.log", r"(127\.0\.0\.1:\d+)", env=backend_env) as labeling,
        started([*annotate, "--enable-legacy-api-token"], folder / "studio.log", "(Quit the server)", env=studio_env),
    ):
        # A personal access token for the backend; the calls of this test use the legacy token.
        created = httpx2.post(f"{address}/api/token/", headers={"Authorization": f"Token {TOKEN}"}, timeout=120)
        (folder / "key").write_text(created.json()["token"])
        connect = [sys.executable, "-m", "mal_client.cli.main", "label-studio", "--server", labeling, "--port", "0"]
        connect += ["--label-studio", address, "--api-key-file", str(folder / "key")]
        with started(connect, folder / "backend.log", r"on (http://\S+)", env=backend_env) as backend:
            studio = Studio(address, backend, labeling, scene(folder))
            yield studio
            studio.http.close()


def test_a_rectangle_drawn_in_the_browser_gets_the_mask_of_the_server(
    studio: Studio, tools: Tools, tmp_path: Path
) -> None:
    project, task = studio.project(BRUSHES)
    job = {"host": studio.address, "email": EMAIL, "password": PASSWORD, "project": project, "task": task}
    job |= {"chromium": program("chromium"), "box": BOXES[0], "width": WIDTH, "screenshots": str(tmp_path)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    driver = [
        str(tools.python),
        str(ROOT / "tests/mal_client/integrations/label_studio/drive_label_studio.py"),
        str(tmp_path / "job.json"),
    ]
    finished = subprocess.run(driver, check=True, timeout=300, capture_output=True, text=True)
    screenshots_dir = os.environ.get("MAL_KEEP_SCREENSHOTS")
    if screenshots_dir:
        shutil.copytree(tmp_path, screenshots_dir, dirs_exist_ok=True)

    (request,) = json.loads(finished.stdout)["requests"]
    rectangle = read_rectangle(json.loads(request)["context"]["result"][0])
    assert iou(box_filled(rectangle.box, (HEIGHT, WIDTH)), box_filled(BOXES[0], (HEIGHT, WIDTH))) > 0.8
    (annotation,) = studio.call("GET", f"/api/tasks/{task}/annotations/")
    regions = {region["type"]: region for region in annotation["result"]}
    (expected,) = studio.masks([rectangle.box])
    assert expected.any()
    mask = decode_brush(regions["brushlabels"]["value"]["rle"], HEIGHT, WIDTH)
    assert (mask == expected).all()
    # An unmasked box would give 0.6; edges over dark noise change by less than the threshold.
    assert _painted(tmp_path, expected, rectangle.box) > 0.8


def _painted(folder: Path, mask: NDArray[np.bool_], box: BoxXywh) -> float:
    """Returns the IoU of the mask and the pixels that differ between two screenshots, inside the outline of the box."""
    before, after = (
        np.asarray(Image.open(folder / name).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BOX), dtype=int)
        for name in ("before.png", "suggested.png")
    )
    x, y, w, h = box
    inside = np.s_[round(y) + 4 : round(y + h) - 4, round(x) + 4 : round(x + w) - 4]
    changed = (np.abs(after - before).max(axis=2) > 24)[inside]
    return float((changed & mask[inside]).sum() / (changed | mask[inside]).sum())


def rectangles() -> list[dict[str, Any]]:
    """Returns regions as in an annotation."""
    names = ("x", "y", "width", "height")
    return [
        {
            "id": f"r{index}",
            "from_name": "box",
            "to_name": "image",
            "type": "rectanglelabels",
            "original_width": WIDTH,
            "original_height": HEIGHT,
            "image_rotation": 0,
            "value": dict(zip(names, box_to_percent(box, (WIDTH, HEIGHT)), strict=True))
            | {"rotation": 0, "rectanglelabels": ["thing"]},
        }
        for index, box in enumerate(BOXES)
    ]


def test_a_batch_of_annotated_tasks_gets_brush_predictions(studio: Studio) -> None:
    project, task = studio.project(BRUSHES)
    studio.call("POST", f"/api/tasks/{task}/annotations/", json={"result": rectangles()})
    regions = studio.predicted(project, task)
    masks = [decode_brush(region["value"]["rle"], HEIGHT, WIDTH) for region in regions]
    assert [region["id"] for region in regions] == ["r0-mask", "r1-mask"]
    assert all((mask == expected).all() for mask, expected in zip(masks, studio.masks(BOXES), strict=True))


def test_a_project_with_polygons_gets_polygons(studio: Studio) -> None:
    project, task = studio.project(POLYGONS)
    studio.call("POST", f"/api/tasks/{task}/annotations/", json={"result": rectangles()})
    regions = studio.predicted(project, task)
    assert {region["type"] for region in regions} == {"polygonlabels"}
    for index, expected in enumerate(studio.masks(BOXES)):
        parts = [np.array(r["value"]["points"]) for r in regions if r["id"].startswith(f"r{index}-mask")]
        filled = fill([part * [WIDTH, HEIGHT] / 100 for part in parts], HEIGHT, WIDTH)
        assert (filled & expected).sum() / (filled | expected).sum() > 0.9


def test_the_worst_masks_of_a_labeled_file_are_imported_as_tasks_with_their_masks(
    studio: Studio, tmp_path: Path
) -> None:
    image_name = studio.scene.name
    rows = [{"id": n, "image_id": 1, "category_id": 1, "bbox": list(box)} for n, box in enumerate(BOXES, start=1)]
    image = {"id": 1, "file_name": image_name, "width": WIDTH, "height": HEIGHT}
    coco = {"images": [image], "annotations": rows, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    with Client(studio.labeling) as client:
        client.label_dataset(tmp_path / "boxes.json", studio.scene.parent, tmp_path / "masks.json")
    # Uploads the image before the tasks that refer to it.
    _, upload = studio.project(BRUSHES)
    address = studio.call("GET", f"/api/tasks/{upload}")["data"]["image"]
    command = ["review", "--annotations", str(tmp_path / "masks.json"), "--images", str(studio.scene.parent)]
    command += ["--label-studio", str(tmp_path / "tasks.json"), "--image-prefix", address.removesuffix(image_name)]
    assert main(command) == 0

    config = (tmp_path / "tasks.config.xml").read_text()
    project = studio.call("POST", "/api/projects/", json={"title": "review", "label_config": config})["id"]
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    imported = studio.call("POST", f"/api/projects/{project}/import", json=tasks)
    assert (imported["task_count"], imported["prediction_count"]) == (1, 1)
    (task,) = studio.call("GET", f"/api/tasks/?project={project}")["tasks"]
    assert task["data"]["image"] == address
    assert studio.http.get(address).content == studio.scene.read_bytes()
    (prediction,) = studio.call("GET", f"/api/predictions/?task={task['id']}")
    assert prediction["result"] == tasks[0]["predictions"][0]["result"]
    by_type = {
        region_type: [r for r in prediction["result"] if r["type"] == region_type]
        for region_type in ("rectanglelabels", "brushlabels")
    }
    order = [BOXES.index(read_rectangle(region).box) for region in by_type["rectanglelabels"]]
    assert sorted(order) == [0, 1]
    masks = [decode_brush(region["value"]["rle"], HEIGHT, WIDTH) for region in by_type["brushlabels"]]
    expected = studio.masks(BOXES)
    assert all((mask == expected[index]).all() for mask, index in zip(masks, order, strict=True))

    # The way back: accepted as they are, exported, converted.
    studio.call("POST", f"/api/tasks/{task['id']}/annotations/", json={"result": prediction["result"]})
    export = studio.http.get(f"/api/projects/{project}/export?exportType=JSON")
    (tmp_path / "export.json").write_bytes(export.content)
    given = ["--from", "label-studio", "--labels", str(tmp_path / "export.json"), "--images", str(studio.scene.parent)]
    assert main(["convert", *given, "--output", str(tmp_path / "back.json")]) == 0
    labeled, back = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("masks", "back"))
    assert back["images"][0]["file_name"] == image_name
    found = {tuple(row["bbox"]): row["segmentation"] for row in back["annotations"]}
    assert found == {tuple(row["bbox"]): row["segmentation"] for row in labeled["annotations"]}


def test_label_studio_serves_local_files_of_odd_names(studio: Studio) -> None:
    folder = studio.scene.parent / "odd"
    for name in ODD_NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    project = studio.call("POST", "/api/projects/", json={"title": "odd", "label_config": BRUSHES})["id"]
    storage = {"project": project, "path": str(folder), "use_blob_urls": True, "title": "odd"}
    studio.call("POST", "/api/storages/localfiles/", json=storage)
    for name in ODD_NAMES:
        response = studio.http.get(f"/data/local-files/?d=odd/{quote_name(name)}")
        assert (response.status_code, response.content) == (200, name.encode()), name


SDK_SCRIPT = """
import json, sys
import numpy as np
from label_studio_sdk.converter.brush import decode_rle, mask2rle
masks = [np.array(mask, np.uint8) * 255 for mask in json.load(sys.stdin)]
codes = [mask2rle(mask) for mask in masks]
back = [decode_rle(code).reshape(*mask.shape, 4)[:, :, 3].tolist() for code, mask in zip(codes, masks)]
print(json.dumps([codes, back]))
"""


def test_masks_of_the_sdk_are_decoded_exactly(tools: Tools) -> None:
    case = np.random.default_rng(3)
    masks = [case.random(case.integers(1, 70, 2)) < density for density in (0.0, 0.01, 0.3, 0.7, 0.99, 1.0)]
    given = json.dumps([mask.astype(int).tolist() for mask in masks])
    done = subprocess.run(
        [str(tools.python), "-c", SDK_SCRIPT], input=given, capture_output=True, text=True, check=True, timeout=300
    )
    codes, back = json.loads(done.stdout)
    for mask, code, values in zip(masks, codes, back, strict=True):
        height, width = mask.shape
        assert decode_brush_mask(code, (width, height)) == encode_mask(mask)
        assert (np.array(values) > 0).tolist() == mask.tolist()
