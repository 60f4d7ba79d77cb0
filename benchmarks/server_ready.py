"""Measures the start of `mal-server serve` until it is ready, with the built-in model and an encrypted ViT-base.

The ViT-base checkpoint has student and teacher in float32 (random weights) and is decrypted with an identity file. The
time includes imports, decryption, building both networks and the warm-up; the port file appears once health is SERVING.
The first start of each warms the page cache and is not counted.
"""

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.inputs import random_labeler
from benchmarks.load.run import Server
from benchmarks.serving import ModelServer, cpu_of
from benchmarks.timing import Table
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key, write_identity

ARCH, SIDE, STARTS = "vit-deit-base/16", 512, 2


def write_checkpoint(folder: Path) -> Path:
    """Writes a checkpoint encrypted to the identity in folder/identity."""
    labeler = random_labeler(ARCH, SIDE)
    weights = {name: tensor.detach() for name, tensor in labeler.network.state_dict().items()}
    recipient = write_identity(folder / "identity")
    key = parse_key(recipient, purpose="encryption", source="environment")
    path = folder / "model.malckpt"
    save_checkpoint(path, Checkpoint(labeler.network.config, labeler.config, weights), key)
    return path


def start(folder: Path, checkpoint: str | Path, settings: list[str]) -> tuple[float, float]:
    """Returns (wall seconds, CPU seconds) until the server is ready."""
    began = time.perf_counter()
    server: Server = ModelServer(folder, Path(checkpoint), settings)
    try:
        return time.perf_counter() - began, cpu_of(server.process.pid)
    finally:
        server.process.kill()
        server.process.wait()


def main() -> int:
    """Prints the table."""
    table = Table("server_ready", "Start of the server")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder)
        table.add(f"encrypted {ARCH}, crop {SIDE}", checkpoint.stat().st_size / 2**20, "MiB")
        models: dict[str, tuple[str | Path, list[str], float]] = {
            "built-in model": (builtin.BUILTIN, [], 5.0),
            f"encrypted {ARCH}": (checkpoint, [f"decryption_key=file:{folder / 'identity'}"], 15.0),
        }
        for model, (path, settings, most_s) in models.items():
            start(folder, path, settings)
            runs = [start(folder, path, settings) for _ in range(STARTS)]
            table.add(f"{model}: until ready, wall time", statistics.median(wall for wall, _ in runs), "s", most=most_s)
            table.add(f"{model}: until ready, CPU time", statistics.median(cpu for _, cpu in runs), "s")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
