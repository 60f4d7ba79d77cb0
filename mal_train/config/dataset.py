"""Section `dataset`: which annotations and images, and how large their crops are."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mal_train.core.yaml_config import Strict


class DatasetConfig(Strict):
    """Which annotations and images."""

    type: Literal["coco"] = Field(default="coco", description="Format of the annotation files.")
    train_ann_path: str = Field(
        default="",
        description="COCO JSON to train on; boxes are enough, train.supervision tells whether masks are used.",
    )
    train_img_dir: str = Field(default="", description="Folder of its images.")
    val_ann_path: str = Field(
        default="", description="COCO JSON to validate and evaluate on; empty trains without validation."
    )
    val_img_dir: str = Field(default="", description="Folder of its images.")
    load_mask: bool = Field(
        default=True, description="Read the masks of the validation file, for mIoU and AP and to fit thresholds."
    )
    min_obj_size: float = Field(default=2048.0, ge=0.0, description="Train on boxes with an area above this many px².")
    max_obj_size: float = Field(default=1e10, gt=0.0, description="Train on boxes with an area below this many px².")
    crop_size: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Side of the square network input in px, a multiple of the patch size.\n"
            "null: 512, or 504 where patches have 14 px (vit-mae-huge/14)."
        ),
    )
    test_crop_size: int | None = Field(
        default=None, ge=1, description="Side of the crop in validation and labeling; null: crop_size."
    )
    num_workers_per_gpu: int = Field(
        default=2, ge=0, description="Processes that prepare training crops; 0: the main process."
    )

    @model_validator(mode="after")
    def _sizes_in_order(self) -> Self:
        if self.min_obj_size >= self.max_obj_size:
            raise ValueError(f"min_obj_size {self.min_obj_size} must be below max_obj_size {self.max_obj_size}")
        return self
