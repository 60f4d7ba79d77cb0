"""The spec of `mal-train`: the top-level fields, values derived from several fields, and the loader.

Each section is a module of this package; a field declares its default, range and meaning. Names and defaults follow
the documented spec of TAO's Mask Auto Labeler, so that a TAO spec runs unchanged. Opens no image, builds no network.
"""

import re
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from mal_train.config.dataset import DatasetConfig
from mal_train.config.labeling import EvaluateConfig, InferenceConfig
from mal_train.config.limits import LimitsConfig
from mal_train.config.network import NetworkConfig
from mal_train.config.tao_forms import Note, Verb, current_form, current_override
from mal_train.config.training import TrainConfig
from mal_train.config.tune import TuneConfig, has_credentials, redacted_url
from mal_train.core.errors import ConfigError
from mal_train.core.secrets import is_secret_reference
from mal_train.core.settings import Compat, LabelerConfig
from mal_train.core.storage.addresses import is_remote, redact, scheme_of
from mal_train.core.yaml_config import Signer, Strict, apply_overrides, load_yaml, validate

Section = TypeVar("Section", bound=Strict)

RETIRED = {
    "model_name": "not supported; checkpoints are named mal_model_*; remove it",
    "wandb": "Weights & Biases is not supported; metrics go to metrics.csv and TensorBoard; remove the section",
    "evaluate.trt_engine": "TensorRT is not supported; remove it and give evaluate.checkpoint",
    "inference.trt_engine": "TensorRT is not supported; remove it and give inference.checkpoint",
    "evaluate.comp_clustering": "not supported; TAO prints this score but never computes it; remove it",
    "train.min_lr": "TAO overwrites it; give train.min_lr_rate",
    "train.crf_omega": "it has no effect in TAO either; remove it",
    "mal": "a section of TAO's auto-label service; move its fields to the top level",
    "autolabel_type": "a field of TAO's auto-label service; remove it",
    "gpus": "a name of TAO 4; give train.num_gpus, evaluate.num_gpus or inference.num_gpus",
    "num_gpus": "a top-level field of TAO 5; give train.num_gpus, evaluate.num_gpus or inference.num_gpus",
    "gpu_ids": "a top-level field of TAO 5; give train.gpu_ids, evaluate.gpu_ids or inference.gpu_ids",
    "num_nodes": "a top-level field of TAO 5; give train.num_nodes",
    "checkpoint": (
        "a top-level field of TAO 5; give evaluate.checkpoint or inference.checkpoint, or, to start from it, "
        "train.pretrained_model_path"
    ),
    "train.save_every_k_epoch": "a name of TAO 5; give train.checkpoint_interval",
    "train.val_interval": "a name of TAO 5; give train.validation_interval",
}
"""Fields of TAO specs that are refused, each with the reason and the remedy; `tao_forms` moves some of them before."""

FORMER_SPELLINGS = {
    "train.colour_augmentation": "train.color_augmentation",  # former name
}
"""Fields that version 0.1.0 spelled differently, in both spellings; files and overrides may use either."""

_WITH_ADDRESSES = ("dataset", "train", "evaluate", "inference")
"""Sections with paths, in whose place an address may be given."""


class Spec(Strict):
    """The complete spec."""

    compat: Compat = Field(
        default=Compat.NONE,
        description="tao: reproduce the published behavior where this implementation differs on purpose.",
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description=(
            "Distributed training: ddp replicates the networks in each process; fsdp shards them over GPUs.\n"
            "auto: ddp for several processes."
        ),
    )
    results_dir: str = Field(
        default="./results", description="Output folder; each command writes to a subfolder of its own."
    )
    publish_to: str = Field(
        default="",
        description=(
            "Address (s3://, gs://, az://) below which the output folder of a command is copied when it succeeds;\n"
            "empty: no copy."
        ),
    )
    encryption_key: str | None = Field(
        default=None,
        repr=False,
        description=(
            "Key that encrypts checkpoints: an age recipient (age1...), file:PATH, env:NAME or a passphrase.\n"
            "null: checkpoints are not encrypted. Prefer env: or file:, which keep the key out of the spec."
        ),
    )
    decryption_key: str | None = Field(
        default=None,
        repr=False,
        description="Key that decrypts checkpoints: file:PATH or env:NAME; null: encryption_key, if it can decrypt.",
    )
    trusted_signers: tuple[Signer, ...] = Field(
        default=(),
        max_length=100,
        description=(
            "Public keys (ed25519:...) of authors: evaluate.checkpoint, inference.checkpoint and starting weights\n"
            "must have the signature of one of them (FILE.sig, from `mal-train sign`); weights that timm downloads\n"
            "have none. [] = none is needed. Checkpoints of the own output folder, to resume from, need none."
        ),
    )
    limits: LimitsConfig = LimitsConfig()
    dataset: DatasetConfig = DatasetConfig()
    model: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    inference: InferenceConfig = InferenceConfig()
    tune: TuneConfig = TuneConfig()

    def task_dir(self, task: Literal["train", "evaluate", "inference", "tune"]) -> Path:
        """Returns the output folder of a command: its own results_dir if given, else <results_dir>/<task>."""
        own: str | None = getattr(self, task).results_dir
        folder = Path(own) if own else Path(self.results_dir) / task
        if is_remote(own or self.results_dir):
            raise ConfigError(
                f"results_dir: {redact(own or self.results_dir)}; the files of a run are locked and extended, which no "
                "store allows: give a local folder, and publish_to for a copy of the finished run"
            )
        return folder

    def labeler_config(self, default_crop_size: int) -> LabelerConfig:
        """Returns the labeler settings that a new checkpoint stores, before validation fits any.

        Args:
            default_crop_size: crop size in px where the spec gives none: the backbone's, or an existing checkpoint's.
        """
        return LabelerConfig(
            crop_size=self.dataset.test_crop_size or self.dataset.crop_size or default_crop_size,
            margin_rate=self.train.test_margin_rate[0],
            mask_thres=self.train.thresholds,
            compat=self.compat,
        )

    @property
    def logit_weight(self) -> float:
        """Weight of the logit penalty."""
        if self.train.loss_logit_weight is None:
            return 0.0 if self.compat is Compat.TAO else 0.01
        return self.train.loss_logit_weight

    @property
    def fits_thresholds(self) -> bool:
        """True if validation fits the mask thresholds."""
        if self.train.fit_thresholds is None:
            return self.compat is not Compat.TAO
        return self.train.fit_thresholds

    @property
    def fits_calibration(self) -> bool:
        """True if validation fits the map from score to expected IoU."""
        if self.train.fit_calibration is None:
            return self.compat is not Compat.TAO
        return self.train.fit_calibration

    def without_secrets(self) -> "Spec":
        """Returns a copy for files and logs; redacts keys that are not recipients, file paths or variable names.

        The storage of `tune` keeps its address, without user, password and options.
        """
        storage = self.tune.storage
        return self.model_copy(
            update={
                **{name: _without_signatures(getattr(self, name)) for name in _WITH_ADDRESSES},
                "publish_to": redact(self.publish_to),
                "tune": self.tune.model_copy(update={"storage": None if storage is None else redacted_url(storage)}),
                "encryption_key": _public_form(self.encryption_key),
                "decryption_key": _public_form(self.decryption_key),
            }
        )


