"""Names and licenses that checkpoints carry from one training to the next."""

from pathlib import Path

import pytest

from mal_train.kernel.checkpoint.json_tree import Tree
from mal_train.kernel.checkpoint.lineage import NOT_STATED, Lineage, average_provenance, license_of

FIRST = Lineage("deit_tiny_patch16_224.fb_in1k", "Apache-2.0")


def descendant(origin: Lineage, name: str, **stated: str) -> Lineage:
    """Returns the lineage of a training that starts from a checkpoint of a training with lineage `origin`."""
    return Lineage.from_checkpoint(
        Path("folder") / name, f"sha of {name}", {**origin.to_provenance(), "steps": 8, **stated}
    )


def test_a_third_round_still_names_the_weights_and_license_of_the_first() -> None:
    third = descendant(descendant(FIRST, "one.malckpt"), "two.malckpt")
    assert (third.starting_weights, third.license) == ("two.malckpt", "Apache-2.0")
    assert [entry["checkpoint"] for entry in third.ancestors] == ["one.malckpt", "two.malckpt"]
    assert third.ancestors[0]["starting_weights"] == FIRST.starting_weights
    assert third.ancestors[1]["sha256"] == "sha of two.malckpt"


def test_a_resumed_training_keeps_its_lineage() -> None:
    second = descendant(FIRST, "one.malckpt")
    assert Lineage.from_provenance({**second.to_provenance(), "steps": 99}) == second


@pytest.mark.parametrize(
    ("provenance", "license"),
    [
        ({}, NOT_STATED),
        ({"starting_weights_licence": "MIT"}, "MIT"),
        ({"starting_weights_licence": "MIT", "licence": "Apache-2.0"}, "Apache-2.0"),
        ({"starting_weights_licence": NOT_STATED, "licence": "Apache-2.0"}, "Apache-2.0"),
        ({"starting_weights_licence": NOT_STATED, "lineage": [{"licence": "MIT"}]}, "MIT"),
        ({"starting_weights_licence": NOT_STATED, "lineage": [{"steps": 1}]}, NOT_STATED),
    ],
)
def test_a_known_license_takes_precedence_over_an_unknown_one(provenance: dict[str, object], license: str) -> None:
    assert license_of(provenance) == license
    assert Lineage.from_checkpoint(Path("a.malckpt"), "", provenance).license == license


def test_the_mean_of_files_with_equal_provenance_keeps_it_once() -> None:
    mean = average_provenance(
        [(Path(f"{n}.malckpt"), str(n), {**FIRST.to_provenance(), "steps": 8, "licence": "MIT"}) for n in range(3)]
    )
    assert (mean["starting_weights"], mean["starting_weights_licence"], mean["licence"]) == (
        FIRST.starting_weights,
        "Apache-2.0",
        "MIT",
    )
    assert (mean["steps"], mean["mean_of_checkpoints"], len(mean["sources"])) == (8, 3, 3)


@pytest.mark.parametrize(
    ("other", "license"),
    [
        ({"starting_weights_licence": "CC-BY-NC-4.0"}, "Apache-2.0 and CC-BY-NC-4.0"),
        ({"starting_weights_licence": "CC-BY-NC-4.0", "licence": "MIT"}, "Apache-2.0 and MIT"),
        ({"lineage": [{"starting_weights_licence": "CC-BY-NC-4.0"}]}, "Apache-2.0 and CC-BY-NC-4.0"),
        ({}, f"Apache-2.0 and {NOT_STATED}"),
    ],
)
def test_a_mean_names_the_license_of_each_file(other: dict[str, Tree], license: str) -> None:
    files = [
        (Path("a.malckpt"), "1", {**FIRST.to_provenance(), "licence": "Apache-2.0"}),
        (Path("b.malckpt"), "2", other),
    ]
    assert license_of(average_provenance(files)) == license
    assert set(license_of(average_provenance(files[::-1])).split(" and ")) == set(license.split(" and "))


def test_a_mean_of_files_without_own_license_has_those_of_their_starting_weights() -> None:
    mean = average_provenance(
        [(Path(f"{name}.malckpt"), name, {"starting_weights_licence": name}) for name in ("MIT", "ISC")]
    )
    assert (mean.get("licence"), license_of(mean)) == (None, "MIT and ISC")
