"""What a pool shows of itself on a real terminal, recorded through tmux: nothing is torn, and all is as before in the
end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from screens import ENDED, Screen, needs_tmux

pytestmark = needs_tmux


@pytest.fixture
def screen(tmp_path) -> Iterator[Screen]:
    screens = Screen(tmp_path)
    try:
        yield screens
    finally:
        screens.close()


STARTING = """
import pathlib, threading, time
import skyward_lite as sky
from skyward_lite.providers.local import LocalMachine

def wait_for(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.01)

class SlowMachine(LocalMachine):
    def open(self, core):
        self.doing = "downloading numpy 2.4.1 (16 MB)"
        wait_for("installed")
        self.doing = ""
        if self.name == "local-1":
            raise sky.NodeStartError("cannot connect: connection refused")
        return super().open(core)

class Slow(sky.Local):
    def start(self, wanted, machines):
        machines.extend(SlowMachine(f"local-{number}", wanted.connect_timeout) for number in range(wanted.nodes))

def chat():
    wait_for("chat")
    for number in range(200):
        print("printed", number)
    pathlib.Path("chatted").touch()

print("before")
threading.Thread(target=chat, daemon=True).start()
with sky.pool(Slow(), nodes=(NODES - 1, NODES), worker=sky.Worker(concurrency=2)) as pool:
    pool.submit(print, "a task").result()
print("after")
"""


def test_the_start_of_nodes_is_a_live_part_below_what_is_printed(screen, tmp_path):
    """While nodes start there is a row for each, below what the program prints meanwhile; one line stays in the end."""
    pytest.importorskip("rich")
    screen.run(STARTING.replace("NODES", "3"))
    text = screen.wait(lambda text: text.count("downloading numpy") == 3)
    lines = text.split("\n")
    assert lines[:2] == ["before", lines[1]]
    assert lines[1].startswith("Starting 3 nodes · 0 ready · ")
    assert [line.split()[1] for line in lines[2:]] == ["local-0", "local-1", "local-2"]
    Path(tmp_path, "chat").touch()
    screen.wait(lambda text: Path(tmp_path, "chatted").exists() and "local-2  downloading" in text)
    Path(tmp_path, "installed").touch()
    lines = screen.end()
    assert lines[:201] == ["before", *(f"printed {number}" for number in range(200))]
    # The log's warning of the node that failed may come before or after.
    rest = [line for line in lines[201:] if not line.startswith(("node local-1 is left out", "skyward_lite agent"))]
    assert rest[0].startswith("skyward_lite: 2 nodes ready with 4 slots after ")
    assert rest[1][:8] == "[local-0" or rest[1][:8] == "[local-2"
    assert rest[2:] == ["after", f"{ENDED} 0"]


@pytest.mark.parametrize("term", ["dumb", "screen"])
def test_the_start_of_nodes_without_a_live_part_is_a_line_for_each_change(screen, tmp_path, term):
    """Without rich, and on a terminal that cannot move its cursor, there is one line for each change of a node."""
    program = STARTING.replace("NODES", "2")
    if term != "dumb":
        program = "import sys; sys.modules['rich'] = None\n" + program
    screen.run(program, TERM=term)
    screen.wait(lambda text: text.count("downloading numpy") == 2)
    Path(tmp_path, "installed").touch()
    lines = [line for line in screen.end() if not line.startswith(("node local-1 is left out", "skyward_lite agent"))]
    assert lines[0] == "before"
    told = [line.removeprefix("skyward_lite: ") for line in lines[1:] if line.startswith("skyward_lite: ")]
    assert told[0].startswith("local-0: downloading numpy 2.4.1 (16 MB) after 0.")
    assert told[1].startswith("local-1: downloading numpy 2.4.1 (16 MB) after 0.")
    assert told[-1].startswith("1 node ready with 2 slots after ")
    assert lines[-3:] == ["[local-0] a task", "after", f"{ENDED} 0"]


def test_a_silent_pool_shows_nothing(screen):
    """With progress=False nothing is shown of nodes that take longer than a moment."""
    slow = 'threading.Timer(1.0, lambda: open("installed", "w")).start()\nprint("before")\n'
    program = STARTING.replace("NODES", "2").replace('print("before")\n', slow)
    screen.run(program.replace(")) as pool", "), progress=False) as pool").replace("local-1", "nothing"))
    assert [line.replace("local-1", "local-0") for line in screen.end()] == [
        *["before", "[local-0] a task", "after", f"{ENDED} 0"]
    ]


MANY_WRITERS = """
import logging, os, pathlib, sys, threading, time, warnings
logging.basicConfig(format="%(message)s")
kept = sys.stdout
from skyward_lite.client.screen import screen

