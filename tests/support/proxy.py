"""A TCP proxy before a host, which delays, slows, stalls, cuts, truncates and falsifies what passes, to the byte.

    proxy = before(lab, host)        # `sky.SSH(host.name, config=lab.config)` goes through it from now on
    proxy.cut()                      # reset all connections now
    armed = proxy.up.at(5_000_000, "cut")
    armed.fired.wait(10)             # the host has got exactly 5,000,000 further bytes, and both ends a reset

Up is from the client to the host, down from the host to the client. Everything may be called from any thread.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Literal

from lab import Lab, Sshd

How = Literal["reset", "end", "silence"]
"""What the two ends of a connection learn of its cut: a reset, an orderly end of stream, or nothing at all."""
Act = Literal["cut", "truncate", "flip", "stall"]
"""What happens at a byte: the connection is cut, its direction ends, a bit is changed, or the direction stalls."""

PIECE_BYTES = 1 << 18
SLOW_PIECE_BYTES = 1 << 12
"""The same, in a direction with a bandwidth."""
QUEUE_BYTES = 4 << 20
"""Bytes that one direction of a connection may have under way; of more, nothing is read from its sender."""
COMMAND_SECONDS = 10.0


class Armed:
    """What is to happen when a direction has carried `left` further bytes. `fired` is set when it has happened."""

    def __init__(self, left: int, act: Act, how: How, bit: int) -> None:
        self.left = left
        self.act = act
        self.how = how
        self.bit = bit
        self.fired = threading.Event()


class Direction:
    """One direction of all connections of a proxy; its fields may be set at any time."""

    def __init__(self, proxy: Proxy, delay: float) -> None:
        self.delay = delay
        """Seconds between a byte's arrival and its departure."""
        self.bandwidth: float | None = None
        """Bytes that pass in a second; None for as many as can."""
        self.bytes = 0
        """Bytes that were passed on; written by the proxy's thread."""
        self.armed: Armed | None = None
        self.flows = asyncio.Event()
        self.flows.set()
        self.free_at = 0.0
        """The loop's time at which the bandwidth allows the next byte."""
        self._proxy = proxy

    def at(self, count: int, act: Act, how: How = "reset", bit: int = 0) -> Armed:
        """Let something happen once, after `count` further bytes in this direction, whichever connection has them."""
        armed = Armed(count, act, how, bit)

        async def arm() -> None:
            self.armed = armed

        self._proxy.run(arm())
        return armed

    def stall(self) -> None:
        """Pass nothing on from now on, neither of open connections nor of new ones."""
        self._proxy.call(self.flows.clear)

    def resume(self) -> None:
        """Pass on what was held back, and all that comes."""
        self._proxy.call(self.flows.set)


class _Half:
    """One direction of one connection."""

    def __init__(self, direction: Direction, source: socket.socket, target: socket.socket, pair: _Pair) -> None:
        self.direction = direction
        self.source = source
        self.target = target
        self.pair = pair
        self.loop = asyncio.get_running_loop()
        self.under_way: collections.deque[tuple[float, bytes]] = collections.deque()
        self.queued = 0
        self.changed = asyncio.Event()
        self.truncated = False

    async def read(self) -> None:
        """Take what comes, as long as there is room for it."""
        piece = b"+"
        while piece:
            while self.queued > QUEUE_BYTES:
                self.changed.clear()
                await self.changed.wait()
            size = PIECE_BYTES if self.direction.bandwidth is None else SLOW_PIECE_BYTES
            piece = await self.loop.sock_recv(self.source, size)
            self.queued += len(piece)
            self.under_way.append((self.loop.time() + self.direction.delay, piece))
            self.changed.set()

    async def write(self) -> None:
        """Pass on what was read, when it is due."""
        direction = self.direction
        while True:
            while not self.under_way:
                self.changed.clear()
                await self.changed.wait()
            due, piece = self.under_way.popleft()
            await self._sleep_until(due)
            if direction.bandwidth is not None:
                begin = max(self.loop.time(), direction.free_at)
                direction.free_at = begin + len(piece) / direction.bandwidth
                await self._sleep_until(direction.free_at)
            await direction.flows.wait()
            if not piece:
                break
            await self._pass(piece)
            self.queued -= len(piece)
            self.changed.set()
        self._end()

    async def _sleep_until(self, time: float) -> None:
        if time > self.loop.time():
            await asyncio.sleep(time - self.loop.time())

    async def _pass(self, piece: bytes) -> None:
        """Pass a piece on, and do in it what is armed."""
        while piece and not self.truncated:
            armed = self.direction.armed
            if armed is None or armed.left > len(piece):
                await self._send(piece)
                if armed is not None:
                    armed.left -= len(piece)
                return
            head, piece = piece[: armed.left], piece[armed.left :]
            if armed.act == "flip" and not piece:
                # The byte that is to be changed comes with the next piece.
                armed.left = 0
                await self._send(head)
                return
            self.direction.armed = None
            await self._send(head)
            await self._do(armed)
            if armed.act == "flip":
                piece = bytes([piece[0] ^ 1 << armed.bit]) + piece[1:]

    async def _do(self, armed: Armed) -> None:
        if armed.act == "truncate":
            self.truncated = True
            self._end()
        elif armed.act == "stall":
            self.direction.flows.clear()
        elif armed.act == "cut":
            self.pair.proxy.start(self.pair.cut(armed.how, armed.fired))
            await asyncio.Event().wait()  # until the cut cancels this
        armed.fired.set()
        await self.direction.flows.wait()

    async def _send(self, piece: bytes) -> None:
        await self.loop.sock_sendall(self.target, piece)
        self.direction.bytes += len(piece)

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self.target.shutdown(socket.SHUT_WR)


