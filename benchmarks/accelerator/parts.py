"""The parts of the accelerator benchmark. Each appends rows to a file as soon as they are measured."""

import argparse
import io
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.inputs import boxed_images
from benchmarks.load.images import draw_images, save_images
from benchmarks.serving import BOXES, ModelServer, in_process, served, write_checkpoint
from benchmarks.training_step import random_batch
from mal_train.core.errors import OutOfDeviceMemory
from mal_train.core.images.decoder import decode_image
from mal_train.core.settings import Branch, LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Crop
from mal_train.kernel.networks.network import MalNetwork, ModelConfig, normalize
from mal_train.kernel.networks.packing import packed
from mal_train.losses.crf import MeanField
from mal_train.training.module import LossSettings, MalModule
from mal_train.training.optimizer import OptimizerSettings
from mal_train.training.schedule import CosineSchedule

ARCHS = ("vit-deit-tiny/16", "vit-deit-small/16", "vit-mae-base/16", "vit-mae-large/16")
CROPS = (224, 512)
BATCHES = (1, 8, 32, 128)
DTYPES = ("float32", "bfloat16", "float16")
MATRIX_SIDE = 8192
TRAINING_BATCHES = {224: 64, 512: 16}
WINDOW_S = 1.0
"""Duration of one measurement, after a warm-up."""


@dataclass(frozen=True)
class Scale:
    """Device, file of the rows, and whether sizes are small."""

    part: str
    device: torch.device
    rows: Path
    quick: bool

    def add(self, name: str, value: float | str, unit: str) -> None:
        """Appends a row."""
        row = {"part": self.part, "name": name, "value": value, "unit": unit}
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rate(self, run: Callable[[], object]) -> float:
        """Returns the calls/s of a function, after two unmeasured calls."""
        for _ in range(2):
            run()
        self.synchronize()
        calls, began = 0, time.perf_counter()
        window = WINDOW_S / 10 if self.quick else WINDOW_S
        while time.perf_counter() - began < window:
            run()
            self.synchronize()
            calls += 1
        return calls / (time.perf_counter() - began)

    def synchronize(self) -> None:
        """Waits until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def archs(self) -> tuple[str, ...]:
        """Returns the backbones to measure."""
        return ("vit-micro/16",) if self.quick else ARCHS

    def crops(self) -> tuple[int, ...]:
        """Returns the crop sizes to measure."""
        return (64,) if self.quick else CROPS

    def batches(self) -> tuple[int, ...]:
        """Returns the batch sizes to measure."""
        return BATCHES[:2] if self.quick else BATCHES

    def dtypes(self) -> tuple[str, ...]:
        """Returns the precisions that labelers accept on the device."""
        return DTYPES if self.device.type == "cuda" else DTYPES[:1]


def matrix(scale: Scale) -> None:
    """Measures the device's own rate: square products in each dtype, and TF32."""
    if scale.device.type == "cuda":
        scale.add("device", torch.cuda.get_device_name(scale.device), f"torch {torch.__version__}")
    side = 256 if scale.quick else MATRIX_SIDE
    for name in scale.dtypes():
        a = torch.randn(side, side, device=scale.device, dtype=getattr(torch, name))
        for precision in ("highest", "high") if name == "float32" else ("highest",):
            torch.set_float32_matmul_precision(precision)
            tflops = 2e-12 * side**3 * scale.rate(partial(torch.matmul, a, a))
            scale.add(f"square {side}, {'tf32' if precision == 'high' else name}", tflops, "TFLOP/s")
    torch.set_float32_matmul_precision("highest")


def predict(scale: Scale) -> None:
    """Measures `Labeler.predict` by backbone, crop size, precision and batch size."""
    for arch, crop, name in itertools.product(scale.archs(), scale.crops(), scale.dtypes()):
        labeler = _labeler(arch, crop, scale.device, name)
        for batch in scale.batches():
            crops = _crops(labeler, batch)
            try:
                rate = batch * scale.rate(partial(labeler.predict, crops))
            except OutOfDeviceMemory:
                scale.add(f"{arch} {crop} {name}, batch {batch}", "out of memory", "")
                break
            scale.add(f"{arch} {crop} {name}, batch {batch}", rate, "crops/s")


