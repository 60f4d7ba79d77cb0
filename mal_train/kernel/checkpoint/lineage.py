"""Carries names and licenses of starting weights from one training to the next, in the provenance of checkpoints.

A known license is never replaced by an unknown one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mal_train.kernel.checkpoint.json_tree import Tree

NOT_STATED = "not stated in the file; look where it came from"
_ENTRY_FIELDS = (
    "checkpoint",
    "sha256",
    "starting_weights",
    "starting_weights_licence",
    "licence",
    "epochs",
    "steps",
    "supervision",
    "network",
    "mean_of_checkpoints",
    "sources",
)
"""Fields of a checkpoint's provenance that are copied into the lineage of its descendants."""


@dataclass(frozen=True)
class Lineage:
    """The starting weights of a training and the checkpoints that they descend from.

    Attributes:
        starting_weights: name, without folders.
        license: SPDX name of the license of these weights, or a sentence if there is none.
        ancestors: checkpoints of this project that the weights descend from, oldest first; see `lineage_entry`.
    """

    starting_weights: str
    license: str
    ancestors: tuple[Tree, ...] = ()

    def to_provenance(self) -> dict[str, Tree]:
        """Returns the fields of a checkpoint's provenance."""
        fields: dict[str, Tree] = {
            "starting_weights": self.starting_weights,
            "starting_weights_licence": self.license,
        }
        return {**fields, "lineage": list(self.ancestors)} if self.ancestors else fields

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Tree]) -> "Lineage":
        """Inverse of `to_provenance`: the lineage of a training that is resumed from a checkpoint."""
        return cls(
            str(provenance.get("starting_weights", "not stated")),
            str(provenance.get("starting_weights_licence", NOT_STATED)),
            _ancestors(provenance),
        )

    @classmethod
    def from_checkpoint(cls, path: Path, sha256: str, provenance: Mapping[str, Tree]) -> "Lineage":
        """Returns the lineage of a training that starts from the weights of a checkpoint."""
        ancestors = (*_ancestors(provenance), lineage_entry(path, sha256, provenance))
        return cls(path.name, license_of(provenance), ancestors)


def license_of(provenance: Mapping[str, Tree]) -> str:
    """Returns the first known license among the checkpoint, its starting weights and its ancestors, latest first.

    Returns NOT_STATED if none is known.
    """
    stated = [provenance.get("licence"), provenance.get("starting_weights_licence")]
    for entry in reversed(_ancestors(provenance)):
        if isinstance(entry, dict):
            stated += [entry.get("licence"), entry.get("starting_weights_licence")]
    known = [str(license) for license in stated if license and license != NOT_STATED]
    return known[0] if known else NOT_STATED


def lineage_entry(path: Path, sha256: str, provenance: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns the entry of a checkpoint in the lineage of its descendants, without the checkpoint's own lineage."""
    own = {"checkpoint": path.name, "sha256": sha256}
    return {name: value for name, value in {**provenance, **own}.items() if name in _ENTRY_FIELDS}


def average_provenance(files: Sequence[tuple[Path, str, Mapping[str, Tree]]]) -> dict[str, Tree]:
    """Returns the provenance of a checkpoint whose weights are the mean of several checkpoints.

    A field with the same value in all of them is kept; `sources` lists the fields of each. Different names and licenses
    of starting weights are joined. If at least one checkpoint states its own license, `licence` joins those of all.

    Args:
        files: path, SHA-256 and provenance of each checkpoint.
    """
    first = files[0][2]
    shared = {
        name: value for name, value in first.items() if all(other.get(name) == value for _, _, other in files[1:])
    }
    licenses = _join_unique(license_of({**provenance, "licence": None}) for _, _, provenance in files)
    names = _join_unique(str(provenance.get("starting_weights", "not stated")) for _, _, provenance in files)
    sources: list[Tree] = [
        {**lineage_entry(path, sha256, provenance), "lineage": list(_ancestors(provenance))}
        for path, sha256, provenance in files
    ]
    is_stated = any(provenance.get("licence") for _, _, provenance in files)
    return {
        **shared,
        "starting_weights": names,
        "starting_weights_licence": licenses,
        **({"licence": _join_unique(license_of(provenance) for _, _, provenance in files)} if is_stated else {}),
        "mean_of_checkpoints": len(files),
        "sources": sources,
    }


def _ancestors(provenance: Mapping[str, Tree]) -> tuple[Tree, ...]:
    stored = provenance.get("lineage")
    return tuple(stored) if isinstance(stored, list) else ()


def _join_unique(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))
