"""Runs the real server with a fake network: fixed time per batch, masks that depend only on image and box.

Measures the serving path without a model, and clients can check every result. `mal-server` cannot be configured to use
this network.

    python -m benchmarks.load.fake_server --port-file FILE [--batch-ms 5] [max_batch_size=16 ...]
"""

import gc

# As in mal-server, before large imports.
if __name__ == "__main__":
    gc.disable()

import argparse
import asyncio
import json
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.load.loop_watch import SLOW_S, LoopWatch
from benchmarks.load.summary import percentile
from mal_server.config.model_config import ModelPlan
from mal_server.config.server import ServerConfig
from mal_server.lifecycle import serve
from mal_server.models.loader import LoadedModel
from mal_server.ops import logging
from mal_train.core.errors import DeviceLost
from mal_train.core.images.decoder import decode_image
from mal_train.core.masks.geometry import Box
from mal_train.core.settings import LabelerConfig
from mal_train.core.yaml_config import apply_overrides, validate
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions
from tests.mal_server.fakes import BrightPredictor, loaded

CROP_SIZE = 32


class FakePredictor(BrightPredictor):
    """Predictor with a fixed time per batch; pixels brighter than the mean of their crop are foreground.

    Args:
        batch_s: time per batch in seconds.
        fits: number of crops that fit into device memory.
        lives: batches until the device is lost; None for a device that is never lost.
        crop_size: side of a crop in px.
    """

    def __init__(
        self, batch_s: float = 0.0, fits: int = 10_000, lives: int | None = None, crop_size: int = CROP_SIZE
    ) -> None:
        super().__init__(wait_s=batch_s, fits=fits)
        self.config = LabelerConfig(crop_size=crop_size, mask_thres=(0.5, 0.5, 0.5))
        self._lives = lives

    def lose(self) -> None:
        """Makes the device fail from the next batch on."""
        self._lives = 0

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        """Returns the brightness relative to the mean as probability; raises DeviceLost after `lives` batches."""
        if self._lives is not None:
            if self._lives <= 0:
                raise DeviceLost("the fake device was lost as configured")
            self._lives -= 1
        predictions = super().predict(crops, options)
        self.batches.clear()  # keeps the memory of a long run constant
        return [Prediction(np.clip(each.prob - each.prob.mean() + np.float32(0.5), 0, 1)) for each in predictions]


def expected_masks(content: bytes, boxes: Sequence[Box], crop_size: int = CROP_SIZE) -> list[bytes]:
    """Returns the COCO counts that the fake server must return."""
    labels = FakePredictor(crop_size=crop_size).label(decode_image(content), boxes)
    return [label.rle.counts if isinstance(label, Label) else b"" for label in labels]


def report_of(watch: LoopWatch) -> dict[str, object]:
    """Returns the statistics of the event loop and the resource usage of the process as a JSON object."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    late = watch.lateness_s or [0.0]
    return {
        "callbacks": watch.callbacks,
        "slow_callbacks": len(watch.slow),
        "slow_callbacks_cpu": sum(cpu >= SLOW_S for _, cpu, _ in watch.slow),
        "slowest": sorted(watch.slow, reverse=True)[:5],
        "longest_callback_ms": watch.longest_s * 1000,
        "longest_callback_cpu_ms": watch.longest_cpu_s * 1000,
        "lateness_p50_ms": percentile(late, 50) * 1000,
        "lateness_p99_ms": percentile(late, 99) * 1000,
        "lateness_max_ms": max(late) * 1000,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }


async def run(config: ServerConfig, port_file: Path, report: Path | None, predictor: FakePredictor) -> None:
    """Serves until SIGTERM and then writes the report; SIGUSR1 resets the statistics, SIGUSR2 loses the device."""
    watch = LoopWatch()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, predictor.lose)

    def load(plan: ModelPlan) -> LoadedModel:
        return loaded(plan, predictor)

    if report is None:
        await serve(config, port_file=port_file, load=load)
        return
    watch.install()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, watch.reset)
    beating = asyncio.create_task(watch.beat())
    try:
        await serve(config, port_file=port_file, load=load)
    finally:
        beating.cancel()
        report.write_text(json.dumps(report_of(watch)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the real server with a fake network.")
    parser.add_argument("--port-file", type=Path, required=True, help="file for HOST:PORT, written when ready")
    parser.add_argument("--report", type=Path, help="file for statistics of the event loop (JSON)")
    parser.add_argument("--batch-ms", type=float, default=5.0, help="milliseconds per batch (default: %(default)g)")
    parser.add_argument("--fits", type=int, default=10_000, help="crops that fit into device memory")
    parser.add_argument("--lives", type=int, help="batches until the device is lost")
    parser.add_argument("--crop-size", type=int, default=CROP_SIZE, help="side of a crop in px")
    parser.add_argument("--log-level", default="WARNING")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of the server")
    args = parser.parse_args(argv)
    settings = {"checkpoint": "fake.malckpt", "gpu_ids": [], "drain_delay_s": 0.0, "listen": {"port": 0}}
    config = validate(ServerConfig, apply_overrides(settings, args.overrides), source="fake server")
    logging.set_up(args.log_level, "text", sys.stderr)
    predictor = FakePredictor(args.batch_ms / 1000, args.fits, args.lives, args.crop_size)
    try:
        asyncio.run(run(config, args.port_file, args.report, predictor))
    except DeviceLost as error:
        print(f"fake server: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
