"""The commands of docs/distributed.md, run by two processes on the CPU."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mal_train.distributed.launch import free_port
from mal_train.training.checkpoints import newest_checkpoint
from tests.mal_train.training.runs import SMALL, assert_same, weights
from tests.paths import ROOT
from tests.scenes import write_scenes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").splitlines()
ENVIRONMENT = {
    **os.environ,
    # The commands are those of this environment, activated or not.
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec for a run of 24 steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("launchers")
    annotations, images = write_scenes(folder / "scenes", images=6, masks=False, seed=1)
    sections: dict[str, list[str]] = {}
    extra = ["train.checkpoint_interval=1", "train.checkpoint_interval_unit=step", "dataset.num_workers_per_gpu=1"]
    paths = [f"dataset.train_ann_path='{annotations}'", f"dataset.train_img_dir='{images}'"]
    for override in [*SMALL, *extra, *paths, "train.num_epochs=8", "train.batch_size=2"]:
        section, _, rest = override.partition(".")
        name, _, value = rest.partition("=")
        sections.setdefault(section, [])
        sections[section] = [line for line in sections[section] if not line.startswith(f"{name}:")] + [
            f"{name}: {value}"
        ]
    path = folder / "spec.yaml"
    path.write_text(
        "".join(f"{name}:\n" + "".join(f"  {line}\n" for line in lines) for name, lines in sections.items())
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of an uninterrupted run of two processes that mal-train starts."""
    results = tmp_path_factory.mktemp("uninterrupted")
    finished = subprocess.run(
        mal_train_command(spec, results), env=ENVIRONMENT, check=False, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return newest(results)


def command_on_page(start: str, spec: Path) -> list[str]:
    """Returns the words of the only line of the page with this start, with the path of the spec."""
    (line,) = [line for line in PAGE if line.startswith(start)]
    return [str(spec) if word == "spec.yaml" else word for word in shlex.split(line)]


def mal_train_command(spec: Path, results: Path) -> list[str]:
    line = "mal-train train -e spec.yaml train.num_gpus=2 train.gpu_ids=[]"
    return [*command_on_page(line, spec), f"results_dir='{results}'"]


def newest(results: Path) -> Path:
    found = newest_checkpoint(results / "train")
    assert found is not None
    return found


def wait_for(condition: Callable[[], bool], within_s: float) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"no success within {within_s} s"
        time.sleep(0.02)


def environment_of(process: str) -> dict[str, str]:
    try:
        content = Path("/proc", process, "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in content.split("\0") if "=" in entry)


def processes_with(name: str, value: str) -> Iterator[tuple[int, dict[str, str]]]:
    for process in filter(str.isdecimal, os.listdir("/proc")):
        found = environment_of(process)
        if found.get(name) == value:
            yield int(process), found


def test_torchrun_trains_the_same_weights_as_mal_train(spec: Path, uninterrupted: Path, tmp_path: Path) -> None:
    line = [*command_on_page("torchrun --standalone", spec), f"results_dir='{tmp_path}'"]
    finished = subprocess.run(line, env=ENVIRONMENT, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert_same(weights(uninterrupted), weights(newest(tmp_path)))


def test_srun_trains_the_same_weights_on_two_nodes_as_on_one(spec: Path, uninterrupted: Path, tmp_path: Path) -> None:
    # The learning rate does not scale with the number of nodes, so it is doubled here.
    overrides = ["train.num_gpus=1", "train.num_nodes=2", "train.lr=2e-4", f"results_dir='{tmp_path}'"]
    line = [*command_on_page("srun mal-train", spec)[1:], *overrides]
    slurm = {
        "SLURM_JOB_ID": "77",
        "MASTER_PORT": str(free_port()),
        "SLURM_JOB_NAME": "mal",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "localhost",
        "SLURM_LOCALID": "0",
    }
    nodes = [
        subprocess.Popen(line, env={**ENVIRONMENT, **slurm, "SLURM_PROCID": rank, "SLURM_NODEID": rank})
        for rank in ("0", "1")
    ]
    assert [node.wait(600) for node in nodes] == [0, 0]
    assert_same(weights(uninterrupted), weights(newest(tmp_path)))


def test_a_killed_rank_ends_all_processes_and_the_next_run_resumes(
    spec: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    port = str(free_port())
    line = mal_train_command(spec, tmp_path)
    with subprocess.Popen(line, env={**ENVIRONMENT, "MASTER_PORT": port}, stderr=subprocess.PIPE, text=True) as command:
        wait_for(lambda: len(list((tmp_path / "train").glob("model_*"))) >= 4, 300)
        (victim,) = [
            pid
            for pid, found in processes_with("MASTER_PORT", port)
            if found.get("RANK") == "1" and f"PPid:\t{command.pid}\n" in Path(f"/proc/{pid}/status").read_text()
        ]
        killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        _, err = command.communicate(timeout=240)
    duration_s = time.monotonic() - killed_at
    assert command.returncode == 137
    (message,) = [line for line in err.splitlines() if "SIGKILL" in line]
    assert "process 1 of 2" in message
    # A loader checks every five seconds that its trainer is alive.
    wait_for(lambda: not list(processes_with("MASTER_PORT", port)), 60)
    steps = newest(tmp_path).stem.rpartition("_")[2]
    finished = subprocess.run(line, env=ENVIRONMENT, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    print(f"killed after step {steps} of 24; the command ended {duration_s:.1f} s later")
    assert_same(weights(uninterrupted), weights(newest(tmp_path)))
