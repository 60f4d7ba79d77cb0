"""Starting and watching the processes of a training, with stand-ins that take no time to start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mal_train.core.errors import ConfigError
from mal_train.distributed.env import LAUNCHED, DistributedEnv, first_host, world_of
from mal_train.distributed.launch import run_ranks
from tests.paths import ROOT


def run(script: str, size: int = 2, grace_s: float = 10.0) -> int:
    return run_ranks(
        [], size, program=(sys.executable, "-c", f"import os, signal, sys, time\n{script}"), grace_s=grace_s
    )


def test_all_well_is_code_0() -> None:
    assert run("sys.exit(0)") == 0


def test_each_process_is_told_who_it_is(tmp_path: Path) -> None:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"
    script = f"open(f'{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert run(script, 3) == 0
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [line[:4] for line in told] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({line[4] for line in told}) == 1


def test_the_first_failure_is_the_code_and_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    # The other would wait for ever.
    assert run("sys.exit(2) if os.environ['RANK'] == '1' else signal.pause()") == 2
    assert "process 1 of 2 ended with code 2; ending the others" in capfd.readouterr().err


def test_a_killed_process_is_named_and_one_that_hears_nothing_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    script = """
if os.environ['RANK'] == '0':
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    signal.pause()
"""
    assert run(script, grace_s=0.5) == 137
    assert "process 0 of 2 was killed by SIGKILL" in capfd.readouterr().err


def test_those_asked_to_end_may_do_so_one_after_the_other(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("time.sleep(0.5 * int(os.environ['RANK'])); sys.exit(143)", grace_s=0.1) == 143
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_all(number: signal.Signals, code: int, tmp_path: Path) -> None:
    child = f"""
import os, signal, sys, time
def end(*_):
    sys.exit({code})
signal.signal({int(number)}, end)
open('{tmp_path}/' + os.environ['RANK'], 'w').close()
while True:  # a pause would sleep through a signal that comes just before it
    time.sleep(0.05)
"""
    parent = f"""
import sys
from mal_train.distributed.launch import run_ranks
sys.exit(run_ranks([], 2, program=(sys.executable, "-c", {child!r})))
"""
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT) as process:
        until = time.monotonic() + 200
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(200) == code


def test_children_are_told_when_the_parent_is_killed(tmp_path: Path) -> None:
    child = f"""
import os, signal, sys, time
from mal_train.distributed.launch import tie_to_parent
def end(*_):
    open('{tmp_path}/ended', 'w').close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
tie_to_parent()
open('{tmp_path}/began', 'w').close()
while True:  # a pause would sleep through a signal that comes just before it
    time.sleep(0.05)
"""
    parent = f"""
import sys
from mal_train.distributed.launch import run_ranks
run_ranks([], 1, program=(sys.executable, "-c", {child!r}))
"""
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT) as process:
        for name, then in (("began", process.kill), ("ended", process.wait)):
            until = time.monotonic() + 200
            while not (tmp_path / name).exists():
                assert time.monotonic() < until
                time.sleep(0.01)
            then()


def test_several_machines_need_to_know_each_other() -> None:
    with pytest.raises(ConfigError, match="NODE_RANK, MASTER_ADDR, MASTER_PORT"):
        run_ranks([], 2, nodes=2, environment={})


def test_a_machine_that_is_no_number_is_refused() -> None:
    told = {"NODE_RANK": "first", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    with pytest.raises(ConfigError, match="NODE_RANK: 'first'"):
        run_ranks([], 2, nodes=2, environment=told)


def test_a_process_alone_is_its_own_world() -> None:
    assert world_of({}) == DistributedEnv()
    assert world_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}) == DistributedEnv()


def test_torchrun_and_ourselves_say_who_is_who() -> None:
    told = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "GROUP_RANK": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "7",
    }
    for mark, launcher in (("TORCHELASTIC_RUN_ID", "torchrun"), (LAUNCHED, "mal-train")):
        assert world_of({mark: "1", **told}) == DistributedEnv(5, 8, 1, 2, launcher, "a", 7)  # type: ignore[arg-type]


def test_slurm_says_who_is_who() -> None:
    told = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "1234567",
    }
    assert world_of(told) == DistributedEnv(3, 4, 1, 1, "SLURM", "gpu07", 19567)
    assert world_of({**told, "MASTER_ADDR": "b", "MASTER_PORT": "9"}).address == "b"
    assert world_of({**told, "SLURM_JOB_NAME": "bash"}) == DistributedEnv()


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n[3,5-6]", "n3"), ("a-b[001-004],c", "a-b001"), ("x,y", "x")]
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_launcher_that_says_half_is_refused() -> None:
    with pytest.raises(ConfigError, match="environment variable WORLD_SIZE"):
        world_of({LAUNCHED: "1", "RANK": "0", "LOCAL_RANK": "0"})


def test_a_world_of_another_size_than_the_spec_says_is_refused() -> None:
    with pytest.raises(ConfigError, match="makes 4 processes, but torchrun started 2"):
        DistributedEnv(size=2, launcher="torchrun").check(2, 2)
    DistributedEnv(size=4).check(2, 2)
    with pytest.raises(ConfigError, match=r"more than train\.num_gpus 2 processes"):
        DistributedEnv(rank=3, size=4, local_rank=3, launcher="SLURM").check(2, 2)
    assert os.environ.get(LAUNCHED) is None