screen.show("pool", ["row 0", "row 0"])

def write(thread):
    for line in range(100):
        (kept if thread % 2 else sys.stdout).write(f"thread {thread} line {line}\\n")
        logging.warning("logged by %d line %d", thread, line)

threads = [threading.Thread(target=write, args=(thread,)) for thread in range(3)]
for thread in threads:
    thread.start()
for step in range(50):
    screen.show("pool", [f"row {step}", f"row {step} \\x1b[31min colour\\x1b[0m"] * (1 + step % 3))
    screen.refresh()
for thread in threads:
    thread.join()

print("begun", end="")
screen.show("pool", ["below a line that has not ended"])
pathlib.Path("begun").touch()
while not pathlib.Path("seen").exists():
    time.sleep(0.01)
print(" and ended")
sys.stderr.write("\\r10%")
sys.stderr.write("\\r100%\\n")
print("wide " + "x" * 150)

child = os.fork()
if not child:
    # Nothing of the parent's display, nor the lock of another thread, is the child's.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    print("unseen", flush=True)
    os._exit(len(screen._wrapped) + ("write" in sys.stdout.__dict__))
assert os.waitpid(child, 0)[1] == 0

late = sys.stdout.write
print("half a line,", end="")
screen.show("pool", [])
late(" and the rest\\n")
assert "write" not in sys.stdout.__dict__ and "write" not in sys.stderr.__dict__
raise SystemExit(3)
"""


@pytest.mark.parametrize("streams", ["", "2>errors", ">output"])
def test_lines_of_many_writers_stay_whole_above_the_live_part(screen, tmp_path, streams):
    """Lines of threads, of loggers and of streams that were kept earlier stay whole above the live part, whichever of
    the streams is the terminal; a line that has not ended is shown before its end.
    """
    screen.run(MANY_WRITERS, streams)
    screen.wait(lambda text: Path(tmp_path, "begun").exists() and text.endswith("below a line that has not ended"))
    if streams != ">output":
        assert screen.text().split("\n")[-2] == "begun"
    Path(tmp_path, "seen").touch()
    lines = screen.end()
    out = {f"thread {thread} line {line}" for thread in range(3) for line in range(100)}
    errors = {f"logged by {thread} line {line}" for thread in range(3) for line in range(100)}
    wide = ["begun and ended", "100%", "wide " + "x" * 95, "x" * 55, "half a line, and the rest", f"{ENDED} 3"]
    if streams == ">output":
        out, wide = set(), [wide[1], wide[-1]]
    elif streams:
        errors, wide = set(), [*wide[:1], *wide[2:]]
    written = lines[: -len(wide)]
    assert sorted(written) == sorted(out | errors)
    assert lines[-len(wide) :] == wide


def test_the_live_part_follows_the_windows_size(screen, tmp_path):
    """A live part that is drawn again in a narrower window leaves nothing behind, and never fills the window."""
    program = """
import pathlib, time
from skyward_lite.client.screen import screen
print("above")
for step in range(3):
    screen.show("pool", [f"row {number} of step {step} " + "x" * 80 for number in range(30)])
    while not pathlib.Path(f"go{step}").exists():
        time.sleep(0.01)
screen.show("pool", [])
print("below")
"""
    screen.run(program)
    screen.wait(lambda text: "row 29 of step 0" in text)
    screen.resize(60, 12)
    Path(tmp_path, "go0").touch()
    screen.wait(lambda text: "row 29 of step 1" in text)
    screen.resize(90, 30)
    Path(tmp_path, "go1").touch()
    screen.wait(lambda text: "row 29 of step 2" in text)
    Path(tmp_path, "go2").touch()
    lines = screen.end()
    assert lines[-2:] == ["below", f"{ENDED} 0"]
    assert lines[0] == "above"
