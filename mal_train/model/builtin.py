"""The model that comes with the package, so that photographs can be labelled without training one first.

A checkpoint may be named `builtin` wherever a file of one may: `resolve` is the only place that knows.
Its card, mal_train/models/README.md, says what it was trained on and what it gets wrong.
"""

from importlib import resources
from pathlib import Path

from mal_train.errors import ConfigError

BUILTIN = "builtin"
FILE = "photographs_deit_tiny.malckpt"


def resolve(checkpoint: str | Path) -> Path:
    """The file that `checkpoint` names: itself, or the model in the package for `builtin`.

    Raises:
        ConfigError: the package was installed without it.
    """
    if str(checkpoint) != BUILTIN:
        return Path(checkpoint)
    path = Path(str(resources.files("mal_train.models").joinpath(FILE)))
    if not path.is_file():
        raise ConfigError(f"checkpoint: builtin: {path} is not there; install the package anew, or name a file")
    return path
