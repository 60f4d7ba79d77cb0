"""Finds the model that comes with the package, which labels photographs without any training.

Wherever a checkpoint file may be named, `builtin` names this model; `resolve` is the only place that knows. Its model
card is mal_train/kernel/assets/README.md. Imports no torch.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from mal_train.core.errors import ConfigError
from mal_train.kernel.checkpoint.trust import TrustPolicy

V = TypeVar("V")

BUILTIN = "builtin"
FILE = "photographs_deit_tiny.malckpt"
INT8_FILE = "photographs_deit_tiny.int8.json"
SHA256 = "2d87fb0ca7bd66334e3be9dd88418a5bb6a25de3148b17ab27f8ad13eabc2e42"
CARD: Mapping[str, str] = {
    "starting_weights": "deit_tiny_patch16_224.fb_in1k, through small-cpu, -round2, -round3 and -round4",
    "starting_weights_licence": "Apache-2.0",
}
"""Provenance of the file, as its model card states it."""


def resolve(checkpoint: str | Path) -> Path:
    """Returns the path of a checkpoint; for `builtin`, that of the model in the package.

    Raises:
        ConfigError: the installed package lacks the model.
    """
    if str(checkpoint) != BUILTIN:
        return Path(checkpoint)
    path = Path(str(resources.files("mal_train.kernel.assets").joinpath(FILE)))
    if not path.is_file():
        raise ConfigError(f"checkpoint: builtin: {path} does not exist; reinstall the package or name a file")
    return path


def trust_for(checkpoint: str | Path, trust: TrustPolicy) -> TrustPolicy:
    """Returns the policy for a checkpoint: the model in the package is pinned by its SHA-256 instead of a signature."""
    if str(checkpoint) != BUILTIN or not trust.signers:
        return trust
    return TrustPolicy(trust.sha256 or (SHA256,))


def int8_calibration() -> dict[str, Any]:
    """Returns the ranges with which the model in the package computes in int8, as `Int8Calibration.to_dict` does.

    They are a file of their own: the file of the model keeps its SHA-256.
    """
    text = resources.files("mal_train.kernel.assets").joinpath(INT8_FILE).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def with_card(sha256: str, provenance: Mapping[str, V]) -> dict[str, V | str]:
    """Returns a checkpoint's provenance, completed from `CARD` if the checkpoint is the built-in model."""
    return {**provenance, **CARD} if sha256 == SHA256 else dict(provenance)
