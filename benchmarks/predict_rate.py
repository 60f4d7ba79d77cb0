"""Compares `Labeler.predict` with its matrix products alone, on the same shapes and in the same run.

Records every matrix product and convolution of a batch, and measures each alone, by the fastest of torch's kernels for
it, on operands in the caches. Their sum is the limit: predict cannot be faster unless it multiplies less. The rest is
normalization, softmax, GELU, norms, sums, resampling and the interpreter. Weights are random, except those of the
built-in model; speed does not depend on them. One torch thread and its CPU time; with --threads, the clock.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.inputs import SIZES, boxed_images, random_labeler
from benchmarks.timing import Table, interleaved
from mal_train.core.images.decoder import decode_image
from mal_train.kernel.checkpoint.builtin import BUILTIN, resolve
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Crop
from mal_train.kernel.networks.heads import ConvRelu
from mal_train.kernel.networks.packing import packed

MODELS = (
    ("builtin", 224, 20),
    ("vit-deit-tiny/16", 512, 4),
    ("vit-deit-small/16", 512, 4),
    ("vit-deit-base/16", 512, 2),
)
"""Network, crop size, crops."""
ROUNDS = 3
LEAST_RATIO = 0.65
REPEATED_MS = 20.0
"""Each product is repeated until it takes this long."""


class Product(NamedTuple):
    """A matrix product of (batch, rows, depth) and (batch, depth, columns), or a convolution.

    A convolution has the shape of its input in `maps`, and (kernel, stride, padding, groups) in `window`.
    """

    batch: int
    rows: int
    depth: int
    columns: int
    maps: tuple[int, ...] = ()
    window: tuple[int, ...] = ()

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return 2.0 * self.batch * self.rows * self.depth * self.columns


class ProductRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the products that run inside it; `products` has the count of each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("linear", "_linear_pointwise"):
            self.products[Product(1, args[0].numel() // args[0].shape[-1], args[0].shape[-1], out.shape[-1])] += 1
        elif name == "bmm":
            batch, rows, depth = args[0].shape
            self.products[Product(batch, rows, depth, args[1].shape[-1])] += 1
        elif name == "scaled_dot_product_attention":
            crops, heads, tokens, depth = args[0].shape
            self.products[Product(crops * heads, tokens, depth, tokens)] += 1
            self.products[Product(crops * heads, tokens, tokens, depth)] += 1
        elif name in ("conv2d", "_convolution_pointwise"):
            self._add_convolution(args, out, is_packed=name == "_convolution_pointwise")
        elif name in ("addmm", "mm", "matmul", "convolution"):
            raise RuntimeError(f"{name}: a product that this benchmark does not know; add it")
        return out

    def _add_convolution(self, args: Sequence[Any], out: torch.Tensor, *, is_packed: bool) -> None:
        x, weight = args[0], args[1]
        # conv2d leaves out trailing arguments that have their defaults.
        stride, padding, _, groups = (
            (args[4], args[3], args[5], args[6]) if is_packed else (*args[3:], *([1], [0], [1], 1)[len(args) - 3 :])
        )
        window = (weight.shape[-1], stride[0], padding[0], groups)
        depth = x.shape[1] // window[3] * window[0] ** 2
        rows = out.shape[0] * out.shape[2] * out.shape[3]
        self.products[Product(1, rows, depth, out.shape[1], tuple(x.shape), window)] += 1


def kernels_of(product: Product, dtype: torch.dtype) -> list[Callable[[], object]]:
    """Returns torch's ways to compute a product."""
    if product.maps:
        kernel, stride, padding, groups = product.window
        layer = ConvRelu(product.maps[1], product.columns, kernel, stride, padding, groups=groups).to(dtype)
        x = torch.randn(product.maps).to(dtype).to(memory_format=torch.channels_last)
        fast = packed(layer, dtype)
        return [lambda: functional.conv2d(x, layer.weight, layer.bias, stride, padding, 1, groups), lambda: fast(x)]
    a = torch.randn(product.batch, product.rows, product.depth).to(dtype)
    if product.batch > 1:
        b = torch.randn(product.batch, product.depth, product.columns).to(dtype)
        c = torch.randn(product.batch, product.columns, product.depth).to(dtype)
        return [lambda: torch.bmm(a, b), lambda: torch.bmm(a, c.transpose(1, 2))]
    linear = torch.nn.Linear(product.depth, product.columns).to(dtype)
    fast = packed(linear, dtype)
    return [lambda: functional.linear(a, linear.weight, linear.bias), lambda: fast(a)]


def seconds_alone(product: Product, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Returns the time of a product by the fastest kernel: the least median of three."""
    best = float("inf")
    for kernel in kernels_of(product, dtype):
        kernel()
        began = time.perf_counter()
        kernel()
        times = max(int(REPEATED_MS / 1000 / max(time.perf_counter() - began, 1e-6)), 1)

        def repeated(kernel: Callable[[], object] = kernel, times: int = times) -> None:
            for _ in range(times):
                kernel()

        best = min(best, interleaved({"": repeated}, ROUNDS, clock)[""] / times)
    return best


def crops_of(labeler: Labeler, count: int) -> list[Crop]:
    """Returns crops of boxes of all size classes."""
    images = boxed_images(-(-count // 10), 10, SIZES["640x480"])
    crops = [crop for image in images for crop in labeler.prepare(decode_image(image.content), image.boxes)]
    return [crop for crop in crops if isinstance(crop, Crop)][:count]


def measure(table: Table, name: str, crop_size: int, count: int, clock: Callable[[], float]) -> None:
    """Adds the rows of a model to the table."""
    precision = table.arguments.precision
    if name == BUILTIN:
        labeler, _ = load_labeler(resolve(BUILTIN), precision=precision)
    else:
        labeler = random_labeler(name, crop_size, precision)
    crops = crops_of(labeler, count)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a recorder sees the products of its own thread only
    labeler.predict(crops)  # packs the weights
    with ProductRecorder() as recorder:
        labeler.predict(crops)
    torch.set_num_threads(threads)
    products = recorder.products
    before = interleaved({"": lambda: labeler.predict(crops)}, ROUNDS, clock)[""]
    limit = sum(count * seconds_alone(product, labeler.dtype, clock) for product, count in products.items())
    after = interleaved({"": lambda: labeler.predict(crops)}, ROUNDS, clock)[""]
    seconds = (before + after) / 2
    gflop = sum(count * product.flops for product, count in products.items()) / 1e9
    variant = f"{name}, crop {crop_size}, {str(labeler.dtype).removeprefix('torch.')}"
    table.add(f"{variant}: predict", 1000 * seconds / len(crops), "ms a crop")
    table.add(f"{variant}: limit", 1000 * limit / len(crops), "ms a crop")
    table.add(f"{variant}: rate of predict", gflop / seconds, "GFLOP/s")
    table.add(f"{variant}: rate of the products alone", gflop / limit, "GFLOP/s")
    table.add(f"{variant}: ratio", limit / seconds, "", least=LEAST_RATIO)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, help="torch threads; measures the clock (default: CPU time of one)")
    parser.add_argument("--precision", default="auto", help="as of the labeler (default: %(default)s)")
    table = Table("predict_rate", "predict against its matrix products alone", parser)
    threads: int | None = table.arguments.threads
    torch.set_num_threads(threads or 1)
    for name, crop_size, count in MODELS:
        measure(table, name, crop_size, count, time.process_time if threads is None else time.perf_counter)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
