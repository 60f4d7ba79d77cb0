"""`make demo`: the whole way on a fresh machine, with the real commands, and one page to look at.

    photographs → mal-server serve with the model in the package → masks
    scenes → boxes only → mal-train train → sealed checkpoint → mal-server serve → mal_client → COCO file, figures, page

Nothing here is demo-only but the pictures: training, sealing, serving and evaluating are what one would run on one's
own images. Exit code 0: the served masks beat the best of three simple baselines by MARGIN; 1: they do not, or a step
failed.
"""

import argparse
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import FrameType

import numpy as np
from mal_client.client import Client
from mal_client.report import evaluation_sections
from mal_client.review import worst_cards
from mal_client.types import AS_SERVED, Evaluation, LabelOptions
from PIL import Image

from mal_train.atomic import write_text
from mal_train.data.photographs import write_photographs
from mal_train.data.synthetic import CocoSplit, write_split
from mal_train.errors import MalError, OutputError
from mal_train.labeling import baselines
from mal_train.labeling.coco import by_image, read_coco
from mal_train.labeling.coco_output import write_json_atomic
from mal_train.labeling.geometry import Box
from mal_train.labeling.images import RgbImage, read_image
from mal_train.labeling.rle import Rle, from_segmentation, iou
from mal_train.report.charts import line_chart
from mal_train.report.overlays import Drawn, draw_labels, png_data_uri
from mal_train.report.page import Card, build_report, contact_sheet, section, table

MARGIN = 0.05
"""How much better than the best baseline the mIoU must be."""
SEED = 7
STAGES = 7
SERVER_START_S = 120.0
SERVER_STOP_S = 30.0
MARKER = ".written-by-demo"
"""Stands in a folder that an earlier demo made, and that may therefore be deleted."""
CLOSE_UPS, WHOLE_PICTURES = 24, 8
LATEST = "mal_model_latest.malckpt"


class DemoFailed(MalError):
    """A step of the demo did not do what it should."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything. `overrides` are fields of the training spec that a shorter demo replaces."""

    train: int
    watch: int
    heldout: int
    overrides: tuple[str, ...] = ()


FULL = Size(train=300, watch=24, heldout=60)
QUICK = Size(train=8, watch=2, heldout=4, overrides=("train.num_epochs=1", "train.checkpoint_interval=1"))


@dataclasses.dataclass(frozen=True)
class Scenes:
    """The three parts of the set. Only the boxes of `train` teach; `watch` gives the curve, `heldout` the figures."""

    train: CocoSplit
    watch: CocoSplit
    heldout: CocoSplit
    heldout_boxes: Path
    """The held-out annotations without their masks: what a user would send to be labelled."""


