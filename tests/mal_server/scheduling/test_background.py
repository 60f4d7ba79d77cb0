"""The exit of a process with running threads: output is flushed, the exit code is kept, nothing waits."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mal_server.scheduling import background

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


def test_an_unexpected_error_is_reported_although_a_thread_never_ends() -> None:
    code, out, err = run_script(
        "background.JOIN_TIMEOUT_S = 0.0\n"
        "from mal_server import cli\n"
        "def fails(args):\n    raise RuntimeError('unexpected')\n"
        "cli._run = fails\n"
        "sys.exit(cli.main(['serve']))"
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
    script = "import sys; from mal_server.cli import main; sys.exit(main())"
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
