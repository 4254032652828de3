"""Output of tasks reaches the client's streams, bounded, whatever the tasks do to their own streams."""

from __future__ import annotations

import ctypes
import io
import logging
import operator
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import skyward_lite as sky
from lab import Lab
from processes import eventually
from skyward_lite.client.output import MAX_HELD_LINE, Printer
from skyward_lite.client.tasks import Tasks


def chat(text):
    print(text)
    print(text.upper(), file=sys.stderr)
    logging.getLogger("chat").warning("logged %s", text)


def test_output_lines_have_the_nodes_name(capsys):
    """Lines of print to both streams and of logging have the node's name, and all are there when the block is left."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        list(pool.map(chat, [f"line {n}" for n in range(20)]))
        shell = "echo from a child; printf 'no newline'"
        pool.submit(subprocess.run, shell, shell=True, check=True).result(20)
    out, err = capsys.readouterr()
    for n in range(20):
        assert any(f"[local-{node}] line {n}\n" in out for node in (0, 1))
        assert any(f"[local-{node}] LINE {n}\n" in err for node in (0, 1))
        assert f"logged line {n}\n" in err
    assert "] from a child\n" in out
    assert "] no newline\n" in out
    assert all(line.startswith("[local-") for line in (out + err).splitlines())


def test_output_of_c_libraries(capsys, monkeypatch):
    """Output of C libraries arrives, although their stream has a buffer of its own."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def put():
        ctypes.CDLL(None).puts(b"printed in C")

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(put).result(20)
    assert "[local-0] printed in C\n" in capsys.readouterr().out


def test_output_lines_stay_whole(capsys):
    """Lines stay whole however many are written at once."""
    lines = [f"{n} {'ä' * (n % 50)}" for n in range(3_000)]
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(os.write, 2, "".join(f"{line}\n" for line in lines).encode()).result(20)
    assert capsys.readouterr().err.splitlines() == [f"[local-0] {line}" for line in lines]


def test_lines_of_threads_stay_whole(capsys):
    """`print` writes its arguments one by one, and yet no other task of the process gets between them."""

    def tell(task):
        for step in range(20):
            print("task", task, "step", step)
            print("task", task, "step", step, file=sys.stderr)
            time.sleep(0.0005)

    with sky.pool(sky.Local(1), worker=sky.Worker(concurrency=8)) as pool:
        list(pool.map(tell, range(40)))
    expected = sorted(f"[local-0] task {task} step {step}" for task in range(40) for step in range(20))
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == sorted(err.splitlines()) == expected


def test_what_threads_began_is_not_lost(capsys):
    """The beginning of a line appears with its task's end; that of a thread which has ended, once, also if it forks."""

    def begin(text):
        print(text, end="")
        thread = threading.Thread(target=print, args=(f"a thread's {text}",), kwargs={"end": ""})
        thread.start()
        thread.join()
        if (child := os.fork()) == 0:
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        return sys.stdout

    with sky.pool(sky.Local(1), worker=sky.Worker(concurrency=1)) as pool:
        assert pool.submit(begin, "beginning").result(20) is sys.stdout
        pool.submit(print).result(20)
    out = capsys.readouterr().out
    assert out.count("a thread's beginning") == 1
    assert out.count("beginning") == 3, out


def test_output_without_a_newline(capsys, monkeypatch):
    """Output without the end of a line arrives with its task's end, though streams are buffered."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def mumble():
        print("mumbled", end=" ")
        sys.stderr.write("murmured")
        sys.stdout.buffer.write(b"muttered")

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(mumble).result(20)
    out, err = capsys.readouterr()
    assert "mumbled" in out
    assert "muttered" in out
    assert "murmured" in err


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_subprocesses_of_tasks_can_be_interrupted(executor):
    """Workers ignore Ctrl-C, which is the client's; programs that tasks start do not."""

    def interrupted() -> int:
        with subprocess.Popen(["sleep", "30"]) as process:
            os.kill(os.getpid(), signal.SIGINT)
            process.send_signal(signal.SIGINT)
            return process.wait(20)

    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
        assert pool.submit(interrupted).result(25) == -signal.SIGINT


def test_output_arrives_while_a_task_runs(capsys, tmp_path):
    """Output arrives while its task runs, not only at the end."""
    gate = tmp_path / "gate"

    def say_and_wait():
        print("early")
        while not gate.exists():
            time.sleep(0.01)

    seen = ""

    def came():
        nonlocal seen
        seen += capsys.readouterr().out
        return "early" in seen

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = pool.submit(say_and_wait)
        assert eventually(came, 10)
        assert not future.done()
        gate.touch()


