"""What a pool shows of itself on a real terminal, recorded through tmux: nothing is torn, and all is as before in the
end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import eventually
from screens import ENDED, SECONDS, Screen, needs_tmux

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


TASKS = """
import pathlib, sys, time
import skyward_lite as sky
from joblib import Parallel, delayed

def work(number, gate):
    # Not by print, which writes a line's end separately: another thread's line could come between.
    sys.stdout.write(f"task {number}\\n")
    while number in (30, 99) and not gate.exists():
        time.sleep(0.01)
    if number == 99:
        raise ValueError("task 99")
    return number

gate = pathlib.Path("gate").absolute()
with sky.pool(nodes=2, worker=sky.Worker(concurrency=2), progress=PROGRESS) as pool:
BODY
print("after")
"""
BLOCK = """
    with sky.progress(total=TOTAL):
        print("begun")
        calls = (delayed(work)(number, gate) for number in range(100))
        try:
            Parallel(n_jobs=-1, batch_size=1)(calls)
        except ValueError as error:
            print("raised", error)
        else:
            print("returned")
        raise SystemExit(4)
"""
ALL = """
    print(list(pool.map(work, range(40), [gate] * 40, chunksize=5))[-1])
"""


def without_tasks(lines: list[str]) -> list[str]:
    """Return the lines that no task printed, and not those on a start that took long."""
    others = [line for line in lines if "] task " not in line]
    return [line for line in others if not re.match("skyward_lite: (2 nodes ready|local-)", line)]


def test_tasks_are_shown_below_what_they_print(screen, tmp_path):
    """Inside sky.progress(), numbers of calls, rate, time left and a row for each node are below what tasks and the
    program print; the block and the program may end by an exception, and one line stays.
    """
    pytest.importorskip("rich")
    program = TASKS.replace("PROGRESS", "None").replace("BODY", BLOCK).replace("TOTAL", "100")
    screen.run(program)
    text = screen.wait(lambda text: "98 of 100 tasks done" in text and "local-1" in text.split("\n")[-1])
    rows = [line.strip() for line in text.split("\n")[-4:]]
    assert rows[0].startswith("━" * 20)
    assert rows[0].endswith("/s · 0:00 left")
    assert rows[1].startswith("2 running · ↑ ")
    nodes = [re.fullmatch(r"(local-[01])  ([0-2]) of 2 slots busy · (\d+) done", row) for row in rows[2:]]
    assert [node[1] for node in nodes] == ["local-0", "local-1"]
    assert [sum(int(node[field]) for node in nodes) for field in (2, 3)] == [2, 98]
    Path(tmp_path, "gate").touch()
    lines = screen.end()
    assert [line.partition(" task ")[0] for line in lines if "] task " in line].count("[local-0]") > 10
    begun, raised, done, end = without_tasks(lines)
    assert (begun, raised, end) == ("begun", "raised task 99", f"{ENDED} 4")
    # Task 30 may not have ended when the other one failed.
    assert re.match(r"skyward_lite: (99 of )?100 tasks done in [\d.]+ m?s \([\d,.]+/s\), 1 failed · ↑ ", done)


@pytest.mark.parametrize("redirections", ["", "2>errors"])
def test_all_tasks_of_a_pool_are_shown_in_one_line_without_rich(screen, tmp_path, redirections):
    """With pool(progress=True) and without rich, one line is written over, also where only standard output is a
    terminal; it counts calls and not batches.
    """
    program = "import sys; sys.modules['rich'] = None\n" + TASKS.replace("PROGRESS", "True").replace("BODY", ALL)
    screen.run(program, redirections)
    text = screen.wait(lambda text: "35 of 40 tasks done" in text)
    assert text.count(" tasks done") == 1
    assert " · 1 running · 4 waiting · ↑ " in text.split("\n")[-1]
    Path(tmp_path, "gate").touch()
    lines = screen.end()
    value, done, after, end = without_tasks(lines)
    assert (value, after, end) == ("39", "after", f"{ENDED} 0")
    assert done.startswith("skyward_lite: 40 tasks done in ")
    assert len([line for line in lines if "] task " in line]) == 40


def test_ctrl_c_leaves_the_terminal_as_before(screen):
    """Ctrl-C while tasks are shown takes the live part away; the traceback is whole below the last line."""
    pytest.importorskip("rich")
    screen.run(TASKS.replace("PROGRESS", "True").replace("BODY", BLOCK).replace("TOTAL", "None"))
    screen.wait(lambda text: " 2 running" in text and "local-1" in text.split("\n")[-1])
    screen.press("C-c")
    lines = without_tasks(screen.end())
    assert lines[-1].startswith(ENDED)
    assert lines[-2].endswith("KeyboardInterrupt")
    assert not any("slots busy" in line or "━" in line for line in lines)
    assert sum(line.startswith("skyward_lite: ") for line in lines) == 2


UNREAD = """
import os, pathlib, sys, time
import skyward_lite as sky
from skyward_lite.client import leaving

leaving.JOIN_SECONDS = 0.5
with sky.pool(worker=sky.Worker(concurrency=1), progress=True) as pool:
    pool.submit(print, "a task").result()
    with sky.progress():
        if os.fork() == 0:
            sys.exit(0)  # the blocks that a forked child leaves are its parent's
    assert os.wait()[1] == 0
    pathlib.Path("begun").touch()
    while not pathlib.Path("stopped").exists():
        time.sleep(0.01)
    pool.submit(print, "x" * 200_000).result()
pathlib.Path("left").touch()
"""


@pytest.mark.parametrize("redirections", ["", "| (while ! test -e left; do sleep 0.05; done; cat > rest)"])
def test_a_pool_is_left_while_nobody_reads_what_it_shows(screen, tmp_path, redirections):
    """A terminal that is stopped by Ctrl-S, and a pipe that is full, hold up no pool that is left."""
    screen.run(UNREAD, redirections)
    assert eventually(Path(tmp_path, "begun").exists, SECONDS), screen.text()
    if not redirections:
        screen.press("C-s")
    Path(tmp_path, "stopped").touch()
    assert eventually(Path(tmp_path, "left").exists, SECONDS)
    screen.press("C-q")
    assert screen.end()[-1] == f"{ENDED} 0"


def test_a_progress_bar_of_the_program_is_above_the_tasks(screen, tmp_path):
    """A tqdm bar that the program makes inside the block moves above the rows of the pool, and stays when they go."""
    pytest.importorskip("rich")
    pytest.importorskip("tqdm")
    body = """
    from tqdm import tqdm
    calls = (delayed(work)(number, gate) for number in range(98))
    values = Parallel(n_jobs=-1, batch_size=1, return_as="generator")(calls)
    for value in tqdm(values, total=98, mininterval=0, miniters=1):
        pass
"""
    screen.run(TASKS.replace("PROGRESS", "True").replace("BODY", body))
    text = screen.wait(lambda text: "30/98" in text and "97 of 98 tasks done" in text and "1 of 2 slots busy" in text)
    lines = text.split("\n")
    assert "30/98" in lines[-5]
    assert "97 of 98 tasks done" in lines[-4]
    Path(tmp_path, "gate").touch()
    bar, done, after, end = without_tasks(screen.end())
    assert bar.startswith("100%|")
    assert done.startswith("skyward_lite: 98 tasks done in ")
    assert (after, end) == ("after", f"{ENDED} 0")
