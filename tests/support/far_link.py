"""A long way to a host: a TCP proxy that delivers each byte some time after it was sent, in both directions."""

from __future__ import annotations

import collections
import contextlib
import socket
import threading
import time


class FarLink:
    """Listens on `address`:`port`; what comes there leaves for the target `seconds` later, and the other way round."""

    def __init__(self, target: tuple[str, int], seconds: float) -> None:
        self.target = target
        self.seconds = seconds
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address, self.port = self.server.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                far = socket.create_connection(self.target)
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for here, there in ((near, far), (far, near)):
                    _Direction(here, there, self.seconds)

    def close(self) -> None:
        """Take no further connections. Those that are open end with their ends."""
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


class _Direction:
    """One direction of a connection."""

    def __init__(self, here: socket.socket, there: socket.socket, seconds: float) -> None:
        self.here, self.there, self.seconds = here, there, seconds
        self.under_way: collections.deque[tuple[float, bytes]] = collections.deque()
        self.arrived = threading.Semaphore(0)
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        piece = b"+"
        while piece:
            try:
                piece = self.here.recv(1 << 18)
            except OSError:
                piece = b""
            self.under_way.append((time.monotonic() + self.seconds, piece))
            self.arrived.release()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.arrived.acquire()
                due, piece = self.under_way.popleft()
                time.sleep(max(0.0, due - time.monotonic()))
                if not piece:
                    break
                self.there.sendall(piece)
        with contextlib.suppress(OSError):
            self.there.shutdown(socket.SHUT_WR)
