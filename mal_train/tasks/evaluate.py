"""`mal-train evaluate`: a checkpoint's labels against the masks of dataset.val_ann_path."""

from mal_train.config import Spec
from mal_train.errors import BadDataset, ConfigError
from mal_train.labeling.coco import by_image, read_coco
from mal_train.labeling.coco_output import write_json_atomic
from mal_train.labeling.evaluation_report import EvaluationReport
from mal_train.labeling.labeler import dtype_on
from mal_train.labeling.parallel import label_on
from mal_train.screen import Screen
from mal_train.tasks.common import (
    checkpoint_file,
    choose_devices,
    existing_file,
    existing_folder,
    open_labeler,
    passes_of,
    provenance,
    task_folder,
    told,
    worker_threads,
)
from mal_train.training.records import figures_of
from mal_train.training.validation import add_answer, evaluator_of, has_masks


def evaluate(spec: Spec, screen: Screen) -> EvaluationReport:
    """Measures evaluate.checkpoint and writes results.json into the task's folder.

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
        devices = choose_devices(settings.gpus, settings.num_gpus, screen)
        labeler, checkpoint = open_labeler(
            spec,
            settings.checkpoint,
            "evaluate.checkpoint",
            devices=devices,
            precision=settings.precision,
            screen=screen,
        )
        passes = passes_of(settings)
        rows = list(by_image(coco))
        evaluator = evaluator_of(coco, rows)
        labels = label_on(
            devices,
            labeler,
            rows,
            image_dir,
            precision=settings.precision,
            passes=passes,
            batch_size=settings.batch_size,
            threads=worker_threads(),
        )
        with screen.bar(len(coco.annotations), 0, "box") as bar:
            for annotation, label in labels:
                add_answer(evaluator, annotation, label)
                bar.update()
        report = evaluator.report()
        checkpoint_path = checkpoint_file(settings.checkpoint, "evaluate.checkpoint")
        result = {
            **provenance(checkpoint_path, checkpoint),
            "annotations": str(ann_path),
            **told(passes),
            "precision": str(dtype_on(devices[0], labeler.config, settings.precision)).removeprefix("torch."),
            **report.to_dict(),
        }
        write_json_atomic(folder / "results.json", result)
        status.write("RUNNING", "Test metrics generated.", kpi=figures_of(report))
        screen.say(f"wrote {folder / 'results.json'}")
    return report
