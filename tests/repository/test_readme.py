"""The README's tree and commands are those of the repository."""

import re

from tests.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_two_commands_are_verbs_of_the_makefile() -> None:
    block = README.split("```", 2)[1]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = block.split("\n")[1:-1]
    assert commands == ["make demo", "make test"]
    for command in commands:
        assert re.search(rf"^{command.removeprefix('make ')}:", makefile, flags=re.MULTILINE)


def test_the_index_of_the_docs_names_every_page_and_no_other() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"\]\(([^)]+)\)", index) if "/" not in name}
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert "docs/README.md" in README
