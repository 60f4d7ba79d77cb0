"""`mal-train train`: builds network, data, losses and callbacks from the spec, and lets Lightning run them."""

import dataclasses
import logging
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch

from mal_train.config import Spec, TrainConfig
from mal_train.data.annotations import TrainingBoxes, select_boxes
from mal_train.data.augment import Cropping
from mal_train.data.datamodule import BoxDataModule, LoaderSettings
from mal_train.errors import BadDataset, ConfigError, OutOfDeviceMemory
from mal_train.labeling.coco import CocoFile, read_coco
from mal_train.labeling.evaluation_report import EvaluationReport
from mal_train.losses.crf import MeanField
from mal_train.model.backbones import check_crop_size
from mal_train.model.checkpoint import Checkpoint, read_header
from mal_train.model.keys import DecryptionKey
from mal_train.model.network import MalNetwork, ModelConfig
from mal_train.model.precision import Precision, resolve
from mal_train.model.pretrained import load_pretrained, starting_weights_licence
from mal_train.screen import Screen
from mal_train.tasks.common import (
    choose_device,
    existing_file,
    existing_folder,
    keys_of,
    model_config,
    task_folder,
    version,
    worker_threads,
)
from mal_train.training.callbacks import Records, Validate
from mal_train.training.checkpoints import (
    LATEST,
    Checkpoints,
    Position,
    Preempt,
    SealedCheckpointIO,
    newest_checkpoint,
    newest_whole,
)
from mal_train.training.module import LossSettings, MalModule
from mal_train.training.optimiser import OptimiserSettings, freeze_stages
from mal_train.training.progress import Progress
from mal_train.training.records import MetricsFile
from mal_train.training.schedule import CosineSchedule
from mal_train.training.validation import Validator, has_masks


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        checkpoint: the last file.
        report: figures of the last validation; None without one.
        skipped_steps: optimiser steps left out because their gradient was not finite.
    """

    checkpoint: Path
    report: EvaluationReport | None
    skipped_steps: int


def train(spec: Spec, screen: Screen) -> TrainResult:
    """Trains from boxes, and leaves sealed checkpoints, metrics.csv and status.json in the task's folder.

    Goes on from train.resume_training_checkpoint_path, or from the newest checkpoint in the folder where there is one.

    Raises:
        MalError: a setting or the data cannot be used, gradients stopped being finite, or a file cannot be written.
        Terminated: a SIGTERM came; a checkpoint was written first.
    """
    with task_folder(spec, "train") as (folder, status):
        seal_with, open_with = keys_of(spec)
        resume = _checkpoint_to_resume(spec, folder, screen)
        seed = secrets.randbits(31) if spec.train.seed < 0 else spec.train.seed
        coco = read_coco(existing_file(spec.dataset.train_ann_path, "dataset.train_ann_path"))
        boxes = _training_boxes(spec, coco, screen)
        device = choose_device(spec.train.gpu_ids, screen)
        torch.manual_seed(seed)
        network, source = build_network(spec, resume, open_with, screen)
        module = build_module(spec, network, boxes, seed, screen)
        if seal_with is None:
            screen.say("checkpoints will not be encrypted; set encryption_key to seal them")

        def describe() -> Checkpoint:
            return Checkpoint(
                network.config,
                module.labeler_config,
                {},
                coco.categories,
                _provenance(source, spec.train.supervision, module, validate),
            )

        data = BoxDataModule(
            boxes,
            Cropping(spec.dataset.crop_size, spec.train.margin_rate, spec.compat, spec.train.colour_augmentation),
            LoaderSettings(
                spec.train.batch_size, spec.dataset.num_workers_per_gpu, seed, pin_memory=device.type == "cuda"
            ),
        )

        def resumed(checkpoint: Checkpoint, position: Position) -> None:
            _check_same_network(checkpoint, network.config, resume)
            if spec.fits_thresholds:
                thresholds = checkpoint.labeler.mask_thres
                module.labeler_config = dataclasses.replace(module.labeler_config, mask_thres=thresholds)
            if spec.fits_calibration:
                knots = checkpoint.labeler.calibration
                module.labeler_config = dataclasses.replace(module.labeler_config, calibration=knots)
            data.go_on_from(position.epochs, position.batches)

        metrics = MetricsFile(folder, append=resume is not None)
        records = Records(metrics, status)
        validate = _validation(spec, device, records, screen)
        checkpoints = Checkpoints(folder, spec.train.checkpoint_interval, screen.say)
        callbacks: list[lightning.Callback] = [Progress(screen), records]
        callbacks += [validate] if validate is not None else []
        preempt = Preempt(checkpoints)
        callbacks += [checkpoints, preempt]
        io = SealedCheckpointIO(describe, resumed, seal_with=seal_with, open_with=open_with)
        try:
            with _quiet(), preempt.watching():
                trainer = _trainer(spec.train, device, callbacks, io, folder)
                status.write("RUNNING", "Starting Training Loop.")
                _fit(trainer, module, data, resume)
        finally:
            metrics.close()
        status.write("RUNNING", "Training loop complete.")
        last = newest_checkpoint(folder)
        if checkpoints.written is None:
            screen.say(f"{resume}: has trained {spec.train.num_epochs} epochs already; raise train.num_epochs to go on")
        return TrainResult(
            last or folder / LATEST, None if validate is None else validate.last_report, module.steps_skipped
        )


def build_network(
    spec: Spec, resume: Path | None, open_with: DecryptionKey | None, screen: Screen
) -> tuple[MalNetwork, str]:
    """The network with its starting weights, and where these come from.

    A resumed run takes them from its checkpoint later, so nothing is read here for it.
    """
    check_crop_size(spec.model.arch, spec.dataset.crop_size)
    network = MalNetwork(model_config(spec.model))
    source = spec.train.pretrained_model_path
    if resume is not None:
        screen.say(f"going on from {resume}")
    elif source:
        report = load_pretrained(network, source, _key_if_sealed(source, open_with))
        screen.say(str(report))
        screen.say(f"licence of these weights: {starting_weights_licence(source)}")
    else:
        screen.say("starting from random weights; train.pretrained_model_path gives better ones")
    frozen = freeze_stages(network, spec.model.frozen_stages)
    if frozen:
        screen.say(f"not learning: {', '.join(frozen)}")
    return network, source or "random"


def build_module(spec: Spec, network: MalNetwork, boxes: TrainingBoxes, seed: int, screen: Screen) -> MalModule:
    """The training module that the spec describes."""
    section = spec.train
    peak = section.lr * section.batch_size * section.num_gpus
    return MalModule(
        network,
        spec.labeler_config(),
        schedule=CosineSchedule(
            peak, peak * section.min_lr_rate, section.warmup_epochs, section.num_epochs, section.num_wave
        ),
        losses=LossSettings(
            mil_weight=section.loss_mil_weight,
            crf_weight=section.loss_crf_weight,
            mil_steps=section.loss_mil_step,
            crf_steps=section.loss_crf_step,
            logit_weight=spec.logit_weight,
            mask_weight=section.loss_mask_weight,
            crf_size_ratio=section.crf_size_ratio,
        ),
        mean_field=MeanField(
            kernel_size=section.crf_kernel_size,
            zeta=section.crf_zeta,
            num_iter=section.crf_num_iter,
            low=section.crf_value_low_thres,
            high=section.crf_value_high_thres,
        ),
        optimiser=OptimiserSettings(
            betas=section.betas,
            eps=section.optim_eps,
            weight_decay=section.wd,
            decay_norm_bias=section.wd_norm_bias,
            head_lr_mult=section.head_lr_mult,
        ),
        teacher_momentum=spec.model.teacher_momentum,
        seed=seed,
        num_images=len(boxes.paths),
        learns_from_masks=bool(boxes.masks),
        say=screen.say,
    )


def _key_if_sealed(source: str, open_with: DecryptionKey | None) -> DecryptionKey | None:
    """Published starting weights may lie bare beside checkpoints that are sealed."""
    path = Path(source)
    if path.suffix != ".malckpt" or not path.is_file() or read_header(path, None).seal.how == "none":
        return None
    return open_with


def _checkpoint_to_resume(spec: Spec, folder: Path, screen: Screen) -> Path | None:
    """The file that was named, else the newest whole one in the folder; None starts anew."""
    seal_with, open_with = keys_of(spec)
    given = spec.train.resume_training_checkpoint_path
    path = newest_checkpoint(folder)
    if given is not None:
        path = existing_file(given, "train.resume_training_checkpoint_path")
    if path is not None and seal_with is not None and open_with is None:
        raise ConfigError(
            f"decryption_key: not given; it is needed to go on from {path} (an age recipient can only seal)"
        )
    return path if given is not None else newest_whole(folder, open_with, screen.say)


def _training_boxes(spec: Spec, coco: CocoFile, screen: Screen) -> TrainingBoxes:
    boxes = select_boxes(
        coco,
        existing_folder(spec.dataset.train_img_dir, "dataset.train_img_dir"),
        min_area=spec.dataset.min_obj_size,
        max_area=spec.dataset.max_obj_size,
        compat=spec.compat,
        supervision=spec.train.supervision,
        name=spec.dataset.train_ann_path,
    )
    screen.say(boxes.summary())
    return boxes


def _validation(spec: Spec, device: torch.device, records: Records, screen: Screen) -> Validate | None:
    """Validation, where there is something to validate with."""
    if not spec.dataset.val_ann_path:
        screen.say("no validation: dataset.val_ann_path is not given")
        return None
    coco = read_coco(existing_file(spec.dataset.val_ann_path, "dataset.val_ann_path"))
    image_dir = existing_folder(spec.dataset.val_img_dir, "dataset.val_img_dir")
    if not spec.dataset.load_mask:
        screen.say("no validation: dataset.load_mask is false")
        return None
    if not has_masks(coco):
        screen.say(f"no validation: no annotation of {spec.dataset.val_ann_path} has a mask")
        return None
    validator = Validator(
        coco=coco,
        image_dir=image_dir,
        batch_size=spec.train.batch_size,
        fit_thresholds=spec.fits_thresholds,
        fit_calibration=spec.fits_calibration,
        precision=_precision(spec.train),
        device=str(device),
        threads=worker_threads(),
    )
    return Validate(validator, spec.train.validation_interval, records, screen.say)


def _precision(section: TrainConfig) -> str:
    return str(Precision.AUTO if section.use_amp else Precision.FLOAT32)


def _trainer(
    section: TrainConfig,
    device: torch.device,
    callbacks: list[lightning.Callback],
    io: SealedCheckpointIO,
    folder: Path,
) -> lightning.Trainer:
    mixed: Any = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
    dtype = resolve(_precision(section), device)
    if section.use_amp and device.type == "cuda" and dtype is torch.float32:
        dtype = torch.float16  # GPUs before Ampere are fast at float16 only
    return lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" else 1,
        precision=mixed[dtype],
        max_epochs=section.num_epochs,
        accumulate_grad_batches=section.accum_grad_batches,
        callbacks=callbacks,
        plugins=[io],
        default_root_dir=str(folder),
        # Files, bars and rows are our callbacks' work.
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _fit(trainer: lightning.Trainer, module: MalModule, data: BoxDataModule, resume: Path | None) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    except SystemExit:
        # Lightning's answer to Ctrl-C.
        raise KeyboardInterrupt("interrupted; the last checkpoint is whole") from None
    except BadDataset as error:
        # From a loader process the message comes with that process's stack before it.
        raise BadDataset(str(error).strip().rpartition("BadDataset: ")[2]) from error
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(
            f"a training batch does not fit into {module.device}: lower train.batch_size (train.accum_grad_batches "
            f"makes up for it) or dataset.crop_size ({error})"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' hints off the screen: they speak of their own interfaces, which nobody here uses."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning", "torch.utils.cpp_extension")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _check_same_network(checkpoint: Checkpoint, wanted: ModelConfig, path: Path | None) -> None:
    if checkpoint.training is None:
        raise ConfigError(
            f"train.resume_training_checkpoint_path: {path} holds weights only; give it as train.pretrained_model_path"
        )
    if checkpoint.model != wanted:
        has, asked = checkpoint.model.to_dict(), wanted.to_dict()
        different = ", ".join(
            f"{name} {has[name]!r}, the spec says {asked[name]!r}" for name in has if has[name] != asked[name]
        )
        raise ConfigError(f"{path}: trained with model.{different}; make them agree or choose another results_dir")


def _provenance(source: str, supervision: str, module: MalModule, validate: Validate | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tool": f"mask-auto-labeler {version()}",
        "starting_weights": Path(source).name,
        "starting_weights_licence": starting_weights_licence(source) if source != "random" else "none",
        "epochs": module.current_epoch + 1,
        "steps": module.global_step,
        "supervision": supervision,
    }
    if validate is not None and validate.last_report is not None:
        found["validation_mIoU"] = validate.last_report.miou.overall
    return found
