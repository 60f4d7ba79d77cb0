"""`mal-train tune`: searches fields of a spec for the best validation metric."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mal_train.commands.common import checkpoint_keys, choose_devices, image_folder, input_file
from mal_train.config.spec import Spec
from mal_train.config.tune import redacted_url
from mal_train.core.atomic_io import write_text
from mal_train.core.coco.annotations import read_coco
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.report.page import format_metric
from mal_train.core.storage.addresses import redact
from mal_train.core.yaml_config import dump
from mal_train.distributed.launch import recorded_signals
from mal_train.kernel.networks.backbones import backbone_size
from mal_train.training.validation import has_masks

try:
    import optuna
except ModuleNotFoundError:
    raise ConfigError("Optuna is not installed; run: pip install 'mask-auto-labeler[train,tune]'") from None

from mal_train.tuning.objective import Objective, RankAgreement, choose_objective
from mal_train.tuning.report import agreement_of, write_report
from mal_train.tuning.space import SECTIONS, distributions
from mal_train.tuning.storage import open_storage, storage_errors, storage_url
from mal_train.tuning.study import FOLDER, REASON, SharedStudy
from mal_train.tuning.trial_process import PROGRAM
from mal_train.tuning.tuner import Device, Tuner, TuningFailed

CHECKPOINTS = "*.malckpt"
OF_A_MACHINE = {
    *("dataset.train_ann_path", "dataset.train_img_dir", "dataset.val_ann_path", "dataset.val_img_dir"),
    *("dataset.num_workers_per_gpu", "train.gpu_ids", "train.num_gpus", "train.results_dir"),
    *("train.resume_training_checkpoint_path", "train.board_size"),
}
"""Fields that may differ between the tuners of a study: paths, devices, and what no metric depends on."""


@dataclass(frozen=True)
class TuneResult:
    """Result of a search.

    Attributes:
        folder: output folder of the study.
        best: number of the best trial.
        value: its value.
        objective: the metric.
        agreement: rank correlation of the proxy with mIoU over the trials.
        failed: (number, reason) of each failed trial.
    """

    folder: Path
    best: int
    value: float
    objective: Objective
    agreement: RankAgreement
    failed: tuple[tuple[int, str], ...]

    def summary(self) -> str:
        """Returns the result as lines of text."""
        lines = [f"trial {number} failed: {reason}" for number, reason in self.failed]
        lines.append(f"best: trial {self.best}, {self.objective.metric} {self.value:.4f}")
        if self.agreement.spearman is not None:
            lines.append(
                f"rank correlation of box_proxy with mIoU over {self.agreement.count} trials: "
                f"{format_metric(self.agreement.spearman)}"
            )
        return "\n".join([*lines, f"spec: {self.folder / 'best.yaml'}", f"report: {self.folder / 'report.html'}"])


def tune(spec: Spec, console: Console, *, program: Sequence[str] = PROGRAM) -> TuneResult:
    """Runs trials until the study has `tune.trials` of them, and writes report.html and best.yaml.

    The same command resumes a study that was interrupted. Several tuners with one storage share the trials.

    Args:
        spec: the spec.
        console: prints progress.
        program: command that runs `mal-train`.

    Raises:
        ConfigError: a field or a value of the section cannot be used, or the study began with other settings.
        OutputError: the storage or the output folder cannot be used.
        TuningFailed: no trial was completed.
    """
    space = distributions(spec)
    _check_backbones(spec)
    objective = _objective(spec, console)
    _check_secrets(spec)
    if spec.publish_to:
        console.print("publish_to: a search copies nothing; best.yaml keeps the field for the training that follows")
    devices = _devices(spec, console)
    output = spec.task_dir("tune")
    folder = output / spec.tune.study
    _create(folder)
    url = storage_url(spec.tune.storage, output)
    with storage_errors(url), recorded_signals() as signals:
        study = SharedStudy(open_storage(url), spec.tune, space, _setup(spec, objective), parallel=len(devices) > 1)
        console.print(
            f"study {spec.tune.study} in {redacted_url(url)}: {len(study.done())} of {spec.tune.trials} trials done"
        )
        write_text(folder / "spec.yaml", dump(spec.without_secrets()))

        def on_end() -> None:
            write_report(folder, spec, study, objective, space)
            if spec.tune.keep_checkpoints == "best":
                _remove_checkpoints(folder, study)

        tuner = Tuner(
            study,
            spec,
            objective,
            devices,
            folder=folder,
            console=console,
            on_end=on_end,
            signals=signals,
            threads=None if devices[0] else max(1, len(os.sched_getaffinity(0)) // len(devices)),
            program=program,
        )
        try:
            tuner.run()
        except TuningFailed:
            on_end()  # the page has the trial that ended the search
            raise
        on_end()
        return _result(folder, study, objective)


def _result(folder: Path, study: SharedStudy, objective: Objective) -> TuneResult:
    best, trials = study.best(), study.done()
    if best is None or best.value is None:
        raise TuningFailed(f"{folder}: no trial was completed; report.html lists why")
    failed = [trial for trial in trials if trial.state is optuna.trial.TrialState.FAIL]
    return TuneResult(
        folder,
        best.number,
        best.value,
        objective,
        agreement_of(trials),
        tuple((trial.number, str(trial.user_attrs.get(REASON, "unknown"))) for trial in failed),
    )


def _objective(spec: Spec, console: Console) -> Objective:
    """Returns the objective for the validation set; checks the files that every trial needs."""
    with input_file(spec.dataset.train_ann_path, "dataset.train_ann_path") as annotations:
        image_folder(spec, spec.dataset.train_img_dir, "dataset.train_img_dir", annotations)
    if not spec.dataset.load_mask:
        raise ConfigError("dataset.load_mask: false, which is no validation; trials are compared by it; set it to true")
    with input_file(spec.dataset.val_ann_path, "dataset.val_ann_path") as annotations:
        coco = read_coco(annotations, spec.dataset.row_rules)
        image_folder(spec, spec.dataset.val_img_dir, "dataset.val_img_dir", annotations)
    objective = choose_objective(spec.tune.objective, has_masks=has_masks(coco))
    reason = ""
    if objective.chosen:
        reason = f": tune.objective is auto, and the validation set has {'masks' if has_masks(coco) else 'no masks'}"
    console.print(f"objective {objective.name}, {objective.metric} of the validation set{reason}")
    return objective


def _check_backbones(spec: Spec) -> None:
    """Raises ConfigError for an unknown backbone, which the schema takes: the kernel has the list."""
    searched = spec.tune.space.get("model.arch")
    for arch in (spec.model.arch,) if searched is None else searched.choices or ():
        backbone_size(arch)


def _check_secrets(spec: Spec) -> None:
    """Raises ConfigError for a secret that the specs of the trials would repeat, or a key that cannot be read."""
    public = spec.without_secrets()
    secret = [
        name for name in ("encryption_key", "decryption_key", "dataset") if getattr(spec, name) != getattr(public, name)
    ]
    secret += [
        f"tune.space.{name}" for name, values in spec.tune.space.items() if any(map(_is_signed, values.choices or ()))
    ]
    if secret:
        raise ConfigError(
            f"{secret[0]}: a passphrase, or an address with a signature; the specs of the trials would repeat it; give "
            "a key as env:NAME or file:PATH, and addresses without signature"
        )
    checkpoint_keys(spec)


def _is_signed(value: object) -> bool:
    return isinstance(value, str) and redact(value) != value


def _devices(spec: Spec, console: Console) -> list[Device]:
    """Returns the devices of the trials that run at a time; without CUDA, the CPU."""
    given = [(entry,) if isinstance(entry, int) else entry for entry in spec.tune.devices]
    if not all(given):
        raise ConfigError("tune.devices: an empty list of GPUs; give each trial at least one, or tune.devices=[]")
    gpus = tuple(dict.fromkeys(gpu for entry in given for gpu in entry))
    if choose_devices(gpus, 1, console)[0].type == "cpu":
        return [()] * spec.tune.cpu_trials
    return given


def _setup(spec: Spec, objective: Objective) -> dict[str, Any]:
    """Returns what all trials of a study have in common; paths and devices may differ between machines."""
    data = spec.model_dump(mode="json")
    space = data["tune"]["space"]
    fields = {f"{section}.{name}": value for section in SECTIONS for name, value in data[section].items()}
    fields = {name: value for name, value in fields.items() if name not in {*space, *OF_A_MACHINE}}
    fields |= {"compat": data["compat"], "strategy": data["strategy"], "tune.objective": objective.name}
    return fields | {f"tune.space.{name}": values for name, values in space.items()}


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror}; choose another results_dir") from error


def _remove_checkpoints(folder: Path, study: SharedStudy) -> None:
    """Removes the checkpoints of all ended trials but the best one; a trial that is continued keeps them."""
    best = study.best()
    trials = study.trials()
    kept = {trial.user_attrs.get(FOLDER) for trial in trials if not trial.state.is_finished()}
    kept |= {None if best is None else best.user_attrs.get(FOLDER)}
    for name in {trial.user_attrs.get(FOLDER) for trial in trials} - kept - {None}:
        for path in (folder / "trials" / str(name) / "train").glob(CHECKPOINTS):
            path.unlink(missing_ok=True)
