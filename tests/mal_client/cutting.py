"""TCP relay that truncates responses as a proxy does when its server dies in a call: no trailers, no status."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

DATA, HEADERS, RST_STREAM = 0, 1, 3
END_STREAM = 1
FRAME_HEAD_BYTES = 9
INTERNAL_ERROR, CANCEL = 2, 8


class Cut(Enum):
    """Position and form of the truncation."""

    RESET_FIRST = "reset before the response"
    RESET = "reset after the first message, as nginx does"
    END = "ended with the first message and then reset, as HAProxy does"


@contextmanager
def cutting(address: str, cut: Cut, count: int, *, after: int = 0) -> Iterator[str]:
    """Runs a relay in front of `address`, host:port; yields its address.

    The first `after` responses pass complete; the next `count` are truncated.
    """
    host, _, port = address.rpartition(":")
    due = [False] * after + [True] * count
    opened: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:  # the relay is closed
                    return
                server = socket.create_connection((host, int(port)))
                opened.extend((client, server))
                threading.Thread(target=_pass_on, args=(client, server), daemon=True).start()
                threading.Thread(target=_cut, args=(server, client, cut, due), daemon=True).start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for connection in opened:
                connection.close()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # one side is gone
        return


def _cut(server: socket.socket, client: socket.socket, cut: Cut, due: list[bool]) -> None:
    """Forwards all frames, also those of truncated streams: the header tables of both sides must stay equal."""
    seen: set[int] = set()
    try:
        with server.makefile("rb") as frames:
            while len(head := frames.read(FRAME_HEAD_BYTES)) == FRAME_HEAD_BYTES:
                frame = bytearray(head + frames.read(int.from_bytes(head[:3], "big")))
                frame_type, stream = head[3], int.from_bytes(head[5:], "big")
                if frame_type == (HEADERS if cut is Cut.RESET_FIRST else DATA) and stream not in seen:
                    seen.add(stream)
                    if due and due.pop(0):
                        frame = _truncated(frame, stream, cut)
                client.sendall(frame)
        client.shutdown(socket.SHUT_WR)
    except OSError:  # one side is gone
        return


def _truncated(frame: bytearray, stream: int, cut: Cut) -> bytearray:
    reset = struct.pack(">BHBBII", 0, 4, RST_STREAM, 0, stream, CANCEL if cut is Cut.END else INTERNAL_ERROR)
    if cut is Cut.END:
        frame[4] |= END_STREAM
    return bytearray(reset) + frame if cut is Cut.RESET_FIRST else frame + reset
