"""The README's Python block, run against the server that the README starts."""

import io
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from deploy.demo.photographs import write_photographs
from tests.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:50051"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mal-server serve`, on a free port."""
    port_file = tmp_path_factory.mktemp("server") / "address"
    command = [str(Path(sys.executable).parent / "mal-server"), "serve", "--port-file", str(port_file)]
    process = subprocess.Popen([*command, "listen.port=0", "drain_delay_s=0"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not port_file.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port_file.read_text(encoding="ascii").strip()
    finally:
        process.terminate()
        process.wait(60)


def test_the_python_block_prints_what_the_readme_shows(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown = re.findall(r"```python\n(.*?)```\s*```\n(.*?)```", README, flags=re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    (write_photographs(tmp_path).images / "coffee.png").rename(tmp_path / "coffee.png")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code.replace(ADDRESS, address), {})
    without_numbers = [re.sub(r"[\d.]+", "N", text) for text in (printed.getvalue(), shown)]
    assert without_numbers[0] == without_numbers[1]
    # Number formats and matrix kernels differ between machines.
    found, expected = (
        [float(number) for number in re.findall(r"\d+\.?\d*", text)] for text in (printed.getvalue(), shown)
    )
    assert found == pytest.approx(expected, rel=0.03)
