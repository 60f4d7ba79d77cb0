"""`mal-train inference` with `inference.engine: ray`: adds masks to a COCO file in parquet on a Ray cluster.

The output is a folder of parts, which together are a COCO file in parquet. The journal beside it notes each finished
part. It stays after the last one: the same command labels only missing parts, and another command is refused.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mal_train.commands.common import existing_file, existing_folder, handle_sigterm, task_folder
from mal_train.commands.inference import InferenceResult
from mal_train.commands.label import LabelingJob, open_labeling_job
from mal_train.config.labeling import InferenceConfig
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import read_images
from mal_train.core.coco.parquet_ids import refuse_repeated_ids
from mal_train.core.coco.parquet_parts import divide, tasks_of
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_schema import SUFFIX, is_parquet
from mal_train.core.coco.parquet_share import head_builder
from mal_train.core.coco.part_folder import PartFolder
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset, ConfigError, DeviceLost, LostProcess
from mal_train.core.images.files import ImageFolder, add_findings, image_notes
from mal_train.core.numbers import counted
from mal_train.core.reminder import Reminder
from mal_train.core.secrets import is_secret_reference
from mal_train.core.settings import NetworkEngine, Precision
from mal_train.core.storage.addresses import Location, is_remote, parse_location, redact
from mal_train.kernel.checkpoint.builtin import BUILTIN
from mal_train.offline.part_labeler import PartJob, PartResult, decode_message
from mal_train.offline.ray_cluster import RayCluster

TASKS_PER_ACTOR: Final = 8
"""Tasks of each actor, if there are parts for them, so that all actors end at about the same time."""
MAX_PARTS_PER_TASK: Final = 16
"""Parts of a task, which are labeled again when its process is lost."""
STALL_S: Final = 600.0
"""Seconds without a finished part after which the resources of the cluster are printed."""
MAX_MESSAGES: Final = 1000
"""Different messages of failures that are printed; the output has all of them."""


def inference_on_ray(spec: Spec, console: Console) -> InferenceResult:
    """Labels every box of inference.ann_path and writes the parts in the folder inference.label_dump_path.

    An error in one image or box is printed and stored in its annotation; the other boxes are still labeled.

    Raises:
        MalError: a setting, an input, the cluster or the checkpoint cannot be used, the output cannot be written or
            belongs to another job, or parts are missing because processes were lost.
        Terminated: SIGTERM arrived; the finished parts are kept.
    """
    settings = spec.inference
    _check_settings(spec)
    with task_folder(spec, "inference") as (folder, status), handle_sigterm():
        dataset = ParquetDataset(_on_all_machines(settings.ann_path, "ann_path"))
        dataset.check_complete()
        head_builder(dataset)
        refuse_repeated_ids(dataset)
        output = Path(os.path.realpath(folder / settings.label_dump_path))
        # A restart deletes the parts in the output.
        if isinstance(dataset.path, Path) and dataset.path.is_relative_to(output):
            raise ConfigError(f"output {output}: is an input of the same command; choose another folder")
        parts = divide(dataset.row_groups, settings.ray_part_boxes)
        if not parts:
            raise BadDataset(f"{dataset.path}: has no images and no annotations; there is nothing to label")
        images = ImageFolder(_on_all_machines(settings.img_dir, "img_dir"), limits=spec.limits.images())
        images = images.of_names(lambda: _file_names(dataset))
        labeling = open_labeling_job(_on_this_cpu(spec), "inference", console)
        manifest = _manifest(dataset, images, spec, labeling)
        with PartFolder(output, parts, manifest, restart=settings.restart) as folder_of_parts:
            job = _part_job(spec, dataset, images, folder_of_parts, labeling)
            _Run(job, folder_of_parts, dataset.head.annotations, console).finish(settings)
            _, labeled, failed, crowds = folder_of_parts.counts()
            folder_of_parts.check_complete(dataset)
        summary = f"{counted(labeled, 'box')} labeled, {failed.total()} failed"
        status.write("RUNNING", f"{summary}.")
        console.print(f"wrote {output}: {len(parts)} parts, {summary}")
        for note in image_notes(images):
            console.print(note)
    return InferenceResult(output, str(output), labeled, failed, None, crowds)


def task_size(parts: int, actors: int) -> int:
    """Returns the number of parts of a task."""
    return max(1, min(MAX_PARTS_PER_TASK, parts // (actors * TASKS_PER_ACTOR)))


class _Run:
    """One run of a job.

    Args:
        job: settings of the processes.
        output: finished parts of earlier runs; receives those of this run.
        boxes: number of annotations in all parts.
        console: prints progress and failures.
    """

    def __init__(self, job: PartJob, output: PartFolder, boxes: int, console: Console) -> None:
        self._job, self._output, self._boxes, self._console = job, output, boxes, console
        self._printed: set[str] = set()

    def finish(self, settings: InferenceConfig) -> None:
        """Labels the missing parts, and those that lost processes leave, as long as any part is finished.

        Raises:
            LostProcess: parts are missing in the end.
        """
        missing, total = self._output.missing(), len(self._output.parts)
        if len(missing) < total:
            self._console.print(f"{self._output.path}: {total - len(missing)} of {total} parts are finished")
        if missing:
            self._console.print(
                f"connecting to Ray at {settings.ray_address}" if settings.ray_address else "starting Ray"
            )
            with RayCluster(settings.ray_address) as cluster:
                self._label(cluster, settings)
            self._refuse_missing()

    def _label(self, cluster: RayCluster, settings: InferenceConfig) -> None:
        pool = cluster.plan(
            use_gpus=bool(settings.gpu_ids), count=settings.ray_actors, cpus=settings.ray_cpus_per_actor
        )
        missing, (rows, *_) = self._output.missing(), self._output.counts()
        self._console.print(f"{len(missing)} parts on {pool.count} actors of {pool.resources}")
        with (
            self._console.progress(self._boxes, "box", initial=rows) as bar,
            Reminder(STALL_S, lambda: self._console.print(_stall_message(cluster))) as reminder,
        ):
            size = task_size(len(missing), pool.count)
            while missing:
                for message in cluster.label(self._job, pool, tasks_of(missing, size)):
                    reminder.postpone()
                    bar.update(self._receive(message))
                lost = self._output.missing()
                if len(lost) == len(missing) and size == 1:
                    return
                # A part that ends its process ends the task of no other part.
                missing, size = lost, 1

    def _refuse_missing(self) -> None:
        missing = self._output.missing()
        if missing:
            raise LostProcess(
                f"{self._output.path}: {len(missing)} of {len(self._output.parts)} parts are missing, such as "
                f"{missing[0].name}: their processes ended repeatedly, for example for lack of memory; run the same "
                "command again, with fewer actors, or see the logs of Ray on the machines"
            )

    def _receive(self, message: str) -> int:
        """Notes the result in a message; returns its number of annotations. Raises the error in a message."""
        try:
            result = decode_message(message)
        except DeviceLost as error:
            self._console.print(f"an actor is replaced, and its work repeated: {error}")
            return 0
        add_findings(self._job.images, result.findings)
        if self._output.is_finished(self._output.parts[result.number]):  # of an actor whose end was noticed late
            return 0
        counts = ("rows", "labeled", "failed", "crowds")
        self._output.add(result.number, {name: getattr(result, name) for name in counts})
        self._print_failures(result)
        return result.rows

    def _print_failures(self, result: PartResult) -> None:
        lines = [f"no mask{f' for {n} boxes' if n > 1 else ''}: {text}" for text, n in result.messages.items()]
        for line in (*lines, *result.notes):
            if line not in self._printed and len(self._printed) < MAX_MESSAGES:
                self._printed.add(line)
                self._console.print(line)


def _stall_message(cluster: RayCluster) -> str:
    return f"no part has finished for {STALL_S / 60:g} minutes; {cluster.resources()}"


def _check_settings(spec: Spec) -> None:
    """Raises ConfigError for settings that this engine does not support."""
    settings = spec.inference
    for field in ("ann_path", "label_dump_path"):
        value = parse_location(getattr(settings, field))
        if not is_parquet(value):
            raise ConfigError(
                f"inference.{field}: {redact(value)}; inference.engine: ray reads and writes COCO in parquet: give a "
                f"name that ends in {SUFFIX} (mal-client convert --from coco --labels IN.json --output OUT{SUFFIX})"
            )
    for field, is_given, remedy in (
        ("inference.label_dump_path", is_remote(settings.label_dump_path), "give a folder that all machines share"),
        ("inference.box_inputs", bool(settings.box_inputs), "use inference.engine=local"),
        ("inference.load_mask", settings.load_mask, "use inference.engine=local"),
        ("inference.num_gpus", settings.num_gpus != 1, "give inference.ray_actors"),
        ("dataset.coco_url_hosts", bool(spec.dataset.coco_url_hosts), "give inference.img_dir"),
    ):
        if is_given:
            raise ConfigError(f"{field}: not supported with inference.engine: ray; {remedy}")


def _on_all_machines(text: str, field: str) -> Location:
    """Returns an address, or the full path of a local file or folder, for processes with another current folder.

    Raises:
        ConfigError: there is no such file or folder, or the address holds a secret.
    """
    location = parse_location(text)
    if isinstance(location, Path):
        exists = existing_folder if field == "img_dir" else existing_file
        return Path(os.path.realpath(exists(text, f"inference.{field}")))
    if redact(location) != location:
        raise ConfigError(
            f"inference.{field}: {redact(location)}; a password or signature in an address would pass through Ray: "
            "remove it, and give the machines credentials of their own"
        )
    return location


def _file_names(dataset: ParquetDataset) -> Iterator[str]:
    """Yields the file name of each image; reads the columns of the images alone."""
    for row in dataset.rows(with_annotations=False):
        if row.index is not None:
            yield from (image.file_name for _, image in read_images([row.image], [], row.index))


def _on_this_cpu(spec: Spec) -> Spec:
    """Returns a spec by which this process loads the checkpoint on its CPU; it labels nothing."""
    changes: dict[str, Any] = {"gpu_ids": ()}
    if spec.inference.network_engine is NetworkEngine.TORCH:
        changes["precision"] = Precision.FLOAT32  # the GPUs' may be another that this CPU lacks
    return spec.model_copy(update={"inference": spec.inference.model_copy(update=changes)})


def _manifest(dataset: ParquetDataset, images: ImageFolder, spec: Spec, labeling: LabelingJob) -> dict[str, Any]:
    """Returns everything that the parts depend on."""
    settings = spec.inference
    return {
        "input_sha256": dataset.sha256,
        "images": images.name,
        "part_boxes": settings.ray_part_boxes,
        "precision": settings.precision,
        **spec.limits.manifest(),
        **spec.dataset.row_rules.manifest(),
        **labeling.provenance(),
    }


def _part_job(
    spec: Spec, dataset: ParquetDataset, images: ImageFolder, output: PartFolder, labeling: LabelingJob
) -> PartJob:
    settings = spec.inference
    return PartJob(
        dataset=dataset.path,
        dataset_sha256=dataset.sha256,
        images=images,
        output=output.path,
        journal=output.journal,
        manifest=output.manifest_line(),
        provenance=labeling.provenance(),
        checkpoint=str(settings.checkpoint if settings.checkpoint == BUILTIN else labeling.path.resolve()),
        checkpoint_sha256=labeling.checkpoint.sha256,
        key=_key_reference(spec, labeling),
        precision=settings.precision,
        network_engine=settings.network_engine,
        tta=labeling.tta,
        batch_size=settings.batch_size,
        rules=spec.dataset.row_rules,
    )


def _key_reference(spec: Spec, labeling: LabelingJob) -> str | None:
    """Returns where each machine finds the decryption key; the key itself does not pass through Ray.

    Raises:
        ConfigError: the spec holds the key itself.
    """
    encryption = labeling.checkpoint.encryption
    if encryption is None or encryption.mode == "none":
        return None
    text = spec.decryption_key or spec.encryption_key or ""
    if not is_secret_reference(text):
        raise ConfigError(
            "decryption_key: a secret in the spec; with inference.engine: ray each machine reads the key by itself: "
            "give file:PATH of a file, or env:NAME of a variable, that all machines have"
        )
    scheme, _, target = text.partition(":")
    return f"{scheme}:{os.path.abspath(target)}" if scheme == "file" and not target.startswith("~") else text