class Stages:
    """Prints what is being done, and how long it took."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._began = time.monotonic()

    @property
    def total_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """One stage: a line before it, its time after it."""
        say(f"\n[{len(self.seconds) + 1}/{STAGES}] {name}: {text}")
        began = time.monotonic()
        yield
        self.seconds.append((name, time.monotonic() - began))
        say(f"      done in {self.seconds[-1][1]:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; its exit code."""
    parser = argparse.ArgumentParser(description="Train from boxes, serve, label, evaluate: on synthetic scenes.")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write (default demo_out)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few scenes and steps, to see that every part runs; the masks are no good, the margin is not checked",
    )
    arguments = parser.parse_args(argv)
    # A SIGTERM unwinds like Ctrl-C, so that the server never outlives the demo.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run_demo(arguments.out, QUICK if arguments.quick else FULL, check_margin=not arguments.quick)
    except MalError as error:
        print(f"demo: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("demo: interrupted; what was started has been stopped", file=sys.stderr)
    return 1


def run_demo(out: Path, size: Size, *, check_margin: bool) -> int:
    """All stages into the folder `out`; 0 when the margin is reached or not asked for.

    Raises:
        MalError: a stage failed; the message says which and why.
    """
    stages = Stages()
    _fresh_folder(out)
    with stages.stage("Photographs", "labelled by the model in the package; nothing has been trained yet"):
        photographs = label_photographs(out)
    with stages.stage("Scenes", f"{size.train} to train on (boxes only), {size.heldout} held out, in {out / 'data'}"):
        scenes = write_scenes(out / "data", size)
    with stages.stage("Train", "from boxes only, from random weights; checkpoints are sealed with a fresh key"):
        checkpoint = train(out, scenes, size.overrides)
    with stages.stage("Serve", "the sealed checkpoint, opened with its identity file"):
        identity = (out / "identity.txt").absolute()
        server = start_server(
            out, "server", {"checkpoint": str(checkpoint.absolute()), "decryption_key": f"file:{identity}"}
        )
    try:
        with Client(server.address) as client:
            with stages.stage("Label", f"{size.heldout} held-out images through gRPC"):
                labelled = client.label_dataset(scenes.heldout_boxes, scenes.heldout.images, out / "labels.json")
                if labelled.failed:
                    raise DemoFailed(f"{len(labelled.failed)} boxes got no mask; the first: {labelled.failed[0].error}")
                say(f"      {labelled.labelled} masks in {labelled.output} (COCO)")
            with stages.stage("Evaluate", "the served masks against the true ones, through the Evaluate RPC"):
                evaluation = client.evaluate(scenes.heldout.annotations, scenes.heldout.images, worst_count=10_000)
                if evaluation.failed_count or evaluation.overall.miou is None:
                    raise DemoFailed(f"the evaluation left masks out: {evaluation.skipped}")
                references = measure_baselines(scenes.heldout)
            with stages.stage("Page", f"overlays and {out / 'report.html'}"):
                coco = read_coco(scenes.heldout.annotations)
                cards = worst_cards(client, evaluation, coco, scenes.heldout.images, AS_SERVED, count=CLOSE_UPS)
                pictures = write_overlays(out / "overlays", labelled.output, scenes.heldout.images)
                metrics = out / "train" / "metrics.csv"
                page = report_page(
                    metrics,
                    evaluation,
                    references,
                    photographs=photographs,
                    worst=cards,
                    pictures=pictures,
                    stages=stages,
                )
                write_text(out / "report.html", page)
    finally:
        server.stop()
    return conclude(out, evaluation.overall.miou, references, stages, check_margin=check_margin)


def label_photographs(out: Path) -> list[Card]:
    """Masks of real photographs through a server that was told no checkpoint; their overlays.

    Raises:
        DemoFailed: the server did not start, or a box got no mask.
    """
    photographs = write_photographs(out / "data")
    server = start_server(out, "builtin", {})
    try:
        with Client(server.address) as client:
            labelled = client.label_dataset(
                photographs.annotations,
                photographs.images,
                out / "photographs.json",
                # A saucer is what is left of it beside its cup.
                options=LabelOptions(resolve_overlaps=True),
            )
    finally:
        server.stop()
    if labelled.failed:
        raise DemoFailed(f"{len(labelled.failed)} boxes got no mask; the first: {labelled.failed[0].error}")
    say(f"      {labelled.labelled} masks in {labelled.output} (COCO)")
    return write_overlays(out / "overlays", labelled.output, photographs.images)


def write_scenes(folder: Path, size: Size) -> Scenes:
    """Writes the COCO set; the file to train on and the file to label hold no segmentation."""
    train_split = write_split(folder, "train", size.train, SEED, masks=False)
    watch = write_split(folder, "watch", size.watch, SEED, masks=True)
    heldout = write_split(folder, "heldout", size.heldout, SEED, masks=True)
    boxes = json.loads(heldout.annotations.read_text(encoding="utf-8"))
    for row in boxes["annotations"]:
        del row["segmentation"], row["area"]
    heldout_boxes = folder / "heldout_boxes.json"
    write_json_atomic(heldout_boxes, boxes)
    return Scenes(train_split, watch, heldout, heldout_boxes)


def train(out: Path, scenes: Scenes, overrides: Sequence[str]) -> Path:
    """Makes a key, runs `mal-train train` with its output visible, and returns the sealed checkpoint."""
    identity = out / "identity.txt"
    recipient = _command_output("mal-train", "keygen", "-o", str(identity)).splitlines()[-1]
    with resources.as_file(resources.files("mal_train.specs") / "demo.yaml") as spec:
        _run(
            "mal-train",
            "train",
            "-e",
            str(spec),
            f"results_dir={out}",
            f"encryption_key={recipient}",
            f"decryption_key=file:{identity}",
            f"dataset.train_ann_path={scenes.train.annotations}",
            f"dataset.train_img_dir={scenes.train.images}",
            f"dataset.val_ann_path={scenes.watch.annotations}",
            f"dataset.val_img_dir={scenes.watch.images}",
            *overrides,
        )
    checkpoint = out / "train" / LATEST
    if not checkpoint.is_file():
        raise DemoFailed(f"{checkpoint}: training left no checkpoint there")
    say(f"      sealed: {checkpoint.resolve().name}; {identity} (mode 0600) opens it")
    return checkpoint


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """A `mal-server` of ours: its process and where it listens."""

    process: subprocess.Popen[bytes]
    address: str

    def stop(self) -> None:
        """SIGTERM, by process id, and wait; SIGKILL should it not end."""
        say("\nStopping the server.")
        _end(self.process)


def start_server(out: Path, name: str, settings: Mapping[str, str]) -> RunningServer:
    """Starts `mal-server serve` on a free port and waits until it serves.

    Args:
        out: where its settings, its log and its address go.
        name: of these files.
        settings: of the server; what they leave out is at its default.

    Raises:
        DemoFailed: it ended, or did not serve in time; the message has the end of its log.
    """
    config, port_file, log_file = (out / f"{name}.{suffix}" for suffix in ("yaml", "address", "log"))
    # JSON strings are YAML strings, whatever the path holds.
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()] + ["gpu_ids: []", "drain_delay_s: 0"]
    write_text(config, "\n".join(lines) + "\n")
    command = [_script("mal-server"), "serve", "-c", str(config), "--port-file", str(port_file), "listen.port=0"]
    say(f"      mal-server serve -c {config} listen.port=0")
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SERVER_START_S
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoFailed(f"the server did not start; the end of {log_file}:\n{_tail(log_file)}")
            time.sleep(0.1)
    except BaseException:
        # Also on Ctrl-C: the server must not outlive a demo that has not yet got hold of it.
        _end(process)
        raise
    address = port_file.read_text(encoding="ascii").strip()
    say(f"      serving on {address}; its log: {log_file}")
    return RunningServer(process, address)


