"""A DNS server on a loopback port, which gRPC's own resolver asks when the address is dns://HOST:PORT/NAME."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HEADER_BYTES = 12
A_RECORD, IN_CLASS = 1, 1
ANSWER, NAME_ERROR = 0x8400, 3
POINTER_TO_NAME = b"\xc0\x0c"


class NameServer:
    """Answers with the A records of one name.

    Attributes:
        name: the name.
        addresses: its IPv4 addresses; change them at any time.
        queries: number of questions for A records so far.
        socket: bound to a free port.
    """

    def __init__(self, name: str, addresses: list[str]) -> None:
        self.name = name
        self.addresses = addresses
        self.queries = 0
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))

    def target(self, port: int) -> str:
        """Returns the address of the servers behind the name, for a client."""
        return f"dns://127.0.0.1:{self.socket.getsockname()[1]}/{self.name}:{port}"

    def run(self) -> None:
        """Answers until `close`."""
        while True:
            question, client = self.socket.recvfrom(4096)
            if not question:
                return
            self.socket.sendto(self._answer(question), client)

    def close(self) -> None:
        """Ends `run`."""
        self.socket.sendto(b"", self.socket.getsockname())

    def _answer(self, question: bytes) -> bytes:
        name, end = _read_name(question)
        (kind,) = struct.unpack_from(">H", question, end)
        is_known = name == self.name
        addresses = list(self.addresses) if is_known and kind == A_RECORD else []
        self.queries += kind == A_RECORD
        flags = ANSWER | (0 if is_known else NAME_ERROR)
        header = question[:2] + struct.pack(">HHHHH", flags, 1, len(addresses), 0, 0)
        records = (struct.pack(">HHIH", A_RECORD, IN_CLASS, 0, 4) + socket.inet_aton(each) for each in addresses)
        return header + question[HEADER_BYTES : end + 4] + b"".join(POINTER_TO_NAME + record for record in records)


def _read_name(question: bytes) -> tuple[str, int]:
    """Returns the name of a question, and the offset behind it."""
    labels, at = [], HEADER_BYTES
    while question[at]:
        labels.append(question[at + 1 : at + 1 + question[at]].decode("ascii"))
        at += 1 + question[at]
    return ".".join(labels), at + 1


@contextmanager
def name_server(*addresses: str, name: str = "mal.test") -> Iterator[NameServer]:
    """Runs a DNS server with these addresses of one name."""
    server = NameServer(name, list(addresses))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(10)
        server.socket.close()
