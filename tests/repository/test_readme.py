"""README, the index of the docs and the checks of pre-commit agree with the repository."""

import re

import pytest
import yaml

from tests.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MAX_LINES = 180


def test_the_first_two_commands_are_verbs_of_the_makefile() -> None:
    commands = README.split("```", 2)[1].split("\n")[1:-1]
    assert commands == ["make demo", "make test"]
    for command in commands:
        assert re.search(rf"^{command.removeprefix('make ')}:", MAKEFILE, flags=re.MULTILINE)


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_the_table_of_folders_names_folders_that_exist() -> None:
    table = README.partition("## Folders")[2].partition("\n## ")[0]
    folders = re.findall(r"^\| `([\w/]+)", table, flags=re.MULTILINE)
    assert len(folders) > 8
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    assert [target for target in sorted(targets - {""}) if not (ROOT / page).parent.joinpath(target).exists()] == []


def test_the_index_of_the_docs_names_every_page_and_no_other() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"\]\(([^)]+)\)", index) if "/" not in name}
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert "docs/README.md" in README


def test_pre_commit_runs_the_checks_of_the_makefile() -> None:
    recipe = MAKEFILE.partition("\ncheck:")[2].partition("\n\n")[0]
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()[1:]]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    assert hooks == [command.replace("PYTHON=$(PYTHON) ", "") for command in commands]
