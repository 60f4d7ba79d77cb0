"""Section `tune` of the spec: the fields to search, the number of trials, their devices, and the storage."""

from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import Field, model_validator

from mal_train.core.secrets import is_secret_reference
from mal_train.core.yaml_config import Strict

Bound = Annotated[int | float, Field(ge=-1e12, le=1e12)]
GpuIndex = Annotated[int, Field(ge=0, le=1023)]


class SearchRange(Strict):
    """Values that a field may take in a trial: from `low` to `high`, or one of `choices`."""

    low: Bound | None = Field(default=None, description="Smallest value.")
    high: Bound | None = Field(default=None, description="Largest value.")
    step: Annotated[int | float, Field(gt=0, le=1e12)] | None = Field(
        default=None, description="Distance of the values; null: any value in between."
    )
    log: bool = Field(default=False, description="Search the logarithm of the value; low must be above 0.")
    choices: tuple[Any, ...] | None = Field(
        default=None, min_length=1, max_length=1000, description="The values; lists for a field that holds a list."
    )

    @model_validator(mode="after")
    def _range_or_choices(self) -> Self:
        if self.choices is not None:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("give choices, or low and high, not both")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("with log, low must be above 0, and there is no step")
        return self


class TuneConfig(Strict):
    """Section `tune`."""

    space: dict[str, SearchRange] = Field(
        default={},
        description=(
            "Fields to search, by name: {train.lr: {low: 1e-5, high: 1e-3, log: true}, model.arch: {choices: [a, b]}}."
        ),
    )
    trials: int = Field(
        default=20, ge=1, le=1_000_000, description="Trainings of the study, of all tuners and runs together."
    )
    objective: Literal["auto", "miou", "ap", "proxy"] = Field(
        default="auto",
        description="Metric of the validation set to maximize. miou; ap: AP@score; proxy: tightness times stability,\n"
        "which needs no true masks; auto: miou where the set has masks, else proxy.",
    )
    sampler: Literal["tpe", "random"] = Field(default="tpe", description="Optuna's sampler.")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of the sampler.")
    pruner: Literal["median", "halving", "none"] = Field(
        default="median",
        description="Ends unpromising trials early. median: below the median of earlier trials at the same epoch,\n"
        "from the sixth trial on; halving: not among the best quarter after n, 4n, 16n … epochs,\n"
        "with n = prune_after_epochs.",
    )
    prune_after_epochs: int = Field(default=1, ge=0, le=1_000_000, description="Epochs before a trial may be pruned.")
    devices: tuple[GpuIndex | tuple[GpuIndex, ...], ...] = Field(
        default=(),
        max_length=1024,
        description="GPU of each trial that runs at a time: [0, 1] runs two trials; [[0, 1], [2, 3]] two trials of\n"
        "two GPUs each. []: the CPU.",
    )
    cpu_trials: int = Field(
        default=1, ge=1, le=1024, description="Trials that run at a time on the CPU; they share its cores."
    )
    storage: str | None = Field(
        default=None,
        repr=False,
        description=(
            "Optuna's storage: sqlite:///FILE, journal:///FILE, postgresql://…, mysql://…, grpc://HOST:PORT (Optuna's\n"
            "server), env:NAME or file:PATH. Tuners with the same storage and study share the trials.\n"
            "null: sqlite:///<output folder>/study.db."
        ),
    )
    study: str = Field(
        default="mal", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="Name of the study in the storage."
    )
    keep_checkpoints: Literal["best", "all"] = Field(
        default="best", description="Checkpoints to keep: those of the best trial, or of all trials."
    )
    results_dir: str | None = Field(
        default=None, description="Output folder of `mal-train tune`; null: <results_dir>/tune."
    )


HIDDEN = "***"
_OF_FILES = ("sqlite", "journal")
"""Schemes whose address names a file; an "@" in it belongs to the name."""


def redacted_url(storage: str) -> str:
    """Returns the address of a storage without user, password and options, for messages and files.

    >>> redacted_url("postgresql://ann:secret@db:5432/tune?password=secret")
    'postgresql://***@db:5432/tune?***'
    >>> redacted_url("sqlite:///study.db"), redacted_url("env:STORAGE")
    ('sqlite:///study.db', 'env:STORAGE')
    """
    if is_secret_reference(storage):
        return storage
    scheme, user, place, options = _parts(storage)
    return f"{scheme}{f'{HIDDEN}@' if user else ''}{place}{f'?{HIDDEN}' if options else ''}"


def has_credentials(storage: str) -> bool:
    """Returns True if an address holds a user, a password or options, which may hold one."""
    return redacted_url(storage) != storage


def without_credentials(text: str, storage: str) -> str:
    """Returns a message of a library with the password and the options of a storage address hidden.

    >>> without_credentials("cannot log in with s%2Fcret as ann: s/cret", "mysql://ann:s%2Fcret@db/tune")
    'cannot log in with *** as ann: ***'
    """
    _, user, _, options = _parts(storage)
    secrets = {user.partition(":")[2], *(option.partition("=")[2] for option in options.split("&"))}
    # The longest first: one may be a part of another.
    for secret in sorted((secrets | set(map(unquote, secrets))) - {""}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _parts(storage: str) -> tuple[str, str, str, str]:
    """Splits `scheme://user:password@host/path?options` into scheme with ://, user, place and options.

    A password may hold any character but "@", so everything before the last "@" counts as user and password.
    """
    scheme, separator, rest = storage.partition("://")
    if not separator:
        scheme, rest = "", storage
    user, _, place = ("", "", rest) if scheme.partition("+")[0] in _OF_FILES else rest.rpartition("@")
    place, _, options = place.partition("?")
    return scheme + separator, user, place, options
