"""Section `model`: which network, and how its teacher follows it."""

from typing import Annotated

from pydantic import Field

from mal_train.config.ranges import BelowOne, Fraction
from mal_train.core.yaml_config import Strict


class NetworkConfig(Strict):
    """Section `model`."""

    arch: str = Field(
        default="vit-mae-base/16", description="Backbone. vit-deit-small/16 starts from freely usable weights."
    )
    frozen_stages: tuple[Annotated[int, Field(ge=-1)], ...] = Field(
        default=(-1,), description="Stages that stay as they are: 0 the patch embedding, i the i-th block, -1 none."
    )
    mask_head_num_convs: int = Field(default=4, ge=1, description="Convolutions of the mask head.")
    mask_head_hidden_channel: int = Field(default=256, ge=1, description="Width inside the mask head.")
    mask_head_out_channel: int = Field(
        default=256, ge=1, description="Channels that the mask head and the RoI head meet in."
    )
    teacher_momentum: Fraction = Field(default=0.996, description="Share of the teacher that stays at every step.")
    not_adjust_scale: bool = Field(default=False, description="true: one feature scale for boxes of every size.")
    mask_scale_ratio_pre: int = Field(default=1, ge=1, description="Upsampling before the mask head.")
    mask_scale_ratio: float = Field(default=2.0, gt=0.0, description="Upsampling inside the mask head.")
    vit_dpr: BelowOne = Field(
        default=0.0, description="Largest rate of stochastic depth, growing linearly from 0 over the blocks."
    )
