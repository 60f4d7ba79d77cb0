"""A client of HTTP/2 that sends what gRPC's own clients never do: unfinished messages, and headers of any bytes."""

import asyncio
import struct
from collections import defaultdict
from typing import Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
INITIAL_WINDOW = 4
DEFAULT_WINDOW = 65535
MAX_FRAME = 16384


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: bytes, value: bytes) -> bytes:
    """Returns a header as HPACK literals of less than 255 bytes each."""

    def literal(text: bytes) -> bytes:
        return (bytes([len(text)]) if len(text) < 127 else b"\x7f" + bytes([len(text) - 127])) + text

    return b"\x00" + literal(name) + literal(value)


def message(payload: bytes, size: int | None = None) -> bytes:
    """Returns a gRPC message that claims to have `size` bytes; default: as many as the payload."""
    return b"\0" + struct.pack(">I", len(payload) if size is None else size) + payload


class RawConnection:
    """One connection, whose streams obey the server's flow control.

    Attributes:
        ended: streams that the server has ended or reset.
        headers: undecoded header blocks of each stream.
        is_closed: the server closed the connection or said that it will.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._initial = DEFAULT_WINDOW
        self._windows: defaultdict[int, int] = defaultdict(lambda: self._initial)
        self._windows[0] = DEFAULT_WINDOW
        self._changed = asyncio.Condition()
        self.ended: set[int] = set()
        self.headers: defaultdict[int, bytes] = defaultdict(bytes)
        self.is_closed = False
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, address: str, source: str | None = None) -> Self:
        """Connects to HOST:PORT, from the address `source` of this machine."""
        host, _, port = address.rpartition(":")
        local = None if source is None else (source, 0)
        connection = cls(*await asyncio.open_connection(host, int(port), local_addr=local))
        connection._writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))
        return connection

    async def close(self) -> None:
        self._writer.close()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def call(self, stream: int, path: bytes, *headers: tuple[bytes, bytes]) -> None:
        """Opens a stream with the headers of a gRPC call."""
        given = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x")]
        given += [(b"content-type", b"application/grpc"), (b"te", b"trailers"), *headers]  # codespell:ignore te
        self._windows[stream] = self._initial
        self._writer.write(frame(HEADERS, END_HEADERS, stream, b"".join(header(*pair) for pair in given)))

    async def send(self, stream: int, data: bytes, *, is_last: bool = False) -> None:
        """Sends data as the server permits; returns early once the server has ended the stream."""
        while data and not self._is_over(stream):
            async with self._changed:
                await self._changed.wait_for(lambda: self._room(stream) > 0 or self._is_over(stream))
            size = min(self._room(stream), len(data), MAX_FRAME)
            self._windows[0] -= size
            self._windows[stream] -= size
            part, data = data[:size], data[size:]
            self._writer.write(frame(DATA, END_STREAM if is_last and not data else 0, stream, part))
            await self._writer.drain()

    async def wait_ended(self, stream: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_over(stream))

    def _is_over(self, stream: int) -> bool:
        return stream in self.ended or self.is_closed

    def _room(self, stream: int) -> int:
        return min(self._windows[0], self._windows[stream])

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                async with self._changed:
                    self._take(head[3], head[4], int.from_bytes(head[5:], "big") & 0x7FFFFFFF, payload)
                    self._changed.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            async with self._changed:
                self.is_closed = True
                self._changed.notify_all()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self._windows[stream] += int.from_bytes(payload, "big")
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
        elif kind == PING and not flags & ACK:
            self._writer.write(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self.is_closed = True
        elif kind == HEADERS:
            self.headers[stream] += payload
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self.ended.add(stream)

    def _take_settings(self, payload: bytes) -> None:
        for key, value in struct.iter_unpack(">HI", payload):
            if key == INITIAL_WINDOW:
                for stream in self._windows:
                    if stream:
                        self._windows[stream] += value - self._initial
                self._initial = value
        self._writer.write(frame(SETTINGS, ACK, 0))
