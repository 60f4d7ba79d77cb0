"""Builds the parts of a training from the spec: data, network, module and validation."""

from collections.abc import Callable
from pathlib import Path

import torch

from mal_train.commands.common import (
    image_folder,
    input_file,
    labeler_config,
    local_path,
    model_config,
    train_crop_size,
    trust_policy,
    worker_threads,
)
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import CocoFile, Reason, read_coco
from mal_train.core.coco.box_form import form_note
from mal_train.core.coco.left_out import ignored_rows
from mal_train.core.console import Console
from mal_train.core.images.files import for_names, respelling_note
from mal_train.core.settings import Precision
from mal_train.core.storage.addresses import redact
from mal_train.data.annotations import TrainingBoxes, select_boxes
from mal_train.data.augment import Cropping
from mal_train.data.datamodule import BoxDataModule, LoaderSettings
from mal_train.distributed.process_group import ProcessGroup
from mal_train.kernel.checkpoint.checkpoint import encryption_of
from mal_train.kernel.checkpoint.keys import DecryptionKey
from mal_train.kernel.checkpoint.lineage import Lineage
from mal_train.kernel.convert.pretrained import load_pretrained
from mal_train.kernel.networks.backbones import check_crop_size
from mal_train.kernel.networks.network import MalNetwork
from mal_train.losses.crf import MeanField
from mal_train.training.callbacks import MetricsCallback, ValidationCallback
from mal_train.training.compilation import compile_backbones
from mal_train.training.module import LossSettings, MalModule
from mal_train.training.optimizer import OptimizerSettings, freeze_stages
from mal_train.training.panels import ContactSheet
from mal_train.training.schedule import CosineSchedule
from mal_train.training.trainer import FitSettings
from mal_train.training.validation import Validator, has_masks


def read_training_boxes(spec: Spec, console: Console) -> tuple[CocoFile, TrainingBoxes]:
    """Reads dataset.train_ann_path, and selects the boxes to train on."""
    with input_file(spec.dataset.train_ann_path, "dataset.train_ann_path") as annotations:
        coco = read_coco(annotations, spec.dataset.row_rules)
        images = image_folder(spec, spec.dataset.train_img_dir, "dataset.train_img_dir", annotations)
    images = for_names(images, coco.file_names)
    for line in ignored_rows(coco.notes, redact(spec.dataset.train_ann_path)):
        console.print(line)
    form = form_note(coco.annotations, coco.images)
    if form is not None:
        console.print(f"{redact(spec.dataset.train_ann_path)}: {form}")
    boxes = select_boxes(
        coco,
        images,
        min_area=spec.dataset.min_obj_size,
        max_area=spec.dataset.max_obj_size,
        compat=spec.compat,
        supervision=spec.train.supervision,
        name=redact(spec.dataset.train_ann_path),
    )
    notes = boxes.notes(redact(spec.dataset.train_ann_path))
    # The notes count the reasons, except where only crowd regions are left out.
    for line in (boxes.summary(reasons=not boxes.left_out.examples(Reason.CROWD)), *notes):
        console.print(line)
    if (note := respelling_note(images)) is not None:
        console.print(note)
    return coco, boxes


def build_data(spec: Spec, boxes: TrainingBoxes, seed: int, device: torch.device, group: ProcessGroup) -> BoxDataModule:
    """Builds the data module of this process."""
    return BoxDataModule(
        boxes,
        Cropping(train_crop_size(spec), spec.train.margin_rate, spec.compat, spec.train.color_augmentation),
        LoaderSettings(
            spec.train.batch_size,
            spec.dataset.num_workers_per_gpu,
            seed,
            pin_memory=device.type == "cuda",
            rank=group.rank,
            world_size=group.world_size,
        ),
    )


