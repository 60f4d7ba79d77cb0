"""The spec of `mal-train`: every field, its default, its range and its meaning. Opens no image, builds no network.

Names and defaults follow the documented spec of TAO's Mask Auto Labeler, so that such a spec runs here unchanged.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mal_train.errors import ConfigError
from mal_train.labeling.settings import Compat, LabelerConfig
from mal_train.strictyaml import Strict, apply_overrides, load_yaml, validate

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Threshold = Annotated[float, Field(gt=0.0, lt=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Margin = Annotated[float, Field(ge=0.0, le=4.0)]

NOT_HERE = {
    "model_name": "not used here: checkpoints are named mal_model_*; remove it",
    "wandb": "Weights & Biases is not connected here: metrics go to metrics.csv and TensorBoard; remove the section",
    "evaluate.trt_engine": "there is no TensorRT path; remove it and give evaluate.checkpoint",
    "inference.trt_engine": "there is no TensorRT path; remove it and give inference.checkpoint",
    "evaluate.comp_clustering": "the published code prints this score but never computes it; remove it",
    "train.min_lr": "overwritten in TAO as well: give train.min_lr_rate",
    "train.crf_omega": "without effect in the published code too; remove it",
    "gpus": "TAO 4's name; give train.num_gpus, evaluate.num_gpus or inference.num_gpus",
    "gpu_ids": "TAO 5's place; give train.gpu_ids",
    "num_nodes": "TAO 5's place; give train.num_nodes",
    "checkpoint": "TAO 5's place; give evaluate.checkpoint or inference.checkpoint",
    "train.save_every_k_epoch": "TAO 5's name; give train.checkpoint_interval",
    "train.val_interval": "TAO 5's name; give train.validation_interval",
}
"""Fields of TAO specs that do not exist here, each with what to do instead."""


class _Devices(Strict):
    """Where a task runs: one process a device."""

    num_gpus: int = Field(default=1, ge=1, description="Processes on a machine, one a GPU (or so many on the CPU).")
    gpu_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0,),
        description=(
            "Their GPUs, one each; [0] stands for the first num_gpus.\n"
            "[]: the CPU, which also does the work on a machine without CUDA."
        ),
    )

    @model_validator(mode="after")
    def _one_device_each(self) -> Self:
        ids = self.gpu_ids
        if ids not in {(), (0,)} and (len(ids) != self.num_gpus or len(set(ids)) != len(ids)):
            raise ValueError(
                f"num_gpus {self.num_gpus}, gpu_ids {list(ids)}: name as many different ids as num_gpus says, [0] for "
                "the first ones, or [] for the CPU"
            )
        return self

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPU of each process; empty for the CPU."""
        return tuple(range(self.num_gpus)) if self.gpu_ids == (0,) else self.gpu_ids


class _OneMachine(_Devices):
    """Where labelling runs."""

    num_nodes: int = Field(
        default=1, ge=1, description="Machines; 1, for several share a file through mal-client label --server A,B."
    )

    @field_validator("num_nodes")
    @classmethod
    def _one(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                "this command labels on one machine; for several, start mal-server on each and label with "
                "mal-client label --server HOST1:50051,HOST2:50051"
            )
        return value


class CudnnConfig(Strict):
    """Section `train.cudnn`."""

    benchmark: bool = Field(default=False, description="Try cuDNN's algorithms and keep the fastest.")
    deterministic: bool = Field(default=True, description="Use only those of them that give the same bits every time.")


