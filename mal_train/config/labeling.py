"""Sections `evaluate` and `inference` of the spec: input, checkpoint, and test-time augmentation."""

from typing import Literal

from pydantic import Field

from mal_train.config.devices import OneMachine
from mal_train.config.ranges import Margin
from mal_train.core.settings import NetworkEngine, Precision
from mal_train.core.yaml_config import Sha256


class _TestTimeAugmentation(OneMachine):
    """Fields that trade time for mask quality, and what runs the network."""

    use_mixed_model_test: bool = Field(
        default=False,
        description="Label with the mean of student and teacher; takes precedence over use_teacher_test.",
    )
    use_teacher_test: bool = Field(default=False, description="Label with the teacher instead of the student.")
    use_flip_test: bool = Field(
        default=False, description="Average each crop with its mirror image; doubles the network time."
    )
    margins: tuple[Margin, ...] = Field(
        default=(),
        description="Crop margins to average over, one pass each (see train.test_margin_rate); []: the checkpoint's.",
    )
    resolve_overlaps: bool = Field(
        default=False, description="Assign pixels in which masks of an image overlap in part to one of them."
    )
    refine_edges: bool = Field(
        default=False,
        description="Move mask edges to color edges; 0.1 s of CPU per box at crop 224, 150 MB per thread at crop 512.",
    )
    network_engine: NetworkEngine = Field(
        default=NetworkEngine.TORCH,
        description="What runs the network. openvino: on CPUs, in float32 or int8; needs the extra openvino.",
    )
    precision: Precision = Field(
        default=Precision.AUTO,
        description="Data type of the network; auto: bfloat16 where the device is fast at it, else float32.\n"
        "Under compat tao and with openvino, auto is float32.\n"
        "int8: with openvino, and a checkpoint from `mal-train export --int8`.",
    )


class EvaluateConfig(_TestTimeAugmentation):
    """Section `evaluate`."""

    checkpoint: str | None = Field(
        default=None,
        description="Checkpoint to evaluate on dataset.val_ann_path; builtin: the model in the package.",
    )
    checkpoint_sha256: Sha256 | None = Field(
        default=None, description="SHA-256 that the checkpoint must have (sha256sum FILE); null: any."
    )
    box_inputs: str = Field(
        default="",
        description="COCO results file with detected boxes and scores; they replace the boxes of val_ann_path.",
    )
    results_dir: str | None = Field(
        default=None, description="Output folder of `mal-train evaluate`; null: <results_dir>/evaluate."
    )
    batch_size: int = Field(default=3, ge=1, le=65_536, description="Boxes per batch.")


class InferenceConfig(_TestTimeAugmentation):
    """Section `inference`."""

    checkpoint: str | None = Field(
        default=None, description="Checkpoint to label with; builtin: the model in the package."
    )
    checkpoint_sha256: Sha256 | None = Field(
        default=None, description="SHA-256 that the checkpoint must have (sha256sum FILE); null: any."
    )
    results_dir: str | None = Field(
        default=None, description="Output folder of `mal-train inference`; null: <results_dir>/inference."
    )
    ann_path: str = Field(
        default="", description="COCO file with the boxes to label, or its address (s3://, gs://, az://, https://)."
    )
    img_dir: str = Field(default="", description="Folder of the images of ann_path, or its address.")
    box_inputs: str = Field(
        default="",
        description="COCO results file with detected boxes and scores; they replace the boxes of ann_path.",
    )
    label_dump_path: str = Field(
        default="instances_val2017_mal.json",
        description="COCO JSON file to write, or its address; a relative path is relative to the output folder.",
    )
    restart: bool = Field(
        default=False, description="Discard the results of an unfinished run instead of continuing from its journal."
    )
    engine: Literal["local", "ray"] = Field(
        default="local",
        description=(
            "ray: label on a Ray cluster (docs/distributed.md); ann_path and label_dump_path then end in .parquet."
        ),
    )
    ray_address: str = Field(
        default="",
        description=(
            "HOST:PORT of the cluster's head node, or auto: the cluster of this machine.\n"
            "Empty: a cluster of this machine alone, for this run."
        ),
    )
    ray_actors: int = Field(default=0, ge=0, le=100_000, description="Processes that label; 0: as many as fit.")
    ray_cpus_per_actor: int = Field(
        default=0,
        ge=0,
        le=1024,
        description=(
            "CPUs of each, for decoding and, without a GPU, for the network.\n"
            "0: the share of a GPU in the CPUs of its machine; without GPUs up to 4."
        ),
    )
    ray_part_boxes: int = Field(
        default=2048,
        ge=1,
        le=1_000_000,
        description="Boxes of an output file, about; a process that is lost repeats up to 16 files.",
    )
    batch_size: int = Field(default=3, ge=1, le=65_536, description="Boxes per batch.")
    load_mask: bool = Field(
        default=False, description="Read the masks of ann_path too, and report the IoU of each label with its mask."
    )
