"""`mal-train export`: a trained checkpoint → a small file for whoever labels: one network, in float16, fitted to it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mal_train.commands.common import (
    checkpoint_file,
    choose_devices,
    existing_file,
    existing_folder,
    keys_of,
    worker_threads,
)
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import read_coco
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.lineage import average_provenance
from mal_train.kernel.labeler.labeler import PredictOptions
from mal_train.kernel.networks.backbones import check_crop_size
from mal_train.kernel.networks.network import MalNetwork
from mal_train.training.run_files import figures_of, one_line
from mal_train.training.validation import Validator, has_masks


def export(
    spec: Spec, target: Path, screen: Console, *, license: str | None = None, average_with: Sequence[Path] = ()
) -> EvaluationReport | None:
    """Writes the network that evaluate.use_teacher_test names, as the only one, in float16.

    With dataset.val_ann_path, thresholds and calibration are fitted to that network on the masks there, at the crop and
    margin that the spec gives (or else the checkpoint), and the figures stand in the file. Without, the thresholds
    stay, and the calibration where it is of the same network, crop and margin.
    `average_with` names more checkpoints of the same network: what is written is the mean of all of them, which helps
    where one was trained on from the other (Wortsman et al., "Model soups", ICML 2022).
    `license` of the weights is written into it, too: starting weights from a bare file do not state theirs.

    Returns:
        Figures of what was written, where there were masks to compare with.

    Raises:
        MalError: the checkpoint or the data cannot be used, or the file cannot be written.
    """
    settings = spec.evaluate
    if settings.use_mixed_model_test:
        raise ConfigError("evaluate.use_mixed_model_test: one network is exported; set it to false")
    seal_with, open_with = keys_of(spec)
    source = checkpoint_file(settings.checkpoint, "evaluate.checkpoint")
    checkpoint = load_checkpoint(source, open_with, skip_training_state=True)
    which = "teacher" if settings.use_teacher_test else "student"
    networks = [_one_network(checkpoint, which, source)]
    files = [_file(source, checkpoint)]
    for path in average_with:
        other = load_checkpoint(existing_file(str(path), "--average"), open_with, skip_training_state=True)
        if other.model != checkpoint.model:
            raise ConfigError(f"--average: {path} is of another network than {source}; their mean would be neither")
        networks.append(_one_network(other, which, path))
        files.append(_file(path, other))
    stored = {name: _mean_in_half([network[name] for network in networks]) for name in networks[0]}
    config = _labeler_config(spec, checkpoint.labeler)
    check_crop_size(checkpoint.model.arch, config.crop_size)
    network = MalNetwork(checkpoint.model)
    network.load({name: tensor.float() for name, tensor in stored.items()})
    report = None
    behind = average_provenance(files) if average_with else files[0][2]
    provenance = {**behind, "network": which, "weights_stored_as": "float16"}
    if license is not None:
        provenance["licence"] = license
    if spec.dataset.val_ann_path:
        validation = _validator(spec, screen).run(network, config)
        config, report = validation.config, validation.report
        screen.print(one_line(report))
        provenance["validation"] = figures_of(report)
        provenance.pop("validation_mIoU", None)  # that was of the network, crop and thresholds of training
    elif _was_fitted_to_another(checkpoint, config, which, is_mean=bool(average_with)):
        config = dataclasses.replace(config, calibration=None, calibrated_with_flip=False)
        screen.print(
            f"calibration: left out; it was fitted to the student of {source} at its own crop and margin, not to what "
            "is written. dataset.val_ann_path fits one"
        )
    written = dataclasses.replace(checkpoint, labeler=config, weights=stored, provenance=provenance, encryption=None)
    seal = save_checkpoint(target, written, seal_with)
    screen.print(
        f"wrote {target}: {target.stat().st_size / 1e6:.1f} MB, the {which} in float16, encryption: {seal.mode}"
    )
    return report


def _was_fitted_to_another(checkpoint: Checkpoint, config: LabelerConfig, which: str, *, is_mean: bool) -> bool:
    """Whether the checkpoint's calibration is of other answers than those of what is written."""
    stored = checkpoint.labeler
    is_same_crop = (config.crop_size, config.margin_rate) == (stored.crop_size, stored.margin_rate)
    return stored.calibration is not None and (which != "student" or is_mean or not is_same_crop)


def _file(path: Path, checkpoint: Checkpoint) -> tuple[Path, str, Mapping[str, Any]]:
    """A source with its SHA-256 and what it says of itself."""
    return path, checkpoint.sha256, builtin.with_card(checkpoint.sha256, checkpoint.provenance)


def _one_network(checkpoint: Checkpoint, which: str, path: Path) -> dict[str, Tensor]:
    """Weights of the student or the teacher, under the student's names."""
    found = {
        f"student.{name.removeprefix(f'{which}.')}": tensor
        for name, tensor in checkpoint.weights.items()
        if name.startswith(f"{which}.")
    }
    if not found:
        raise ConfigError(f"evaluate.use_teacher_test: {path} holds the student alone; set it to false")
    return found


def _mean_in_half(tensors: Sequence[Tensor]) -> Tensor:
    """float16; of whole numbers, which count (the batches that a norm has seen), the first stays."""
    return torch.stack(list(tensors)).mean(0).to(torch.float16) if tensors[0].is_floating_point() else tensors[0]


def _labeler_config(spec: Spec, stored: LabelerConfig) -> LabelerConfig:
    """The checkpoint's settings, with the crop and the margin that the spec gives."""
    asked = spec.labeler_config(stored.crop_size)
    margin_rate = asked.margin_rate if "test_margin_rate" in spec.train.model_fields_set else stored.margin_rate
    # A new fit is of the score of today; an old fit is of the score that it was made for.
    score = asked.score if spec.dataset.val_ann_path and spec.fits_calibration else stored.score
    return dataclasses.replace(stored, crop_size=asked.crop_size, margin_rate=margin_rate, score=score)


def _validator(spec: Spec, screen: Console) -> Validator:
    path = existing_file(spec.dataset.val_ann_path, "dataset.val_ann_path")
    coco = read_coco(path)
    if not has_masks(coco):
        raise ConfigError(f"dataset.val_ann_path: no annotation of {path} has a mask to fit on; leave it empty")
    return Validator(
        coco=coco,
        image_dir=existing_folder(spec.dataset.val_img_dir, "dataset.val_img_dir"),
        batch_size=spec.evaluate.batch_size,
        fit_thresholds=spec.fits_thresholds,
        fit_calibration=spec.fits_calibration,
        precision=spec.evaluate.precision,
        device=str(choose_devices(spec.evaluate.gpus, spec.evaluate.num_gpus, screen)[0]),
        threads=worker_threads(),
        options=PredictOptions(flip=spec.evaluate.use_flip_test),
    )