class DatasetConfig(Strict):
    """Which annotations and images."""

    type: Literal["coco"] = Field(default="coco", description="Format of the annotation files.")
    train_ann_path: str = Field(
        default="",
        description="COCO JSON to train on; boxes are enough, train.supervision tells whether masks are used.",
    )
    train_img_dir: str = Field(default="", description="Folder of its images.")
    val_ann_path: str = Field(
        default="", description="COCO JSON to validate and evaluate on; empty trains without validation."
    )
    val_img_dir: str = Field(default="", description="Folder of its images.")
    load_mask: bool = Field(
        default=True, description="Read the masks of the validation file, for mIoU and AP and to fit thresholds."
    )
    min_obj_size: float = Field(default=2048.0, ge=0.0, description="Train on boxes with an area above this many px².")
    max_obj_size: float = Field(default=1e10, gt=0.0, description="Train on boxes with an area below this many px².")
    crop_size: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Side of the square network input in px, a multiple of the patch size.\n"
            "null: 512, or 504 where patches have 14 px (vit-mae-huge/14)."
        ),
    )
    test_crop_size: int | None = Field(
        default=None, ge=1, description="Side of the crop in validation and labelling; null: crop_size."
    )
    num_workers_per_gpu: int = Field(
        default=2, ge=0, description="Processes that prepare training crops; 0: the main process."
    )

    @model_validator(mode="after")
    def _sizes_in_order(self) -> Self:
        if self.min_obj_size >= self.max_obj_size:
            raise ValueError(f"min_obj_size {self.min_obj_size} must be below max_obj_size {self.max_obj_size}")
        return self


class NetworkConfig(Strict):
    """Section `model`."""

    arch: str = Field(
        default="vit-mae-base/16", description="Backbone. vit-deit-small/16 starts from freely usable weights."
    )
    frozen_stages: tuple[Annotated[int, Field(ge=-1)], ...] = Field(
        default=(-1,), description="Stages that stay as they are: 0 the patch embedding, i the i-th block, -1 none."
    )
    mask_head_num_convs: int = Field(default=4, ge=1, description="Convolutions of the mask head.")
    mask_head_hidden_channel: int = Field(default=256, ge=1, description="Width inside the mask head.")
    mask_head_out_channel: int = Field(
        default=256, ge=1, description="Channels that the mask head and the RoI head meet in."
    )
    teacher_momentum: Fraction = Field(default=0.996, description="Share of the teacher that stays at every step.")
    not_adjust_scale: bool = Field(default=False, description="true: one feature scale for boxes of every size.")
    mask_scale_ratio_pre: int = Field(default=1, ge=1, description="Upsampling before the mask head.")
    mask_scale_ratio: float = Field(default=2.0, gt=0.0, description="Upsampling inside the mask head.")
    vit_dpr: BelowOne = Field(
        default=0.0, description="Largest rate of stochastic depth, growing linearly from 0 over the blocks."
    )