class _Pair:
    """One connection: the client's to the proxy, and the proxy's to the host."""

    def __init__(self, proxy: Proxy, near: socket.socket) -> None:
        self.proxy = proxy
        self.sockets = [near]
        self.tasks: list[asyncio.Task[None]] = []
        self.serving = proxy.start(self.serve(near))

    async def serve(self, near: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        far.setblocking(False)
        self.sockets.append(far)
        halves: list[_Half] = []
        try:
            for one in self.sockets:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(far, self.proxy.target)
            halves = [_Half(self.proxy.up, near, far, self), _Half(self.proxy.down, far, near, self)]
            self.tasks = [asyncio.create_task(work) for half in halves for work in (half.read(), half.write())]
            await asyncio.gather(*self.tasks)
        except OSError:
            await self.cut("reset")
        else:
            self._close()

    async def cut(self, how: How, fired: threading.Event | None = None) -> None:
        """End the connection."""
        this = asyncio.current_task()
        ending = [task for task in (self.serving, *self.tasks) if task is not this]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        if how == "silence":
            # Nobody reads from these sockets any more, nor closes them before the proxy is closed.
            self.proxy.pairs.discard(self)
            self.proxy.silent += self.sockets
        elif how == "reset":
            for one in self.sockets:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._close()
        else:
            await self._say_end()
        if fired is not None:
            fired.set()

    async def _say_end(self) -> None:
        """Tell both ends that the stream ends, and drop what they had sent, which would turn the end into a reset."""
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_WR)
        self.proxy.pairs.discard(self)
        self.proxy.start(self._drain())

    async def _drain(self) -> None:
        async def drain(one: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while await asyncio.get_running_loop().sock_recv(one, PIECE_BYTES):
                    pass

        try:
            await asyncio.wait_for(asyncio.gather(*map(drain, self.sockets)), COMMAND_SECONDS)
        except TimeoutError:
            pass
        finally:
            self._close()

    def _close(self) -> None:
        self.proxy.pairs.discard(self)
        for one in self.sockets:
            one.close()


class Proxy:
    """Listens on `address`, and leads to `target`. `delay` is that of each direction, in seconds."""

    def __init__(self, target: tuple[str, int], address: str = "127.0.0.1", delay: float = 0.0) -> None:
        self.target = target
        self.address = address
        self.port = 0
        self.connections = 0
        """Connections that were accepted; written by the proxy's thread."""
        self.pairs: set[_Pair] = set()
        """Open connections."""
        self.silent: list[socket.socket] = []
        """What is left of connections that were cut in silence."""
        self.up = Direction(self, delay)
        self.down = Direction(self, delay)
        self._running: set[asyncio.Task[Any]] = set()
        self._server: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.listen()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do something on the proxy's thread, and wait for its end."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * COMMAND_SECONDS)

    def call(self, do: Any) -> None:
        """Call something on the proxy's thread, and wait for its return."""

        async def work() -> None:
            do()

        self.run(work())

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin something, on the proxy's thread."""
        task = self._loop.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def listen(self) -> None:
        """Take connections, again on the same port after `refuse`."""

        async def work() -> None:
            if self._server is None:
                self._server = socket.create_server((self.address, self.port), backlog=128)
                self._server.setblocking(False)
                self.port = self._server.getsockname()[1]
                self._accepting = self.start(self._accept(self._server))

        self.run(work())

    async def _accept(self, server: socket.socket) -> None:
        while True:
            near, _ = await self._loop.sock_accept(server)
            near.setblocking(False)
            self.connections += 1
            self.pairs.add(_Pair(self, near))

    def refuse(self) -> None:
        """Refuse further connections. Those that are open stay so."""

        async def work() -> None:
            if self._server is not None:
                assert self._accepting is not None
                self._accepting.cancel()
                await asyncio.gather(self._accepting, return_exceptions=True)
                self._server.close()
                self._server = None

        self.run(work())

    def cut(self, how: How = "reset") -> int:
        """Cut all open connections. Return how many there were."""

        async def work() -> int:
            pairs = list(self.pairs)
            for pair in pairs:
                await pair.cut(how)
            return len(pairs)

        count: int = self.run(work())
        return count

    def stall(self) -> None:
        """Pass nothing on in either direction."""
        self.up.stall()
        self.down.stall()

    def resume(self) -> None:
        """Pass everything on again."""
        self.up.resume()
        self.down.resume()

    def close(self) -> None:
        """Refuse further connections, and reset those that are open."""

        async def work() -> None:
            for one in self.silent:
                one.close()
            rest = [task for task in self._running if task is not asyncio.current_task()]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        if not self._loop.is_closed():
            self.refuse()
            self.cut()
            self.run(work())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(COMMAND_SECONDS)
            self._loop.close()


def before(lab: Lab, host: Sshd, delay: float = 0.0) -> Proxy:
    """Put a proxy before a host of a lab: the client's configuration leads through it from now on."""
    proxy = Proxy((host.address, host.port), host.address, delay)
    lab.extra[host.name] = [
        *(f"HostName {proxy.address}", f"Port {proxy.port}", f"HostKeyAlias [{host.address}]:{host.port}"),
        *lab.extra[host.name],
    ]
    lab.write()
    return proxy
