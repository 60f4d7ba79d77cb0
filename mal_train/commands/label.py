"""Parts that evaluation and inference share: the labeler of a checkpoint, its devices and its options."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mal_train.commands.common import checkpoint_file, checkpoint_keys, choose_devices, trust_policy, worker_threads
from mal_train.config.labeling import EvaluateConfig, InferenceConfig
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import Annotation
from mal_train.core.console import Console
from mal_train.core.images.files import ImageSource
from mal_train.core.settings import Branch, LabelerConfig, NetworkEngine, Precision, ScoreBasis
from mal_train.core.version import distribution_version
from mal_train.kernel.checkpoint.checkpoint import Checkpoint
from mal_train.kernel.labeler.labeler import Labeler, compute_dtype
from mal_train.kernel.labeler.load import calibration_of, load_labeler
from mal_train.kernel.labeler.types import Label, PredictOptions
from mal_train.kernel.networks.precision import reported, resolve
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.offline.multi_device import label_on_devices
from mal_train.offline.tta import TtaOptions


@dataclass(frozen=True)
class LabelingJob:
    """A loaded checkpoint with the devices and options of a section of the spec.

    Attributes:
        path: file of the checkpoint.
        checkpoint: content of the checkpoint.
        labeler: labeler on the device; with several devices, on the CPU, from where each process copies it.
        devices: devices, one process each.
        tta: test-time augmentation.
    """

    path: Path
    checkpoint: Checkpoint
    labeler: Labeler
    devices: list[torch.device]
    tta: TtaOptions
    _section: EvaluateConfig | InferenceConfig

    def labels(
        self, rows: Sequence[Row], image_dir: ImageSource
    ) -> Generator[tuple[Annotation, Label | LabelFailure], None, None]:
        """Yields each box that is not a crowd, in the order of `rows`, with its label or failure."""
        return label_on_devices(
            self.devices,
            self.labeler,
            rows,
            image_dir,
            precision=self._section.precision,
            network_engine=self._section.network_engine,
            int8=calibration_of(self.checkpoint.sha256, self.checkpoint.int8),
            tta=self.tta,
            batch_size=self._section.batch_size,
            threads=worker_threads(),
        )

    @property
    def precision(self) -> str:
        """Number format of the network, from `precision.reported`."""
        section = self._section
        dtype = compute_dtype(self.devices[0], self.labeler.config, section.precision, section.network_engine)
        return reported(dtype)

    def provenance(self) -> dict[str, Any]:
        """Returns what the output stores about its origin: tool, checkpoint, settings and options."""
        options, tta = self.tta.options, self.tta
        basis = ScoreBasis(
            options.branch, options.flip, tta.margins, tta.resolve_overlaps, refined_edges=tta.refine_edges
        )
        return {
            "tool": f"mask-auto-labeler {distribution_version()}",
            "checkpoint": self.path.name,
            "checkpoint_sha256": self.checkpoint.sha256,
            "model": self.checkpoint.model.to_dict(),
            "labeler": self.checkpoint.labeler.summary(),
            "score": self.checkpoint.labeler.score_meaning(basis),
            "network_engine": self._section.network_engine,
            # With torch it may depend on the machine, and is part of the journal alone.
            **({} if self._section.network_engine is NetworkEngine.TORCH else {"precision": self.precision}),
            "branch": str(options.branch),
            "flip": options.flip,
            "margins": list(tta.margins),
            "resolve_overlaps": tta.resolve_overlaps,
            "refine_edges": tta.refine_edges,
        }


def open_labeling_job(spec: Spec, task: Literal["evaluate", "inference"], console: Console) -> LabelingJob:
    """Loads the checkpoint of section `task` on the devices of that section.

    With several devices, `mal_train.offline.multi_device` starts a process for each, and this process loads the
    labeler on the CPU. Prints a line if the file is not encrypted, and one for each setting of the spec that differs
    from the checkpoint's.

    Raises:
        ConfigError: a device, the file or its key is missing.
        CheckpointError: the file cannot be decrypted or read.
    """
    section = spec.evaluate if task == "evaluate" else spec.inference
    devices = choose_devices(section.gpus, section.num_gpus, console)
    device, precision, engine = devices[0], str(section.precision), str(section.network_engine)
    resolve(precision, device, engine)  # before the checkpoint is read, and before processes start
    if len(devices) > 1 and engine == NetworkEngine.TORCH:
        device, precision = torch.device("cpu"), Precision.FLOAT32
    path = checkpoint_file(section.checkpoint, f"{task}.checkpoint")
    _, decryption_key = checkpoint_keys(spec)
    trust = trust_policy(spec, section.checkpoint or "", section.checkpoint_sha256)
    labeler, content = load_labeler(
        path, key=decryption_key, device=device, precision=precision, network_engine=engine, trust=trust
    )
    if content.encryption is not None and content.encryption.mode == "none":
        console.print(f"{path}: not encrypted")
    for line in _overridden_fields(spec, labeler.config):
        console.print(line)
    return LabelingJob(path, content, labeler, devices, _tta_options(section), section)


def _overridden_fields(spec: Spec, used: LabelerConfig) -> list[str]:
    """Returns a line for each field whose value in the spec differs from the checkpoint's, which is used."""
    given = spec.labeler_config(used.crop_size)
    fields = {
        "dataset.crop_size": (spec.dataset, "crop_size", given.crop_size, used.crop_size),
        "train.test_margin_rate": (spec.train, "test_margin_rate", given.margin_rate, used.margin_rate),
        "train.mask_thres": (spec.train, "mask_thres", given.mask_thres, used.mask_thres),
        "compat": (spec, "compat", str(given.compat), str(used.compat)),
    }
    return [
        f"{name}: {value} in the spec, {stored} in the checkpoint; the checkpoint's value is used"
        for name, (section, field, value, stored) in fields.items()
        if field in section.model_fields_set and value != stored
    ]


def _tta_options(section: EvaluateConfig | InferenceConfig) -> TtaOptions:
    """Returns the options of a section; use_mixed_model_test takes precedence over use_teacher_test."""
    branch = Branch.TEACHER if section.use_teacher_test else Branch.STUDENT
    if section.use_mixed_model_test:
        branch = Branch.MIXED
    return TtaOptions(
        PredictOptions(branch, flip=section.use_flip_test),
        section.margins,
        section.resolve_overlaps,
        section.refine_edges,
    )
