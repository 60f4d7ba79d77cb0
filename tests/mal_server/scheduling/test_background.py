"""The end of a process whose threads are still at work: what was said is out, the exit code counts, nothing waits."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LEAVING = """
import atexit, sys, threading
from mal_server.scheduling import left_behind

atexit.register(lambda: print("the interpreter ended"))
begun, ends = threading.Event(), threading.Event()

def work():
    begun.set()
    ends.wait()

threading.Thread(target=work, name=left_behind.DEVICE + "cpu").start()
begun.wait()
print("said")
"""


def left(script: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a process that ends by `leave`; output goes to a pipe, so it is buffered."""
    line = [sys.executable, "-c", LEAVING + script]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_a_thread_that_never_ends_does_not_keep_the_process_and_what_was_said_is_out() -> None:
    # The interpreter itself would wait for it for ever.
    code, out, err = left("left_behind.PATIENCE_S = 0.0\nsys.exit(left_behind.exit_process(7))")
    assert (code, out) == (7, "said\n")
    assert "left while a checkpoint was being loaded" in err


def test_a_thread_that_is_about_to_end_is_waited_for_and_the_process_ends_as_others_do() -> None:
    code, out, err = left(
        "left_behind.PATIENCE_S = 200.0\nthreading.Timer(0.1, ends.set).start()\nsys.exit(left_behind.exit_process(7))"
    )
    assert (code, out, err) == (7, "said\nthe interpreter ended\n", "")


def test_an_error_that_nobody_expected_is_told_though_a_thread_never_ends() -> None:
    code, out, err = left(
        "left_behind.PATIENCE_S = 0.0\n"
        "from mal_server import cli\n"
        "def fails(args):\n    raise RuntimeError('odd')\n"
        "cli._run = fails\n"
        "sys.exit(cli.main(['serve']))"
    )
    assert (code, out) == (1, "said\n")
    assert "RuntimeError: odd" in err


def test_sigterm_ends_a_server_whose_key_comes_from_where_nothing_comes(tmp_path: Path) -> None:
    pipe, port_file = tmp_path / "identity", tmp_path / "address"
    os.mkfifo(pipe)
    (tmp_path / "model.malckpt").write_bytes(b"never read")
    (tmp_path / "server.yaml").write_text(
        f"checkpoint: {tmp_path}/model.malckpt\ndecryption_key: file:{pipe}\ngpu_ids: []\nlisten: {{port: 0}}\n"
    )
    line = "import sys; from mal_server.cli import main; sys.exit(main())"
    arguments = ["serve", "-c", str(tmp_path / "server.yaml"), "--port-file", str(port_file)]
    with subprocess.Popen([sys.executable, "-c", line, *arguments], stderr=subprocess.PIPE, text=True) as process:
        writer = writing_end(pipe, process)
        try:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=240)
        finally:
            process.kill()
            os.close(writer)
    assert process.returncode == 0, err
    assert "left while a checkpoint was being loaded" in err
    assert not port_file.exists()


def writing_end(pipe: Path, process: "subprocess.Popen[str]") -> int:
    """Opens a named pipe once the process reads from it."""
    while True:
        assert process.poll() is None, process.communicate()[1]
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        time.sleep(0.02)
