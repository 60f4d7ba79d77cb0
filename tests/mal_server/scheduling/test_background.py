"""The exit of a process with running threads: output is flushed, the exit code is kept, nothing waits."""

import asyncio
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import grpc
import pytest
from mal.v1 import labeling_pb2_grpc

from mal_server import cli
from mal_server.scheduling import background
from tests.mal_server.fakes import DISC_BOX, label_request

SCRIPT = """
import atexit, sys, threading
from mal_server.scheduling import background

atexit.register(lambda: print("the interpreter ended"))
started, gate = threading.Event(), threading.Event()

def work():
    started.set()
    gate.wait()

threading.Thread(target=work, name=background.DEVICE_THREAD_PREFIX + "cpu").start()
started.wait()
print("buffered")
"""


def run_script(script: str) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a process that ends by `exit_process`; pipes make its output buffered."""
    command = [sys.executable, "-c", SCRIPT + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_a_thread_that_never_ends_does_not_block_the_exit_and_output_is_flushed() -> None:
    # The interpreter would wait for it forever.
    code, out, err = run_script("background.JOIN_TIMEOUT_S = 0.0\nsys.exit(background.exit_process(7))")
    assert (code, out) == (7, "buffered\n")
    assert "device-cpu" in err


def test_a_thread_that_ends_within_the_timeout_is_joined_and_the_process_exits_normally() -> None:
    code, out, err = run_script(
        "background.JOIN_TIMEOUT_S = 200.0\n"
        "threading.Timer(0.1, gate.set).start()\n"
        "sys.exit(background.exit_process(7))"
    )
    assert (code, out, err) == (7, "buffered\nthe interpreter ended\n", "")


def test_a_cpu_task_that_never_ends_does_not_block_the_exit() -> None:
    code, out, err = run_script(
        "background.JOIN_TIMEOUT_S = 0.0\n"
        "gate.set()\n"
        "from mal_server.scheduling.cpu_pool import PriorityThreadPool\n"
        "from mal_server.scheduling.priority import Priority\n"
        "running = threading.Event()\n"
        "pool = PriorityThreadPool(1)\n"
        "pool.submit(Priority.BATCH, lambda: (running.set(), threading.Event().wait()))\n"
        "running.wait()\n"
        "pool.shutdown()\n"
        "sys.exit(background.exit_process(7))"
    )
    assert (code, out) == (7, "buffered\n")
    assert "cpu-0" in err


def test_work_of_the_loop_that_never_ends_blocks_neither_the_loop_nor_the_exit() -> None:
    code, out, _ = run_script(
        "background.JOIN_TIMEOUT_S = 0.0\n"
        "import asyncio\n"
        "async def serve():\n"
        "    asyncio.get_running_loop().set_default_executor(background.LoopExecutor())\n"
        "    running = threading.Event()\n"
        "    background.run_in_thread(lambda: (running.set(), threading.Event().wait()))\n"
        "    await asyncio.to_thread(running.wait)\n"
        "asyncio.run(serve())\n"
        "sys.exit(background.exit_process(7))"
    )
    assert (code, out) == (7, "buffered\n")


class Content:
    """Stands for what a call holds; weakly referable."""

    def keep(self) -> "Content":
        return self


def test_cancelled_work_of_the_loop_is_dropped_while_all_threads_are_busy() -> None:
    gate = threading.Event()

    async def work() -> list[object]:
        asyncio.get_running_loop().set_default_executor(background.LoopExecutor(1))
        background.run_in_thread(gate.wait)
        first, second = Content(), Content()
        kept = [weakref.ref(first), weakref.ref(second)]
        background.run_in_thread(first.keep).cancel()
        caller = asyncio.ensure_future(asyncio.to_thread(second.keep))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        del first, second, caller
        return [reference() for reference in kept]

    try:
        assert asyncio.run(work()) == [None, None]
    finally:
        gate.set()


def test_an_unexpected_error_is_reported_although_a_thread_never_ends() -> None:
    code, out, err = run_script(
        "background.JOIN_TIMEOUT_S = 0.0\n"
        "from mal_server import cli\n"
        "def fails(args):\n    raise RuntimeError('unexpected')\n"
        "cli._run = fails\n"
        "sys.argv = ['mal-server', 'serve']\ncli.run()"
    )
    assert (code, out) == (1, "buffered\n")
    assert "RuntimeError: unexpected" in err


def test_sigterm_ends_a_server_that_waits_for_its_key_from_a_pipe(tmp_path: Path) -> None:
    pipe, port_file = tmp_path / "identity", tmp_path / "address"
    os.mkfifo(pipe)
    (tmp_path / "model.malckpt").write_bytes(b"never read")
    (tmp_path / "server.yaml").write_text(
        f"checkpoint: {tmp_path}/model.malckpt\ndecryption_key: file:{pipe}\ngpu_ids: []\nlisten: {{port: 0}}\n"
    )
    script = "from mal_server.cli import run; run()"
    arguments = ["serve", "-c", str(tmp_path / "server.yaml"), "--port-file", str(port_file)]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True) as process:
        writer = writing_end(pipe, process)
        try:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=240)
        finally:
            process.kill()
            os.close(writer)
    assert process.returncode == 0, err
    assert background.DAEMON_THREAD in err
    assert not port_file.exists()


HANGING_DECODER = """
import threading
from mal_server import cli, lifecycle
from mal_server.inference import preparation
from tests.mal_server.fakes import BrightPredictor, loaded