def compiled(scale: Scale) -> None:
    """Measures the forward pass as shipped, with torch.compile, and with CUDA graphs (mode reduce-overhead)."""
    modes = {"as shipped": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}
    for arch, crop in itertools.product(scale.archs()[:3], scale.crops()):
        labeler = _labeler(arch, crop, scale.device, "bfloat16" if scale.device.type == "cuda" else "float32")
        shipped = partial(labeler.engine.run, branch=Branch.STUDENT)
        # On a CPU the weights are packed by oneDNN, which torch.compile does not take.
        is_on_cpu = scale.device.type == "cpu"
        network = labeler.network.student if is_on_cpu else packed(labeler.network.student, labeler.dtype)
        for batch in scale.batches()[::2]:
            x_NCHW, size_class_N = _inputs(scale, crop, batch)
            for name, mode in modes.items():
                if mode == "reduce-overhead" and scale.device.type != "cuda":
                    continue
                forward = shipped if mode is None else torch.compile(network, mode=mode, dynamic=False)
                began = time.perf_counter()
                _forward(scale, forward, x_NCHW, size_class_N)
                scale.synchronize()
                first_s = time.perf_counter() - began
                run = partial(_forward, scale, forward, x_NCHW, size_class_N)
                scale.add(f"{arch} {crop}, batch {batch}, {name}", batch * scale.rate(run), "crops/s")
                scale.add(f"{arch} {crop}, batch {batch}, {name}, first call", first_s, "s")


def transfer(scale: Scale) -> None:
    """Measures copies of crops to the device, from pageable and from pinned memory."""
    for crop in scale.crops():
        pixels = torch.zeros(32, crop, crop, 3, dtype=torch.uint8)
        sources = {"pageable": pixels}
        if scale.device.type == "cuda":
            sources["pinned"] = pixels.pin_memory()
        for name, source in sources.items():
            rate = scale.rate(partial(_copy, source, scale.device))
            scale.add(f"32 crops of {crop}, {name}", rate * pixels.numel() / 1e9, "GB/s")


def decode(scale: Scale) -> None:
    """Measures the decoder of JPEGs: ours, and nvJPEG through torchvision where the device has it."""
    for name, size_wh in {"640x480": (640, 480), "12 Mpix": (4000, 3000)}.items():
        (image,) = boxed_images(1, 1, size_wh)
        scale.add(f"{name}, CPU, one thread", scale.rate(partial(decode_image, image.content)), "images/s")
        if scale.device.type == "cuda":
            from torchvision.io import decode_jpeg  # noqa: PLC0415  only here, and only with CUDA

            data = torch.frombuffer(bytearray(image.content), dtype=torch.uint8)
            rate = scale.rate(partial(decode_jpeg, data, device=scale.device))
            scale.add(f"{name}, nvJPEG", rate, "images/s")
            pixels = decode_jpeg(data, device=scale.device).permute(1, 2, 0).cpu().numpy()
            differing = np.mean(pixels != np.asarray(Image.open(io.BytesIO(image.content)).convert("RGB")))
            scale.add(f"{name}, samples in which nvJPEG differs", 100 * float(differing), "%")


def training(scale: Scale) -> None:
    """Measures the losses of a training step with their backward pass, beside forward and backward pass alone."""
    for arch, crop in itertools.product(scale.archs()[:3], scale.crops()):
        count = 2 if scale.quick else TRAINING_BATCHES[crop]
        module = _module(arch, crop, count).to(scale.device)
        batch = module.transfer_batch_to_device(random_batch(crop, count), scale.device, 0)
        x_NCHW = normalize(batch.student_NHWC)

        def floor(module: MalModule = module, x_NCHW: Tensor = x_NCHW, sizes: Tensor = batch.size_class_N) -> None:
            module.network.student.zero_grad(set_to_none=True)
            with _autocast(scale):
                student = module.network.logits(x_NCHW, sizes, Branch.STUDENT)
                module.network.logits(x_NCHW, sizes, Branch.TEACHER)
            torch.autograd.backward(student.sum())

        scale.add(f"{arch} {crop}, batch {count}, forward and backward", 1000 / scale.rate(floor), "ms")
    side = 16 if scale.quick else 128
    guide, prob = torch.rand(8, 3, side, side, device=scale.device), torch.rand(8, side, side, device=scale.device)
    box = torch.ones_like(prob)
    for name, is_compiled in {"eager": False, "compiled": True}.items():
        rate = scale.rate(partial(MeanField(compiled=is_compiled), guide, prob, box))
        scale.add(f"mean field, 8 maps of {side}, {name}", 1000 / rate, "ms")