def measure_baselines(split: CocoSplit) -> dict[str, float]:
    """Mean IoU of what needs no training: each box filled, the ellipse in it, and colours that its margin lacks."""
    coco = read_coco(split.annotations)
    methods: dict[str, Callable[[RgbImage, Box], Rle]] = {
        "box filled": lambda image, box: baselines.box_filled(box, (image.shape[0], image.shape[1])),
        "ellipse in the box": lambda image, box: baselines.ellipse(box, (image.shape[0], image.shape[1])),
        "colour clustering in the box": baselines.colour_clustering,
    }
    ious: dict[str, list[float]] = {name: [] for name in methods}
    for info, rows in by_image(coco):
        image = read_image(split.images / info.file_name)
        for row in rows:
            truth = from_segmentation(row.raw["segmentation"], image.shape[0], image.shape[1])
            for name, method in methods.items():
                ious[name].append(iou(method(image, row.box_xywh), truth))
    return {name: float(np.mean(values)) for name, values in ious.items()}


def write_overlays(folder: Path, labels: Path, images: Path) -> list[Card]:
    """Draws the labelled file over its pictures, one PNG each; cards of the first few."""
    folder.mkdir(exist_ok=True)
    cards: list[Card] = []
    for info, rows in by_image(read_coco(labels)):
        image = read_image(images / info.file_name)
        height, width = image.shape[:2]
        drawn = draw_labels(
            image,
            [
                Drawn(
                    from_segmentation(row.raw["segmentation"], height, width), row.box_xywh, f"{row.raw['score']:.2f}"
                )
                for row in rows
            ],
        )
        Image.fromarray(drawn).save(folder / Path(info.file_name).with_suffix(".png").name)
        if len(cards) < WHOLE_PICTURES:
            cards.append(Card(png_data_uri(drawn), info.file_name, f"{len(rows)} masks, each with its score"))
    return cards


def report_page(
    metrics: Path,
    evaluation: Evaluation,
    references: dict[str, float],
    *,
    photographs: Sequence[Card],
    worst: Sequence[Card],
    pictures: Sequence[Card],
    stages: Stages,
) -> str:
    """The page: what was done, the figures beside the baselines, the curve, the pictures."""
    figures = [("served masks, trained on boxes only", evaluation.overall.miou), *references.items()]
    curve, losses = _curves(metrics)
    last = max((step for step, _ in curve), default=0.0)
    flat = {name: [(0.0, value), (last, value)] for name, value in references.items()}
    sections = [
        section(
            "Photographs",
            contact_sheet(photographs),
            "By the model in the package, which learned from boxes of other photographs. The boxes were drawn by hand.",
        ),
        section(
            "Masks on held-out scenes", contact_sheet(pictures), "From the server, as they are; the rest: overlays/."
        ),
        section(
            "Against what needs no training",
            table(["method", f"mIoU of {evaluation.overall.count} held-out masks"], figures),
        ),
        section(
            "How it learned",
            line_chart({"watched scenes": curve, **flat}, "step", "mIoU")
            + line_chart({"multiple-instance loss": losses[0], "mean-field loss": losses[1]}, "step", "loss, weighted"),
            "The watched scenes are neither trained on nor held out; their masks draw this curve and do nothing else.",
        ),
        *evaluation_sections(evaluation, worst),
        section("Time", table(["stage", "seconds"], [[name, round(seconds, 1)] for name, seconds in stages.seconds])),
    ]
    return build_report("Masks from boxes: the demo", sections, "No mask was seen in training.")


