"""Names and licenses that checkpoints carry from one training to the next."""

from pathlib import Path

import pytest

from mal_train.kernel.checkpoint.json_tree import Tree
from mal_train.kernel.checkpoint.lineage import NOT_STATED, Lineage, license_of, mean_of

FIRST = Lineage("deit_tiny_patch16_224.fb_in1k", "Apache-2.0")


def following(origin: Lineage, name: str, **stated: str) -> Lineage:
    """What starts from a file of a training that started from `origin`."""
    return Lineage.from_checkpoint(Path("folder") / name, f"sha of {name}", {**origin.told(), "steps": 8, **stated})


def test_a_third_round_still_tells_of_the_first_ones_weights_and_license() -> None:
    third = following(following(FIRST, "one.malckpt"), "two.malckpt")
    assert (third.starting_weights, third.license) == ("two.malckpt", "Apache-2.0")
    assert [step["checkpoint"] for step in third.lineage] == ["one.malckpt", "two.malckpt"]
    assert third.lineage[0]["starting_weights"] == FIRST.starting_weights
    assert third.lineage[1]["sha256"] == "sha of two.malckpt"


def test_going_on_from_a_checkpoint_keeps_what_it_started_from() -> None:
    second = following(FIRST, "one.malckpt")
    assert Lineage.stored({**second.told(), "steps": 99}) == second


@pytest.mark.parametrize(
    ("provenance", "licence"),
    [
        ({}, NOT_STATED),
        ({"starting_weights_licence": "MIT"}, "MIT"),
        ({"starting_weights_licence": "MIT", "licence": "Apache-2.0"}, "Apache-2.0"),
        ({"starting_weights_licence": NOT_STATED, "licence": "Apache-2.0"}, "Apache-2.0"),
        ({"starting_weights_licence": NOT_STATED, "lineage": [{"licence": "MIT"}]}, "MIT"),
        ({"starting_weights_licence": NOT_STATED, "lineage": [{"steps": 1}]}, NOT_STATED),
    ],
)
def test_a_license_that_is_known_is_not_given_up_for_one_that_is_not(
    provenance: dict[str, object], license: str
) -> None:
    assert license_of(provenance) == license
    assert Lineage.from_checkpoint(Path("a.malckpt"), "", provenance).license == license


def test_the_mean_of_files_alike_says_each_thing_once() -> None:
    mean = mean_of([(Path(f"{n}.malckpt"), str(n), {**FIRST.told(), "steps": 8, "licence": "MIT"}) for n in range(3)])
    assert (mean["starting_weights"], mean["starting_weights_licence"], mean["licence"]) == (
        FIRST.starting_weights,
        "Apache-2.0",
        "MIT",
    )
    assert (mean["steps"], mean["mean_of_checkpoints"], len(mean["sources"])) == (8, 3, 3)


@pytest.mark.parametrize(
    ("other", "licence"),
    [
        ({"starting_weights_licence": "CC-BY-NC-4.0"}, "Apache-2.0 and CC-BY-NC-4.0"),
        ({"starting_weights_licence": "CC-BY-NC-4.0", "licence": "MIT"}, "Apache-2.0 and MIT"),
        ({"lineage": [{"starting_weights_licence": "CC-BY-NC-4.0"}]}, "Apache-2.0 and CC-BY-NC-4.0"),
        ({}, f"Apache-2.0 and {NOT_STATED}"),
    ],
)
def test_a_mean_does_not_give_all_its_files_the_license_that_one_of_them_states(
    other: dict[str, Tree], license: str
) -> None:
    files = [(Path("a.malckpt"), "1", {**FIRST.told(), "licence": "Apache-2.0"}), (Path("b.malckpt"), "2", other)]
    assert license_of(mean_of(files)) == license
    assert set(license_of(mean_of(files[::-1])).split(" and ")) == set(license.split(" and "))


def test_a_mean_of_files_that_state_no_license_of_their_own_has_those_they_started_from() -> None:
    mean = mean_of([(Path(f"{name}.malckpt"), name, {"starting_weights_licence": name}) for name in ("MIT", "ISC")])
    assert (mean.get("licence"), license_of(mean)) == (None, "MIT and ISC")
