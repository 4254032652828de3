"""An agent that speaks the protocol and follows a script: for tests of a client's behaviour with a bad node.

It is a program and a library that imports nothing of the package: `rust/src/wire/` defines the wire, and this file
writes it once more. `fakes.py` starts it as a node's agent, with a line of JSON as its first argument:

    {"behaviour": "silent", "args": {...}, "journal": "/path"}

A behaviour is a function of this file, or of another one ("path.py:name"), that takes an `Agent` and the arguments.
When it is called, nothing has been sent yet; when it returns, the process ends. What the agent hears and does is
written to the journal, a line each.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import runpy
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MAGIC = b"\0SKYWARD-LITE\r\n\0"
PROTOCOL = 6
HEAD = "<BBHIIIQ"
"""Of a message: code, blobs, parts, generation, slot, calls, nanoseconds."""
MAX_BLOCK = 256 * 1024
MAX_BODY = 64 * 1024
CHUNK = 32 * 1024 - 64
LZ4 = 1 << 31
FIRST, LAST = 1, 2

KINDS = {
    "hello": 1,
    "ready": 2,
    "heartbeat": 3,
    "pulse": 4,
    "goodbye": 5,
    "acknowledge": 6,
    "cancel": 7,
    "recall": 8,
    "given_back": 9,
    "recall_refused": 10,
    "task": 11,
    "result": 12,
    "abort": 13,
    "output": 14,
    "drain": 15,
    "note": 16,
    "note_answer": 17,
    "blob_chunk": 18,
    "forget": 19,
    "received": 20,
    "blob_lost": 21,
    "attach": 23,
    "reached": 24,
    "stripe_block": 25,
    "blocks_arrived": 26,
}
NAMES = {number: name for name, number in KINDS.items()}
OUTCOMES = {"returned": 0, "raised": 1, "crashed": 2, "cancelled": 3, "node_lost": 4, "timed_out": 5, "partial": 6}

# ------------------------------------------------------------------------------------------------------------ writing


def frame(kind: str | int, body: bytes = b"", *, task: int = 0, attempt: int = 0, flags: int = 0) -> bytes:
    """Return one frame. Numbers that do not fit their field are cut."""
    number = KINDS[kind] if isinstance(kind, str) else kind
    return struct.pack("<IBBHQ", len(body), number, flags, attempt & 0xFFFF, task & (1 << 64) - 1) + body


def message(
    kind: str | int, parts: list[bytes], *, task: int = 0, attempt: int = 0, outcome: int | str = 0, nanos: int = 0
) -> Iterator[bytes]:
    """Yield the frames of a task, a result or a note."""
    number = OUTCOMES[outcome] if isinstance(outcome, str) else outcome
    fields = struct.pack(HEAD, number, 0, len(parts), 0, 0, 0, nanos) + b"".join(
        struct.pack("<Q", len(p)) for p in parts
    )
    payload = b"".join(parts)
    pieces = [payload[at : at + CHUNK] for at in range(0, len(payload), CHUNK)] or [b""]
    for place, piece in enumerate(pieces):
        flags = (FIRST if place == 0 else 0) | (LAST if place == len(pieces) - 1 else 0)
        yield frame(kind, (fields if place == 0 else b"") + piece, task=task, attempt=attempt, flags=flags)


def acknowledgement(ids: list[tuple[int, int]]) -> bytes:
    """Return the frame that acknowledges these (task, attempt)."""
    return frame("acknowledge", b"".join(struct.pack("<QH", *one) for one in ids))


def block(raw: bytes) -> bytes:
    """Return a block that is not compressed."""
    return struct.pack("<II", len(raw), len(raw)) + raw


def compressed(raw: bytes, wire: bytes) -> bytes:
    """Return a block whose compressed bytes are `wire`."""
    return struct.pack("<II", len(wire) | LZ4, len(raw)) + wire


def repeated(unit: bytes, count: int) -> bytes:
    """Return a block of `count` times the same bytes, compressed to little more than one of them."""
    raw = unit * count
    match = len(raw) - len(unit) - len(unit)
    if match < 16:
        return block(raw)
    # Literals, a match that repeats them, and literals again: lz4's last sequence must consist of literals.
    wire = _sequence(unit, len(unit), match) + _sequence(unit, None, 0)
    return compressed(raw, wire)


def _sequence(literals: bytes, offset: int | None, match: int) -> bytes:
    def more(rest: int) -> bytes:
        return b"\xff" * (rest // 255) + bytes([rest % 255])

    count, extra = len(literals), 0 if offset is None else match - 4
    out = bytes([min(count, 15) << 4 | min(extra, 15)])
    out += more(count - 15) if count >= 15 else b""
    out += literals
    if offset is not None:
        out += struct.pack("<H", offset) + (more(extra - 15) if extra >= 15 else b"")
    return out


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass
class Frame:
    """A control frame or a whole message of the client."""

    kind: str
    task: int
    attempt: int
    body: bytes = b""
    """Of a control frame."""
    parts: list[bytes] = field(default_factory=list)
    """Of a message."""
    code: int = 0
    """Of a message: a task's kind, or the outcome in a result."""

    @property
    def id(self) -> dict[str, int]:
        """Return the fields that name the task in an answer."""
        return {"task": self.task, "attempt": self.attempt}

    def __str__(self) -> str:
        return f"{self.kind} {self.task} {self.attempt}"