def conclude(out: Path, miou: float, references: dict[str, float], stages: Stages, *, check_margin: bool) -> int:
    """Prints figures, files and the next command; the exit code."""
    best = max(references.values())
    reached = miou - best >= MARGIN
    say("\nMean IoU on held-out scenes")
    for name, value in references.items():
        say(f"  {name:<37}{value:.3f}")
    say(f"  {'served masks, trained on boxes only':<37}{miou:.3f}   {miou - best:+.3f} against the best of these")
    say(
        f"\nWritten in {stages.total_s:.0f} s:\n"
        f"  {out / 'report.html'}   the page: curve, figures, worst masks first\n"
        f"  {out / 'labels.json'}   COCO file with the masks; {out / 'overlays'}/ shows them\n"
        f"  {out / 'train' / LATEST}   sealed; {out / 'identity.txt'} opens it\n"
    )
    say(_next_commands(out))
    if not check_margin:
        say("\nQuick form: every part ran. Training was far too short for good masks, so the margin was not checked.")
        return 0
    if not reached:
        print(f"demo: {miou:.3f} is not {MARGIN} above the best baseline ({best:.3f})", file=sys.stderr)
        return 1
    return 0


def _next_commands(out: Path) -> str:
    """What to type for one's own images, with the key of this demo."""
    scripts = Path(sys.executable).parent
    bin_path = Path(os.path.relpath(scripts)) if scripts.is_relative_to(Path.cwd()) else scripts
    recipient = next(
        line.removeprefix("# public key: ")
        for line in (out / "identity.txt").read_text(encoding="ascii").splitlines()
        if line.startswith("# public key: ")
    )
    return (
        "Next, on your own images (BOXES.json: a COCO file; this starts from published DeiT-small weights):\n"
        f"  {bin_path / 'mal-train'} train -e mal_train/specs/default.yaml results_dir=mine \\\n"
        "    dataset.train_ann_path=BOXES.json dataset.train_img_dir=IMAGES \\\n"
        f"    encryption_key={recipient}\n"
        f"  {bin_path / 'mal-server'} serve -c {out / 'server.yaml'} checkpoint=mine/train/{LATEST} &\n"
        f"  {bin_path / 'mal-client'} label --server 127.0.0.1:50051 --annotations BOXES.json --images IMAGES "
        "--output MASKS.json"
    )


def say(text: str) -> None:
    """One or more lines, at once: the commands that the demo runs write to the same terminal."""
    print(text, flush=True)


def _curves(metrics: Path) -> tuple[list[tuple[float, float]], tuple[list[tuple[float, float]], ...]]:
    """(step, mIoU) of the validations, and (step, loss) of both losses."""
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    miou = [(float(row["step"]), float(row["mIoU"])) for row in rows if row["kind"] == "val" and row["mIoU"]]
    steps = [row for row in rows if row["kind"] == "train"]
    return miou, tuple([(float(row["step"]), float(row[name])) for row in steps] for name in ("loss_mil", "loss_crf"))


def _fresh_folder(out: Path) -> None:
    """An empty folder: an earlier demo's is deleted (training would go on from its checkpoint), nobody else's is."""
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists and was not made by the demo; choose another --out or move it away")
    try:
        shutil.rmtree(out, ignore_errors=False) if out.exists() else None
        out.mkdir(parents=True)
        (out / MARKER).touch()
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror}); choose another --out") from error


def _script(name: str) -> str:
    """A command of this environment, not one that happens to be on the PATH."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise DemoFailed(f"{path}: not installed; run `make demo`, which installs it")
    return str(path)


def _run(name: str, *arguments: str) -> None:
    """Runs one of our commands with its output visible; ends it when the demo is interrupted."""
    say("      " + " ".join((name, *arguments[:3], "…")))
    process = subprocess.Popen([_script(name), *arguments])
    try:
        code = process.wait()
    except BaseException:
        # Ctrl-C reaches the child as well; SIGTERM does not.
        _end(process)
        raise
    if code:
        raise DemoFailed(f"{name} {arguments[0]} ended with exit code {code}; its last lines above say why")


def _command_output(name: str, *arguments: str) -> str:
    done = subprocess.run([_script(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoFailed(f"{name} {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SERVER_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _interrupt(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
