"""Runs the published implementation, a checkout of NVIDIA's tao_pytorch_backend, once for each request.

The checkout stays as it is: its model, data set, transforms, prediction step and training step run unchanged. Modules
around them that do not take part (status files, FairScale's sharding, other backbones) are replaced by empty ones, so
that the checkout needs no packages beyond those of this project.
"""

import argparse
import importlib
import json
import logging
import sys
import time
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch
import torch
from torch import nn
from torch.utils.data import DataLoader

PACKAGE = "nvidia_tao_pytorch"
BATCH_SIZE = 4
"""Crops in a batch, of inference and of training."""
SIZES = {"vit-deit-tiny/16": (192, 3), "vit-deit-small/16": (384, 6), "vit-deit-base/16": (768, 12)}
"""Backbone → width and heads. The published builder refuses ViT-tiny; the class behind it does not."""
PACKAGES = ("cv", "cv.backbone_v2", "core", "core.lightning", "core.distributed", "core.loggers")
FANS = (
    *(f"fan_{size}_p16_224" for size in ("tiny_12", "small_12", "base_18", "large_24")),
    *(f"fan_{size}_p4_hybrid" for size in ("tiny_8", "small_12", "base_16", "large_16")),
)


def settings(arch: str, crop_size: int) -> Any:
    """Returns the settings that the published code reads, with its defaults."""
    values = {
        "model": {
            "arch": arch,
            "mask_head_num_convs": 4,
            "mask_head_hidden_channel": 256,
            "mask_head_out_channel": 256,
            "mask_scale_ratio_pre": 1,
            "mask_scale_ratio": 2.0,
            "not_adjust_scale": False,
            "teacher_momentum": 0.996,
        },
        "dataset": {"crop_size": crop_size, "load_mask": False},
        "train": {
            "pretrained_model_path": None,
            "use_amp": False,
            "gpu_ids": [0],
            "test_margin_rate": [0.6, 0.6],
            "mask_thres": [0.1, 0.1, 0.1],
            "crf_kernel_size": 3,
            "crf_zeta": 0.1,
            "crf_num_iter": 100,
            "crf_value_high_thres": 0.9,
            "crf_value_low_thres": 0.1,
            "crf_size_ratio": 1,
            "loss_mil_weight": 4.0,
            "loss_mil_step": 1000,
            "loss_crf_weight": 0.5,
            "loss_crf_step": 4000,
            "optim_type": "adamw",
            "optim_eps": 1e-8,
            "optim_betas": [0.9, 0.9],
            "optim_momentum": 0.9,
            "lr": 1e-6,
            "min_lr": 0.0,
            "wd": 5e-4,
            "warmup_epochs": 1,
            "num_epochs": 10,
            "num_wave": 1,
        },
        "evaluate": {
            "comp_clustering": False,
            "use_mixed_model_test": False,
            "use_teacher_test": False,
            "use_flip_test": False,
        },
    }
    return json.loads(json.dumps(values), object_hook=lambda members: SimpleNamespace(**members))


class Module(lightning.pytorch.LightningModule):
    """Base class of the published model, without its callbacks and encryption."""

    def __init__(self, experiment_spec: Any) -> None:
        super().__init__()
        self.experiment_spec = experiment_spec
        self.dataset_config = experiment_spec.dataset
        self.model_config = experiment_spec.model


def use_checkout(checkout: Path) -> None:
    """Makes the published package importable. Exits if the folder is not a checkout of it."""
    folder = checkout / PACKAGE
    if not (folder / "cv" / "mal" / "models" / "mal.py").is_file():
        raise SystemExit(
            f"--published {checkout}: it has no file {PACKAGE}/cv/mal/models/mal.py; give a checkout of TAO"
        )
    _add(PACKAGE, {"__path__": [str(folder)]})
    for name in PACKAGES:  # their own __init__ files import the whole product
        _add(f"{PACKAGE}.{name}", {"__path__": [str(folder.joinpath(*name.split(".")))]})
    registry = SimpleNamespace(register=lambda *_args, **_options: lambda item: item)
    sys.modules[f"{PACKAGE}.cv.backbone_v2"].__dict__["BACKBONE_REGISTRY"] = registry
    ranks = {"get_global_rank": lambda: 0, "is_dist_avail_and_initialized": lambda: False}
    _add(f"{PACKAGE}.cv.backbone_v2.fan", dict.fromkeys(FANS))
    _add(f"{PACKAGE}.core.tlt_logging", {"logging": logging})
    _add(f"{PACKAGE}.core.lightning.tao_lightning_module", {"TAOLightningModule": Module})
    _add(f"{PACKAGE}.core.distributed.comm", ranks)
    _add(f"{PACKAGE}.core.loggers.api_logging", {})
    _add("fairscale", {"__path__": []})
    _add("fairscale.nn", {"auto_wrap": lambda module: module})


