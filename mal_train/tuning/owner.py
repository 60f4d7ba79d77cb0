"""Names the tuner process that runs a trial, and tells whether one of this machine is still alive."""

import functools
import os
import socket
from pathlib import Path


@functools.cache
def this_process() -> str:
    """Returns a name of this process that no other one has: machine, process namespace, process id, start time."""
    return f"{_machine()}/{os.getpid()}/{_start_time(os.getpid())}"


def machine_of(owner: str) -> str:
    """Returns the host name of an owner, for messages."""
    return owner.partition("/")[0]


def is_dead(owner: str) -> bool:
    """Returns True if the owner is a process of this machine that has ended; False for one of another machine."""
    machine, _, rest = owner.rpartition("/")[0].rpartition("/")
    if machine != _machine() or not rest.isdecimal():
        return False
    return _start_time(int(rest)) != owner.rpartition("/")[2]


def _machine() -> str:
    """Returns host name and process namespace: containers may share the name, and count their processes alone."""
    return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"


def _start_time(process_id: int) -> str:
    """Returns the start of a process in clock ticks after the boot; empty if it has ended."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in {"Z", "X"} else fields[18]
