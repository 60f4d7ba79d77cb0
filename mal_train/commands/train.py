"""`mal-train train`: trains the network of a spec, in one process or in several."""

import secrets
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch

from mal_train.commands.common import checkpoint_keys, choose_devices, task_folder
from mal_train.commands.fast_dev_run import FastDevRun
from mal_train.commands.resume import check_same_network, checkpoint_to_resume, resumed_config
from mal_train.commands.training_report import write_training_report
from mal_train.commands.training_setup import (
    build_data,
    build_module,
    build_network,
    build_validation,
    fit_settings,
    read_training_boxes,
)
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import CocoFile
from mal_train.core.console import Console
from mal_train.core.errors import CheckpointError, ConfigError, LostProcess
from mal_train.core.images.files import images_of
from mal_train.core.images.pixels import FormatCounts
from mal_train.core.metrics.evaluator import not_measured
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.storage.addresses import redact
from mal_train.core.version import distribution_version
from mal_train.data.annotations import TrainingBoxes
from mal_train.distributed.env import read_distributed_env
from mal_train.distributed.process_group import ProcessGroup, SilentExit, init_process_group
from mal_train.kernel.checkpoint.checkpoint import Checkpoint
from mal_train.kernel.checkpoint.lineage import Lineage
from mal_train.training.callbacks import MetricsCallback, ValidationCallback
from mal_train.training.checkpoints import (
    LATEST,
    CheckpointCallback,
    DataPosition,
    MalCheckpointIO,
    PreemptionHandler,
    newest_checkpoint,
)
from mal_train.training.compilation import check_compilation
from mal_train.training.optimizer import build_optimizer
from mal_train.training.progress import Progress
from mal_train.training.run_files import MetricsFile, StatusFile, duration
from mal_train.training.trainer import build_trainer, check_strategy, fit, quiet_libraries
from mal_train.training.training_state import StateLayout
from mal_train.training.validation import has_masks


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    Attributes:
        checkpoint: the newest checkpoint.
        report: metrics of the last validation; None without validation.
        skipped_steps: optimizer steps skipped because of a non-finite gradient.
    """

    checkpoint: Path
    report: EvaluationReport | None
    skipped_steps: int


def fast_dev_run(spec: Spec, console: Console) -> str:
    """Takes a training through every phase on a few batches and images; returns the closing line.

    Args:
        spec: the spec, from `shortened`; its output folder is one of its own, and no earlier run in it is resumed.
        console: prints each phase.

    Raises:
        MalError: as `train`, or a phase did not do what the spec says.
    """
    env = read_distributed_env()
    dev_run = FastDevRun(spec, console if env.is_rank_zero else Console.silent(), env.world_size)
    with dev_run.reported():
        result = train(spec, console, dev_run)
        return dev_run.finish(result.checkpoint, spec.task_dir("train")) if env.is_rank_zero else ""


def train(spec: Spec, console: Console, dev_run: FastDevRun | None = None) -> TrainResult:
    """Trains, and writes checkpoints, metrics.csv, status.json, boards/ and report.html to the output folder.

    Resumes from train.resume_training_checkpoint_path, or else from the newest checkpoint in the output folder. If a
    launcher started several processes, this is one of them; rank 0 writes files and prints. With `dev_run`, trains on a
    part of the data, and resumes nothing.

    Raises:
        MalError: a setting or the data cannot be used, gradients are not finite, or a file cannot be written.
        Terminated: SIGTERM arrived, and a checkpoint was written.
    """
    env = read_distributed_env()
    env.check(spec.train.num_gpus, spec.train.num_nodes)
    try:
        with ExitStack() as stack:
            status: StatusFile | None = None
            folder = spec.task_dir("train")
            if env.is_rank_zero:
                folder, status = stack.enter_context(task_folder(spec, "train"))
            else:
                console = Console.silent()
            devices = choose_devices(spec.train.gpus, spec.train.num_gpus, console)
            check_strategy(spec.strategy, devices)
            if spec.train.compile:
                check_compilation(spec.strategy, spec.train.gradient_checkpointing, devices[0])
            group = stack.enter_context(init_process_group(env, cuda=devices[0].type == "cuda"))
            return TrainingRun(spec, console, folder, status, devices=devices, group=group, dev_run=dev_run).run()
    except LostProcess as error:
        if env.is_rank_zero:
            raise
        raise SilentExit(error.exit_code) from error


class TrainingRun:
    """The part of one process in a training, from the input files to the report.

    Args:
        spec: the spec.
        console: prints messages; silent in all processes but rank 0.
        folder: output folder.
        status: status.json of rank 0; None in the other processes.
        devices: devices of the processes on this machine, by local rank.
        group: the processes that train together.
        dev_run: limits and checks the run; None: a complete training.
    """

    def __init__(
        self,
        spec: Spec,
        console: Console,
        folder: Path,
        status: StatusFile | None,
        *,
        devices: list[torch.device],
        group: ProcessGroup,
        dev_run: FastDevRun | None = None,
    ) -> None:
        self.start = time.monotonic()
        self.spec, self.console, self.folder, self.status = spec, console, folder, status
        self.devices, self.group, self.dev_run = devices, group, dev_run
        self.device = devices[group.env.local_rank]
        self.encryption_key, self.decryption_key = checkpoint_keys(spec)
        self.coco, self.boxes, self.resume, seed = _agree_on_inputs(
            spec, folder, group, console, resumes=dev_run is None
        )
        if dev_run is not None:
            self.boxes = dev_run.few_boxes(self.boxes)
        torch.manual_seed(seed)
        self.network, self.lineage = build_network(spec, self.resume, self.decryption_key, console)
        self.module = build_module(spec, self.network, self.boxes, seed, console, group=group)
        self.data = build_data(spec, self.boxes, seed, self.device, group)
        self.checkpoints = CheckpointCallback(
            folder,
            spec.train.checkpoint_interval,
            console.print,
            by_step=spec.train.checkpoint_interval_unit == "step",
            group=group,
        )
        self.validation: ValidationCallback | None = None
        self._layout: StateLayout | None = None

    def run(self) -> TrainResult:
        """Trains, writes the report, and returns the result."""
        if self.encryption_key is None:
            self.console.print("checkpoints are not encrypted; encryption_key encrypts them")
        trainer = self._fit()
        self._print_notes()
        if self.checkpoints.written is None:
            epochs = self.spec.train.num_epochs
            self.console.print(
                f"{self.resume}: already trained for {epochs} epochs; raise train.num_epochs to continue"
            )
        elif self.status is not None:
            path = write_training_report(
                self.folder,
                self.spec,
                self._facts(trainer),
                None if self.validation is None else self.validation.snapshot,
            )
            self.console.print(f"wrote {path}")
        return TrainResult(
            newest_checkpoint(self.folder) or self.folder / LATEST,
            None if self.validation is None else self.validation.last_report,
            self.module.steps_skipped,
        )

    def _print_notes(self) -> None:
        """Prints how many images were stretched or have bands that are not used, and rows that were not measured."""
        own, formats = self.data.formats().take(), FormatCounts()
        formats.update(*map(self.group.all_gather, own))
        for note in formats.notes():
            self.console.print(f"training: {note}")
        snapshot = None if self.validation is None else self.validation.snapshot
        if snapshot is None:
            return
        for note in images_of(snapshot.image_dir).formats.notes():
            self.console.print(f"validation: {note}")
        if has_masks(snapshot.coco):  # otherwise the boxes were measured
            rows = not_measured(snapshot.result.report.skipped_rows)
            for line in rows.lines(f"{redact(self.spec.dataset.val_ann_path)}: not measured"):
                self.console.print(line)

    def _fit(self) -> lightning.Trainer:
        preemption = PreemptionHandler(self.checkpoints)
        io = MalCheckpointIO(
            self._describe, self._on_resume, encryption_key=self.encryption_key, decryption_key=self.decryption_key
        )
        settings = fit_settings(self.spec)
        with ExitStack() as stack:
            # Validation comes before the checkpoint, which stores the fitted thresholds.
            callbacks = [*self._rank_zero_callbacks(stack), self.checkpoints, preemption]
            stack.enter_context(quiet_libraries())
            stack.enter_context(preemption.handle_signals())
            trainer = build_trainer(settings, self.module, self.devices, callbacks=callbacks, io=io, folder=self.folder)
            self._layout = StateLayout.of(
                trainer, build_optimizer(self.network, self.module.optimizer_settings, fused=False)
            )
            fit(trainer, self.module, self.data, self.resume, settings)
        if self.status is not None:
            self.status.write("RUNNING", "Training loop complete.")
        return trainer

    def _rank_zero_callbacks(self, stack: ExitStack) -> list[lightning.Callback]:
        """Returns the callbacks that show progress, write metrics and validate; none in the other processes."""
        if self.status is None:
            return []
        file = stack.enter_context(closing(MetricsFile(self.folder, append=self.resume is not None)))
        metrics = MetricsCallback(file, self.status)
        if self.dev_run is None:
            self.validation = build_validation(self.spec, self.device, self.folder, metrics, self.console)
        else:
            self.validation = build_validation(
                self.spec, self.device, self.folder, metrics, self.console, choose=self.dev_run.few_masks
            )
        self.status.write("RUNNING", "Starting Training Loop.")
        found = [callback for callback in (self.validation, self.dev_run) if callback is not None]
        return [Progress(self.console), metrics, *found]

    def _describe(self) -> Checkpoint:
        """Returns the current checkpoint without weights and training state."""
        config = self.module.labeler_config
        return Checkpoint(self.network.config, config, {}, self.coco.categories, self._provenance())

    def _on_resume(self, checkpoint: Checkpoint, position: DataPosition) -> None:
        """Takes lineage, fitted settings and data position from a checkpoint."""
        check_same_network(checkpoint, self.network.config, self.resume)
        # FSDP has replaced the parameters of the network by then.
        misfit = "" if self.spec.strategy == "fsdp" else self.network.misfit(checkpoint.weights)
        if misfit:
            raise CheckpointError(f"{self.resume}: weights that do not fit its settings: {misfit}")
        assert self._layout is not None
        self._layout.check(checkpoint.training or {})
        self.lineage = Lineage.from_provenance(checkpoint.provenance)
        self.module.labeler_config = resumed_config(self.spec, self.module.labeler_config, checkpoint.labeler)
        self.data.resume_from(position.epochs, position.batches)

    def _provenance(self) -> dict[str, Any]:
        provenance: dict[str, Any] = {
            "tool": f"mask-auto-labeler {distribution_version()}",
            **self.lineage.to_provenance(),
            "epochs": self.module.current_epoch + 1,
            "steps": self.module.global_step,
            "supervision": self.spec.train.supervision,
        }
        if self.validation is not None and self.validation.last_report is not None:
            provenance["validation_mIoU"] = self.validation.last_report.overall.miou
        return provenance

    def _facts(self, trainer: lightning.Trainer) -> list[tuple[str, str]]:
        """Returns (name, value) rows for the report."""
        written = self.checkpoints.written
        encryption = "not encrypted" if self.encryption_key is None else "encrypted"
        validation = 0.0 if self.validation is None else self.validation.seconds
        return [
            ("boxes", self.boxes.summary()),
            ("starting weights", self.lineage.starting_weights if self.resume is None else str(self.resume)),
            ("license of the starting weights", self.lineage.license),
            ("device", f"{self.group.world_size} x {self.device.type}, {trainer.precision}"),
            ("epochs", str(self.spec.train.num_epochs)),
            ("steps", str(self.module.global_step)),
            ("skipped steps", f"{self.module.steps_skipped} with a non-finite gradient"),
            ("checkpoint", f"{'' if written is None else written.name}, {encryption}"),
            ("time of this run", f"{duration(time.monotonic() - self.start)}; validation: {duration(validation)}"),
        ]


def _agree_on_inputs(
    spec: Spec, folder: Path, group: ProcessGroup, console: Console, *, resumes: bool
) -> tuple[CocoFile, TrainingBoxes, Path | None, int]:
    """Returns training boxes, checkpoint to resume from, and seed: the same in all processes.

    Rank 0 reads first, so that an error in the files is reported once.

    Raises:
        ConfigError: the processes read different boxes.
    """
    resume, seed = None, spec.train.seed
    read: tuple[CocoFile, TrainingBoxes] | None = None
    if group.is_rank_zero:
        resume = checkpoint_to_resume(spec, folder, console) if resumes else None
        seed = secrets.randbits(31) if seed < 0 else seed
        read = read_training_boxes(spec, console)
    resume, seed = group.broadcast([None if resume is None else str(resume), seed])
    coco, boxes = read or read_training_boxes(spec, console)
    if len(set(group.all_gather([boxes.digest()]))) > 1:
        group.abort(
            ConfigError(
                "dataset.train_ann_path, dataset.train_img_dir: the processes read different boxes; all machines need "
                "the same files under the same paths"
            )
        )
    return coco, boxes, None if resume is None else Path(resume), int(seed)