def hang(*args, **kwargs):
    print("decoding", flush=True)
    threading.Event().wait()

preparation.decode_container = hang
serve = lifecycle.serve
lifecycle.serve = lambda config, **options: serve(
    config, **options, load=lambda plan: loaded(plan, BrightPredictor(), BrightPredictor())
)
cli.run()
"""


def test_sigterm_ends_a_server_whose_decoder_hangs_and_flushes_its_log(tmp_path: Path) -> None:
    port_file = tmp_path / "address"
    (tmp_path / "server.yaml").write_text("grace_s: 0.1\ndrain_delay_s: 0\ngpu_ids: []\nlisten: {port: 0}\n")
    arguments = ["serve", "-c", str(tmp_path / "server.yaml"), "--port-file", str(port_file)]
    command = [sys.executable, "-c", HANGING_DECODER, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "serving" in process.stdout.readline()
            with grpc.insecure_channel(port_file.read_text().strip()) as channel:
                call = labeling_pb2_grpc.LabelingServiceStub(channel).LabelImage(label_request(DISC_BOX))
                assert process.stdout.readline() == "decoding\n"
                process.send_signal(signal.SIGTERM)
                _, err = process.communicate(timeout=240)
                assert call.code() is not None
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "stopped" in err
    assert "cpu-" in err


def writing_end(pipe: Path, process: "subprocess.Popen[str]") -> int:
    """Opens the writing end of a named pipe once the process reads from it."""
    while True:
        assert process.poll() is None, process.communicate()[1]
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        time.sleep(0.02)


def test_the_garbage_collector_is_paused_until_the_last_work_has_ended() -> None:
    assert gc.isenabled()
    with background.collector_paused():
        with pytest.raises(ValueError, match="work"), background.collector_paused():
            raise ValueError("work")
        assert not gc.isenabled()
    assert gc.isenabled()


def test_only_the_command_of_a_process_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` returns to a program that calls it, whatever threads that program has."""
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"the process would end with {code}"))
    never, started = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        never.wait()

    worker = threading.Thread(target=work, name=background.CPU_THREAD_PREFIX, daemon=True)
    worker.start()
    started.wait()
    try:
        assert cli.main(["serve", "-c", "missing.yaml"]) == 2
    finally:
        never.set()
