"""`make demo`: the whole way on a fresh machine, with the real commands, and one page to look at.

    photographs → mal-server serve with the model in the package → masks
    scenes → boxes only → mal-train train → sealed checkpoint → mal-server serve → mal_client → COCO file, figures, page

Nothing here is demo-only but the pictures: training, sealing, serving and evaluating are what one would run on one's
own images. Exit code 0: the served masks beat the best of three simple baselines by MARGIN; 1: they do not, or a step
failed.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import FrameType

from mal_client.client import Client
from mal_client.review.pages import worst_cards
from mal_client.types import SERVER_DEFAULTS, DatasetResult, LabelOptions

from deploy.demo.commands import DemoFailed, command_output, run_command, say, start_server
from deploy.demo.page import report_page, write_overlays
from deploy.demo.photographs import write_photographs
from deploy.demo.scenes import FULL, QUICK, Scenes, Size, measure_baselines, write_scenes
from mal_train.core.atomic_io import write_text
from mal_train.core.coco.annotations import read_coco
from mal_train.core.errors import MalError, OutputError
from mal_train.core.report.page import Card

MARGIN = 0.05
"""How much better than the best baseline the mIoU must be."""
STAGES = 7
MARKER = ".written-by-demo"
"""Stands in a folder that an earlier demo made, and that may therefore be deleted."""
CLOSE_UPS = 24
LATEST = "mal_model_latest.malckpt"


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
    parser = argparse.ArgumentParser(
        prog="python -m deploy.demo", description="Train from boxes, serve, label, evaluate: on synthetic scenes."
    )
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
    with stages.stage("Photographs", "labeled by the model in the package; nothing has been trained yet"):
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
                labeled = client.label_dataset(scenes.heldout_boxes, scenes.heldout.images, out / "labels.json")
                _check_all_labeled(labeled)
            with stages.stage("Evaluate", "the served masks against the true ones, through the Evaluate RPC"):
                evaluation = client.evaluate(scenes.heldout.annotations, scenes.heldout.images, worst_count=10_000)
                if evaluation.failed_count or evaluation.overall.miou is None:
                    raise DemoFailed(f"the evaluation left masks out: {evaluation.skipped}")
                references = measure_baselines(scenes.heldout)
            with stages.stage("Page", f"overlays and {out / 'report.html'}"):
                coco = read_coco(scenes.heldout.annotations)
                cards = worst_cards(client, evaluation, coco, scenes.heldout.images, SERVER_DEFAULTS, count=CLOSE_UPS)
                pictures = write_overlays(out / "overlays", labeled.output, scenes.heldout.images)
                metrics = out / "train" / "metrics.csv"
                page = report_page(
                    metrics,
                    evaluation,
                    references,
                    photographs=photographs,
                    worst=cards,
                    pictures=pictures,
                    durations=stages.seconds,
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
            labeled = client.label_dataset(
                photographs.annotations,
                photographs.images,
                out / "photographs.json",
                # A saucer is what is left of it beside its cup.
                options=LabelOptions(resolve_overlaps=True),
            )
    finally:
        server.stop()
    _check_all_labeled(labeled)
    return write_overlays(out / "overlays", labeled.output, photographs.images)


def train(out: Path, scenes: Scenes, overrides: Sequence[str]) -> Path:
    """Makes a key, runs `mal-train train` with its output visible, and returns the sealed checkpoint."""
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
        raise DemoFailed(f"{checkpoint}: training left no checkpoint there")
    say(f"      sealed: {checkpoint.resolve().name}; {identity} (mode 0600) opens it")
    return checkpoint


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


def _check_all_labeled(result: DatasetResult) -> None:
    if result.failed:
        raise DemoFailed(f"{len(result.failed)} boxes got no mask; the first: {result.failed[0].error}")
    say(f"      {result.labeled} masks in {result.output} (COCO)")


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


def _interrupt(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
