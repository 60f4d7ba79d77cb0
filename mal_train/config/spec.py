"""The spec of `mal-train` as a whole: the fields outside of sections, what follows from several, and how it is read.

Each section stands in a file of its own in `sections`, a field with its default, its range and its meaning. Names and
defaults follow the documented spec of TAO's Mask Auto Labeler, so that such a spec runs here unchanged. Opens no image,
builds no network.
"""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mal_train.config.dataset import DatasetConfig
from mal_train.config.labeling import EvaluateConfig, InferenceConfig
from mal_train.config.network import NetworkConfig
from mal_train.config.training import TrainConfig
from mal_train.core.errors import ConfigError
from mal_train.core.secrets import is_secret_reference
from mal_train.core.settings import Compat, LabelerConfig
from mal_train.core.yaml_config import Strict, apply_overrides, load_yaml, validate

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


class Spec(Strict):
    """The whole file."""

    compat: Compat = Field(
        default=Compat.NONE, description="tao: reproduce the published behavior where ours differs on purpose."
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

    def labeler_config(self, default_crop_size: int) -> LabelerConfig:
        """What the checkpoint will say about crops and thresholds, before any fit.

        Args:
            default_crop_size: px, where the spec gives no size of the crop: the backbone's, or an older checkpoint's.
        """
        return LabelerConfig(
            crop_size=self.dataset.test_crop_size or self.dataset.crop_size or default_crop_size,
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
    if is_secret_reference(key) or re.fullmatch(r"age1[02-9ac-hj-np-z]{58}", key):
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