def flood(stream, size):
    os.write(stream, b"begin\n")
    block = b"x" * 1023 + b"\n"
    for _ in range(size // 1024):
        os.write(stream, block)
    os.write(stream, b"end\n")
    return "done"


@pytest.mark.parametrize("stream", [1, 2])
def test_output_flood_is_bounded(capsys, stream):
    """Of 64 MiB of output the middle is left out and counted to the byte; the task ends and the node lives."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        assert pool.submit(flood, stream, 64 << 20).result(50) == "done"
        assert pool.submit(operator.neg, 1).result(20) == -1
    both = capsys.readouterr()
    text = both.out if stream == 1 else both.err
    assert text.startswith("[local-0] begin\n")
    assert text.endswith("[local-0] end\n")
    notes = re.findall(r"^\[local-0\] … (\d+) bytes of output are left out here$", both.err, re.MULTILINE)
    written = sum(len(line) - len("[local-0] ") for line in text.splitlines(keepends=True) if "…" not in line)
    # A reader that keeps up gets all output.
    assert written + sum(map(int, notes)) == (64 << 20) + len("begin\nend\n")


def close_all():
    for fd in (0, 1, 2):
        os.close(fd)
    # These files take the freed descriptors.
    files = [open(os.devnull, "rb") for _ in range(3)]  # noqa: SIM115
    return [file.fileno() for file in files]


def test_task_may_close_its_standard_streams():
    """A task may close descriptors 0, 1 and 2, as the worker does not communicate through them."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        assert pool.submit(close_all).result(20) == [0, 1, 2]
        assert pool.submit(operator.neg, 1).result(20) == -1


def garbage():
    os.write(1, os.urandom(1 << 16))
    os.write(2, b"\0SKYWARD-LITE\r\n\0" + os.urandom(1 << 16))
    return 1


def test_binary_output_is_not_taken_for_frames(capsys):
    """Bytes that are no text, and the protocol's own magic bytes, may be written to the streams."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        assert pool.submit(garbage).result(20) == 1
    assert "SKYWARD-LITE" in capsys.readouterr().err


def fork_and_return():
    return os.fork() == 0


def test_task_that_forks_has_one_result():
    """A forked child that returns into the worker's code ends there, so the task has one result."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        assert [pool.submit(fork_and_return).result(20) for _ in range(5)] == [False] * 5
        assert pool.submit(operator.neg, 1).result(20) == -1
        assert Tasks.of(pool).core.counts() == (0, 0)


def test_closed_stdout_of_the_client_is_no_error(monkeypatch):
    """Output for a closed `sys.stdout` of the client is dropped."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(chat, "unheard").result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


ODD = "ä € 💡 \x0b \x0c \x1c \x85 \u2028 \u2029 end"
LOCALES = {
    "latin": {"PYTHONIOENCODING": "latin-1"},
    "posix": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


def print_odd():
    """Print text that is no ASCII. Return the encoding of a program that the task starts."""
    print(ODD)
    print(ODD, "lone \udce4", file=sys.stderr)
    return subprocess.check_output([sys.executable, "-c", "import sys; print(sys.stdout.encoding)"], text=True).strip()


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize("locale", LOCALES)
def test_output_of_any_character_under_any_locale(capsys, locale, executor):
    """Workers print every character under any locale of the node; subprocesses get that locale; only newlines end
    lines.
    """
    image = sky.Image(env=LOCALES[locale])
    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), image=image, plugins=[]) as pool:
        assert pool.submit(print_odd).result(20) in ("iso8859-1", "latin-1", "ascii", "ANSI_X3.4-1968")
    out, err = capsys.readouterr()
    assert out == f"[local-0] {ODD}\n"
    assert err == f"[local-0] {ODD} lone \\udce4\n"


def test_output_of_any_character_over_ssh_in_the_posix_locale(capsys, tmp_path):
    """Both executors print every character over SSH on a host without a locale."""
    lab = Lab(tmp_path)
    try:
        # The host has none of this file's modules.
        modules = f"{Path(sky.__file__).parent.parent}:{Path(__file__).parent}"
        image = sky.Image(env={"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": modules})
        lab.host(name="far", env={"LC_ALL": "C", "LANG": "C"}).make_environment(image)
        for executor in ("thread", "process"):
            worker = sky.Worker(concurrency=1, executor=executor)
            with sky.pool(sky.SSH("far", config=lab.config), worker=worker, image=image, plugins=[]) as pool:
                assert pool.submit(print_odd).result(20) in ("ascii", "ANSI_X3.4-1968")
            assert capsys.readouterr().out == f"[far] {ODD}\n"
    finally:
        lab.close()


def test_output_bytes_that_are_no_utf_8_are_escaped(capsys):
    """Bytes that are no UTF-8, as C code may write, are escaped, and the text around them stays."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(os.write, 1, b"before\nfa\xe7ade \xff \xc3\xa4\nafter\n").result(20)
    assert capsys.readouterr().out == "[local-0] before\n[local-0] fa\\xe7ade \\xff ä\n[local-0] after\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_output_that_the_clients_stream_cannot_encode_is_escaped(monkeypatch, encoding):
    """Only the characters that the client's stream cannot encode are escaped."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(print, "ä € 💡\nplain").result(20)
    escaped = "ä € 💡".encode(encoding, "backslashreplace").decode(encoding)
    assert raw.getvalue().decode(encoding) == f"[local-0] {escaped}\n[local-0] plain\n"


def print_long(directory, mark):
    """Write long lines in parts, at the same time as the other task."""
    line = f"{mark}ä€" * 15_000
    (directory / mark).touch()
    while len(list(directory.iterdir())) < 2:
        time.sleep(0.001)
    for _ in range(3):
        data = f"{line}\n".encode()
        while data:
            data = data[os.write(1, data[:20_001]) :]
            time.sleep(0.001)
    return line


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_long_output_lines_of_two_workers_stay_whole(capsys, tmp_path, executor):
    """Lines of 90 KB, written in parts that end within characters, have no name, newline or other line in them."""
    nodes = 2 if executor == "thread" else 1
    slots = 2 // nodes
    with sky.pool(nodes=nodes, worker=sky.Worker(concurrency=slots, executor=executor), plugins=[]) as pool:
        lines = set(pool.map(print_long, [tmp_path] * 2, "ab"))
    written = capsys.readouterr().out.split("\n")
    assert written.pop() == ""
    assert len(written) == 6
    assert {re.sub(r"^\[local-[01]\] ", "", line) for line in written} == lines


class Terminal(io.StringIO):
    """A stream whose `isatty` is true."""

    def isatty(self):
        return True

    def screen(self):
        """Return the text that a terminal shows in the end."""
        lines = []
        for line in self.getvalue().split("\n"):
            seen = ""
            for state in line.split("\r"):
                seen = state + seen[len(state) :]
            lines.append(seen.rstrip())
        return lines


def progress(gate, steps):
    for step in range(steps):
        sys.stderr.write(f"\rstep {step}")
        sys.stderr.flush()
    while not gate.exists():
        time.sleep(0.01)
    sys.stderr.write("\rall done\n")


def test_progress_on_a_terminal_while_a_task_runs(monkeypatch, tmp_path):
    """A terminal shows the last state of progress during a task, and not each state."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    gate = tmp_path / "gate"
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = pool.submit(progress, gate, 50_000)
        assert eventually(lambda: terminal.screen()[-1] == "[local-0] step 49999", 20)
        assert not future.done()
        gate.touch()
    assert terminal.screen() == ["[local-0] all done", ""]
    # Two updates a second and one at the end.
    assert terminal.getvalue().count("step") < 100


def test_progress_in_a_file_is_the_final_state(capsys, tmp_path):
    """A file gets the final state of a bar, finished or not, and nothing of a bar that was wiped out."""
    gate = tmp_path / "gate"
    gate.touch()

    def others():
        print("10%\r20%\r", end="", flush=True)

    def wiped_out():
        sys.stderr.write("\r 50%\r    \r")

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(progress, gate, 1_000).result(20)
        pool.submit(others).result(20)
        pool.submit(wiped_out).result(20)
    out, err = capsys.readouterr()
    assert out == "[local-0] 20%\n"
    assert err == "[local-0] all done\n"


def test_tqdm_on_a_terminal(monkeypatch, tmp_path):
    """A tqdm bar moves while its loop runs."""
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def loop():
        import tqdm

        for step in tqdm.tqdm(range(100)):
            while step == 50 and not (tmp_path / "gate").exists():
                time.sleep(0.01)
            time.sleep(0.001)

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = pool.submit(loop)
        assert eventually(lambda: re.match(r"\[local-0\] +\d+%\|", terminal.screen()[-1]), 20)
        assert not future.done()
        (tmp_path / "gate").touch()
    assert terminal.screen()[0].startswith("[local-0] 100%|")


A, B = 8 + 1, 16 + 1
"""The numbers of two workers' standard output."""
WAITS = 4
"""The mark of a pause."""


@pytest.mark.parametrize(
    ("rows", "file", "terminal"),
    [
        ([(A, b"one\ntwo\n")], "[n] one\n[n] two\n", ["[n] one", "[n] two", ""]),
        ([(A, b"long"), (B, b"other\n"), (A, b"er\n")], "[n] other\n[n] longer\n", ["[n] other", "[n] longer", ""]),
        ([(A | WAITS, b"so"), (A, b" far\n")], "[n] so far\n", ["[n] so far", ""]),
        ([(A | WAITS, b"so \xc3"), (A, b"\xa4\n")], "[n] so ä\n", ["[n] so ä", ""]),
        ([(A | WAITS, b"so"), (B, b"b\n"), (A, b"on\n")], "[n] so\n[n] b\n[n] on\n", ["[n] b", "[n] soon", ""]),
        ([(A | WAITS, b"so"), (A, b"\rover\n")], "[n] so\n[n] over\n", ["[n] over", ""]),
        ([(A | WAITS, b"\r1%"), (B | WAITS, b"\r2%"), (A, b"\n")], "[n] 1%\n[n] 2%\n", ["[n] 1%", "[n] 2%", ""]),
        ([(A, b"dos\r\n\r\n")], "[n] dos\n[n] \n", ["[n] dos", "[n]", ""]),
        ([(A, b"unfinished")], "[n] unfinished\n", ["[n] unfinished", ""]),
        ([], "", [""]),
    ],
)
def test_output_parts_of_lines_are_joined(monkeypatch, rows, file, terminal):
    """Parts of a line are joined, with other workers' lines before or after; only in a file may a line that paused be
    broken.
    """
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stdout", stream)
        printer = Printer(None)
        for number, text in rows:
            printer.write([("n", number, text)])
        printer.close()
        if isinstance(stream, Terminal):
            assert stream.screen() == terminal
        else:
            assert stream.getvalue() == file


def test_output_line_without_an_end_is_bounded(monkeypatch):
    """An endless line is written in parts, of which the printer holds at most one, and no other line comes between
    them.
    """
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    printer = Printer(None)
    part = b"x" * 16_384
    for _ in range(100):
        printer.write([("n", A, part)])
        assert printer._held_cost <= MAX_HELD_LINE
    printer.write([("n", A, b"\n")])
    assert stream.getvalue() == f"[n] {'x' * 1_638_400}\n"
    many = [("n", 8 * worker + 1, part) for worker in range(1, 3_000)]
    printer.write(many)
    assert printer._held_cost <= 16 << 20
    printer.close()
    assert stream.getvalue().count("x" * 16_384 + "\n") == 3_000


def test_many_output_lines_without_an_end_are_bounded(monkeypatch):
    """A node that begins a line on a new stream each time costs bounded memory, and all its text is written."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    printer = Printer(None)
    for text in (b"x", "é".encode()[:1]):
        printer.write([("n", 8 * worker + 1, text) for worker in range(1, 40_000)])
        assert len(printer._held) <= 16_384
    printer.close()
    assert stream.getvalue().count("x") >= 39_999


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_several_tqdm_bars_share_a_status_line(monkeypatch, tmp_path, stream):
    """Several tqdm bars of one process share a status line while they run, and each is there in the end."""
    pytest.importorskip("tqdm")
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    gate = tmp_path / "gate"

    def loop(name):
        import tqdm

        for step in tqdm.tqdm(range(40), desc=name, mininterval=0):
            while step == 20 and not gate.exists():
                time.sleep(0.01)
            time.sleep(0.01)

    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        futures = [pool.submit(loop, name) for name in "ab"]
        if stream is Terminal:
            assert eventually(lambda: "20/40" in written.getvalue(), 20)
            assert len(written.screen()) == 1
        assert not any(future.done() for future in futures)
        gate.touch()
    lines = written.screen() if stream is Terminal else written.getvalue().split("\n")
    assert sorted(line[:20] for line in lines) == ["", "[local-0] a: 100%|██", "[local-0] b: 100%|██"]
