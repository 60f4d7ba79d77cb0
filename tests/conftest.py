"""Settings of all tests."""

import os
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

from mal_train.core.threads import wait_passively
from tests.form import FORM
from tests.repository.promises import keep, new_row, shown

# Before any test imports torch: tests share few cores with servers and loader processes.
wait_passively()

# Before any test imports grpc: its fork handlers restart its threads in the training processes that tests fork, which
# make no calls. With open channels, forked processes crashed from it, and one hung.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# Tests that need a proxy set its variables; that of the machine would make the others depend on it.
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]

# The same examples in every run, so that a failure is caused by the change under test.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

pytest_plugins = ["tests.object_store"]
"""The fixture `s3`."""

RECORDED: dict[str, object] = {}
"""Measurements of the test that runs, from the fixture `record`."""


@pytest.fixture(scope="session")
def record() -> Callable[..., None]:
    """Prints the measurements of a test, and keeps them for its promise."""

    def show(row: str, **values: object) -> None:
        RECORDED.update(values)
        form = "full" if FORM.is_full else "short"
        print(f"\n{row} [{form}, seed {FORM.seed}]: {', '.join(f'{name} {shown(v)}' for name, v in values.items())}")

    return show


def pytest_runtest_setup() -> None:
    RECORDED.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Writes the promise of a test that passed, with its measurements, to the file that MAL_PROMISES names."""
    report = yield
    promise, path = item.get_closest_marker("promise"), os.environ.get("MAL_PROMISES")
    if promise and path and report.when == "call" and report.passed:
        topic, text = promise.args
        keep(new_row(topic, text, item.nodeid, RECORDED), Path(path))
    return report
