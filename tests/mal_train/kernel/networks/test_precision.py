"""Names of number formats by which results are compared."""

import pytest
import torch

from mal_train.kernel.networks import precision


@pytest.mark.parametrize(
    ("dtype", "has_dot_product", "name"),
    [
        (torch.float32, False, "float32"),
        (torch.bfloat16, True, "bfloat16"),
        (torch.int8, True, "int8"),
        (torch.int8, False, "int8_reduced_range"),
    ],
)
def test_int8_of_two_kinds_of_cpu_has_two_names(
    dtype: torch.dtype, has_dot_product: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_int8_dot_product", lambda: has_dot_product)
    assert precision.reported(dtype) == name
