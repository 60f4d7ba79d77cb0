"""Where weights come from: names and licenses that a checkpoint's provenance carries from one training to the next.

A license that is known is never given up for one that is not: what a file does not state is said beside it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mal_train.kernel.checkpoint.json_tree import Tree

NOT_STATED = "not stated in the file; look where it came from"
_STEP = (
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
"""What of a file's provenance is told of it in the files that come from it."""


@dataclass(frozen=True)
class Lineage:
    """What a training starts from.

    Attributes:
        starting_weights: name, without folders.
        license: of these weights, an SPDX name, or what is known instead of one.
        lineage: the checkpoints of ours that lie behind them, the oldest first; each as `lineage_entry` tells it.
    """

    starting_weights: str
    license: str
    lineage: tuple[Tree, ...] = ()

    def told(self) -> dict[str, Tree]:
        """The fields of a provenance that say so."""
        told: dict[str, Tree] = {
            "starting_weights": self.starting_weights,
            "starting_weights_licence": self.license,
        }
        return {**told, "lineage": list(self.lineage)} if self.lineage else told

    @classmethod
    def stored(cls, provenance: Mapping[str, Tree]) -> "Lineage":
        """Inverse of `told`: what a training that goes on from a checkpoint once started from."""
        return cls(
            str(provenance.get("starting_weights", "not stated")),
            str(provenance.get("starting_weights_licence", NOT_STATED)),
            _lineage(provenance),
        )

    @classmethod
    def from_checkpoint(cls, path: Path, sha256: str, provenance: Mapping[str, Tree]) -> "Lineage":
        """That of a training which starts from the weights of a file of ours."""
        return cls(path.name, license_of(provenance), (*_lineage(provenance), lineage_entry(path, sha256, provenance)))


def license_of(provenance: Mapping[str, Tree]) -> str:
    """Of the weights of a file of ours: its own, else that of what it started from, else of what lies further back."""
    stated = [provenance.get("licence"), provenance.get("starting_weights_licence")]
    for step in reversed(_lineage(provenance)):
        if isinstance(step, dict):
            stated += [step.get("licence"), step.get("starting_weights_licence")]
    known = [str(license) for license in stated if license and license != NOT_STATED]
    return known[0] if known else NOT_STATED


def lineage_entry(path: Path, sha256: str, provenance: Mapping[str, Tree]) -> dict[str, Tree]:
    """One file, as the provenance of what comes from it tells it; its own lineage left out."""
    own = {"checkpoint": path.name, "sha256": sha256}
    return {name: value for name, value in {**provenance, **own}.items() if name in _STEP}


def mean_of(files: Sequence[tuple[Path, str, Mapping[str, Tree]]]) -> dict[str, Tree]:
    """The provenance of the mean of several checkpoints: (path, SHA-256, provenance) of each.

    What is the same in all of them stays; what is not is told of each under `sources`. Licenses that differ are all
    named; where one file states its own, `license` names that of each, so that no file speaks for another.
    """
    first = files[0][2]
    same = {name: value for name, value in first.items() if all(other.get(name) == value for _, _, other in files[1:])}
    licenses = _joined(license_of({**provenance, "licence": None}) for _, _, provenance in files)
    names = _joined(str(provenance.get("starting_weights", "not stated")) for _, _, provenance in files)
    sources: list[Tree] = [
        {**lineage_entry(path, sha256, provenance), "lineage": list(_lineage(provenance))}
        for path, sha256, provenance in files
    ]
    is_stated = any(provenance.get("licence") for _, _, provenance in files)
    return {
        **same,
        "starting_weights": names,
        "starting_weights_licence": licenses,
        **({"licence": _joined(license_of(provenance) for _, _, provenance in files)} if is_stated else {}),
        "mean_of_checkpoints": len(files),
        "sources": sources,
    }


def _lineage(provenance: Mapping[str, Tree]) -> tuple[Tree, ...]:
    stored = provenance.get("lineage")
    return tuple(stored) if isinstance(stored, list) else ()


def _joined(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))