def unpack_lz4(wire: bytes, size: int) -> bytes:
    """Return the bytes that an lz4 block holds."""
    out, at = bytearray(), 0

    def length(nibble: int) -> int:
        nonlocal at
        total = nibble
        while nibble == 15:
            byte = wire[at]
            at += 1
            total += byte
            if byte != 255:
                break
        return total

    while at < len(wire):
        token = wire[at]
        at += 1
        literals = length(token >> 4)
        out += wire[at : at + literals]
        at += literals
        if at >= len(wire):
            break
        offset = wire[at] | wire[at + 1] << 8
        at += 2
        left = length(token & 15) + 4
        while left > 0:
            piece = out[-offset:][:left] if offset >= left else out[-offset:]
            out += piece
            left -= len(piece)
    assert len(out) == size, "the client's block is not readable"
    return bytes(out)


class Stream:
    """The frames that can be read from a descriptor, until its end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.rest = bytearray()
        self.open: dict[tuple[str, int, int], tuple[int, list[int], bytearray]] = {}

    def take(self, count: int) -> bytes:
        """Return `count` bytes. Raises EOFError."""
        while len(self.rest) < count:
            more = os.read(self.fd, 1 << 18)
            if not more:
                raise EOFError
            self.rest += more
        taken = bytes(self.rest[:count])
        del self.rest[:count]
        return taken

    def frames(self) -> Iterator[Frame]:
        """Yield all frames until the end of the stream."""
        with contextlib.suppress(EOFError):
            assert self.take(16) == MAGIC, "the client does not speak our protocol"
            assert self.take(4) == struct.pack("<I", PROTOCOL), "the client has another version of the protocol"
            while True:
                wire, size = struct.unpack("<II", self.take(8))
                raw = self.take(wire & ~LZ4)
                yield from self._split(unpack_lz4(raw, size) if wire & LZ4 else raw)

    def _split(self, raw: bytes) -> Iterator[Frame]:
        at = 0
        while at < len(raw):
            length, number, flags, attempt, task = struct.unpack_from("<IBBHQ", raw, at)
            body = raw[at + 16 : at + 16 + length]
            at += 16 + length
            kind = NAMES[number]
            if kind not in ("task", "result", "note"):
                yield Frame(kind, task, attempt, body)
                continue
            key = (kind, task, attempt)
            if flags & FIRST:
                code, blobs, count, *_ = struct.unpack_from(HEAD, body)
                lengths = list(struct.unpack_from(f"<{count}Q", body, struct.calcsize(HEAD)))
                self.open[key] = (code, lengths, bytearray())
                body = body[struct.calcsize(HEAD) + 8 * count + 10 * blobs :]
            self.open[key][2].extend(body)
            if flags & LAST:
                code, lengths, whole = self.open.pop(key)
                parts, start = [], 0
                for one in lengths:
                    parts.append(bytes(whole[start : start + one]))
                    start += one
                yield Frame(kind, task, attempt, parts=parts, code=code)


# ----------------------------------------------------------------------------------------------------------- the agent


class Agent:
    """One end of a session, as a node's agent.

    A thread reads all that the client sends for as long as the process lives, and ends the process at the end of the
    stream. It answers heartbeats while `alive` is set.
    """

    def __init__(self, reading: int, writing: int, journal: str | None = None) -> None:
        self.stream = Stream(reading)
        self.writing = writing
        self.alive = True
        self.held: dict[tuple[int, int], Frame] = {}
        """The tasks that came and were not answered, by (task, attempt)."""
        self.client: dict[str, Any] = {}
        """The client's hello."""
        self._journal = open(journal, "a", buffering=1) if journal else None  # noqa: SIM115 (open for good)
        self._inbox: queue.Queue[Frame] = queue.Queue()
        self._urgent: list[bytes] = []
        self._lock = threading.Lock()
        self._greeted = False
        threading.Thread(target=self._read, daemon=True).start()

    def note(self, line: object) -> None:
        """Write a line to the journal."""
        if self._journal is not None:
            self._journal.write(f"{line}\n")

    def _read(self) -> None:
        try:
            for one in self.stream.frames():
                if one.kind == "heartbeat":
                    if self.alive:
                        self._urgent.append(block(frame("pulse", task=one.task)))
                        self._flush()
                    continue
                self.note(one)
                self._inbox.put(one)
        except BaseException as error:
            self.note(f"error {error!r}")
        finally:
            self.note("end of stream")
            os._exit(0)

    def _flush(self) -> None:
        # A thread that is writing at the moment sends the urgent frames as well.
        while self._urgent and self._lock.acquire(blocking=False):
            try:
                self._write(b"")
            finally:
                self._lock.release()

    def _write(self, data: bytes) -> None:
        urgent = [self._urgent.pop(0) for _ in range(len(self._urgent))]
        view = memoryview(b"".join([*urgent, data]))
        try:
            while view:
                view = view[os.write(self.writing, view) :]
        except OSError:
            self.note("the client does not read any more")
            os._exit(0)

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        with self._lock:
            self._write(data)
        self._flush()

    def send(self, *frames: bytes) -> None:
        """Send frames, in as many blocks as they need."""
        raw = b""
        for one in frames:
            if len(raw) + len(one) > MAX_BLOCK:
                self.write(block(raw))
                raw = b""
            raw += one
        self.write(block(raw))

    def preamble(self) -> None:
        """Send what opens the stream."""
        self.write(MAGIC + struct.pack("<I", PROTOCOL))

    def hello(self, **changes: object) -> None:
        """Wait for the client's hello and answer it, with these fields changed."""
        one = self._inbox.get()
        assert one.kind == "hello", one
        self.client = json.loads(one.body)
        answer = {
            "version": self.client["version"],
            "python": self.client["python"],
            "epoch": "fake",
            "cores": 1,
            "pid": os.getpid(),
            **changes,
        }
        self.preamble()
        self.send(frame("hello", json.dumps(answer).encode()))

    @property
    def slots(self) -> int:
        """Return the number of slots that the client asked for."""
        return self.client["worker"]["concurrency"] or 1

    def ready(self, slots: int | None = None) -> None:
        """Announce that tasks may come."""
        self.send(frame("ready", task=self.slots if slots is None else slots))

    def begin(self) -> None:
        """Send the hello, and announce that tasks may come."""
        self.hello()
        self.ready()

    def next(self, seconds: float | None = None) -> Frame | None:
        """Wait for the next frame but heartbeats, for at most `seconds`. Return None if none came."""
        try:
            one = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        if one.kind == "task":
            self.held[one.task, one.attempt] = one
        return one

    def until(self, *kinds: str) -> Frame:
        """Wait for a frame of one of these kinds, and pass over the others."""
        while True:
            one = self.next()
            assert one is not None
            if one.kind in kinds:
                return one

    def result(self, one: Frame, parts: list[bytes] | None = None, outcome: int | str = "returned") -> None:
        """End the task that a frame is about."""
        self.held.pop((one.task, one.attempt), None)
        self.send(*message("result", parts or [], outcome=outcome, **one.id))

    def give_back(self, one: Frame) -> None:
        """Answer a recall as an agent does whose workers have begun no task."""
        here = self.held.pop((one.task, one.attempt), None)
        self.send(frame("recall_refused" if here is None else "given_back", **one.id))

    def drop(self, one: Frame) -> None:
        """Answer a cancel or an abort as an agent does whose workers have begun no task."""
        self.result(one, outcome="cancelled")

    def leave(self, why: bytes = b"goodbye") -> None:
        """Send a goodbye, and wait for the end of the stream."""
        self.send(frame("goodbye", why))
        self.sleep()

    def sleep(self, seconds: float = 1e6) -> None:
        """Go on reading and do nothing else."""
        time.sleep(seconds)

    def serve(self, seconds: float | None = None, **answers: Callable[[Frame], object]) -> None:
        """Answer as an agent whose workers begin no task, but for the kinds in `answers`, for `seconds` or for good."""
        usual: dict[str, Callable[[Frame], object]] = {
            "recall": self.give_back,
            "cancel": self.drop,
            "abort": self.drop,
            "goodbye": lambda one: self.leave(),
        }
        by = None if seconds is None else time.monotonic() + seconds
        while (left := None if by is None else by - time.monotonic()) is None or left > 0:
            one = self.next(left)
            if one is not None:
                {**usual, **answers}.get(one.kind, lambda one: None)(one)


