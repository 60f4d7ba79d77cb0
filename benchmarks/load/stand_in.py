"""The real server round a stand-in network: a fixed time a batch, and a mask that depends on picture and box alone.

So the serving path is measured without a model, and every answer can be checked by whoever knows the picture. No
setting of `mal-server` leads here.

    python -m benchmarks.load.stand_in --port-file FILE [--batch-ms 5] [max_batch_size=16 ...]
"""

import gc

# As in the command mal-server, before anything heavy is imported.
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
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.images import decode_image
from mal_train.core.settings import LabelerConfig
from mal_train.core.yaml_config import apply_overrides, validate
from mal_train.kernel.labeler.labeler import Crop, Label, Prediction, PredictOptions
from tests.mal_server.fakes import BrightPredictor, loaded

CROP_SIZE = 32


class StandIn(BrightPredictor):
    """What is brighter than its crop's mean is foreground, so no mask is empty; every batch takes the same time.

    Args:
        batch_s: time of a batch.
        fits: crops that fit the device.
        lives: batches until the device is lost for good; None: for ever.
        crop_size: side of a crop in px.
    """

    def __init__(
        self, batch_s: float = 0.0, fits: int = 10_000, lives: int | None = None, crop_size: int = CROP_SIZE
    ) -> None:
        super().__init__(wait_s=batch_s, fits=fits)
        self.config = LabelerConfig(crop_size=crop_size, mask_thres=(0.5, 0.5, 0.5))
        self._lives = lives

    def lose(self) -> None:
        """The next batch finds no device any more."""
        self._lives = 0

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        """Brightness against the crop's mean as probability; raises DeviceLost once its lives are spent."""
        if self._lives is not None:
            if self._lives <= 0:
                raise DeviceLost("the stand-in's lives are spent")
            self._lives -= 1
        found = super().predict(crops, options)
        self.batches.clear()  # the memory of a long run must stay flat
        return [Prediction(np.clip(one.prob - one.prob.mean() + np.float32(0.5), 0, 1)) for one in found]


def right_masks(content: bytes, boxes: Sequence[Box], crop_size: int = CROP_SIZE) -> list[bytes]:
    """COCO counts of what the stand-in must answer."""
    labels = StandIn(crop_size=crop_size).label(decode_image(content), boxes)
    return [label.rle.counts if isinstance(label, Label) else b"" for label in labels]


def report_of(watch: LoopWatch) -> dict[str, object]:
    """The watch's figures and what the process used, as JSON."""
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


async def run(config: ServerConfig, port_file: Path, report: Path | None, predictor: StandIn) -> None:
    """Serves until SIGTERM; SIGUSR1 starts the watch's figures anew, the report is written at the end.

    SIGUSR2 takes the device away.
    """
    watch = LoopWatch()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, predictor.lose)

    def load(plan: ModelPlan) -> LoadedModel:
        return loaded(plan, predictor)

    if report is None:
        await serve(config, port_file=port_file, load=load)
        return
    watch.install()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, watch.forget)
    beating = asyncio.create_task(watch.beat())
    try:
        await serve(config, port_file=port_file, load=load)
    finally:
        beating.cancel()
        report.write_text(json.dumps(report_of(watch)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The real server round a stand-in network.")
    parser.add_argument("--port-file", type=Path, required=True, help="host:port appears there once it serves")
    parser.add_argument("--report", type=Path, help="figures of the event loop go there at the end (JSON)")
    parser.add_argument("--batch-ms", type=float, default=5.0, help="time of a batch (default %(default)g)")
    parser.add_argument("--fits", type=int, default=10_000, help="crops that fit the device")
    parser.add_argument("--lives", type=int, help="batches until the device is lost for good")
    parser.add_argument("--crop-size", type=int, default=CROP_SIZE, help="side of a crop in px")
    parser.add_argument("--log-level", default="WARNING")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of the server")
    args = parser.parse_args(argv)
    settings = {"checkpoint": "stand-in.malckpt", "gpu_ids": [], "drain_delay_s": 0.0, "listen": {"port": 0}}
    config = validate(ServerConfig, apply_overrides(settings, args.overrides), source="stand-in")
    logging.set_up(args.log_level, "text", sys.stderr)
    predictor = StandIn(args.batch_ms / 1000, args.fits, args.lives, args.crop_size)
    try:
        asyncio.run(run(config, args.port_file, args.report, predictor))
    except DeviceLost as error:
        print(f"stand-in: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
