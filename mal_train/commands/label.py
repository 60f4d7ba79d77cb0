"""What evaluation and inference share: a checkpoint's labeler on its devices, and what is done for a label."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mal_train.commands.common import checkpoint_file, choose_devices, keys_of, worker_threads
from mal_train.config.labeling import EvaluateConfig, InferenceConfig
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import Annotation
from mal_train.core.console import Console
from mal_train.core.settings import Branch, LabelerConfig, ScoreBasis
from mal_train.core.version import distribution_version
from mal_train.kernel.checkpoint.checkpoint import Checkpoint
from mal_train.kernel.labeler.labeler import Label, Labeler, PredictOptions, load_labeler
from mal_train.kernel.networks.precision import Precision, resolve
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.offline.multi_device import label_on_devices
from mal_train.offline.tta import TtaOptions


@dataclass(frozen=True)
class Labeling:
    """A checkpoint that is ready to label as a section of the spec says.

    Attributes:
        path: the checkpoint's file.
        checkpoint: what it holds beside the weights.
        labeler: its labeler: on the device, or, where there are several, on the CPU, for each of them to copy.
        devices: one process each.
        passes: what is done for a label.
    """

    path: Path
    checkpoint: Checkpoint
    labeler: Labeler
    devices: list[torch.device]
    passes: TtaOptions
    _section: EvaluateConfig | InferenceConfig

    def labels(
        self, rows: Sequence[Row], image_dir: Path
    ) -> Generator[tuple[Annotation, Label | LabelFailure], None, None]:
        """Yields every annotation that is not a crowd with its label or failure; see `label_on_devices`."""
        return label_on_devices(
            self.devices,
            self.labeler,
            rows,
            image_dir,
            precision=self._section.precision,
            tta=self.passes,
            batch_size=self._section.batch_size,
            threads=worker_threads(),
        )

    def provenance(self) -> dict[str, Any]:
        """What made a label: the tool, the checkpoint by name and content, its settings, and what was done with it."""
        options, passes = self.passes.options, self.passes
        manner = ScoreBasis(
            options.branch, options.flip, passes.margins, passes.resolve_overlaps, refined_edges=passes.refine_edges
        )
        return {
            "tool": f"mask-auto-labeler {distribution_version()}",
            "checkpoint": self.path.name,
            "checkpoint_sha256": self.checkpoint.sha256,
            "model": self.checkpoint.model.to_dict(),
            "labeler": self.checkpoint.labeler.to_dict(),
            "score": self.checkpoint.labeler.score_meaning(manner),
            "branch": str(options.branch),
            "flip": options.flip,
            "margins": list(passes.margins),
            "resolve_overlaps": passes.resolve_overlaps,
            "refine_edges": passes.refine_edges,
        }


def open_labeling(spec: Spec, task: Literal["evaluate", "inference"], screen: Console) -> Labeling:
    """The checkpoint of a task's section, on the devices that it names; says so when the file is not encrypted.

    Where there are several devices, each gets its own labeler in a process of its own (`labeling.parallel`), and this
    one waits on the CPU.

    Raises:
        ConfigError: there are GPUs, but not those; or no such file, or no key for it.
        CheckpointError: the file cannot be opened or used.
    """
    section = spec.evaluate if task == "evaluate" else spec.inference
    devices = choose_devices(section.gpus, section.num_gpus, screen)
    device, precision = devices[0], str(section.precision)
    if len(devices) > 1:
        resolve(precision, device)  # says before they start what none of them could do
        device, precision = torch.device("cpu"), Precision.FLOAT32
    path = checkpoint_file(section.checkpoint, f"{task}.checkpoint")
    _, open_with = keys_of(spec)
    labeler, content = load_labeler(path, key=open_with, device=device, precision=precision)
    if content.encryption is not None and content.encryption.mode == "none":
        screen.print(f"{path}: not encrypted")
    for line in _outvoted(spec, labeler.config):
        screen.print(line)
    return Labeling(path, content, labeler, devices, _passes_of(section), section)


def _outvoted(spec: Spec, used: LabelerConfig) -> list[str]:
    """A line for each field that the spec gives otherwise than the checkpoint, which is the one that counts."""
    asked = spec.labeler_config(used.crop_size)
    fields = {
        "dataset.crop_size": (spec.dataset, "crop_size", asked.crop_size, used.crop_size),
        "train.test_margin_rate": (spec.train, "test_margin_rate", asked.margin_rate, used.margin_rate),
        "train.mask_thres": (spec.train, "mask_thres", asked.mask_thres, used.mask_thres),
        "compat": (spec, "compat", str(asked.compat), str(used.compat)),
    }
    return [
        f"{name}: {given} in the spec, {stored} in the checkpoint; the checkpoint's is used"
        for name, (section, field, given, stored) in fields.items()
        if field in section.model_fields_set and given != stored
    ]


def _passes_of(section: EvaluateConfig | InferenceConfig) -> TtaOptions:
    """What is done for a label; the mean of both networks comes before the teacher, and that before the student."""
    branch = Branch.TEACHER if section.use_teacher_test else Branch.STUDENT
    if section.use_mixed_model_test:
        branch = Branch.MIXED
    return TtaOptions(
        PredictOptions(branch, flip=section.use_flip_test),
        section.margins,
        section.resolve_overlaps,
        section.refine_edges,
    )
