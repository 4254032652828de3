"""A long way to a host: a TCP relay that delivers each byte some time after it was sent, in both directions."""

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
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                self.threads.append(threading.Thread(target=self._relay, args=(near,), daemon=True))
                self.threads[-1].start()

    def _relay(self, near: socket.socket) -> None:
        with near, socket.create_connection(self.target) as far:
            directions = [_Direction(*ends, self.seconds) for ends in ((near, far), (far, near))]
            for thread in [thread for direction in directions for thread in direction.threads]:
                thread.join()

    def close(self) -> None:
        """Take no further connections, and wait for the end of those that are open."""
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        for thread in self.threads:
            thread.join(10)


class _Direction:
    """One direction of a connection."""

    def __init__(self, here: socket.socket, there: socket.socket, seconds: float) -> None:
        self.here, self.there, self.seconds = here, there, seconds
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.under_way: collections.deque[tuple[float, bytes]] = collections.deque()
        self.sent = threading.Semaphore(0)
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._write)]
        for thread in self.threads:
            thread.start()

    def _read(self) -> None:
        piece = b"+"
        while piece:
            try:
                piece = self.here.recv(1 << 18)
            except OSError:
                piece = b""
            self.under_way.append((time.monotonic() + self.seconds, piece))
            self.sent.release()

    def _write(self) -> None:
        piece = b"+"
        with contextlib.suppress(OSError):
            while piece:
                self.sent.acquire()
                due, piece = self.under_way.popleft()
                time.sleep(max(0.0, due - time.monotonic()))
                self.there.sendall(piece)
        # If the far side takes nothing more, the near side learns it too.
        for end, how in ((self.there, socket.SHUT_WR), (self.here, socket.SHUT_RD)):
            with contextlib.suppress(OSError):
                end.shutdown(how)
