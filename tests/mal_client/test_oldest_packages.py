"""The client with the oldest version of each package that it requires, in an environment of their own."""

import subprocess
import sysconfig

import pytest

from tests.deploy.test_locks import LOCKS, versions
from tests.paths import ROOT
from tests.tools import missing

OLD_PYTHON = ROOT / ".venv-oldest" / "bin" / "python"
ROOMS = (
    "mal_client/test_label_image.py",
    "mal_client/images",
    "mal_train/core/images",
    "mal_train/core/masks/test_geometry.py::test_a_crop_has_its_own_order_of_passes_with_every_pillow",
    "mal_train/core/masks/test_rle.py",
)

SCRIPT = """
import importlib.metadata, sys
versions, root, site, rooms = {versions!r}, {root!r}, {site!r}, {rooms!r}
sys.path[:0] = [root, root + "/clients", root + "/protos"]
assert {{name: importlib.metadata.version(name) for name in versions}} == versions, "run `make test`"
sys.path.append(site)  # pytest, and the packages that only the server and training need
import pytest
options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-o", "addopts="]
sys.exit(pytest.main([*options, *(root + "/tests/" + room for room in rooms)]))
"""


@pytest.mark.timeout(1200)  # runs rooms of tests, each with its own limit
def test_the_client_works_with_the_oldest_packages_that_it_requires() -> None:
    if not OLD_PYTHON.exists():
        missing("an environment with the oldest packages", f"`make test` makes {OLD_PYTHON}")
    oldest = versions(LOCKS / "oldest.txt")
    oldest.pop("colorama")  # Windows
    site = sysconfig.get_paths()["purelib"]
    script = SCRIPT.format(root=str(ROOT), site=site, versions=oldest, rooms=ROOMS)
    done = subprocess.run([str(OLD_PYTHON), "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
