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
