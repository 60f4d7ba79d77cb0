"""Number ranges that fields of several sections share."""

from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Threshold = Annotated[float, Field(gt=0.0, lt=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Margin = Annotated[float, Field(ge=0.0, le=4.0)]
"""Margin m of a crop: the window is 1 + m/2 times as wide and as high as the box."""
