"""The model that comes with the package, so that photographs can be labeled without training one first.

A checkpoint may be named `builtin` wherever a file of one may: `resolve` is the only place that knows.
Its card, mal_train/kernel/assets/README.md, says what it was trained on and what it gets wrong. Imports no torch.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TypeVar

from mal_train.core.errors import ConfigError

V = TypeVar("V")

BUILTIN = "builtin"
FILE = "photographs_deit_tiny.malckpt"
SHA256 = "1d28fddb608ef969a5481170874ad287afa53de58b27b3860cf376776a14529d"
CARD: Mapping[str, str] = {
    "starting_weights": "deit_tiny_patch16_224.fb_in1k, through small-cpu, -round2, -round3 and -round4",
    "starting_weights_licence": "Apache-2.0",
}
"""What the card knows and the file itself does not: it was written before a checkpoint told of those behind it."""


def resolve(checkpoint: str | Path) -> Path:
    """The file that `checkpoint` names: itself, or the model in the package for `builtin`.

    Raises:
        ConfigError: the package was installed without it.
    """
    if str(checkpoint) != BUILTIN:
        return Path(checkpoint)
    path = Path(str(resources.files("mal_train.kernel.assets").joinpath(FILE)))
    if not path.is_file():
        raise ConfigError(f"checkpoint: builtin: {path} is not there; install the package anew, or name a file")
    return path


def completed(sha256: str, provenance: Mapping[str, V]) -> dict[str, V | str]:
    """A checkpoint's provenance; for the model in the package, with what its card says beside it."""
    return {**provenance, **CARD} if sha256 == SHA256 else dict(provenance)