def _without_signatures(section: Section) -> Section:
    """Returns a section whose addresses, also those that are not supported, have no user, password or signature."""
    texts = {name: value for name, value in section if isinstance(value, str) and scheme_of(value)}
    return section.model_copy(update={name: redact(value) for name, value in texts.items()})


def load_spec(path: Path | None, overrides: list[str], verb: Verb | None = None, note: Note = lambda _: None) -> Spec:
    """Reads the spec from a YAML file (None: all defaults) and applies `a.b=c` overrides.

    Args:
        path: the file.
        overrides: of the command line.
        verb: the command; its spec may have a form of another TAO release (`tao_forms`). None: such forms are refused.
        note: receives a line for each field that is read in another place.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, of the wrong type, out of range, or given in two
            spellings.
    """
    for override in overrides:
        name, _, value = override.partition("=")
        value = value.strip("'\"")
        if name in {"encryption_key", "decryption_key"} and _public_form(value) == REDACTED:
            raise ConfigError(
                f"{name}: a secret; the process list shows command lines; give env:NAME, file:PATH or a recipient"
            )
        if name == "tune.storage" and has_credentials(value):
            raise ConfigError(
                f"{name}: {redacted_url(value)}; the process list shows command lines; give env:NAME or file:PATH with "
                "the address, or write it to the spec"
            )
    source = str(path or "command line")
    data = {} if path is None else _current_spelling(load_yaml(path), source)
    if verb is not None:
        data = current_form(data, verb, note)
        overrides = [one for override in overrides for one in current_override(override, verb, note)]
    data = apply_overrides(data, list(map(_current_override, overrides)))
    try:
        return validate(Spec, _tao_forms(data), source=source, retired=RETIRED)
    except ConfigError as error:
        raise ConfigError(f"{error}{'' if path is None else _origin(str(error), overrides)}") from None


def _origin(message: str, overrides: list[str]) -> str:
    """Returns the end of a message on a spec file: the fields in it that the command line gave."""
    names = dict.fromkeys(override.partition("=")[0] for override in overrides)
    named = [name for name in names if re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", message)]
    return f" (from the command line: {', '.join(named)})" if named else ""


REDACTED = "<redacted>"


def _public_form(key: str | None) -> str | None:
    if key is None or key in {"", "null"}:
        return None
    if is_secret_reference(key) or re.fullmatch(r"age1[02-9ac-hj-np-z]{58}", key):
        return key
    return REDACTED


def _current_spelling(data: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns the data with the current spelling of each field; raises ConfigError if both spellings are given."""
    result = dict(data)
    for former, current in FORMER_SPELLINGS.items():
        section, name = former.split(".")
        fields = result.get(section)
        if not isinstance(fields, dict) or name not in fields:
            continue
        current_name = current.removeprefix(f"{section}.")
        if current_name in fields:
            raise ConfigError(f"{source}: {former} and {current} are the same field; remove {former}")
        result[section] = {current_name if key == name else key: value for key, value in fields.items()}
    return result


def _current_override(override: str) -> str:
    """Returns an override `a.b=c` with the current spelling of its field."""
    name, separator, value = override.partition("=")
    return FORMER_SPELLINGS.get(name, name) + separator + value


def _tao_forms(data: dict[str, Any]) -> dict[str, Any]:
    """Replaces the empty strings by which TAO leaves a field out with null."""
    result = {key: None if key.endswith("_key") and value == "" else value for key, value in data.items()}
    for section, names in {
        "train": ("resume_training_checkpoint_path", "results_dir", "pretrained_model_path"),
        "evaluate": ("checkpoint", "results_dir"),
        "inference": ("checkpoint", "results_dir"),
        "tune": ("storage", "results_dir"),
    }.items():
        fields = result.get(section)
        if isinstance(fields, dict):
            result[section] = {key: None if key in names and value == "" else value for key, value in fields.items()}
    return result
