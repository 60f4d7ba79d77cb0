"""Section `model` of the spec: the network and its teacher."""

from typing import Annotated

from pydantic import Field

from mal_train.config.ranges import BelowOne, Fraction
from mal_train.core.settings import MAX_SCALE_RATIO, MAX_SIZES
from mal_train.core.yaml_config import Strict


class NetworkConfig(Strict):
    """Section `model`."""

    arch: str = Field(
        default="vit-mae-base/16",
        description="Backbone. vit-deit-small/16 has starting weights that are free for any use (Apache-2.0).",
    )
    frozen_stages: tuple[Annotated[int, Field(ge=-1, le=1000)], ...] = Field(
        default=(-1,),
        description="Backbone stages to freeze: 0 is the patch embedding, i is block i; -1 freezes none.",
    )
    mask_head_num_convs: int = Field(
        default=4, ge=1, le=MAX_SIZES["mask_head_num_convs"], description="Convolution layers of the mask head."
    )
    mask_head_hidden_channel: int = Field(
        default=256, ge=1, le=MAX_SIZES["mask_head_hidden_channel"], description="Hidden channels of the mask head."
    )
    mask_head_out_channel: int = Field(
        default=256,
        ge=1,
        le=MAX_SIZES["mask_head_out_channel"],
        description="Channels of the mask head's pixel features and of the RoI head's filters.",
    )
    teacher_momentum: Fraction = Field(
        default=0.996, description="Momentum of the teacher, an exponential moving average of the student; per step."
    )
    not_adjust_scale: bool = Field(
        default=False, description="Use one feature scale for boxes of all sizes; false: a scale per size class."
    )
    mask_scale_ratio_pre: int = Field(
        default=1, ge=1, le=MAX_SIZES["mask_scale_ratio_pre"], description="Upsampling factor before the mask head."
    )
    mask_scale_ratio: float = Field(
        default=2.0, gt=0.0, le=MAX_SCALE_RATIO, description="Upsampling factor inside the mask head."
    )
    vit_dpr: BelowOne = Field(
        default=0.0, description="Stochastic depth rate of the last block; it grows linearly from 0 at the first block."
    )
