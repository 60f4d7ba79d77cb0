"""The client with the oldest supported grpcio and protobuf, in the environment of the stub generator."""

import subprocess
import sysconfig

import pytest

from tests.paths import ROOT
from tests.tools import missing

OLD_PYTHON = ROOT / ".venv-protos" / "bin" / "python"

SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/clients", {root!r} + "/protos"]
sys.path.append({site!r})  # numpy, Pillow, pytest; grpc and protobuf come from the old environment
import google.protobuf, grpc
assert grpc.__version__ == "1.62.3" and google.protobuf.__version__.startswith("4.25."), "not the oldest versions"
from mal.v1 import evaluation_pb2_grpc, labeling_pb2_grpc, model_pb2_grpc
import pytest
options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-o", "addopts="]
sys.exit(pytest.main([*options, "{root}/tests/mal_client/test_label_image.py"]))
"""


@pytest.mark.timeout(1200)  # runs a file of tests, each with its own limit
def test_the_client_labels_images_with_the_oldest_grpc() -> None:
    if not OLD_PYTHON.exists():
        missing("the oldest grpcio", "protos/generate.sh --tools makes its environment (make test does)")
    script = SCRIPT.format(root=str(ROOT), site=sysconfig.get_paths()["purelib"])
    done = subprocess.run([str(OLD_PYTHON), "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