class TrainConfig(_Devices):
    """Section `train`."""

    num_nodes: int = Field(
        default=1, ge=1, description="Machines, each with num_gpus processes; docs/distributed.md has the commands."
    )
    cudnn: CudnnConfig = CudnnConfig()

    seed: int = Field(default=1234, ge=-1, le=2**32 - 1, description="Seed of everything random; -1 draws one.")
    num_epochs: int = Field(default=10, ge=1, description="Passes over the boxes.")
    checkpoint_interval: int = Field(
        default=1, ge=1, description="Epochs or steps between checkpoints; the end always writes one."
    )
    checkpoint_interval_unit: Literal["epoch", "step"] = Field(
        default="epoch", description="What checkpoint_interval counts: passes over the boxes, or optimiser steps."
    )
    validation_interval: int = Field(default=1, ge=1, description="Epochs between validations.")
    board_size: int = Field(
        default=24, ge=0, description="Worst masks of each validation to show, in boards/ and TensorBoard; 0: none."
    )
    resume_training_checkpoint_path: str | None = Field(
        default=None, description="Checkpoint to go on from; null: mal_model_latest.malckpt in the results folder."
    )
    results_dir: str | None = Field(
        default=None, description="Folder of this task's results; null: <results_dir>/train."
    )
    pretrained_model_path: str | None = Field(
        default=None,
        description="Starting weights: a .pt, .pth, .safetensors or .malckpt file, or a timm name; null: random.",
    )
    batch_size: int = Field(default=3, ge=1, description="Boxes in a batch.")
    accum_grad_batches: int = Field(default=1, ge=1, description="Batches whose gradients make one step.")
    use_amp: bool = Field(
        default=True, description="Mixed precision where the device is fast at it; losses in float32."
    )
    optim_type: Literal["adamw"] = Field(default="adamw", description="Optimiser.")
    optim_momentum: BelowOne = Field(default=0.9, description="First beta, unless optim_betas is given.")
    optim_betas: tuple[BelowOne, BelowOne] | None = Field(
        default=None, description="Both betas; null: [optim_momentum, 0.9]."
    )
    optim_eps: float = Field(default=1e-8, gt=0.0, description="Epsilon of the optimiser.")
    lr: float = Field(
        default=1.5e-6, ge=0.0, description="Learning rate per sample: the peak is lr * batch_size * num_gpus."
    )
    head_lr_mult: float = Field(
        default=1.0, gt=0.0, description="Learning rate of mask head and RoI head, as a multiple."
    )
    min_lr_rate: Fraction = Field(default=0.2, description="Learning rate at the end, as a share of the peak.")
    num_wave: float = Field(default=1.0, gt=0.0, description="Half cosine waves after the warm-up.")
    wd: float = Field(default=5e-4, ge=0.0, description="Weight decay.")
    wd_norm_bias: bool = Field(default=True, description="Decay also biases and the weights of norms, as TAO does.")
    warmup_epochs: float = Field(default=1.0, ge=0.0, description="Epochs of linear warm-up; fractions are allowed.")
    margin_rate: tuple[Margin, Margin] = Field(
        default=(0.0, 1.2), description="Range of the random growth of a training box."
    )
    colour_augmentation: bool = Field(
        default=True,
        description="Jitter, grey and blur what the student sees; false where fine texture tells objects apart.",
    )
    test_margin_rate: tuple[Margin, ...] = Field(
        default=(0.6, 0.6),
        min_length=1,
        max_length=2,
        description="Growth of a box in validation and labelling; the first counts.",
    )
    mask_thres: tuple[Threshold, ...] = Field(
        default=(0.1,),
        description="Probability above which a pixel is mask: one value, or small, medium and large boxes.",
    )
    fit_thresholds: bool | None = Field(
        default=None,
        description="Fit mask_thres on the validation masks, into the checkpoint; null: unless compat is tao.",
    )
    fit_calibration: bool | None = Field(
        default=None,
        description="Fit the score to IoUs of the validation masks, into the checkpoint; null: unless compat is tao.",
    )
    supervision: Literal["box", "mask", "auto", "pseudo"] = Field(
        default="box",
        description="Learn from boxes alone, from masks alone, (auto) from masks where annotations carry them, or "
        "(pseudo) from all\nboxes and beside them from masks that `mal-train inference` made, weighed by their scores.",
    )
    loss_mask_weight: float = Field(default=4.0, ge=0.0, description="Weight of the loss of boxes that have a mask.")
    loss_mil_weight: float = Field(default=4.0, ge=0.0, description="Weight of the multiple-instance loss.")
    loss_crf_weight: float = Field(default=0.5, ge=0.0, description="Weight of the mean-field loss.")
    loss_mil_step: int = Field(default=1000, ge=0, description="Steps over which the multiple-instance loss ramps up.")
    loss_crf_step: int = Field(default=4000, ge=0, description="Steps over which the mean-field loss ramps up.")
    loss_logit_weight: float | None = Field(
        default=None, ge=0.0, description="Weight of what holds logits within [-8, 8]; null: 0.01, 0 under compat tao."
    )
    crf_zeta: float = Field(default=0.1, gt=0.0, description="Colour bandwidth of the mean field, in normalised RGB.")
    crf_kernel_size: int = Field(default=3, ge=3, description="Side of its neighbourhood; odd.")
    crf_num_iter: int = Field(default=100, ge=0, description="Its iterations.")
    crf_size_ratio: int = Field(default=1, ge=1, description="Its grid, as a multiple of the logits' grid.")
    crf_value_high_thres: Threshold = Field(default=0.9, description="Upper clamp of its marginals.")
    crf_value_low_thres: Threshold = Field(default=0.1, description="Lower clamp of its marginals.")

    @field_validator("mask_thres")
    @classmethod
    def _one_or_three(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in {1, 3}:
            raise ValueError("give one threshold, or three (small, medium, large)")
        return value

    @field_validator("crf_kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("the neighbourhood needs a centre: an odd number")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.margin_rate[0] > self.margin_rate[1]:
            raise ValueError(f"margin_rate {list(self.margin_rate)}: the lower bound comes first")
        if self.crf_value_low_thres >= self.crf_value_high_thres:
            raise ValueError(
                f"crf_value_low_thres {self.crf_value_low_thres} must be below "
                f"crf_value_high_thres {self.crf_value_high_thres}"
            )
        by_epoch = ["checkpoint_interval"] if self.checkpoint_interval_unit == "epoch" else []
        for name in (*by_epoch, "validation_interval"):
            if getattr(self, name) > self.num_epochs:
                raise ValueError(f"{name} {getattr(self, name)} is more than num_epochs {self.num_epochs}")
        return self

    @property
    def betas(self) -> tuple[float, float]:
        """The optimiser's betas: `optim_betas` where given, else `optim_momentum` and TAO's 0.9."""
        return self.optim_betas if self.optim_betas is not None else (self.optim_momentum, 0.9)

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """`mask_thres` for small, medium and large boxes."""
        if len(self.mask_thres) == 1:
            return (self.mask_thres[0],) * 3
        small, medium, large = self.mask_thres
        return small, medium, large


class _Passes(_OneMachine):
    """How a box is labelled where time matters less than the mask."""

    use_mixed_model_test: bool = Field(
        default=False, description="Mean of student and teacher; wins over use_teacher_test."
    )
    use_teacher_test: bool = Field(default=False, description="The teacher instead of the student.")
    use_flip_test: bool = Field(default=False, description="Average each crop with its mirror image.")
    margins: tuple[Margin, ...] = Field(
        default=(),
        description="Growths of a box to label it with, their answers averaged; a pass each. []: the checkpoint's.",
    )
    resolve_overlaps: bool = Field(
        default=False, description="Give each pixel that several boxes of an image claim to one of them."
    )
    refine_edges: bool = Field(
        default=False,
        description="Move the edges of masks to where the colours change; 0.1 s of CPU a box at crop 224.",
    )


class EvaluateConfig(_Passes):
    """Section `evaluate`."""

    checkpoint: str | None = Field(
        default=None, description="Checkpoint to evaluate on dataset.val_ann_path; builtin: the model in the package."
    )
    box_inputs: str = Field(
        default="",
        description="COCO results list with a detector's boxes and scores, to evaluate in place of the file's boxes.",
    )
    results_dir: str | None = Field(
        default=None, description="Folder of this task's results; null: <results_dir>/evaluate."
    )
    batch_size: int = Field(default=3, ge=1, description="Boxes in a batch.")
    precision: Precision = Field(
        default="auto",
        description="Arithmetic of the network; auto: bfloat16 where it is fast, float32 under compat tao.",
    )


class InferenceConfig(_Passes):
    """Section `inference`."""

    checkpoint: str | None = Field(
        default=None, description="Checkpoint to label with; builtin: the model in the package."
    )
    results_dir: str | None = Field(
        default=None, description="Folder of this task's results; null: <results_dir>/inference."
    )
    ann_path: str = Field(default="", description="COCO JSON whose boxes are to get masks.")
    img_dir: str = Field(default="", description="Folder of its images.")
    box_inputs: str = Field(
        default="",
        description="COCO results list with a detector's boxes and scores, to label in place of ann_path's boxes.",
    )
    label_dump_path: str = Field(
        default="instances_val2017_mal.json",
        description="COCO JSON to write; a relative path starts at this task's results folder.",
    )
    batch_size: int = Field(default=3, ge=1, description="Boxes in a batch.")
    load_mask: bool = Field(
        default=False, description="Read the file's masks too and report each one's IoU with the label."
    )
    precision: Precision = Field(
        default="auto",
        description="Arithmetic of the network; auto: bfloat16 where it is fast, float32 under compat tao.",
    )


class Spec(Strict):
    """The whole file."""

    compat: Compat = Field(
        default=Compat.NONE, description="tao: reproduce the published behaviour where ours differs on purpose."
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description=(
            "How processes share the training: ddp, each holds the networks; fsdp, each a part of them (GPUs only).\n"
            "auto: ddp where there are several."
        ),
    )
    results_dir: str = Field(
        default="./results", description="Every task writes into a folder of its own below this one."
    )
    encryption_key: str | None = Field(
        default=None,
        repr=False,
        description=(
            "Seals checkpoints: an age recipient (age1...), file:PATH, env:NAME or a passphrase; null: not encrypted.\n"
            "Prefer env: or file:, which keep the key out of this file."
        ),
    )
    decryption_key: str | None = Field(
        default=None,
        repr=False,
        description="Opens sealed checkpoints: file:PATH or env:NAME; null: the encryption_key, if a passphrase.",
    )
    dataset: DatasetConfig = DatasetConfig()
    model: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    inference: InferenceConfig = InferenceConfig()

    def task_dir(self, task: Literal["train", "evaluate", "inference"]) -> Path:
        """Folder that the task writes to: its own results_dir where given, else <results_dir>/<task>."""
        own: str | None = getattr(self, task).results_dir
        return Path(own) if own else Path(self.results_dir) / task

    def labeler_config(self, own_crop_size: int) -> LabelerConfig:
        """What the checkpoint will say about crops and thresholds, before any fit.

        Args:
            own_crop_size: px, where the spec gives no size of the crop: the backbone's, or an older checkpoint's.
        """
        return LabelerConfig(
            crop_size=self.dataset.test_crop_size or self.dataset.crop_size or own_crop_size,
            margin_rate=self.train.test_margin_rate[0],
            mask_thres=self.train.thresholds,
            compat=self.compat,
        )

    @property
    def logit_weight(self) -> float:
        """Weight of the loss that keeps logits from running away."""
        if self.train.loss_logit_weight is None:
            return 0.0 if self.compat is Compat.TAO else 0.01
        return self.train.loss_logit_weight

    @property
    def fits_thresholds(self) -> bool:
        """Whether training fits the thresholds on the validation masks."""
        if self.train.fit_thresholds is None:
            return self.compat is not Compat.TAO
        return self.train.fit_thresholds

    @property
    def fits_calibration(self) -> bool:
        """Whether training fits the map from score to expected IoU on the validation masks."""
        if self.train.fit_calibration is None:
            return self.compat is not Compat.TAO
        return self.train.fit_calibration

    def without_secrets(self) -> "Spec":
        """A copy that may be written down: a key stays only as a recipient, a file's path or a variable's name."""
        return self.model_copy(
            update={
                "encryption_key": _public_form(self.encryption_key),
                "decryption_key": _public_form(self.decryption_key),
            }
        )


def load_spec(path: Path | None, overrides: list[str]) -> Spec:
    """The spec of a YAML file (None: all defaults) with `a.b=c` overrides on top. ConfigError names what is wrong."""
    for override in overrides:
        name, _, value = override.partition("=")
        if name in {"encryption_key", "decryption_key"} and _public_form(value.strip("'\"")) == REDACTED:
            raise ConfigError(
                f"{name}: a key on the command line shows in the process list; give env:NAME, file:PATH or a recipient"
            )
    data = apply_overrides({} if path is None else load_yaml(path), overrides)
    return validate(Spec, _tao_forms(data), source=str(path or "command line"), retired=NOT_HERE)


REDACTED = "<not written down>"


def _public_form(key: str | None) -> str | None:
    if key is None or key in {"", "null"}:
        return None
    if key.startswith(("file:", "env:")) or re.fullmatch(r"age1[02-9ac-hj-np-z]{58}", key):
        return key
    return REDACTED


def _tao_forms(data: dict[str, Any]) -> dict[str, Any]:
    """TAO writes "none given" as an empty string in places where we say null."""
    result = {key: None if key.endswith("_key") and value == "" else value for key, value in data.items()}
    for section, names in {
        "train": ("resume_training_checkpoint_path", "results_dir", "pretrained_model_path"),
        "evaluate": ("checkpoint", "results_dir"),
        "inference": ("checkpoint", "results_dir"),
    }.items():
        fields = result.get(section)
        if isinstance(fields, dict):
            result[section] = {key: None if key in names and value == "" else value for key, value in fields.items()}
    return result
