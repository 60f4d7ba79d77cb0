"""Stands in for `mal-train` in tests of the tuner: writes the status.json of a training within milliseconds.

    python trainer.py BEHAVIOR train -e SPEC

BEHAVIOR is a JSON object: folder of a trial → what its training does, `*` for all others; several words may be given:

    good        metrics that rise with the epochs to train.lr
    bad         one tenth of them
    fail        an error, exit code 2
    crash       the process kills itself
    empty       validations without metrics
    nan         validations whose metrics are not finite
    hang        waits after the first epoch; SIGTERM saves and ends it, exit code 143
    stubborn    ignores SIGTERM
    preempted   SIGTERM arrives after the first epoch
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml


def main() -> int:
    behaviors, _, _, spec_file = sys.argv[1:]
    spec: dict[str, Any] = yaml.safe_load(Path(spec_file).read_text())
    trial = Path(spec["results_dir"])
    by_folder = json.loads(behaviors)
    behavior = by_folder.get(trial.name, by_folder.get("*", "good")).split()
    folder = trial / "train"
    folder.mkdir(exist_ok=True)
    (folder / "model_epoch_000_step_00001.malckpt").touch()
    with (trial / "starts.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if "fail" in behavior:
        print("mal-train: dataset.crop_size: 7; it must be a multiple of 16", flush=True)
        return 2
    if "crash" in behavior:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in behavior else lambda *_: sys.exit(143))
    epochs = int(spec["train"]["num_epochs"])
    for epoch in range(1, epochs + 1):
        value = float(spec["train"]["lr"]) * epoch / epochs * (0.1 if "bad" in behavior else 1)
        value = math.nan if "nan" in behavior else value
        write(folder, epoch, {} if "empty" in behavior else {"mIoU": value, "box_proxy": value / 2})
        if "preempted" in behavior:
            os.kill(os.getpid(), signal.SIGTERM)
        while "hang" in behavior:
            time.sleep(0.02)
    return 0


def write(folder: Path, epoch: int, kpi: dict[str, float]) -> None:
    lines = [
        {"status": "RUNNING", "message": "Training loop in progress", "epoch": epoch, "kpi": {"mIoU": 0.0}},
        {"status": "RUNNING", "message": "Eval metrics generated.", "epoch": epoch, "kpi": kpi},
    ]
    with (folder / "status.json").open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
