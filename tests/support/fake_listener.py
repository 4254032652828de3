"""An agent for tests of the relay: it listens where `attach.py` starts it, and answers lines instead of frames.

As a real one it answers "k" when it takes a connection, resumes one session over several, and ends when a new session
comes, or its client says "quit".
"""

from __future__ import annotations

import os
import socket
import sys
import threading

from skyward_lite.node import directories

FD, LOCK = 3, 4


def end(directory: str, status: int = 0) -> None:
    """End as a real agent, which removes its directory."""
    directories.remove(directory)
    os._exit(status)


def talk(relay: socket.socket, reading: int, writing: int, directory: str) -> None:
    """Answer the lines of one connection until it ends; then let go of it."""
    with relay, open(reading) as lines, open(writing, "w") as answers:
        for line in lines:
            match line.split():
                case ["quit"]:
                    end(directory)
                case ["fail"]:
                    print("something broke", flush=True)
                    os._exit(3)
                case words:
                    print(*words, os.getpid(), file=answers, flush=True)


def main() -> None:
    """Take connections until a new session comes."""
    if sys.argv[1] == "stdio":
        print(input(), *sys.argv[1:])
        return
    directory = sys.argv[4]
    os.set_inheritable(LOCK, False)
    if os.path.exists(f"{directory}/../broken"):
        print("cannot start", flush=True)
        sys.exit(3)
    listening = socket.socket(fileno=FD)
    is_new = True
    while True:
        relay, _ = listening.accept()
        meaning, fds, _, _ = socket.recv_fds(relay, 1, 2)
        if meaning == b"n" and not is_new:
            relay.close()
            end(directory)
        is_new = False
        relay.send(b"k")
        threading.Thread(target=talk, args=(relay, *fds, directory), daemon=True).start()


if __name__ == "__main__":
    main()
