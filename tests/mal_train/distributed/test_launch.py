"""Launching and watching the processes of a training; the processes are short scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mal_train.distributed import launch as launch_module
from mal_train.distributed.launch import launch
from tests.paths import ROOT


def run(script: str, num_processes: int = 2) -> int:
    return launch([], num_processes, program=(sys.executable, "-c", f"import os, signal, sys, time\n{script}"))


def test_exit_code_is_0_when_all_processes_succeed() -> None:
    assert run("sys.exit(0)") == 0


def test_each_process_gets_its_rank_and_one_common_address(tmp_path: Path) -> None:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"
    script = f"open(f'{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert run(script, 3) == 0
    values = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [line[:4] for line in values] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({line[4] for line in values}) == 1


def test_the_processes_find_one_another_through_a_private_file(tmp_path: Path) -> None:
    script = f"""
import os, stat
store = os.environ["MAL_TRAIN_STORE"]
mode = stat.S_IMODE(os.stat(os.path.dirname(store)).st_mode)
open(f'{tmp_path}/' + os.environ['RANK'], 'w').write(f'{{mode:o}} {{store}}')
"""
    assert run(script) == 0
    (mode, store), other = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert other == [mode, store]
    assert mode == "700"
    assert not Path(store).parent.exists()


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
def test_the_exit_code_of_the_first_failure_passes_through_and_ends_the_others(
    code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    # Rank 0 would wait forever.
    assert run(f"sys.exit({code}) if os.environ['RANK'] == '1' else signal.pause()") == code
    (line,) = capfd.readouterr().err.splitlines()
    assert f"process 1 of 2 ended with code {code}" in line


def test_a_killed_process_is_named_and_a_process_that_ignores_sigterm_is_killed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
if os.environ['RANK'] == '0':
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    signal.pause()
"""
    monkeypatch.setattr(launch_module, "GRACE_S", 1)
    assert run(script) == 137
    (line,) = capfd.readouterr().err.splitlines()
    assert "process 0 of 2" in line
    assert "SIGKILL" in line


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((143, 143), 143), ((130, 130), 130), ((143, 1), 1), ((143, 4), 1), ((143, 0), 1), ((0, 143), 1)],
)
def test_the_exit_code_is_143_only_if_all_processes_saved(
    codes: tuple[int, int], expected: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # As training processes do: after a signal they end one after the other, and ignore further signals.
    script = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = int(os.environ['RANK'])
open(f'{tmp_path}/{{rank}}', 'w').close()
while len(os.listdir('{tmp_path}')) < 2:
    time.sleep(0.01)
time.sleep(0.5 * rank)
sys.exit({codes}[rank])
"""
    assert run(script) == expected
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("code", "short", "ends"),
    [
        (143, "GRACE_S", True),
        (143, "SAVE_GRACE_S", False),
        (1, "GRACE_S", False),
        (1, "SAVE_GRACE_S", True),
    ],
)
def test_processes_that_save_get_another_grace_period_than_after_a_failure(
    code: int, short: str, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, short, 0.1)
    # Rank 1 ends a second after rank 0, whatever signals it gets.
    script = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = os.environ['RANK']
open(f'{tmp_path}/{{rank}}', 'w').close()
while len(os.listdir('{tmp_path}')) < 2:
    time.sleep(0.01)
if rank == '0':
    sys.exit({code})
time.sleep(1)
open('{tmp_path}/ended', 'w').close()
sys.exit(143)
"""
    assert run(script) == (code if ends else 1)
    assert (tmp_path / "ended").exists() is ends


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_all_processes(number: signal.Signals, code: int, tmp_path: Path) -> None:
    child = f"""
import os, signal, sys, time
def end(*_):
    sys.exit({code})
signal.signal({int(number)}, end)
open('{tmp_path}/' + os.environ['RANK'], 'w').close()
while True:  # signal.pause() would miss a signal that arrives just before it
    time.sleep(0.05)
"""
    parent = f"""
import sys
from mal_train.distributed.launch import launch
sys.exit(launch([], 2, program=(sys.executable, "-c", {child!r})))
"""
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT) as process:
        deadline = time.monotonic() + 200
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(200) == code


@pytest.mark.parametrize("start", [1, 2, 8])
def test_a_signal_during_the_start_leaves_no_process_behind(start: int) -> None:
    # The signal arrives inside the call that starts process `start`.
    parent = f"""
import os, signal, sys
from mal_train.distributed.launch import launch
starts = 0
def on_event(event, arguments):
    global starts
    if event == 'subprocess.Popen' and arguments[0] == 'sleep':
        starts += 1
        if starts == {start}:
            os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(on_event)
sys.exit(launch(['300'], 8, program=('sleep',)))
"""
    # The pipe closes when the last process that inherited it ends.
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.communicate(timeout=200)
        assert process.returncode == 128 + signal.SIGTERM


def test_the_launcher_has_one_thread(tmp_path: Path) -> None:
    child = f"""
import os
status = open(f'/proc/{{os.getppid()}}/status').read().split()
open('{tmp_path}/' + os.environ['RANK'], 'w').write(status[status.index('Threads:') + 1])
"""
    parent = f"""
import sys
from mal_train.distributed.launch import launch
sys.exit(launch([], 2, program=(sys.executable, "-c", {child!r})))
"""
    subprocess.run([sys.executable, "-c", parent], cwd=ROOT, check=True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("os.kill(os.getppid(), signal.SIGHUP)") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_are_asked_to_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    child = f"""
import os, signal, sys, time
from mal_train.distributed.launch import end_with_parent
def end(*_):
    open('{tmp_path}/ended', 'w').close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
end_with_parent(os.environ["MAL_TRAIN_LAUNCHED"])
open('{tmp_path}/began', 'w').close()
while True:  # signal.pause() would miss a signal that arrives just before it
    time.sleep(0.05)
"""
    parent = f"""
import sys
from mal_train.distributed.launch import launch
launch([], 1, program=(sys.executable, "-c", {child!r}))
"""
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT) as process:
        for name, then in (("began", process.kill), ("ended", process.wait)):
            deadline = time.monotonic() + 200
            while not (tmp_path / name).exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            then()


def test_a_process_ends_if_its_launcher_died_before_it_could_ask_the_kernel() -> None:
    child = "import sys; from mal_train.distributed.launch import *; end_with_parent(sys.argv[1]); sys.exit(3)"
    for launcher, code in ((os.getpid(), 3), (os.getppid(), -signal.SIGTERM)):
        assert subprocess.call([sys.executable, "-c", child, str(launcher)], cwd=ROOT) == code


def test_the_environment_of_the_caller_is_unchanged() -> None:
    before = dict(os.environ)
    assert run("sys.exit(0)") == 0
    assert dict(os.environ) == before
