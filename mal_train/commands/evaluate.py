"""`mal-train evaluate`: compares the labels of a checkpoint with the masks of dataset.val_ann_path."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from mal_train.commands.common import image_folder, input_file, task_folder
from mal_train.commands.detections import DetectionReport, compare_detections
from mal_train.commands.label import open_labeling_job
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import Annotation, CocoFile, by_image, read_coco
from mal_train.core.coco.detections import read_detections
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset, ConfigError
from mal_train.core.images.files import for_names, image_notes
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.storage.addresses import parse_location, redact
from mal_train.kernel.labeler.types import Label
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.training.run_files import validation_metrics
from mal_train.training.validation import add_result, has_masks, new_evaluator, why_no_masks

LabelResult = tuple[Annotation, Label | LabelFailure]


def evaluate(spec: Spec, console: Console) -> EvaluationReport | DetectionReport:
    """Evaluates evaluate.checkpoint and writes results.json to the output folder.

    With evaluate.box_inputs, labels detected boxes and reports COCO's detection metrics of boxes and masks.

    Raises:
        MalError: a setting, the annotation file or the checkpoint cannot be used.
    """
    settings = spec.evaluate
    with task_folder(spec, "evaluate") as (folder, status), ExitStack() as inputs:
        if not spec.dataset.load_mask:
            raise ConfigError("dataset.load_mask: false; evaluation needs the masks; set it to true")
        annotations = inputs.enter_context(input_file(spec.dataset.val_ann_path, "dataset.val_ann_path"))
        image_dir = image_folder(spec, spec.dataset.val_img_dir, "dataset.val_img_dir", annotations)
        coco = read_coco(annotations, spec.dataset.row_rules)
        image_dir = for_names(image_dir, coco.file_names)
        ann_path = redact(parse_location(spec.dataset.val_ann_path))
        if not has_masks(coco):
            raise BadDataset(f"{ann_path}: nothing to measure: {why_no_masks(coco)}")
        prompts = coco
        if settings.box_inputs:
            prompts = read_detections(
                Path(inputs.enter_context(input_file(settings.box_inputs, "evaluate.box_inputs"))),
                coco,
                spec.dataset.row_rules,
            )
        job = open_labeling_job(spec, "evaluate", console)
        rows = list(by_image(prompts))
        labels = job.labels(rows, image_dir)
        with console.progress(len(prompts.annotations), "box") as bar:
            results = _counted(labels, bar.update)
            report: EvaluationReport | DetectionReport
            if settings.box_inputs:
                report = compare_detections(coco, prompts, results)
            else:
                report = _compare(coco, rows, results)
        for note in image_notes(image_dir):
            console.print(note)
        content = {
            **job.provenance(),
            "annotations": ann_path,
            **({"box_inputs": redact(settings.box_inputs)} if settings.box_inputs else {}),
            "precision": job.precision,
            **report.to_dict(),
        }
        write_json_atomic(folder / "results.json", content)
        kpi = validation_metrics(report) if isinstance(report, EvaluationReport) else report.metrics
        status.write("RUNNING", "Test metrics generated.", kpi=kpi)
        console.print(f"wrote {folder / 'results.json'}")
    return report


def _counted(results: Iterable[LabelResult], count: Callable[[], object]) -> Iterator[LabelResult]:
    for result in results:
        yield result
        count()


def _compare(coco: CocoFile, rows: Sequence[Row], results: Iterable[LabelResult]) -> EvaluationReport:
    evaluator = new_evaluator(coco, rows)
    for annotation, label in results:
        add_result(evaluator, annotation, label)
    return evaluator.report()
