"""Section `dataset` of the spec: annotation files, image folders, and the crop size."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mal_train.core.settings import MAX_CROP_SIZE, RotatedBoxes, RowRules
from mal_train.core.yaml_config import Strict


class DatasetConfig(Strict):
    """Section `dataset`: annotation files, image folders, and the crop size."""

    type: Literal["coco"] = Field(default="coco", description="Format of the annotation files.")
    train_ann_path: str = Field(
        default="",
        description=(
            "COCO file with the training boxes, or its address (s3://, gs://, az://, https://).\n"
            "Masks in it are used only if train.supervision says so."
        ),
    )
    train_img_dir: str = Field(
        default="", description="Folder of the training images, or its address (s3://BUCKET/PREFIX)."
    )
    val_ann_path: str = Field(
        default="",
        description="COCO file for validation and evaluation, or its address; empty: train without validation.\n"
        "Without masks in it, validation measures how tight and how stable the masks of its boxes are.",
    )
    val_img_dir: str = Field(default="", description="Folder of the validation images, or its address.")
    coco_url_hosts: tuple[str, ...] = Field(
        default=(),
        max_length=1000,
        description=(
            "Fetch each image from the coco_url of its row, from these hosts only, in place of the image folders;\n"
            'also for inference.ann_path. "*": every host with a public address, by https. [] = read the folders.'
        ),
    )
    crowd_as_objects: bool = Field(
        default=False,
        description="Read annotations with iscrowd 1 as single objects, also those of inference.ann_path; CVAT sets\n"
        "it for every mask. false: crowd regions, which are never trained on, never counted, and copied.",
    )
    rotated_boxes: Literal["refuse", "upright"] = Field(
        default="refuse",
        description="Rotated boxes, as CVAT exports them (attributes.rotation), also those of inference.ann_path.\n"
        "refuse: excluded, and no mask; upright: the smallest upright box around each.",
    )
    load_mask: bool = Field(
        default=True,
        description="Read the masks of val_ann_path, for mIoU, AP and threshold fitting; false: no validation.",
    )
    min_obj_size: float = Field(
        default=2048.0, ge=0.0, le=1e12, description="Lower bound of the box area for training, in px²; exclusive."
    )
    max_obj_size: float = Field(
        default=1e10, gt=0.0, le=1e12, description="Upper bound of the box area for training, in px²; exclusive."
    )
    crop_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CROP_SIZE,
        description=(
            "Side length of the square network input, in px; a multiple of the patch size.\n"
            "null: 512, or 504 for patches of 14 px (vit-mae-huge/14)."
        ),
    )
    test_crop_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CROP_SIZE,
        description="Side length of the crop in validation and labeling, in px; null: crop_size.",
    )
    num_workers_per_gpu: int = Field(
        default=2,
        ge=0,
        le=1024,
        description="Data loader processes per training process; 0: load in the training process.",
    )

    @property
    def row_rules(self) -> RowRules:
        """Rules by which rows of the annotation files are read."""
        return RowRules(self.crowd_as_objects, RotatedBoxes(self.rotated_boxes))

    @model_validator(mode="after")
    def _sizes_in_order(self) -> Self:
        if self.min_obj_size >= self.max_obj_size:
            raise ValueError(f"min_obj_size {self.min_obj_size} must be below max_obj_size {self.max_obj_size}")
        return self