def _add(name: str, members: Mapping[str, Any]) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def model_of(name: str, data: Path, spec: Any) -> Any:
    """Builds a published model with random weights (seed 0), outside a trainer."""
    builder = importlib.import_module(f"{PACKAGE}.cv.mal.models.vit_builder")
    builder.__dict__["build_model"] = lambda cfg: _backbone(builder, cfg.model.arch)
    cls = getattr(importlib.import_module(f"{PACKAGE}.cv.mal.models.mal"), name)
    alone = type(name, (cls,), {"logger": SimpleNamespace(experiment=None), "current_epoch": 1})
    categories = json.loads((data / "annotations.json").read_text(encoding="utf-8"))["categories"]
    torch.manual_seed(0)
    return alone(cfg=spec, categories=categories, num_iter_per_epoch=1)


def _backbone(builder: types.ModuleType, arch: str) -> nn.Module:
    width, heads = SIZES[arch]
    backbone: nn.Module = builder.VisionTransformer(
        img_size=224,
        dynamic_img_size=True,
        patch_size=16,
        embed_dim=width,
        depth=12,
        num_heads=heads,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    return backbone


def labeling(data: Path, arch: str, crop_size: int, precision: str) -> Callable[[], None]:
    """Returns a function that labels all boxes of a folder by the published prediction step, RLE included.

    Writes the weights to published.pth in the folder.
    """
    spec = settings(arch, crop_size)
    model = model_of("MALPseudoLabels", data, spec)
    torch.save(model.state_dict(), data / "published.pth")
    model.eval()
    coco = importlib.import_module(f"{PACKAGE}.cv.mal.datasets.coco")
    augment = importlib.import_module(f"{PACKAGE}.cv.mal.datasets.data_aug")
    transform = augment.data_aug_pipelines["test"](spec)
    dataset = coco.InstSegCOCO(
        str(data / "annotations.json"), str(data / "images"), load_mask=False, transform=transform
    )

    def run() -> None:
        model.on_predict_epoch_start()
        loader = DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=augment.custom_collate_fn)
        with torch.inference_mode(), autocast(precision):
            for index, batch in enumerate(loader):
                model.predict_step(batch, index)

    return run


def training(data: Path, arch: str, crop_size: int, precision: str) -> Callable[[], None]:
    """Returns a function that runs one published training step on noise, without the loop of Lightning."""
    model = model_of("MAL", data, settings(arch, crop_size)).train()
    optimizer = model.configure_optimizers()
    torch.manual_seed(0)
    image, timage = torch.randn(2, BATCH_SIZE, 3, crop_size, crop_size)
    mask = torch.zeros(BATCH_SIZE, 1, crop_size, crop_size)
    mask[..., crop_size // 6 : -crop_size // 6, crop_size // 5 : -crop_size // 5] = 1
    bbox = torch.tensor([[0.0, 0.0, side, side] for side in (20.0, 60.0, 200.0, 20.0)])
    model.optimizers = lambda: optimizer
    model.log = lambda *_args, **_options: None
    model.manual_backward = torch.Tensor.backward

    def run() -> None:
        with autocast(precision):
            model.training_step({"image": image, "timage": timage, "mask": mask, "bbox": bbox})

    return run


def autocast(precision: str) -> torch.autocast:
    """Returns the context of a precision on the CPU."""
    is_enabled = precision != "float32"
    return torch.autocast("cpu", dtype=getattr(torch, precision) if is_enabled else None, enabled=is_enabled)


def answer_requests(run: Callable[[], None]) -> None:
    """Calls `run` once unmeasured, then once for each line of standard input; prints the seconds of each as JSON."""
    run()
    print(json.dumps("ready"), file=sys.__stdout__, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(json.dumps(time.perf_counter() - began), file=sys.__stdout__, flush=True)


def main() -> None:
    """Answers requests until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--crop", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--train", action="store_true")
    arguments = parser.parse_args()
    sys.stdout = sys.stderr  # pycocotools and the published code print
    use_checkout(arguments.published)
    make = training if arguments.train else labeling
    answer_requests(make(arguments.data, arguments.arch, arguments.crop, arguments.precision))


if __name__ == "__main__":
    main()
