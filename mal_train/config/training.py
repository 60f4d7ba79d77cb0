"""Section `train` of the spec: schedule, optimizer, augmentation, losses, and what validation fits."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mal_train.config.devices import Devices
from mal_train.config.ranges import BelowOne, Fraction, Margin, Threshold
from mal_train.core.yaml_config import Sha256, Strict


class CudnnConfig(Strict):
    """Section `train.cudnn`."""

    benchmark: bool = Field(default=False, description="Let cuDNN time its algorithms and use the fastest.")
    deterministic: bool = Field(default=True, description="Let cuDNN use deterministic algorithms only.")


class TrainConfig(Devices):
    """Section `train`."""

    num_nodes: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="Machines with num_gpus processes each; start several with torchrun or srun (docs/distributed.md).",
    )
    cudnn: CudnnConfig = CudnnConfig()

    seed: int = Field(default=1234, ge=-1, le=2**32 - 1, description="Random seed; -1: a random one for each run.")
    num_epochs: int = Field(default=10, ge=1, le=1_000_000, description="Epochs: passes over the training boxes.")
    checkpoint_interval: int = Field(
        default=1,
        ge=1,
        le=1_000_000_000,
        description="Epochs or steps between checkpoints; the last epoch always writes one.",
    )
    checkpoint_interval_unit: Literal["epoch", "step"] = Field(
        default="epoch", description="Unit of checkpoint_interval: epochs, or optimizer steps."
    )
    validation_interval: int = Field(
        default=1, ge=1, le=1_000_000, description="Epochs between validations; the last epoch always validates."
    )
    board_size: int = Field(
        default=24,
        ge=0,
        le=10_000,
        description="Masks in the contact sheet of each validation, worst first, in boards/ and TensorBoard; 0: none.",
    )
    resume_training_checkpoint_path: str | None = Field(
        default=None, description="Checkpoint to resume from; null: the newest one in the output folder, if any."
    )
    results_dir: str | None = Field(
        default=None, description="Output folder of `mal-train train`; null: <results_dir>/train."
    )
    pretrained_model_path: str | None = Field(
        default=None,
        description="Starting weights: a .pt, .pth, .safetensors or .malckpt file, or a timm model name; null: random.",
    )
    pretrained_model_sha256: Sha256 | None = Field(
        default=None,
        description="SHA-256 that the file of starting weights must have (sha256sum FILE); null: any.",
    )
    batch_size: int = Field(default=3, ge=1, le=65_536, description="Boxes per batch and process.")
    accum_grad_batches: int = Field(default=1, ge=1, le=1_000_000, description="Batches per optimizer step.")
    use_amp: bool = Field(
        default=True,
        description="Use mixed precision where the device is fast at it; losses are always computed in float32.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute blocks and mask head again in the backward pass instead of keeping their maps: the same\n"
        "gradients in less memory and more time (docs/training.md).",
    )
    compile: bool = Field(
        default=False,
        description="Compile the backbones with torch.compile; needs a C++ compiler, and on a GPU Triton. The first\n"
        "steps take longer (docs/training.md).",
    )
    optim_type: Literal["adamw"] = Field(default="adamw", description="Optimizer.")
    optim_momentum: BelowOne = Field(default=0.9, description="AdamW's beta1; optim_betas takes precedence.")
    optim_betas: tuple[BelowOne, BelowOne] | None = Field(
        default=None, description="AdamW's [beta1, beta2]; null: [optim_momentum, 0.9]."
    )
    optim_eps: float = Field(default=1e-8, gt=0.0, le=1.0, description="AdamW's epsilon.")
    lr: float = Field(
        default=1.5e-6, ge=0.0, le=1e3, description="Learning rate per sample; the peak is lr * batch_size * num_gpus."
    )
    head_lr_mult: float = Field(
        default=1.0,
        gt=0.0,
        le=1e6,
        description="Learning rate of mask head and RoI head, as a multiple of the backbone's.",
    )
    min_lr_rate: Fraction = Field(default=0.2, description="Final learning rate, as a fraction of the peak.")
    num_wave: float = Field(default=1.0, gt=0.0, le=1e6, description="Half cosine waves of the schedule after warm-up.")
    wd: float = Field(default=5e-4, ge=0.0, le=1e3, description="Weight decay.")
    wd_norm_bias: bool = Field(
        default=True, description="Apply weight decay to biases and normalization weights too, as TAO does."
    )
    warmup_epochs: float = Field(
        default=1.0, ge=0.0, le=1e6, description="Length of the linear warm-up, in epochs; may be a fraction."
    )
    margin_rate: tuple[Margin, Margin] = Field(
        default=(0.0, 1.2),
        description="Range [low, high] of the random margin m of a training crop; its window is 1 + m/2 times the box.",
    )
    color_augmentation: bool = Field(
        default=True,
        description="Apply color jitter, grayscale and blur to the student's crop.\n"
        "Set false where only fine texture separates objects from the background.",
    )
    test_margin_rate: tuple[Margin, ...] = Field(
        default=(0.6, 0.6),
        min_length=1,
        max_length=2,
        description="Margin m of a crop in validation and labeling; its window is 1 + m/2 times the box.\n"
        "Only the first value is used.",
    )
    mask_thres: tuple[Threshold, ...] = Field(
        default=(0.1,),
        description="Probability above which a pixel belongs to the mask: one value, or one each for small, medium and "
        "large boxes.",
    )
    fit_thresholds: bool | None = Field(
        default=None,
        description="Fit mask_thres to the validation masks and store it in the checkpoint; null: true, false under "
        "compat tao.",
    )
    fit_calibration: bool | None = Field(
        default=None,
        description="Fit the score to the IoU with the validation masks and store model and map in the checkpoint.\n"
        "null: true, false under compat tao.",
    )
    supervision: Literal["box", "mask", "auto", "pseudo"] = Field(
        default="box",
        description="box: boxes only. mask: boxes with a mask, from their masks. auto: masks where given, else boxes.\n"
        "pseudo: boxes, plus masks that `mal-train inference` predicted, weighted by their scores; 1 if `corrected`.",
    )
    loss_mask_weight: float = Field(
        default=4.0, ge=0.0, le=1e6, description="Weight of the mask loss, for boxes with a mask."
    )
    loss_mil_weight: float = Field(default=4.0, ge=0.0, le=1e6, description="Weight of the multiple-instance loss.")
    loss_crf_weight: float = Field(default=0.5, ge=0.0, le=1e6, description="Weight of the mean-field (CRF) loss.")
    loss_mil_step: int = Field(
        default=1000,
        ge=0,
        le=1_000_000_000,
        description="Optimizer steps of the linear ramp of the multiple-instance loss weight.",
    )
    loss_crf_step: int = Field(
        default=4000,
        ge=0,
        le=1_000_000_000,
        description="Optimizer steps of the linear ramp of the mean-field loss weight.",
    )
    loss_logit_weight: float | None = Field(
        default=None,
        ge=0.0,
        le=1e6,
        description="Weight of the penalty on logits outside [-8, 8]; null: 0.01, 0 under compat tao.",
    )
    crf_zeta: float = Field(
        default=0.1, gt=0.0, le=1e3, description="Color bandwidth of the mean field, in units of normalized RGB."
    )
    crf_kernel_size: int = Field(
        default=3, ge=3, le=31, description="Side length of the mean field's window, in cells of its grid; odd."
    )
    crf_num_iter: int = Field(default=100, ge=0, le=100_000, description="Mean-field iterations.")
    crf_size_ratio: int = Field(
        default=1, ge=1, le=16, description="Resolution of the mean field's grid, as a multiple of the logit map's."
    )
    crf_value_high_thres: Threshold = Field(
        default=0.9, description="Upper bound of the mean field's foreground probability."
    )
    crf_value_low_thres: Threshold = Field(
        default=0.1, description="Lower bound of the mean field's foreground probability."
    )

    @field_validator("mask_thres")
    @classmethod
    def _one_or_three(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in {1, 3}:
            raise ValueError("give one threshold, or three for small, medium and large boxes")
        return value

    @field_validator("crf_kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("it must be odd, because the window has a center")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.margin_rate[0] > self.margin_rate[1]:
            raise ValueError(f"margin_rate {list(self.margin_rate)}: the lower bound must come first")
        if self.crf_value_low_thres >= self.crf_value_high_thres:
            raise ValueError(
                f"crf_value_low_thres {self.crf_value_low_thres} must be below "
                f"crf_value_high_thres {self.crf_value_high_thres}"
            )
        by_epoch = ["checkpoint_interval"] if self.checkpoint_interval_unit == "epoch" else []
        for name in (*by_epoch, "validation_interval"):
            if getattr(self, name) > self.num_epochs:
                raise ValueError(f"{name} {getattr(self, name)} must not exceed num_epochs {self.num_epochs}")
        return self

    @property
    def betas(self) -> tuple[float, float]:
        """Betas of AdamW: `optim_betas` if given, else `optim_momentum` and TAO's 0.9."""
        return self.optim_betas if self.optim_betas is not None else (self.optim_momentum, 0.9)

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """Thresholds for small, medium and large boxes, from `mask_thres`."""
        if len(self.mask_thres) == 1:
            return (self.mask_thres[0],) * 3
        small, medium, large = self.mask_thres
        return small, medium, large
