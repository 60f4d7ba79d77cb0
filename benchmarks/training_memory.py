"""Computes memory and floating-point operations of a training step of each recipe for GPUs, without a GPU.

    python -m benchmarks.training_memory [--recipe NAME] [--json FILE]

Runs a step of the recipe's network at its own crop and batch on the CPU, in bfloat16, and counts the bytes of all
tensors that are alive after each operation, and the operations by torch's own counter (a multiplication and an addition
are two). Weights, teacher and AdamW's moments are float32. Not counted: the losses, the working memory inside an
operation, the gaps of the allocator, and the CUDA context. The numbers are computed, not measured on a GPU.
"""

import argparse
import weakref
from importlib import resources
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Table
from benchmarks.training_step import random_batch
from mal_train.commands.common import model_config, train_crop_size
from mal_train.config.spec import Spec, load_spec
from mal_train.core.settings import Branch
from mal_train.data.datamodule import Batch
from mal_train.kernel.networks.network import MalNetwork, normalize

RECIPES = ("small-gpu", "coco-scale")
GIB = 2**30


def read_recipe(name: str) -> Spec:
    """Returns a spec of the package."""
    with resources.as_file(resources.files("mal_train.specs").joinpath(f"{name}.yaml")) as path:
        return load_spec(path, [])


def state_bytes(network: MalNetwork) -> int:
    """Returns the bytes of student, teacher and AdamW's two moments, all float32; gradients belong to the step."""
    trained = sum(parameter.numel() for parameter in network.student.parameters() if parameter.requires_grad)
    return 4 * (sum(parameter.numel() for parameter in network.parameters()) + 2 * trained)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations inside the block create, while they are alive.

    Attributes:
        now: bytes alive now.
        peak: the most after any operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts its new outputs."""
        out = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._alive or not size:
            return

        def on_free(_: Any) -> None:
            self._alive.pop(address, None)
            self.now -= size

        self._alive[address] = weakref.ref(storage, on_free)
        self.now += size


def _storages(tree: Any) -> list[UntypedStorage]:
    """Returns the storages of all tensors in nested containers."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def step_bytes(network: MalNetwork, side: int, count: int, *, recomputed: bool) -> int:
    """Returns the peak bytes of activations, gradients and casts in a step.

    Args:
        network: student and teacher; left without gradients.
        side: side of the crops, in px.
        count: crops of a batch.
        recomputed: with `train.gradient_checkpointing`.
    """
    network.student.set_grad_checkpointing(recomputed)
    with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
        run_step(network, random_batch(side, count))
    network.zero_grad(set_to_none=True)
    peak: int = live.peak
    return peak


def run_step(network: MalNetwork, batch: Batch) -> None:
    """Runs student forward, teacher forward and student backward."""
    student = network.logits(normalize(batch.student_NHWC), batch.size_class_N, Branch.STUDENT)
    network.logits(normalize(batch.teacher_NHWC), batch.size_class_N, Branch.TEACHER)
    torch.autograd.backward(student.sum())


def step_operations(network: MalNetwork, side: int) -> int:
    """Returns the operations of a step for one crop: the mean over a small, a medium and a large box."""
    network.student.set_grad_checkpointing(False)
    with FlopCounterMode(display=False) as counter:
        run_step(network, random_batch(side, 3))
    network.zero_grad(set_to_none=True)
    return int(counter.get_total_flops()) // 3


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Compute memory and operations of a training step.")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="only this one; may be repeated")
    table = Table("training_memory", "A training step of the recipes for GPUs, per GPU, computed", parser)
    for name in table.arguments.recipe or RECIPES:
        spec = read_recipe(name)
        network, side = MalNetwork(model_config(spec.model)), train_crop_size(spec)
        network.train()
        count = spec.train.batch_size
        state = state_bytes(network)
        case = f"{name}, crop {side}, batch {count}: "
        table.add(f"{case}weights, teacher, AdamW", state / GIB, "GiB")
        for option, recomputed in (("", False), (", gradient_checkpointing", True)):
            step = step_bytes(network, side, count, recomputed=recomputed)
            table.add(f"{case}step{option}", step / GIB, "GiB")
            table.add(f"{case}sum{option}", (state + step) / GIB, "GiB")
        table.add(f"{case}operations", step_operations(network, side) * count / 1e12, "TFLOP")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
