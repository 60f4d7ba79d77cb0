"""The flags of a mask are the same in Python and on the wire."""

from mal.v1 import types_pb2

from mal_train.core.masks.flags import FLAG_DESCRIPTIONS, Flag
from tests.paths import ROOT


def test_flags_have_the_names_and_the_order_of_the_wire() -> None:
    _, *wire = types_pb2.MaskFlag.keys()  # the first one is UNSPECIFIED
    assert [f"MASK_FLAG_{flag}" for flag in Flag] == wire


def test_each_flag_is_described_for_users_and_in_the_docs_of_the_proto() -> None:
    assert list(FLAG_DESCRIPTIONS) == list(Flag)
    page = (ROOT / "docs" / "clients.md").read_text()
    assert all(f"\n| `{flag}` | " in page for flag in Flag)
    lines = (ROOT / "protos" / "mal" / "v1" / "types.proto").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith("MASK_FLAG_"):
            assert lines[number - 1].strip().startswith("// ")
