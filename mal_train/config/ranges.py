"""Ranges of numbers that fields of several sections share."""

from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Threshold = Annotated[float, Field(gt=0.0, lt=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Margin = Annotated[float, Field(ge=0.0, le=4.0)]
"""Growth of a box, as a share of its sides."""
