"""Section `train`: how long, how fast, by which losses, and what is fitted on the validation masks."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mal_train.config.devices import Devices
from mal_train.config.ranges import BelowOne, Fraction, Margin, Threshold
from mal_train.core.yaml_config import Strict


class CudnnConfig(Strict):
    """Section `train.cudnn`."""

    benchmark: bool = Field(default=False, description="Try cuDNN's algorithms and keep the fastest.")
    deterministic: bool = Field(default=True, description="Use only those of them that give the same bits every time.")


class TrainConfig(Devices):
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
        default="epoch", description="What checkpoint_interval counts: passes over the boxes, or optimizer steps."
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
    optim_type: Literal["adamw"] = Field(default="adamw", description="Optimizer.")
    optim_momentum: BelowOne = Field(default=0.9, description="First beta, unless optim_betas is given.")
    optim_betas: tuple[BelowOne, BelowOne] | None = Field(
        default=None, description="Both betas; null: [optim_momentum, 0.9]."
    )
    optim_eps: float = Field(default=1e-8, gt=0.0, description="Epsilon of the optimizer.")
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
    color_augmentation: bool = Field(
        default=True,
        description="Jitter, gray and blur what the student sees; false where fine texture tells objects apart.",
    )
    test_margin_rate: tuple[Margin, ...] = Field(
        default=(0.6, 0.6),
        min_length=1,
        max_length=2,
        description="Growth of a box in validation and labeling; the first counts.",
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
    crf_zeta: float = Field(default=0.1, gt=0.0, description="Color bandwidth of the mean field, in normalized RGB.")
    crf_kernel_size: int = Field(default=3, ge=3, description="Side of its neighborhood; odd.")
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
            raise ValueError("the neighborhood needs a center: an odd number")
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
        """The optimizer's betas: `optim_betas` where given, else `optim_momentum` and TAO's 0.9."""
        return self.optim_betas if self.optim_betas is not None else (self.optim_momentum, 0.9)

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """`mask_thres` for small, medium and large boxes."""
        if len(self.mask_thres) == 1:
            return (self.mask_thres[0],) * 3
        small, medium, large = self.mask_thres
        return small, medium, large
