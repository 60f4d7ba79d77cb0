"""Damaged parquet files by the thousand: each gives a result or one clear error, and none ends its process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.form import Form
from tests.paths import ROOT

MAX_PEAK_MIB = 1500


@pytest.mark.promise("files", "A damaged parquet file gives a result or one clear error, and ends no process")
def test_damaged_parquet_files_give_a_result_or_one_clear_error(
    form: Form, record: Callable[..., None], tmp_path: Path
) -> None:
    count = form.pick(300, 20_000)
    module = "tests.mal_train.core.coco.damaged_parquet"
    finished = subprocess.run(
        [sys.executable, "-m", module, str(tmp_path), str(form.seed), str(count)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    outcomes = json.loads(finished.stdout)
    record("damaged parquet files", cases=count, **outcomes)
    assert outcomes["result"] + outcomes["BadDataset"] == count
    assert min(outcomes["result"], outcomes["BadDataset"]) > 0
    assert outcomes["peak_mib"] < MAX_PEAK_MIB
