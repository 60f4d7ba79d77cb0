"""Generates docs/reliability.md from docs/promises.jsonl.

`python -m tests.repository.reliability_page > docs/reliability.md`, or `make promises` with a run of the tests.
"""

import itertools
import sys
from collections.abc import Sequence

from tests.repository.promises import TOPICS, Row, load

HEADER = """# Promises and their tests

Each row is a claim about the behavior of the project, the test that fails where the claim is not true, and what that
test measured in its last recorded run. The page is generated from `docs/promises.jsonl`, which the tests write: a test
that passes replaces its row when `MAL_PROMISES` names that file. `make promises` records the short forms and writes the
page.

`pytest TEST` repeats a row in its short form, `MAL_CHAOS=full pytest TEST` in its full form. The short forms run in
`make test` (those that take minutes, in `make test-slow`) and assert no time; `make chaos` runs the full forms.
"""


def page(rows: Sequence[Row]) -> str:
    """Returns the text of docs/reliability.md."""
    return HEADER + "".join(_section(topic, [row for row in rows if row.topic == topic]) for topic in TOPICS)


def _section(topic: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [_line(list(group)) for _, group in itertools.groupby(rows, lambda row: row.promise)]
    return f"\n## {topic.capitalize()}\n\n| promise | test | measured | run |\n|---|---|---|---|\n{''.join(lines)}"


def _line(cases: Sequence[Row]) -> str:
    """Returns the line of one promise, whose test may have several cases."""
    measured = "; ".join(filter(None, map(_measured, cases)))
    holds = "holds" if len(cases) == 1 else f"holds in {len(cases)} cases"
    runs = "; ".join(dict.fromkeys(f"{row.form}, {row.date}, {row.machine}" for row in cases))
    return f"| {cases[0].promise} | `{cases[0].test}` | {measured or holds} | {runs} |\n"


def _measured(row: Row) -> str:
    numbers = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.numbers.items())
    return f"{row.case}: {numbers}" if row.case and numbers else numbers


if __name__ == "__main__":
    sys.stdout.write(page(load()))
