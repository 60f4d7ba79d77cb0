"""Sections `evaluate` and `inference`: what is labeled, by which checkpoint, and with how many passes."""

from typing import Literal

from pydantic import Field

from mal_train.config.devices import OneMachine
from mal_train.config.ranges import Margin

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class _Passes(OneMachine):
    """How a box is labeled where time matters less than the mask."""

    use_mixed_model_test: bool = Field(
        default=False, description="Mean of student and teacher; wins over use_teacher_test."
    )
    use_teacher_test: bool = Field(default=False, description="The teacher instead of the student.")
    use_flip_test: bool = Field(default=False, description="Average each crop with its mirror image.")
    margins: tuple[Margin, ...] = Field(
        default=(),
        description="Growths of a box to label it with, their answers averaged; a pass each. []: the checkpoint's.",
    )
    resolve_overlaps: bool = Field(
        default=False, description="Give each pixel that several boxes of an image claim to one of them."
    )
    refine_edges: bool = Field(
        default=False,
        description="Move the edges of masks to where the colors change; 0.1 s of CPU a box at crop 224, "
        "150 MB a thread at crop 512.",
    )


class EvaluateConfig(_Passes):
    """Section `evaluate`."""

    checkpoint: str | None = Field(
        default=None, description="Checkpoint to evaluate on dataset.val_ann_path; builtin: the model in the package."
    )
    box_inputs: str = Field(
        default="",
        description="COCO results list with a detector's boxes and scores, to evaluate in place of the file's boxes.",
    )
    results_dir: str | None = Field(
        default=None, description="Folder of this task's results; null: <results_dir>/evaluate."
    )
    batch_size: int = Field(default=3, ge=1, description="Boxes in a batch.")
    precision: Precision = Field(
        default="auto",
        description="Arithmetic of the network; auto: bfloat16 where it is fast, float32 under compat tao.",
    )


class InferenceConfig(_Passes):
    """Section `inference`."""

    checkpoint: str | None = Field(
        default=None, description="Checkpoint to label with; builtin: the model in the package."
    )
    results_dir: str | None = Field(
        default=None, description="Folder of this task's results; null: <results_dir>/inference."
    )
    ann_path: str = Field(default="", description="COCO JSON whose boxes are to get masks.")
    img_dir: str = Field(default="", description="Folder of its images.")
    box_inputs: str = Field(
        default="",
        description="COCO results list with a detector's boxes and scores, to label in place of ann_path's boxes.",
    )
    label_dump_path: str = Field(
        default="instances_val2017_mal.json",
        description="COCO JSON to write; a relative path starts at this task's results folder.",
    )
    batch_size: int = Field(default=3, ge=1, description="Boxes in a batch.")
    load_mask: bool = Field(
        default=False, description="Read the file's masks too and report each one's IoU with the label."
    )
    precision: Precision = Field(
        default="auto",
        description="Arithmetic of the network; auto: bfloat16 where it is fast, float32 under compat tao.",
    )
