"""`mal-train inference`: adds masks to the boxes of a COCO file.

Results go to a journal beside the output as they are made, and from there into the output: memory holds neither pixels
nor masks, and a killed run continues where it ended.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mal_train.commands.common import handle_sigterm, image_folder, input_file, task_folder
from mal_train.commands.inference_output import OutputWriter
from mal_train.commands.label import LabelingJob, open_labeling_job
from mal_train.config.labeling import InferenceConfig
from mal_train.config.spec import Spec
from mal_train.core.coco.job_results import JobResults
from mal_train.core.coco.journal import Journal, RowFailure, failed, journal_path
from mal_train.core.coco.output import label_fields
from mal_train.core.coco.parquet_reader import refuse_hidden_parts
from mal_train.core.coco.parquet_share import share_of
from mal_train.core.coco.plan import DatasetPlan, read_detection_plan, read_plan
from mal_train.core.console import Console
from mal_train.core.images.files import Images, ImageSource, for_names, image_notes
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.numbers import counted
from mal_train.core.storage.addresses import Location, base_name, is_remote, parse_location, redact
from mal_train.core.storage.writing import StagedOutput, check_writable, refuse_same_location
from mal_train.kernel.labeler.types import Label
from mal_train.offline.dataset_labeler import TRANSIENT_REASONS, LabelFailure
from mal_train.training.run_files import validation_metrics

RESUME_HINT: Final = "the same command continues from there"
RETRY_HINT: Final = "the same command labels them"


@dataclass(frozen=True)
class InferenceResult:
    """Result of labeling a file.

    Attributes:
        path: where the file was written; one with a remote address is deleted there after the upload.
        output: path or redacted address of the file.
        labeled: number of boxes with a mask; an empty mask counts.
        failed: number of boxes without a mask, by reason.
        crowds: crowd regions, which were copied.
        report: metrics against the masks of the input file; None unless inference.load_mask is set.
        is_final: False if some boxes failed for a reason that may pass; the same command labels them.
    """

    path: Path
    output: str
    labeled: int
    failed: Counter[str]
    report: EvaluationReport | None
    crowds: int = 0
    is_final: bool = True

    @property
    def nothing_done(self) -> str | None:
        """A sentence if no box was labeled, though none failed, or if no mask was compared, though that was asked."""
        if not self.labeled and not self.failed:
            crowds = f"all {self.crowds} are CROWD; see dataset.crowd_as_objects"
            return f"no annotation was labeled: {crowds if self.crowds else 'the file has none'}"
        if self.report is not None and not self.report.measured:
            return "no mask was compared (inference.load_mask): no labeled annotation has a usable mask"
        return None


def inference(spec: Spec, console: Console) -> InferenceResult:
    """Labels every box of inference.ann_path and writes inference.label_dump_path.

    With inference.box_inputs, labels detected boxes; ann_path then gives the images and categories. An error in one
    image or box is printed and stored in its annotation; the other boxes are still labeled. A run that ended early is
    continued from its journal.

    Raises:
        MalError: a setting, the annotation file or the checkpoint cannot be used, the output cannot be written, or the
            journal holds the results of another job.
        Terminated: SIGTERM arrived; the results so far are kept.
    """
    settings = spec.inference
    with task_folder(spec, "inference") as (folder, status), handle_sigterm(), ExitStack() as inputs:
        staged = _staged_output(settings, folder)
        path = staged.path
        check_writable(path)
        annotations = inputs.enter_context(input_file(settings.ann_path, "inference.ann_path"))
        plan = _read_plan(spec, annotations, staged, inputs)
        image_dir = image_folder(spec, settings.img_dir, "inference.img_dir", annotations)
        image_dir = for_names(image_dir, lambda: (image.file_name for image in plan.images))
        if (note := plan.form_note()) is not None:
            console.print(f"{redact(annotations)}: {note}")
        job = open_labeling_job(spec, "inference", console)
        manifest = {**_inputs(plan, image_dir), "precision": job.precision, **job.provenance()}
        with _open_journal(path, manifest, plan.head.count, console, restart=settings.restart) as journal:
            results = JobResults(plan, journal, complete_images=job.tta.resolve_overlaps)
            _label(job, results, image_dir, console)
            for note in image_notes(image_dir):
                console.print(note)
            output = OutputWriter(plan, console, compare=settings.load_mask)
            output.write(path, results.result, job.provenance())
            report = output.report()
            staged.publish()
            if not results.unavailable:
                journal.remove()
        summary = f"{counted(output.labeled, 'box')} labeled, {output.failed.total()} failed"
        status.write("RUNNING", f"{summary}.", kpi=None if report is None else validation_metrics(report))
        console.print(f"wrote {staged.shown(path)}: {summary}")
        if results.unavailable:
            reasons = ", ".join(sorted({failure.reason for failure in results.unavailable.values()}))
            console.print(
                f"{counted(len(results.unavailable), 'box')} failed, maybe not for good ({reasons}); {RETRY_HINT}"
            )
    return InferenceResult(
        path,
        staged.shown(path),
        output.labeled,
        output.failed,
        report,
        output.crowds,
        is_final=not results.unavailable,
    )


def _staged_output(settings: InferenceConfig, folder: Path) -> StagedOutput:
    """Returns the output; a remote one is prepared in the output folder, where its journal stays."""
    given = parse_location(settings.label_dump_path)
    if not is_remote(given):
        return StagedOutput(folder / given, folder / given)
    check_writable(given)
    refuse_hidden_parts(given)
    return StagedOutput(given, folder / base_name(given))


def _read_plan(spec: Spec, annotations: Location, staged: StagedOutput, inputs: ExitStack) -> DatasetPlan:
    settings = spec.inference
    _refuse_input(settings.ann_path, staged)
    if not settings.box_inputs:
        return read_plan(annotations, share=share_of(annotations, staged.address), rules=spec.dataset.row_rules)
    _refuse_input(settings.box_inputs, staged)
    detections = inputs.enter_context(input_file(settings.box_inputs, "inference.box_inputs"))
    return read_detection_plan(annotations, Path(detections), spec.dataset.row_rules)


def _refuse_input(text: str, staged: StagedOutput) -> None:
    """Raises ConfigError if an input is the output, or the local file in which a remote output is prepared."""
    for output in (staged.address, staged.path):
        refuse_same_location(parse_location(text), output)


@contextmanager
def _open_journal(
    output: Path, manifest: Mapping[str, Any], rows: int, console: Console, *, restart: bool
) -> Iterator[Journal]:
    """Opens the journal of an output; deletes it at the end if it holds no label.

    Prints what is kept if an error ends the block.
    """
    with Journal(
        journal_path(output),
        rows,
        manifest,
        restart=restart,
        restart_option="inference.restart=true",
    ) as journal:
        try:
            yield journal
        except BaseException:  # whatever ends the run, KeyboardInterrupt included
            journal.note_interrupted()
            if journal.label_count:
                console.print(
                    f"{journal.path}: labels of {counted(journal.label_count, 'box')} are kept; {RESUME_HINT}"
                )
            raise
        finally:
            journal.remove_if_empty()


def _inputs(plan: DatasetPlan, images: Images) -> dict[str, Any]:
    """Returns the part of a job's manifest that tells which boxes of which files are labeled."""
    detections = {} if plan.detections is None else {"detections_sha256": plan.detections.sha256}
    return {"input_sha256": plan.head.sha256, **detections, "images": images.name, **plan.head.rules.manifest()}


def _label(job: LabelingJob, results: JobResults, image_dir: ImageSource, console: Console) -> None:
    """Labels the pending boxes and adds each result to the journal."""
    message = results.resume_message()
    if message is not None:
        console.print(message)
    pending = results.pending
    if not len(pending.indices):
        return
    total = len(pending.to_label)
    with (
        console.progress(total, "box", initial=total - len(pending.indices)) as bar,
        closing(job.labels(pending.annotations(), image_dir)) as labels,
    ):
        for index, (_, label) in zip(pending.indices.tolist(), labels, strict=True):
            _add(results, index, label)
            bar.update()


def _add(results: JobResults, index: int, label: Label | LabelFailure) -> None:
    if isinstance(label, Label):
        fields = label_fields(label.rle.to_coco(), label.area, label.score, label.flags, label.agreement)
        results.add({index: {"label": fields}})
        return
    failure = RowFailure("", label.reason, label.message)
    if label.reason in TRANSIENT_REASONS:
        results.unavailable[index] = failure
    else:
        results.add({index: failed(failure)})
