"""Compares two training processes with one on the same boxes in the same steps, over gloo on the CPU.

Each process has one thread and cuts its own crops. On a shared machine, CPU time is more reliable than wall time.
"""

import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deploy.demo.synthetic import write_split
from mal_train import cli
from mal_train.distributed.env import LAUNCHED
from mal_train.distributed.launch import free_port
from mal_train.training.module import MalModule

BOXES = 8
"""Boxes per step, over all processes."""
WARM_UP, STEPS = 2, 8


def train(rank: int, size: int, port: int, arguments: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {LAUNCHED: str(os.getppid()), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    start = MalModule.on_train_batch_start
    marks: list[tuple[float, float]] = []

    def timed(self: MalModule, batch: Any, batch_idx: int) -> None:
        if batch_idx in (WARM_UP, WARM_UP + STEPS):
            marks.append((time.process_time(), time.perf_counter()))
            (folder / f"{size}-{rank}.json").write_text(json.dumps(marks))
        if batch_idx == WARM_UP + STEPS:
            os._exit(0)  # the rest of the epoch is not measured
        start(self, batch, batch_idx)

    MalModule.on_train_batch_start = timed  # type: ignore[method-assign]
    raise SystemExit(cli.main(arguments))


def seconds_per_step(size: int, data: list[str], folder: Path) -> tuple[float, float]:
    """Returns (CPU seconds of all processes, wall seconds) per step."""
    arguments = ["train", "-e", str(folder / "spec.yaml"), *data, f"results_dir='{folder}/{size}'"]
    arguments += [f"train.batch_size={BOXES // size}", f"train.num_gpus={size}"]
    port = free_port()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=train, args=(rank, size, port, arguments, folder)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    marks = [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
    cpu = sum(last[0] - first[0] for first, last in marks) / STEPS
    wall = max(last[1] - first[1] for first, last in marks) / STEPS
    return cpu, wall


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "spec.yaml").write_text(
            "dataset: {crop_size: 112, min_obj_size: 100, num_workers_per_gpu: 0}\n"
            "model: {arch: vit-deit-tiny/16}\n"
            "train: {gpu_ids: [], num_epochs: 1, use_amp: false, crf_num_iter: 20}\n"
        )
        scenes = write_split(folder, "scenes", 40, 1, masks=False)
        data = [f"dataset.train_ann_path='{scenes.annotations}'", f"dataset.train_img_dir='{scenes.images}'"]
        seconds = {size: seconds_per_step(size, data, folder) for size in (1, 2)}
    for size, (cpu, wall) in seconds.items():
        print(f"{size} x {BOXES // size} boxes: CPU {cpu:.3f} s, wall {wall:.3f} s per step")
    print(f"CPU time, two processes / one: {seconds[2][0] / seconds[1][0]:.2f}")
    print(f"wall time, one process / two: {seconds[1][1] / seconds[2][1]:.2f}")


if __name__ == "__main__":
    main()
