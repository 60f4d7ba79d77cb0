"""Trains ViT-tiny on noise in the default precision: a step for each request; see `published.answer_requests`."""

import argparse
import json
import sys
import time
from typing import Any

from mal_train.core.threads import wait_passively

wait_passively()  # as the commands do, before torch is imported

import lightning  # noqa: E402

from benchmarks.side_by_side.published import BATCH_SIZE  # noqa: E402
from benchmarks.training_step import fit  # noqa: E402

MAX_STEPS = 1_000_000


class Requests(lightning.Callback):
    """Callback that prints the seconds of a step, and lets the next begin for each line of standard input."""

    def __init__(self) -> None:
        self._began = 0.0

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Records the start of the step."""
        del trainer, module, batch, batch_idx
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints the seconds of the step; "ready" after the first, which is not measured. Waits for a request."""
        del module, outputs, batch
        print(json.dumps(time.perf_counter() - self._began if batch_idx else "ready"), flush=True)
        trainer.should_stop = not sys.stdin.readline()


def main() -> None:
    """Answers requests until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crop", type=int, required=True)
    fit(parser.parse_args().crop, BATCH_SIZE, MAX_STEPS, Requests())


if __name__ == "__main__":
    main()
