"""docs/spec.md matches the schema."""

from mal_train.commands.spec_table import fields_of, page
from mal_train.config.spec import Spec
from mal_train.core.yaml_config import field_paths
from tests.paths import ROOT


def test_the_page_is_current() -> None:
    committed = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    assert committed == page(), "run: python -m mal_train.commands.spec_table > docs/spec.md"


def test_every_field_has_a_row_with_its_bounds() -> None:
    assert [name for name, _ in fields_of(Spec)] == list(field_paths(Spec))
    rows = {line.split("`")[1]: line for line in page().splitlines() if line.startswith("| `")}
    assert "| `10` | ≥ 1, ≤ 1000000 |" in rows["train.num_epochs"]
    assert "≥ 0, ≤ 4" in rows["train.margin_rate"]
    assert "`none` · `tao`" in rows["compat"]
    assert "> 0, < 1" in rows["train.mask_thres"]
