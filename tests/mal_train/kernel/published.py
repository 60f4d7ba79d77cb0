"""The published networks of the reference material: names, shapes, and the weights that produced its outputs."""

import importlib.util
import json
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.reference import fixture

TAO = "e_statedict_tao_vit_deit_tiny16.json"
NVLABS = "e_statedict_nv_vit_deit_tiny16.json"
TAO6 = "e_statedict_tao6_vit_deit_tiny16.json"
TAO6_FAN = "e_statedict_tao6_fan_tiny_12_p16_224.json"
TAO6_FAN_HYBRID = "e_statedict_tao6_fan_tiny_8_p4_hybrid.json"


def _recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("detweights", fixture("detweights.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state_dict(layout: str) -> dict[str, Tensor]:
    """Returns the weights of a published network under its own names."""
    recipe = _recipe()
    shapes: dict[str, tuple[list[int], str]] = json.loads(fixture(layout).read_text())["state_dict"]
    return {
        name: torch.from_numpy(np.asarray(recipe.det(name, shape, "float" in dtype)))
        for name, (shape, dtype) in shapes.items()
    }


def smooth_input(seed: int, crops: int, side: int) -> Tensor:
    """Returns the normalized crops float32 (N, 3, S, S) of the stored forward passes."""
    crops_NCHW: Any = _recipe().smooth_input(seed, crops, side, side)
    return torch.from_numpy(crops_NCHW)
