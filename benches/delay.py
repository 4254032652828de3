"""A TCP relay that delivers each byte a fixed time after it came: `delay.py HOST PORT MILLISECONDS`.

Prints the port of 127.0.0.1 at which it listens, and relays until its standard input ends. A path has two of these
delays, so the round trip grows by twice the milliseconds; its rate is not limited. (Kernels of small machines often
come without `netem`.)
"""

from __future__ import annotations

import collections
import socket
import sys
import threading
import time

PIECE_BYTES = 1 << 20
"""Read at once, at most."""
PATH_BYTES = 512 << 20
"""Under way in one direction, at most: more than what any sender sends within the delay."""


class Path:
    """One direction of a relayed connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, seconds: float) -> None:
        self._source, self._sink, self._seconds = source, sink, seconds
        self._pieces: collections.deque[tuple[float, bytes]] = collections.deque()
        """What is under way: (when it is to be delivered, what); b"" for the end."""
        self._bytes = 0
        self._changed = threading.Condition()
        for run in (self._read, self._write):
            threading.Thread(target=run, daemon=True).start()

    def _read(self) -> None:
        piece = b" "
        while piece:
            try:
                piece = self._source.recv(PIECE_BYTES)
            except OSError:
                piece = b""
            with self._changed:
                self._changed.wait_for(lambda: self._bytes < PATH_BYTES)
                self._pieces.append((time.monotonic() + self._seconds, piece))
                self._bytes += len(piece)
                self._changed.notify_all()

    def _write(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._pieces)
                    due, piece = self._pieces.popleft()
                time.sleep(max(0.0, due - time.monotonic()))
                if not piece:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                self._sink.sendall(piece)
                with self._changed:
                    self._bytes -= len(piece)
                    self._changed.notify_all()
        except OSError:
            self._source.close()


def serve(host: str, port: int, seconds: float) -> None:
    """Relay all connections that come."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)
    while True:
        near, _ = listener.accept()
        far = socket.create_connection((host, port))
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Path(near, far, seconds)
        Path(far, near, seconds)


if __name__ == "__main__":
    arguments = (sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000)
    threading.Thread(target=serve, args=arguments, daemon=True).start()
    sys.stdin.read()
