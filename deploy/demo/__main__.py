"""`make demo`: the complete path on a fresh machine, with the real commands, and one page to look at.

    built-in model → mal-server serve → masks of photographs, and of held-out scenes for comparison
    scenes → boxes only → mal-train train → encrypted checkpoint → mal-server serve → mal_client → COCO file, page

Only the images are special to the demo: training, encryption, serving and evaluation are those of any dataset. Exit
code 0: the trained model exceeds the best of three simple baselines by MARGIN; 1: it does not, or a step failed.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import FrameType

from mal_client.client import Client
from mal_client.dataset.progress import ProgressDisplay
from mal_client.review.pages import worst_cards
from mal_client.types import SERVER_DEFAULTS, DatasetResult, Evaluation, LabelOptions

from deploy.demo.commands import DemoFailed, command_output, run_command, say, start_server
from deploy.demo.page import report_page, write_overlays
from deploy.demo.photographs import write_photographs
from deploy.demo.scenes import FULL, QUICK, Scenes, Size, measure_baselines, write_scenes
from deploy.demo.synthetic import CocoSplit
from mal_train.core.atomic_io import write_text
from mal_train.core.coco.annotations import read_coco
from mal_train.core.errors import MalError, OutputError
from mal_train.core.report.page import Card

MARGIN = 0.10
"""Least difference in mIoU to the best baseline."""
STAGES = 7
MARKER = ".written-by-demo"
"""File in a folder that an earlier demo wrote and that may therefore be deleted."""
CLOSE_UPS = 24
LATEST = "mal_model_latest.malckpt"
MARGIN_UNCHECKED = "Quick form: every part ran. Training was too short for good masks, so the margin was not checked."
TRAINED = "served model, trained on boxes of scenes"


class Stages:
    """Prints each stage and its duration."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._began = time.monotonic()

    @property
    def total_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """Prints a line before a stage and its duration after it."""
        say(f"\n[{len(self.seconds) + 1}/{STAGES}] {name}: {text}")
        began = time.monotonic()
        yield
        self.seconds.append((name, time.monotonic() - began))
        say(f"      done in {self.seconds[-1][1]:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.demo", description="Train from boxes, serve, label, evaluate: on synthetic scenes."
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write (default demo_out)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few scenes and steps: shows that every part runs; the masks are poor and the margin is not checked",
    )
    arguments = parser.parse_args(argv)
    # SIGTERM unwinds like Ctrl-C, so that the server never outlives the demo.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run_demo(arguments.out, QUICK if arguments.quick else FULL, check_margin=not arguments.quick)
    except MalError as error:
        print(f"demo: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("demo: interrupted; the server and the training have been stopped", file=sys.stderr)
    return 1


def run_demo(out: Path, size: Size, *, check_margin: bool) -> int:
    """Runs all stages into the folder `out`; returns 0 if the margin is reached or not checked.

    Raises:
        MalError: a stage failed; the message names it and the cause.
    """
    stages = Stages()
    _fresh_folder(out)
    text = f"{size.train} to train on (boxes only), {size.heldout} held out, in {out / 'data'}"
    with stages.stage("Scenes", text):
        scenes = write_scenes(out / "data", size)
    with stages.stage("Built-in model", "labels photographs, and the held-out scenes before any training on scenes"):
        photographs, untrained_miou = run_builtin(out, scenes)
    with stages.stage("Train", "from boxes only, from the built-in model; checkpoints are encrypted with a new key"):
        checkpoint = train(out, scenes, size.overrides)
    with stages.stage("Serve", "the encrypted checkpoint, opened with its identity file"):
        identity = (out / "identity.txt").absolute()
        settings = {"checkpoint": str(checkpoint.absolute()), "decryption_key": f"file:{identity}"}
        server = start_server(out, "server", settings)
    try:
        with Client(server.address) as client:
            with stages.stage("Label", f"{size.heldout} held-out images through gRPC"):
                labeled = label(client, scenes.heldout_boxes, scenes.heldout.images, out / "labels.json")
            with stages.stage("Evaluate", "the served masks against the true ones, through the Evaluate RPC"):
                evaluation = evaluate(client, scenes.heldout)
                baselines = measure_baselines(scenes.heldout)
            references = {"built-in model, never trained on scenes": untrained_miou, **baselines}
            with stages.stage("Page", f"overlays and {out / 'report.html'}"):
                coco = read_coco(scenes.heldout.annotations)
                cards = worst_cards(client, evaluation, coco, scenes.heldout.images, SERVER_DEFAULTS, count=CLOSE_UPS)
                page = report_page(
                    out / "train" / "metrics.csv",
                    evaluation,
                    references,
                    photographs=photographs,
                    worst=cards,
                    overlays=write_overlays(out / "overlays", labeled.output, scenes.heldout.images),
                    durations=stages.seconds,
                )
                write_text(out / "report.html", page)
    finally:
        server.stop()
    best_baseline = max(baselines.values())
    return conclude(out, _miou(evaluation), references, best_baseline, stages, check_margin=check_margin)


def run_builtin(out: Path, scenes: Scenes) -> tuple[list[Card], float]:
    """Serves the built-in model; returns overlays of the photographs and the mIoU on the held-out scenes.

    Raises:
        DemoFailed: the server did not start, or a box has no mask.
    """
    photographs = write_photographs(out / "data")
    server = start_server(out, "builtin", {})
    try:
        with Client(server.address) as client:
            # Saucer and spoon overlap the cup: each contested pixel goes to one instance.
            options = LabelOptions(resolve_overlaps=True)
            labeled = label(client, photographs.annotations, photographs.images, out / "photographs.json", options)
            miou = _miou(evaluate(client, scenes.heldout))
    finally:
        server.stop()
    return write_overlays(out / "overlays", labeled.output, photographs.images), miou


def label(
    client: Client, annotations: Path, images: Path, output: Path, options: LabelOptions = SERVER_DEFAULTS
) -> DatasetResult:
    """Labels a COCO file with a progress display. Raises DemoFailed if a box has no mask."""
    with ProgressDisplay("label") as display:
        result = client.label_dataset(annotations, images, output, options=options, on_progress=display)
    if result.failed:
        raise DemoFailed(f"{len(result.failed)} boxes have no mask; the first: {result.failed[0].error}")
    say(f"      {result.labeled} masks in {result.output} (COCO)")
    return result


def evaluate(client: Client, split: CocoSplit) -> Evaluation:
    """Compares the served model's masks with true masks. Raises DemoFailed if a mask is left out."""
    with ProgressDisplay("evaluate") as display:
        result = client.evaluate(split.annotations, split.images, worst_count=10_000, on_progress=display)
    if result.failed_count or result.overall.miou is None:
        raise DemoFailed(f"the evaluation left masks out: {result.skipped}")
    return result


def _miou(evaluation: Evaluation) -> float:
    assert evaluation.overall.miou is not None  # `evaluate` has checked it
    return evaluation.overall.miou


def train(out: Path, scenes: Scenes, overrides: Sequence[str]) -> Path:
    """Creates a key, runs `mal-train train` with its output visible, and returns the encrypted checkpoint."""
    identity = out / "identity.txt"
    recipient = command_output("mal-train", "keygen", "-o", str(identity)).splitlines()[-1]
    with resources.as_file(resources.files("mal_train.specs") / "demo.yaml") as spec:
        run_command(
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
        raise DemoFailed(f"{checkpoint}: training wrote no checkpoint there")
    say(f"      encrypted: {checkpoint.resolve().name}; {identity} (mode 0600) opens it")
    return checkpoint


def conclude(
    out: Path,
    miou: float,
    references: Mapping[str, float],
    best_baseline: float,
    stages: Stages,
    *,
    check_margin: bool,
) -> int:
    """Prints the results, the files and the next commands; returns the exit code."""
    say("\nMean IoU on held-out scenes")
    for name, value in references.items():
        say(f"  {name:<42}{value:.3f}")
    difference = miou - best_baseline
    say(f"  {TRAINED:<42}{miou:.3f}   {difference:+.3f} against the best baseline")
    say(
        f"\nWritten in {stages.total_s:.0f} s:\n"
        f"  {out / 'report.html'}   the page: curve, metrics, worst masks first\n"
        f"  {out / 'labels.json'}   COCO file with the masks; {out / 'overlays'}/ shows them\n"
        f"  {out / 'train' / LATEST}   encrypted; {out / 'identity.txt'} opens it\n"
    )
    say(_next_commands(out))
    if not check_margin:
        say(f"\n{MARGIN_UNCHECKED}")
        return 0
    if difference < MARGIN:
        message = f"mIoU {miou:.3f} is less than {MARGIN} above the best baseline ({best_baseline:.3f})"
        print(f"demo: {message}", file=sys.stderr)
        return 1
    return 0


def _next_commands(out: Path) -> str:
    """Returns the commands for the user's own images, with the key of this demo."""
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


def _fresh_folder(out: Path) -> None:
    """Creates an empty folder; deletes the one of an earlier demo, from which training would resume, and no other."""
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists and was not written by the demo; choose another --out or move it away")
    try:
        shutil.rmtree(out, ignore_errors=False) if out.exists() else None
        out.mkdir(parents=True)
        (out / MARKER).touch()
    except OSError as error:
        raise OutputError(f"{out}: cannot be created ({error.strerror}); choose another --out") from error


def _interrupt(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
