"""`mal-train train`: builds network, data, losses and callbacks from the spec, and lets Lightning run them."""

import secrets
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch

from mal_train.commands.common import (
    choose_devices,
    existing_file,
    existing_folder,
    keys_of,
    labeler_config,
    model_config,
    task_folder,
    train_crop_size,
    worker_threads,
)
from mal_train.commands.resume import check_same_network, checkpoint_to_resume, taken_up
from mal_train.commands.training_report import write_training_report
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import CocoFile, read_coco
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError, LostProcess
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.version import distribution_version
from mal_train.data.annotations import TrainingBoxes, select_boxes
from mal_train.data.augment import Cropping
from mal_train.data.datamodule import BoxDataModule, LoaderSettings
from mal_train.distributed.env import world_of
from mal_train.distributed.process_group import Followed, ProcessGroup, init_process_group
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, read_header
from mal_train.kernel.checkpoint.keys import DecryptionKey
from mal_train.kernel.checkpoint.lineage import Lineage
from mal_train.kernel.convert.pretrained import load_pretrained
from mal_train.kernel.networks.backbones import check_crop_size
from mal_train.kernel.networks.network import MalNetwork
from mal_train.kernel.networks.precision import Precision
from mal_train.losses.crf import MeanField
from mal_train.training.callbacks import MetricsCallback, ValidationCallback
from mal_train.training.checkpoints import (
    LATEST,
    Checkpoints,
    Position,
    PreemptionHandler,
    SealedCheckpointIO,
    newest_checkpoint,
)
from mal_train.training.module import LossSettings, MalModule
from mal_train.training.optimizer import OptimizerSettings, freeze_stages
from mal_train.training.panels import ContactSheet
from mal_train.training.progress import Progress
from mal_train.training.run_files import MetricsFile, StatusFile, duration
from mal_train.training.schedule import CosineSchedule
from mal_train.training.trainer import FitSettings, build_trainer, check_strategy, fit, quiet
from mal_train.training.validation import Validator, has_masks


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        checkpoint: the last file.
        report: figures of the last validation; None without one.
        skipped_steps: optimizer steps left out because their gradient was not finite.
    """

    checkpoint: Path
    report: EvaluationReport | None
    skipped_steps: int


def train(spec: Spec, screen: Console) -> TrainResult:
    """Trains from boxes; leaves sealed checkpoints, metrics.csv, status.json, boards and report.html in its folder.

    Goes on from train.resume_training_checkpoint_path, or from the newest checkpoint in the folder where there is one.
    One of several processes where a launcher started them; the first one writes and speaks.

    Raises:
        MalError: a setting or the data cannot be used, gradients stopped being finite, or a file cannot be written.
        Terminated: a SIGTERM came; a checkpoint was written first.
    """
    world = world_of()
    world.check(spec.train.num_gpus, spec.train.num_nodes)
    try:
        with ExitStack() as stack:
            status: StatusFile | None = None
            folder = spec.task_dir("train")
            if world.is_first:
                folder, status = stack.enter_context(task_folder(spec, "train"))
            else:
                screen = Console.silent()
            devices = choose_devices(spec.train.gpus, spec.train.num_gpus, screen)
            check_strategy(spec.strategy, devices)
            ranks = stack.enter_context(init_process_group(world, cuda=devices[0].type == "cuda"))
            return _train(spec, screen, folder, status, devices=devices, ranks=ranks)
    except LostProcess as error:
        if world.is_first:
            raise
        raise Followed(error.exit_code) from error


def _train(
    spec: Spec,
    screen: Console,
    folder: Path,
    status: StatusFile | None,
    *,
    devices: list[torch.device],
    ranks: ProcessGroup,
) -> TrainResult:
    began = time.monotonic()
    seal_with, open_with = keys_of(spec)
    coco, boxes, resume, seed = _begin(spec, folder, ranks, screen)
    torch.manual_seed(seed)
    network, origin = build_network(spec, resume, open_with, screen)
    module = build_module(spec, network, boxes, seed, screen, ranks=ranks)
    if seal_with is None:
        screen.print("checkpoints will not be encrypted; set encryption_key to seal them")

    def describe() -> Checkpoint:
        return Checkpoint(
            network.config,
            module.labeler_config,
            {},
            coco.categories,
            _provenance(origin, spec.train.supervision, module, validate),
        )

    device = devices[ranks.world.local_rank]
    data = BoxDataModule(
        boxes,
        Cropping(train_crop_size(spec), spec.train.margin_rate, spec.compat, spec.train.color_augmentation),
        LoaderSettings(
            spec.train.batch_size,
            spec.dataset.num_workers_per_gpu,
            seed,
            pin_memory=device.type == "cuda",
            rank=ranks.rank,
            world_size=ranks.size,
        ),
    )

    def resumed(checkpoint: Checkpoint, position: Position) -> None:
        nonlocal origin
        check_same_network(checkpoint, network.config, resume)
        origin = Lineage.from_provenance(checkpoint.provenance)
        module.labeler_config = taken_up(spec, module.labeler_config, checkpoint.labeler)
        data.resume_from(position.epochs, position.batches)

    checkpoints = Checkpoints(
        folder,
        spec.train.checkpoint_interval,
        screen.print,
        by_step=spec.train.checkpoint_interval_unit == "step",
        ranks=ranks,
    )
    preempt = PreemptionHandler(checkpoints)
    callbacks: list[lightning.Callback] = []
    validate: ValidationCallback | None = None
    io = SealedCheckpointIO(describe, resumed, seal_with=seal_with, open_with=open_with)
    settings = _fit_settings(spec)
    with ExitStack() as stack:
        if status is not None:
            metrics = stack.enter_context(closing(MetricsFile(folder, append=resume is not None)))
            records = MetricsCallback(metrics, status)
            validate = _validation(spec, device, folder, records, screen)
            callbacks = [Progress(screen), records, *([validate] if validate is not None else [])]
            status.write("RUNNING", "Starting Training Loop.")
        callbacks += [checkpoints, preempt]
        stack.enter_context(quiet())
        stack.enter_context(preempt.watching())
        trainer = build_trainer(settings, module, devices, callbacks=callbacks, io=io, folder=folder)
        fit(trainer, module, data, resume, settings)
    if status is not None:
        status.write("RUNNING", "Training loop complete.")
    if checkpoints.written is None:
        screen.print(f"{resume}: has trained {spec.train.num_epochs} epochs already; raise train.num_epochs to go on")
    elif status is not None:
        facts = [
            ("boxes", boxes.summary()),
            ("starting weights", str(resume) if resume is not None else origin.starting_weights),
            ("license of the starting weights", origin.license),
            ("device", f"{ranks.size} x {device.type}, {trainer.precision}"),
            ("epochs and steps", f"{spec.train.num_epochs} epochs, {module.global_step} steps"),
            ("steps left out", f"{module.steps_skipped} whose gradient was not finite"),
            ("checkpoint", f"{checkpoints.written.name}, {'not encrypted' if seal_with is None else 'sealed'}"),
            ("time of this run", f"{duration(time.monotonic() - began)}, of it {_validating(validate)}"),
        ]
        page = write_training_report(folder, spec, facts, None if validate is None else validate.validated)
        screen.print(f"wrote {page}")
    return TrainResult(
        newest_checkpoint(folder) or folder / LATEST,
        None if validate is None else validate.last_report,
        module.steps_skipped,
    )


def _begin(
    spec: Spec, folder: Path, ranks: ProcessGroup, screen: Console
) -> tuple[CocoFile, TrainingBoxes, Path | None, int]:
    """What all processes must agree on: the boxes, the checkpoint to go on from, the seed.

    Rank 0 looks first, so that what is wrong with the files is said once.

    Raises:
        ConfigError: the processes do not see the same boxes.
    """
    resume, seed = None, spec.train.seed
    found: tuple[CocoFile, TrainingBoxes] | None = None
    if ranks.is_first:
        resume = checkpoint_to_resume(spec, folder, screen)
        seed = secrets.randbits(31) if seed < 0 else seed
        found = _training_boxes(spec, screen)
    agreed = ranks.share([None if resume is None else str(resume), seed])
    coco, boxes = found or _training_boxes(spec, screen)
    if len(set(ranks.gather([boxes.digest()]))) > 1:
        ranks.stop(
            ConfigError(
                "dataset.train_ann_path, dataset.train_img_dir: the processes find different boxes; all machines must "
                "see the same files under the same paths"
            )
        )
    return coco, boxes, None if agreed[0] is None else Path(agreed[0]), int(agreed[1])


def _fit_settings(spec: Spec) -> FitSettings:
    section = spec.train
    return FitSettings(
        spec.strategy,
        section.num_nodes,
        section.num_epochs,
        section.accum_grad_batches,
        section.use_amp,
        section.cudnn.benchmark,
        section.cudnn.deterministic,
    )


def build_network(
    spec: Spec, resume: Path | None, open_with: DecryptionKey | None, screen: Console
) -> tuple[MalNetwork, Lineage]:
    """The network with its starting weights, and where these come from.

    A resumed run takes both from its checkpoint later, so nothing is read here for it.
    """
    check_crop_size(spec.model.arch, train_crop_size(spec))
    check_crop_size(spec.model.arch, labeler_config(spec).crop_size)
    network = MalNetwork(model_config(spec.model))
    origin = Lineage("random", "none")
    source = spec.train.pretrained_model_path
    if resume is not None:
        screen.print(f"going on from {resume}")
    elif source:
        report = load_pretrained(network, source, _key_if_sealed(source, open_with))
        screen.print(str(report))
        origin = report.lineage
        screen.print(f"license of these weights: {origin.license}")
    else:
        screen.print("starting from random weights; train.pretrained_model_path gives better ones")
    frozen = freeze_stages(network, spec.model.frozen_stages)
    if frozen:
        screen.print(f"not learning: {', '.join(frozen)}")
    return network, origin


def build_module(
    spec: Spec,
    network: MalNetwork,
    boxes: TrainingBoxes,
    seed: int,
    screen: Console,
    *,
    ranks: ProcessGroup | None = None,
) -> MalModule:
    """The training module that the spec describes."""
    section = spec.train
    # As published: times the GPUs of a machine, but neither the machines nor the accumulated batches.
    peak = section.lr * section.batch_size * section.num_gpus
    return MalModule(
        network,
        labeler_config(spec),
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
        optimizer=OptimizerSettings(
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
        uses_pseudo_labels=section.supervision == "pseudo",
        say=screen.print,
        ranks=ranks,
    )


def _key_if_sealed(source: str, open_with: DecryptionKey | None) -> DecryptionKey | None:
    """Published starting weights may lie bare beside checkpoints that are sealed."""
    path = Path(source)
    if path.suffix != ".malckpt" or not path.is_file() or read_header(path, None).encryption.mode == "none":
        return None
    return open_with


def _training_boxes(spec: Spec, screen: Console) -> tuple[CocoFile, TrainingBoxes]:
    coco = read_coco(existing_file(spec.dataset.train_ann_path, "dataset.train_ann_path"))
    boxes = select_boxes(
        coco,
        existing_folder(spec.dataset.train_img_dir, "dataset.train_img_dir"),
        min_area=spec.dataset.min_obj_size,
        max_area=spec.dataset.max_obj_size,
        compat=spec.compat,
        supervision=spec.train.supervision,
        name=spec.dataset.train_ann_path,
    )
    screen.print(boxes.summary())
    return coco, boxes


def _validation(
    spec: Spec, device: torch.device, folder: Path, records: MetricsCallback, screen: Console
) -> ValidationCallback | None:
    """Validation, where there is something to validate with."""
    if not spec.dataset.val_ann_path:
        screen.print("no validation: dataset.val_ann_path is not given")
        return None
    coco = read_coco(existing_file(spec.dataset.val_ann_path, "dataset.val_ann_path"))
    image_dir = existing_folder(spec.dataset.val_img_dir, "dataset.val_img_dir")
    if not spec.dataset.load_mask:
        screen.print("no validation: dataset.load_mask is false")
        return None
    if not has_masks(coco):
        screen.print(f"no validation: no annotation of {spec.dataset.val_ann_path} has a mask")
        return None
    validator = Validator(
        coco=coco,
        image_dir=image_dir,
        batch_size=spec.train.batch_size,
        fit_thresholds=spec.fits_thresholds,
        fit_calibration=spec.fits_calibration,
        precision=Precision.AUTO if spec.train.use_amp else Precision.FLOAT32,
        device=str(device),
        threads=worker_threads(),
    )
    size = spec.train.board_size
    board = ContactSheet(folder, coco, image_dir, size, records.add_picture) if size else None
    return ValidationCallback(validator, spec.train.validation_interval, records, screen.print, board=board)


def _validating(validate: ValidationCallback | None) -> str:
    return "nothing for validation" if validate is None else f"{duration(validate.seconds)} for validation"


def _provenance(
    origin: Lineage, supervision: str, module: MalModule, validate: ValidationCallback | None
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tool": f"mask-auto-labeler {distribution_version()}",
        **origin.to_provenance(),
        "epochs": module.current_epoch + 1,
        "steps": module.global_step,
        "supervision": supervision,
    }
    if validate is not None and validate.last_report is not None:
        found["validation_mIoU"] = validate.last_report.overall.miou
    return found