# ---------------------------------------------------------------------------------------------------------- behaviours


def idle(agent: Agent) -> None:
    """Take tasks and begin none, and answer every request, as an honest agent whose workers are busy."""
    agent.begin()
    agent.serve()


def silent(agent: Agent, hello: bool = True, ready: bool = True, seconds: float = 1e6) -> None:
    """Send nothing, or nothing after the hello or the ready frame, for `seconds`; answer no heartbeats either."""
    agent.alive = False
    if hello:
        agent.hello()
    if ready:
        agent.ready()
    agent.sleep(seconds)


def says(agent: Agent, kind: str | int, body: str = "", task: int = 0, attempt: int = 0, flags: int = 0) -> None:
    """Send one frame when the first task has come, and go on as an honest agent."""
    agent.begin()
    agent.until("task")
    agent.send(frame(kind, bytes.fromhex(body), task=task, attempt=attempt, flags=flags))
    agent.serve()


def floods(
    agent: Agent,
    kind: str | int,
    body: str = "",
    task: int = 0,
    attempt: int = 0,
    flags: int = 0,
    count: int = 0,
    seconds: float = 1e6,
    times: int = 0,
) -> None:
    """Repeat one frame (its body in hexadecimal digits) from the first task on, `count` of them in a compressed block.

    With `times` send this number of blocks and go on as an honest agent; otherwise send for `seconds` and end.
    """
    agent.begin()
    agent.until("task")
    one = frame(kind, bytes.fromhex(body), task=task, attempt=attempt, flags=flags)
    # A frame longer than lz4's reach back is not compressed.
    data = repeated(one, count or MAX_BLOCK // len(one)) if len(one) < 1 << 16 else block(one)
    if times:
        for _ in range(times):
            agent.write(data)
        agent.serve()
    by = time.monotonic() + seconds
    while time.monotonic() < by:
        agent.write(data)


def babbles(agent: Agent, how: str, seed: int = 1, seconds: float = 1e6) -> None:
    """Send nonsense from the first task on, for `seconds`.

    `how`: "bytes" (no block at all), "blocks" (of bytes that are no frames), "frames" (of any kind, with any fields and
    bodies), "lz4" (blocks that do not unpack), "opened" (messages that begin and do not end), "unasked" (results of
    tasks that nobody sent), "notes" (of any number).
    """
    rng = random.Random(seed)
    agent.begin()
    agent.until("task")
    by = time.monotonic() + seconds
    number = 0
    while time.monotonic() < by:
        number += 1
        if how == "bytes":
            agent.write(rng.randbytes(1000))
        elif how == "blocks":
            agent.write(block(rng.randbytes(1000)))
        elif how == "lz4":
            agent.write(compressed(bytes(MAX_BLOCK), rng.randbytes(1000)))
        elif how == "frames":
            body = rng.randbytes(rng.choice([0, 8, 10, 40, 1000]))
            flags = rng.choice([0, 0, 0, FIRST, LAST, FIRST | LAST, 255])
            task = rng.choice([0, 1, number, 1 << 40, rng.getrandbits(64)])
            agent.send(frame(rng.randrange(256), body, task=task, attempt=rng.choice([0, 1, 65535]), flags=flags))
        elif how == "opened":
            opening = struct.pack(HEAD, 0, 0, 1, 0, 0, 0, 0) + struct.pack("<Q", 1 << 20) + bytes(100)
            agent.send(frame("result", opening, task=number, flags=FIRST))
        elif how == "unasked":
            agent.send(*message("result", [bytes(100_000)], task=number))
        elif how == "notes":
            agent.send(*message("note", [bytes(100_000)], task=number))


def hands_back(agent: Agent) -> None:
    """Give every task back at once, unasked."""
    agent.begin()
    agent.serve(task=agent.give_back)


def ignores(agent: Agent, kinds: list[str]) -> None:
    """Take tasks and begin none, and answer no frame of these kinds."""
    agent.begin()
    agent.serve(**dict.fromkeys(kinds, lambda one: None))


def ends(agent: Agent, outcome: str) -> None:
    """End every task with this outcome."""
    agent.begin()
    agent.serve(task=lambda one: agent.result(one, [b"the fake node says so"], outcome))


def drains(agent: Agent) -> None:
    """Announce with the first task that the node will soon be gone, and refuse all recalls."""
    agent.begin()
    agent.until("task")
    agent.send(frame("drain", b"it says so"))
    agent.serve(recall=lambda one: agent.send(frame("recall_refused", **one.id)))


def drips(agent: Agent, pause: float = 0.2) -> None:
    """Send one byte of a block after the other, and answer no heartbeat."""
    agent.alive = False
    agent.begin()
    agent.until("task")
    for byte in block(frame("output", bytes(MAX_BODY - 1))):
        agent.write(bytes([byte]))
        time.sleep(pause)


def keeps_anothers(agent: Agent, task: int) -> None:
    """Refuse the recall of another node's task when asked to drop one, print a line, and leave."""
    agent.begin()
    agent.until("cancel")
    agent.send(frame("recall_refused", task=task), frame("output", b"it is mine\n", task=1))
    agent.leave()


def answers_and_leaves(agent: Agent) -> None:
    """Send in one block that the worker of the first task died, and a goodbye."""
    agent.begin()
    one = agent.until("task")
    crash = message("result", [b"the fake node says so"], outcome="crashed", **one.id)
    agent.send(*crash, frame("goodbye", b"and leaves"))
    agent.sleep()


def main() -> None:
    """Run the behaviour that the first argument describes. Further arguments are for the starter's own use."""
    wanted = json.loads(sys.argv[1])
    file, _, name = wanted["behaviour"].rpartition(":")
    behaviour = runpy.run_path(file)[name] if file else globals()[name]
    reading, writing = os.dup(0), os.dup(1)
    # Output that is printed by mistake must not get between the frames.
    os.dup2(2, 1)
    behaviour(Agent(reading, writing, wanted.get("journal")), **wanted.get("args", {}))


if __name__ == "__main__":
    main()
