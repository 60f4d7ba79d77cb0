"""Packages of other projects that read our files or compute the same metrics, in an environment of their own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.paths import ROOT
from tests.tools import missing

READERS = os.environ.get("MAL_EXPORT_TOOLS", str(ROOT / ".venv-readers" / "bin" / "python"))


def in_tool(tool: str, script: str, *arguments: object) -> Any:
    """Runs a script in the interpreter of the readers and returns the JSON that it prints."""
    if not Path(READERS).exists():
        missing(tool, f"`make tools` makes {READERS}; MAL_EXPORT_TOOLS names another interpreter")
    probe = subprocess.run([READERS, "-c", f"import {tool}"], capture_output=True, text=True, check=False)
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        missing(tool, f"{READERS} cannot import it ({last}); MAL_EXPORT_TOOLS names another interpreter")
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "YOLO_OFFLINE": "true"}
    done = subprocess.run(
        [READERS, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
