"""`mal-train export`: writes one network of a checkpoint as a small float16 file for labeling."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mal_train.commands.common import (
    checkpoint_file,
    checkpoint_keys,
    choose_devices,
    existing_file,
    image_folder,
    input_file,
    trust_policy,
    worker_threads,
)
from mal_train.config.spec import Spec
from mal_train.core.atomic_io import refuse_same_file
from mal_train.core.coco.annotations import by_image, read_coco
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.images.files import for_names
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.settings import LabelerConfig
from mal_train.core.storage.addresses import redact
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import DecryptionKey
from mal_train.kernel.checkpoint.lineage import average_provenance
from mal_train.kernel.checkpoint.trust import TrustPolicy
from mal_train.kernel.labeler.types import PredictOptions
from mal_train.kernel.networks.backbones import check_crop_size
from mal_train.kernel.networks.network import MalNetwork
from mal_train.kernel.networks.quantization import Int8Calibration
from mal_train.offline.int8_ranges import calibrate_int8
from mal_train.training.run_files import summary_line, validation_metrics
from mal_train.training.validation import Validator, has_masks


def export(
    spec: Spec,
    target: Path,
    console: Console,
    *,
    license: str | None = None,
    average_with: Sequence[str] = (),
    int8: bool = False,
) -> EvaluationReport | None:
    """Writes the network that evaluate.use_teacher_test selects, in float16 and without the other one.

    With dataset.val_ann_path, thresholds and calibration are fitted to this network on the masks of that file, at the
    crop size and margin of the spec (or else of the checkpoint), and the metrics are stored. Without it, the thresholds
    are kept, and the calibration too if it was fitted to the same network, crop size and margin.

    Args:
        spec: the spec; evaluate.checkpoint is the source.
        target: the file to write.
        console: prints messages.
        license: license of the weights, as an SPDX identifier; stored in the file.
        average_with: further checkpoints of the same network, whose mean is written. The mean is better than each if
            one was trained from the other (Wortsman et al., "Model soups", ICML 2022).
        int8: calibrate the written network for int8 on crops of dataset.train_ann_path.

    Returns:
        Metrics of the written network; None without validation masks.

    Raises:
        MalError: the checkpoint or the data cannot be used, or the file cannot be written.
    """
    if spec.evaluate.use_mixed_model_test:
        raise ConfigError("evaluate.use_mixed_model_test: true; an export has one network; set it to false")
    encryption_key, decryption_key = checkpoint_keys(spec)
    which = "teacher" if spec.evaluate.use_teacher_test else "student"
    paths = [
        checkpoint_file(spec.evaluate.checkpoint, "evaluate.checkpoint"),
        *(existing_file(path, "--average") for path in average_with),
    ]
    for path in paths:
        refuse_same_file(path, target)
    given, sha256 = spec.evaluate.checkpoint or "", spec.evaluate.checkpoint_sha256
    trusts = [trust_policy(spec, given, sha256), *(trust_policy(spec, path, None) for path in average_with)]
    sources = _read_sources(paths, decryption_key, which, trusts)
    weights = _mean_weights(sources)
    checkpoint = sources[0].checkpoint
    config = _labeler_config(spec, checkpoint.labeler)
    check_crop_size(checkpoint.model.arch, config.crop_size)
    network = MalNetwork(checkpoint.model)
    network.load({name: tensor.float() for name, tensor in weights.items()})
    provenance = _provenance(sources, which, license)
    report = None
    if spec.dataset.val_ann_path:
        validator = _validator(spec, console)
        validation = validator.run(network, config)
        config, report = validation.config, validation.report
        console.print(summary_line(report))
        provenance["validation"] = validation_metrics(report)
        if spec.fits_calibration and config.score_model is not None:
            config = _with_resolved_score(validator, network, config, provenance, console)
        provenance.pop("validation_mIoU", None)  # measured in training, with other crop size and thresholds
    elif _has_other_calibration(checkpoint, config, which, is_mean=len(sources) > 1):
        config = config.without_fitted_score()
        console.print(
            f"calibration: dropped; it was fitted to the student of {paths[0]} at its own crop size and margin. "
            "dataset.val_ann_path fits a new one"
        )
    written = dataclasses.replace(
        checkpoint,
        labeler=config,
        weights=weights,
        provenance=provenance,
        int8=_calibration(spec, network, config, console) if int8 else None,
        encryption=None,
    )
    if checkpoint.int8 is not None and not int8:
        console.print("int8: the calibration is dropped; --int8 makes a new one")
    encryption = save_checkpoint(target, written, encryption_key)
    console.print(
        f"wrote {target}: {target.stat().st_size / 1e6:.1f} MB, the {which} in float16, encryption: {encryption.mode}"
    )
    return report


@dataclass(frozen=True)
class _Source:
    """A checkpoint to export, with the weights of one of its networks under the names of the student."""

    path: Path
    checkpoint: Checkpoint
    weights: Mapping[str, Tensor]


def _read_sources(
    paths: Sequence[Path], decryption_key: DecryptionKey | None, which: str, trusts: Sequence[TrustPolicy]
) -> list[_Source]:
    """Reads the student or the teacher of each checkpoint; raises ConfigError unless all networks are equal."""
    sources: list[_Source] = []
    for path, trust in zip(paths, trusts, strict=True):
        checkpoint = load_checkpoint(path, decryption_key, skip_training_state=True, trust=trust)
        if sources and checkpoint.model != sources[0].checkpoint.model:
            raise ConfigError(f"--average: {path} has a different network than {paths[0]}; give equal networks")
        weights = {
            f"student.{name.removeprefix(f'{which}.')}": tensor
            for name, tensor in checkpoint.weights.items()
            if name.startswith(f"{which}.")
        }
        if not weights:
            raise ConfigError(f"evaluate.use_teacher_test: true; {path} has no teacher; set it to false")
        sources.append(_Source(path, checkpoint, weights))
    return sources


def _mean_weights(sources: Sequence[_Source]) -> dict[str, Tensor]:
    """Returns the mean weights as float16; integers (batch counters of norms) are those of the first source."""

    def mean(name: str, first: Tensor) -> Tensor:
        if not first.is_floating_point():
            return first
        return torch.stack([source.weights[name] for source in sources]).mean(0).to(torch.float16)

    return {name: mean(name, first) for name, first in sources[0].weights.items()}


def _provenance(sources: Sequence[_Source], which: str, license: str | None) -> dict[str, Any]:
    """Returns the provenance of the written file."""
    files = [
        (
            source.path,
            source.checkpoint.sha256,
            builtin.with_card(source.checkpoint.sha256, source.checkpoint.provenance),
        )
        for source in sources
    ]
    inherited = average_provenance(files) if len(files) > 1 else files[0][2]
    own = {"network": which, "weights_stored_as": "float16", **({} if license is None else {"licence": license})}
    return {**inherited, **own}


def _has_other_calibration(checkpoint: Checkpoint, config: LabelerConfig, which: str, *, is_mean: bool) -> bool:
    """Returns True if the stored calibration was fitted to other scores than those of the written network."""
    stored = checkpoint.labeler
    is_same_crop = (config.crop_size, config.margin_rate) == (stored.crop_size, stored.margin_rate)
    return stored.calibration is not None and (which != "student" or is_mean or not is_same_crop)


def _labeler_config(spec: Spec, stored: LabelerConfig) -> LabelerConfig:
    """Returns the labeler settings of the checkpoint, with crop size and margin of the spec if given."""
    requested = spec.labeler_config(stored.crop_size)
    margin_rate = requested.margin_rate if "test_margin_rate" in spec.train.model_fields_set else stored.margin_rate
    # A new calibration is fitted to the current kind of score; a kept one needs the kind that it was fitted to.
    if spec.dataset.val_ann_path and spec.fits_calibration:
        stored = dataclasses.replace(stored.without_fitted_score(), score=requested.score)
    return dataclasses.replace(stored, crop_size=requested.crop_size, margin_rate=margin_rate)


def _calibration(spec: Spec, network: MalNetwork, config: LabelerConfig, console: Console) -> Int8Calibration:
    """Returns the ranges of the written network on crops of dataset.train_ann_path."""
    with input_file(spec.dataset.train_ann_path, "dataset.train_ann_path") as annotations:
        coco = read_coco(annotations, spec.dataset.row_rules)
        images = image_folder(spec, spec.dataset.train_img_dir, "dataset.train_img_dir", annotations)
    images = for_names(images, coco.file_names)
    calibration = calibrate_int8(network, config, list(by_image(coco)), images, threads=worker_threads())
    console.print(f"int8: calibrated on {calibration.crops} crops of {redact(spec.dataset.train_ann_path)}")
    return calibration


def _with_resolved_score(
    validator: Validator, network: MalNetwork, config: LabelerConfig, provenance: dict[str, Any], console: Console
) -> LabelerConfig:
    """Returns `config` with the score of masks whose overlaps are resolved, if there is one; notes their metrics."""
    resolved = validator.fit_resolved(network, config)
    if resolved is None:
        return config
    score, report = resolved
    console.print(f"overlaps resolved: {summary_line(report)}")
    provenance["validation_overlaps_resolved"] = validation_metrics(report)
    return dataclasses.replace(config, resolved_score=score)


def _validator(spec: Spec, console: Console) -> Validator:
    with input_file(spec.dataset.val_ann_path, "dataset.val_ann_path") as annotations:
        coco = read_coco(annotations, spec.dataset.row_rules)
        images = image_folder(spec, spec.dataset.val_img_dir, "dataset.val_img_dir", annotations)
    images = for_names(images, coco.file_names)
    if not has_masks(coco):
        name = redact(spec.dataset.val_ann_path)
        raise ConfigError(f"dataset.val_ann_path: no annotation of {name} has a mask to fit to; leave it empty")
    return Validator(
        coco=coco,
        image_dir=images,
        batch_size=spec.evaluate.batch_size,
        fit_thresholds=spec.fits_thresholds,
        fit_calibration=spec.fits_calibration,
        precision=spec.evaluate.precision,
        device=str(choose_devices(spec.evaluate.gpus, spec.evaluate.num_gpus, console)[0]),
        threads=worker_threads(),
        options=PredictOptions(flip=spec.evaluate.use_flip_test),
    )
