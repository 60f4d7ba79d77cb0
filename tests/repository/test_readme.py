"""README, the index of the docs and the checks of pre-commit agree with the repository."""

import re
import shlex

import pytest
import yaml
from mal_client.cli.main import build_parser

from tests.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MAX_LINES = 180
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "mal_train/kernel/assets/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")),
]


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


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    assert [target for target in sorted(targets - {""}) if not (ROOT / page).parent.joinpath(target).exists()] == []


def test_the_threat_model_names_tests_that_exist() -> None:
    rows = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z_0-9]+/)+(?:test_[a-z_0-9]+\.py|[a-z_0-9]+))`", rows)
    tests = [name for name in named if (ROOT / "tests" / name.split("/")[0]).is_dir()]
    assert len(tests) > 40
    assert [name for name in tests if not any((folder / name).exists() for folder in (ROOT, ROOT / "tests"))] == []
    bare = re.findall(r"`(test_[a-z_0-9]+\.py)`", rows)
    assert bare == [], "give the folder, too"


def test_the_client_commands_of_the_pages_parse() -> None:
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if line.startswith("mal-client ")]
    assert len(commands) > 20
    # The shell replaces the variable before the command starts.
    concrete = [command.replace("$SLURM_ARRAY_TASK_ID", "0") for command in commands]
    assert [command for command in concrete if not parses(shlex.split(command, comments=True)[1:])] == []


def parses(arguments: list[str]) -> bool:
    try:
        build_parser().parse_args(arguments)
    except SystemExit:
        return False
    return True


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
