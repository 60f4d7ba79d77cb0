"""Checks the prose of the repository; `make check` runs it: `python -m tests.repository.prose [PATH ...]`.

Docstrings begin with a verb or a noun phrase, and no file uses a word that the field does not use (docs/glossary.md has
the field's words). A line that must name a former option or setting ends with the comment `former name`.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

OPENINGS = ("How", "What", "When", "Where", "Whether", "Which", "Who", "Whom", "Whose", "Why")
WORDS = {
    "anew": "again",
    "company": "other requests",
    "debt": "credit",
    "figure": "metric or number",
    "figures": "metrics or numbers",
    "lane": "queue",
    "lanes": "queues",
    "mend": "fix",
    "mended": "fixed",
    "mends": "fixes",
    "papers": "certificates",
    "patience": "timeout, aging or retry budget",
    "people": "users or clients",
    "picture": "image",
    "pictures": "images",
    "rehearse": "verify",
    "rehearsal": "verification",
    "somebody": "a client",
    "so many": "n",
    "told": "a message, a log line, or given",
    "whoever": "the client that",
    "whom": "a plainer sentence",
}
EXEMPT_LINE = "former name"
EXEMPT = ("CHANGELOG.md", "LICENSE", "tests/repository/prose.py", "tests/repository/test_prose.py", "docs/experiments/")
SUFFIXES = {
    ".cfg",
    ".conf",
    ".css",
    ".html",
    ".js",
    ".md",
    ".proto",
    ".py",
    ".service",
    ".sh",
    ".toml",
    ".yaml",
    ".yml",
}
NAMES = {"Dockerfile", "Makefile", "run"}

# A letter before or after makes another word; an underscore does not, so names are read as words. <figure> is HTML.
_WORD = re.compile(
    r"(?<![a-z<])(?<!</)(" + "|".join(sorted(WORDS, key=len, reverse=True)) + r")(?![a-z])", re.IGNORECASE
)


def docstring_openings(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and first word of each docstring, also of attributes, that begins with a question word."""
    for node in ast.walk(ast.parse(source)):
        # A string as a statement is a docstring of what is before it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            opening = re.split(r"[\s,.:]", node.value.value.lstrip(), maxsplit=1)[0]
            if opening in OPENINGS:
                yield node.lineno, opening


def listed_words(text: str) -> Iterator[tuple[int, str]]:
    """Yields the line and spelling of each use of a word in `WORDS`."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.rstrip().endswith(EXEMPT_LINE):
            yield from ((number, found.lower()) for found in _WORD.findall(line))


def findings(path: Path, name: str) -> Iterator[str]:
    """Yields one line for each fault of a file, in the form that editors and compilers use."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for line, opening in docstring_openings(text):
            yield f"{name}:{line}: docstring begins with {opening}; begin with a verb (Returns) or a noun"
    for line, word in listed_words(text):
        yield f"{name}:{line}: {word}; write {WORDS[word]}"


def checked_files(below: list[str]) -> Iterator[str]:
    """Yields the tracked files with prose, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "--", *below], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        path = Path(name)
        is_generated = path.stem.endswith(("_pb2", "_pb2_grpc"))
        if (path.suffix in SUFFIXES or path.name in NAMES) and not is_generated and not name.startswith(EXEMPT):
            yield name


def main(below: list[str]) -> int:
    """Prints every finding; returns 1 when there is one."""
    found = [line for name in checked_files(below) for line in findings(ROOT / name, name)]
    print("\n".join(found) if found else "prose: no findings")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
