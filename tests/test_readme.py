"""The README's tree and commands are those of the repository."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("mal_train", "mal_server", "clients/mal_client", "clients/integrations", "benchmarks")


def listed() -> set[str]:
    """Paths of the tree block: folders stand at the margin, their files below them."""
    block = README.split("## The tree", 1)[1].split("```", 2)[1]
    found: set[str] = set()
    folder = ""
    for line in block.strip().splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            found.add(folder + name)
        else:
            folder = name
    return found


def test_the_tree_names_every_module_and_no_other() -> None:
    modules = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert {name for name in listed() if name.endswith(".py")} == modules


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