def build_network(
    spec: Spec, resume: Path | None, decryption_key: DecryptionKey | None, console: Console
) -> tuple[MalNetwork, Lineage]:
    """Builds the network with its starting weights, and returns it with their lineage.

    Args:
        spec: the spec.
        resume: checkpoint to resume from; Lightning loads its weights later, so no starting weights are read.
        decryption_key: key that decrypts starting weights.
        console: prints the weights and their license.
    """
    check_crop_size(spec.model.arch, train_crop_size(spec))
    check_crop_size(spec.model.arch, labeler_config(spec).crop_size)
    network = MalNetwork(model_config(spec.model))
    lineage = Lineage("random", "none")
    source = spec.train.pretrained_model_path
    trust = trust_policy(spec, source or "", spec.train.pretrained_model_sha256)
    if resume is not None:
        console.print(f"resuming from {resume}")
    elif source:
        local_path(source, "train.pretrained_model_path")
        report = load_pretrained(network, source, _key_if_encrypted(source, decryption_key), trust)
        console.print(str(report))
        lineage = report.lineage
        console.print(f"license of these weights: {lineage.license}")
    else:
        console.print("starting from random weights; train.pretrained_model_path gives better ones")
    frozen = freeze_stages(network, spec.model.frozen_stages)
    if frozen:
        console.print(f"frozen stages: {', '.join(frozen)}")
    network.student.set_grad_checkpointing(spec.train.gradient_checkpointing)
    if spec.train.compile:
        compile_backbones(network)
    return network, lineage


def build_module(
    spec: Spec,
    network: MalNetwork,
    boxes: TrainingBoxes,
    seed: int,
    console: Console,
    *,
    group: ProcessGroup | None = None,
) -> MalModule:
    """Builds the Lightning module."""
    section = spec.train
    # As published: scaled by the GPUs per machine, but not by machines or accumulated batches.
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
        print_line=console.print,
        group=group,
    )


def build_validation(
    spec: Spec,
    device: torch.device,
    folder: Path,
    metrics: MetricsCallback,
    console: Console,
    *,
    choose: Callable[[CocoFile], CocoFile] = lambda coco: coco,
) -> ValidationCallback | None:
    """Builds the validation callback; None, with a printed reason, without a validation set.

    Without masks, the validation measures what the boxes alone say (`BoxProxy`), and fits nothing. `choose` selects the
    rows of the validation set; by default, all.
    """
    if not spec.dataset.val_ann_path:
        console.print("no validation: dataset.val_ann_path is not given")
        return None
    with input_file(spec.dataset.val_ann_path, "dataset.val_ann_path") as annotations:
        coco = choose(read_coco(annotations, spec.dataset.row_rules))
        image_dir = image_folder(spec, spec.dataset.val_img_dir, "dataset.val_img_dir", annotations)
    image_dir = for_names(image_dir, coco.file_names)
    if not spec.dataset.load_mask:
        console.print("no validation: dataset.load_mask is false")
        return None
    with_masks = has_masks(coco)
    if not with_masks:
        console.print(
            f"no annotation of {redact(spec.dataset.val_ann_path)} has a mask: validation measures the boxes alone"
        )
    validator = Validator(
        coco=coco,
        image_dir=image_dir,
        batch_size=spec.train.batch_size,
        fit_thresholds=spec.fits_thresholds and with_masks,
        fit_calibration=spec.fits_calibration and with_masks,
        precision=Precision.AUTO if spec.train.use_amp else Precision.FLOAT32,
        device=str(device),
        threads=worker_threads(),
    )
    size = spec.train.board_size if with_masks else 0
    contact_sheet = ContactSheet(folder, coco, image_dir, size, metrics.add_image) if size else None
    interval = spec.train.validation_interval
    return ValidationCallback(validator, interval, metrics, console.print, contact_sheet=contact_sheet)


def fit_settings(spec: Spec) -> FitSettings:
    """Returns the settings of the training loop."""
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


def _key_if_encrypted(source: str, decryption_key: DecryptionKey | None) -> DecryptionKey | None:
    """Returns the key only for encrypted starting weights: published weights need none, encrypted checkpoints do."""
    path = Path(source)
    if path.suffix != ".malckpt" or not path.is_file() or encryption_of(path).mode == "none":
        return None
    return decryption_key
