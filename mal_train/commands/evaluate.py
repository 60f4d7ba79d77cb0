"""`mal-train evaluate`: a checkpoint's labels against the masks of dataset.val_ann_path."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from mal_train.commands.common import existing_file, existing_folder, task_folder
from mal_train.commands.detections import DetectionReport, compare_detections
from mal_train.commands.label import open_labeling
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import Annotation, CocoFile, by_image, read_coco
from mal_train.core.coco.detections import read_detections
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset, ConfigError
from mal_train.core.metrics.report import EvaluationReport
from mal_train.kernel.labeler.labeler import Label, compute_dtype
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.training.run_files import figures_of
from mal_train.training.validation import add_answer, evaluator_of, has_masks

Answer = tuple[Annotation, Label | LabelFailure]


def evaluate(spec: Spec, screen: Console) -> EvaluationReport | DetectionReport:
    """Measures evaluate.checkpoint and writes results.json into the task's folder.

    With evaluate.box_inputs the prompts are a detector's boxes, and the figures COCO's of boxes and masks.

    Raises:
        MalError: a setting, the file of annotations or the checkpoint cannot be used.
    """
    settings = spec.evaluate
    with task_folder(spec, "evaluate") as (folder, status):
        if not spec.dataset.load_mask:
            raise ConfigError("dataset.load_mask: false; evaluation compares masks: set it to true")
        ann_path = existing_file(spec.dataset.val_ann_path, "dataset.val_ann_path")
        image_dir = existing_folder(spec.dataset.val_img_dir, "dataset.val_img_dir")
        coco = read_coco(ann_path)
        if not has_masks(coco):
            raise BadDataset(f"{ann_path}: no annotation has a segmentation to compare with")
        prompts = coco
        if settings.box_inputs:
            prompts = read_detections(existing_file(settings.box_inputs, "evaluate.box_inputs"), coco)
        labeling = open_labeling(spec, "evaluate", screen)
        rows = list(by_image(prompts))
        labels = labeling.labels(rows, image_dir)
        with screen.progress(len(prompts.annotations), "box") as bar:
            answers = _counted(labels, bar.update)
            report: EvaluationReport | DetectionReport
            if settings.box_inputs:
                report = compare_detections(coco, prompts, answers)
            else:
                report = _compare(coco, rows, answers)
        dtype = compute_dtype(labeling.devices[0], labeling.labeler.config, settings.precision)
        result = {
            **labeling.provenance(),
            "annotations": str(ann_path),
            **({"box_inputs": settings.box_inputs} if settings.box_inputs else {}),
            "precision": str(dtype).removeprefix("torch."),
            **report.to_dict(),
        }
        write_json_atomic(folder / "results.json", result)
        kpi = figures_of(report) if isinstance(report, EvaluationReport) else report.figures
        status.write("RUNNING", "Test metrics generated.", kpi=kpi)
        screen.print(f"wrote {folder / 'results.json'}")
    return report


def _counted(answers: Iterable[Answer], count: Callable[[], object]) -> Iterator[Answer]:
    for answer in answers:
        yield answer
        count()


def _compare(coco: CocoFile, rows: Sequence[Row], answers: Iterable[Answer]) -> EvaluationReport:
    evaluator = evaluator_of(coco, rows)
    for annotation, label in answers:
        add_answer(evaluator, annotation, label)
    return evaluator.report()
