"""Searches a recipe on photographs, and compares it with `small-cpu` at the same number of steps.

    python -m benchmarks.recipe_search --data $MAL_SHARED/data --weights deit_tiny_patch16_224.pt --out DIR

The search sees the boxes of `coco_train_mini`, and selects on `coco_val_dev`: by default with `box_proxy`, which needs
no masks. Both recipes are then trained with the same boxes, steps and seeds, and compared on `coco_val_dev2`, which
neither has seen. Prints the rank correlation of the proxy with mIoU over the trials, and the metrics of both recipes;
the same rows are in DIR/comparison.json. The same command continues after an interruption.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from benchmarks.timing import machine
from mal_train.config.spec import load_spec
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.yaml_config import dump

SPACE = {
    "train.lr": "{low: 4e-6, high: 2e-4, log: true}",
    "train.head_lr_mult": "{low: 1.0, high: 10.0, log: true}",
    "train.loss_crf_weight": "{low: 0.5, high: 8.0, log: true}",
    "train.crf_zeta": "{low: 0.1, high: 0.6, log: true}",
    "model.teacher_momentum": "{choices: [0.99, 0.996]}",
    "train.mask_thres": "{choices: [[0.1], [0.2], [0.3], [0.5]]}",
}
"""Searched fields. The thresholds are among them, because without masks none can be fitted."""
METRICS = ("mIoU", "AP@1", "AP@score")


def main() -> int:
    """Runs the search and the comparison."""
    arguments = _arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    common = [
        *_data(arguments),
        f"train.pretrained_model_path={arguments.weights}",
        f"train.num_epochs={arguments.epochs}",
        f"train.checkpoint_interval={arguments.epochs}",
        "train.validation_interval=1",
        "train.board_size=0",
        *(arguments.override or []),
    ]
    with resources.as_file(resources.files("mal_train.specs") / "small-cpu.yaml") as recipe:
        spec = _spec(out / "search.yaml", recipe, [*common, *_search(arguments)])
        print(_run("tune", "-e", str(spec), ok=(0, 3)))
        best = load_spec(out / "tune" / "photographs" / "best.yaml", [])
        found = [f"{name}={json.dumps(_field(best.model_dump(mode='json'), name))}" for name in SPACE]
        rows = [
            {
                "recipe": name,
                "seed": seed,
                **_measure(out / f"{name}-{seed}", recipe, [*common, *fields], seed, arguments),
            }
            for seed in range(1, arguments.seeds + 1)
            for name, fields in (("small-cpu", []), ("found", found))
        ]
    report = {
        "machine": machine(),
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "found": found,
        "rows": rows,
    }
    write_json_atomic(out / "comparison.json", report)
    print(_table(rows))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe_search", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with coco_train_mini, coco_val_dev, coco_val_dev2"
    )
    parser.add_argument("--weights", required=True, help="starting weights: a file, builtin or a model name of timm")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--trials", type=int, default=24, help="trials of the search (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of every training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each recipe (default: %(default)s)")
    parser.add_argument("--images", type=int, default=10**6, help="training images (default: all)")
    parser.add_argument("--held-out", type=int, default=10**6, help="images of each validation set (default: all)")
    parser.add_argument("--objective", choices=("proxy", "miou"), default="proxy", help="default: %(default)s")
    parser.add_argument(
        "--at-a-time", type=int, default=1, help="trials at the same time on the CPU (default: %(default)s)"
    )
    parser.add_argument("--override", action="append", metavar="a.b=c", help="field of all trainings; repeatable")
    return parser.parse_args()


def _search(arguments: argparse.Namespace) -> list[str]:
    """Returns the fields of the search. As without masks, no trial fits thresholds."""
    space = ", ".join(f"{name}: {values}" for name, values in SPACE.items())
    return [
        f"results_dir={arguments.out}",
        "train.fit_thresholds=false",
        "train.fit_calibration=false",
        f"tune.space={{{space}}}",
        f"tune.trials={arguments.trials}",
        f"tune.objective={arguments.objective}",
        f"tune.cpu_trials={arguments.at_a_time}",
        "tune.study=photographs",
    ]


def _data(arguments: argparse.Namespace) -> list[str]:
    """Returns the fields with the training images and the validation set of the search."""
    fields = []
    for part, name, count in (
        ("train", "coco_train_mini", arguments.images),
        ("val", "coco_val_dev", arguments.held_out),
    ):
        annotations, images = _first_images(arguments, name, count)
        fields += [f"dataset.{part}_ann_path={annotations}", f"dataset.{part}_img_dir={images}"]
    return fields


def _first_images(arguments: argparse.Namespace, name: str, count: int) -> tuple[Path, Path]:
    """Returns annotation file and image folder of the first `count` images of a set."""
    folder: Path = arguments.data / name
    coco: dict[str, Any] = json.loads((folder / "annotations.json").read_bytes())
    if count >= len(coco["images"]):
        return folder / "annotations.json", folder / "images"
    coco["images"] = coco["images"][:count]
    ids = {image["id"] for image in coco["images"]}
    coco["annotations"] = [row for row in coco["annotations"] if row["image_id"] in ids]
    path = arguments.out / f"{name}-{count}.json"
    write_json_atomic(path, coco)
    return path, folder / "images"


def _spec(path: Path, recipe: Path, overrides: Sequence[str]) -> Path:
    """Writes a recipe with overrides as a spec."""
    path.write_text(dump(load_spec(recipe, list(overrides))), encoding="utf-8")
    return path


def _measure(
    folder: Path, recipe: Path, overrides: Sequence[str], seed: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Trains a recipe, and returns its metrics on the set that the search has not seen."""
    folder.mkdir(exist_ok=True)
    spec = _spec(folder / "spec.yaml", recipe, [*overrides, f"results_dir={folder}", f"train.seed={seed}"])
    _run("train", "-e", str(spec))
    annotations, images = _first_images(arguments, "coco_val_dev2", arguments.held_out)
    test = [f"dataset.val_ann_path={annotations}", f"dataset.val_img_dir={images}", "evaluate.batch_size=8"]
    _run("evaluate", "-e", str(spec), f"checkpoint={folder}/train/mal_model_latest.malckpt", *test)
    result = json.loads((folder / "evaluate" / "results.json").read_bytes())
    return {"mIoU": result["mIoU"], "AP@1": result["AP@1"]["AP"], "AP@score": result["AP@score"]["AP"]}


def _run(*arguments: str, ok: Sequence[int] = (0,)) -> str:
    """Runs `mal-train`, whose messages go to stderr, and returns what it prints to stdout."""
    print(f"mal-train {' '.join(arguments)}", file=sys.stderr, flush=True)
    finished = subprocess.run(
        [sys.executable, "-m", "mal_train.cli", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode not in ok:
        sys.exit(f"mal-train {arguments[0]}: exit code {finished.returncode}")
    return finished.stdout


def _field(data: Any, name: str) -> Any:
    for part in name.split("."):
        data = data[part]
    return data


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the mean of each metric by recipe, and the difference."""
    means = {
        name: {metric: statistics.mean(row[metric] for row in rows if row["recipe"] == name) for metric in METRICS}
        for name in ("small-cpu", "found")
    }
    means["difference"] = {metric: means["found"][metric] - means["small-cpu"][metric] for metric in METRICS}
    lines = [f"{'':<12}" + "".join(f"{metric:>10}" for metric in METRICS)]
    lines += [f"{name:<12}" + "".join(f"{values[m]:>10.4f}" for m in METRICS) for name, values in means.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