def memory(scale: Scale) -> None:
    """Measures the peak memory of one forward pass, from which the largest batch follows."""
    if scale.device.type != "cuda":
        scale.add("peak memory", "needs cuda", "")
        return
    total = torch.cuda.get_device_properties(scale.device).total_memory
    for arch, crop in itertools.product(scale.archs(), scale.crops()):
        labeler = _labeler(arch, crop, scale.device, "bfloat16")
        peaks = []
        for batch in (8, 32):
            torch.cuda.reset_peak_memory_stats(scale.device)
            labeler.predict(_crops(labeler, batch))
            peaks.append(torch.cuda.max_memory_allocated(scale.device))
        per_crop = (peaks[1] - peaks[0]) / 24
        scale.add(f"{arch} {crop} bfloat16, a crop", per_crop / 2**20, "MiB")
        scale.add(f"{arch} {crop} bfloat16, crops that fit", (total - peaks[0]) // per_crop + 8, "crops")


def serving(scale: Scale) -> None:
    """Measures the server on the device against the labeler in process: 32 clients of eight boxes."""
    arch, crop = ("vit-micro/16", 64) if scale.quick else ("vit-deit-small/16", 512)
    seconds = 2.0 if scale.quick else 10.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = draw_images(8, BOXES, seed=1)
        save_images(images, folder)
        write_checkpoint(folder / "model.malckpt", arch, crop)
        labeler, _ = load_labeler(folder / "model.malckpt", device=str(scale.device))
        local = in_process(labeler, images, seconds)
        server = ModelServer(folder, folder / "model.malckpt", ["gpu_ids=[0]"] if scale.device.type == "cuda" else [])
        try:
            remote = served(server, folder, seconds, warm_s=2.0)
        finally:
            server.process.kill()
            server.process.wait()
    scale.add(f"{arch} {crop}, in process, eight boxes at a time", local.crops_per_s, "crops/s")
    scale.add(f"{arch} {crop}, served", remote.crops_per_s, "crops/s")


def _labeler(arch: str, crop: int, device: torch.device, precision: str) -> Labeler:
    torch.manual_seed(0)
    config = LabelerConfig(crop_size=crop, mask_thres=(0.5, 0.5, 0.5))
    return Labeler(MalNetwork(ModelConfig(arch)), config, device=device, precision=precision)


def _crops(labeler: Labeler, count: int) -> list[Crop]:
    (image,) = boxed_images(1, 8, (640, 480))
    crops = [crop for crop in labeler.prepare(decode_image(image.content), image.boxes) if isinstance(crop, Crop)]
    return list(itertools.islice(itertools.cycle(crops), count))


def _copy(source: Tensor, device: torch.device) -> Tensor:
    return source.to(device, non_blocking=True).sum()


def _inputs(scale: Scale, crop: int, batch: int) -> tuple[Tensor, Tensor]:
    pixels = torch.randint(0, 256, (batch, crop, crop, 3), dtype=torch.uint8, device=scale.device)
    return normalize(pixels), torch.arange(batch) % 3


def _forward(scale: Scale, network: Callable[..., object], x_NCHW: Tensor, size_class_N: Tensor) -> None:
    with torch.inference_mode(), _autocast(scale):
        network(x_NCHW, size_class_N)


def _autocast(scale: Scale) -> torch.autocast:
    is_cuda = scale.device.type == "cuda"
    return torch.autocast(scale.device.type, dtype=torch.bfloat16, enabled=is_cuda)


def _module(arch: str, crop: int, count: int) -> MalModule:
    torch.manual_seed(0)
    return MalModule(
        MalNetwork(ModelConfig(arch)),
        LabelerConfig(crop_size=crop),
        schedule=CosineSchedule(1e-4, 1e-6, 0.0, 1.0),
        losses=LossSettings(mil_steps=0, crf_steps=0),
        mean_field=MeanField(),
        optimizer=OptimizerSettings(),
        teacher_momentum=0.996,
        seed=0,
        num_images=count,
    )


PARTS: dict[str, Callable[[Scale], None]] = {
    "matrix": matrix,
    "predict": predict,
    "compiled": compiled,
    "transfer": transfer,
    "decode": decode,
    "training": training,
    "memory": memory,
    "serving": serving,
}
"""In the order of their value: what bounds the network, and how near to it the code as shipped comes."""


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    PARTS[arguments.part](Scale(arguments.part, torch.device(arguments.device), arguments.rows, arguments.quick))


if __name__ == "__main__":
    main()
