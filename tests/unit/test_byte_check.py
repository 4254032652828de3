"""What is said of a command that does not pass bytes on unchanged, and of a script whose output it has cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import way
from skyward_lite import _core
from skyward_lite.environment import byte_check, scripts
from skyward_lite.errors import NodeStartError

SHELLS = [shell for shell in ("dash", "bash", "busybox", "zsh", "ksh", "mksh") if shutil.which(shell)]


@pytest.fixture(scope="module")
def core() -> Iterator[_core.Core]:
    """Runs the commands."""
    core = _core.Core(1, 1)
    yield core
    core.close()


@pytest.fixture
def faulty(core: _core.Core, tmp_path: Path) -> Callable[[str], _core.Connection]:
    """Returns a command with a fault of `way.py`."""

    def command(fault: str) -> _core.Connection:
        return core.command([sys.executable, "-S", way.__file__, str(tmp_path), fault, "a", "sh", "-c"])

    return command


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run again at once."""
    monkeypatch.setattr(scripts, "RERUN_PAUSES_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(byte_check, "PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("fault", ["none", "banner", "noeof", "lingers", "cuts:100*2", "forgets:60*2", "forgets:999*2"])
def test_a_command_that_will_do(faulty, fault):
    """All bytes come back, whatever is printed before them, and however it ends; a cut may have been a chance."""
    byte_check.check(faulty(fault), 20)


@pytest.mark.parametrize(
    ("fault", "bound", "says"),
    [
        ("terminal", 20, "has a terminal, which changes bytes: leave out the option"),
        ("no-input", 20, "none of its standard input arrived there (status 0): docker, podman and kubectl exec need"),
        ("doubles:90", 20, "where byte 42 was sent, 41 42 43 44 came back"),
        ("flips:90", 20, "where byte 41 was sent, 49 42 43 44 came back"),
        ("text", 20, "where byte 80 was sent, ef bf bd ef came back"),
        ("cuts:90", 20, "is cut: 65 of 256 bytes came back (status 1)"),
        ("forgets:999", 20, "printed nothing (status 0): a shell's command line is added"),
        ("silent", 0.3, "printed nothing within 0.3 s: a shell's command line is added"),
    ],
)
def test_a_command_that_will_not_do(faulty, fault, bound, says):
    """The fault is named, with the remedy where there is one."""
    with pytest.raises(NodeStartError) as caught:
        byte_check.check(faulty(fault), bound)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("true",), "`true` printed nothing (status 0): a shell's command line is added as its last word"),
        (("echo",), "did not run the command line that was added to it (status 0). It printed: sh -c "),
        (("sh",), "did not run the command line that was added to it (status "),
        (("sh", "-c", "echo no such pod >&2; exit 1"), "(status 1). It printed: no such pod"),
        (("sh", "-c", "echo the input device is not a TTY; exit 1"), "TTY\n(it must not ask for a terminal: leave out"),
        (("sh", "-c", "exec sh -c \"$0\" </dev/null"), "none of its standard input arrived"),
        (("env", "PATH=/nowhere", "/bin/sh", "-c"), "(status 127). It printed: "),
    ],
)  # fmt: skip
def test_what_is_no_way_to_a_shell(core, words, says):
    """What the command printed is shown, and what it must be."""
    with pytest.raises(NodeStartError) as caught:
        byte_check.check(core.command(words), 20)
    assert says in str(caught.value)
    # A program that says why it has failed needs no guess at the reason.
    assert ("such as `sh -c`" in str(caught.value)) == (words[-1] in ("true", "echo", "sh") or words[0] == "env")


# ------------------------------------------------------------------------------------------------ scripts

REPORT = b"echo '== skyward_lite =='\necho a=1\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_runs_as_a_whole_or_not_at_all(tmp_path, shell):
    """A shell that has read a part of a script runs nothing of it; one that has read it all tells how it has ended."""
    made = tmp_path / "made"
    body = f"touch {made}\necho $$ \"$(exec sh -c 'echo $PPID')\"\ncat <<'END' -\ntext\nEND\nread line\nexit 7\n"
    words = ["busybox", "sh"] if shell == "busybox" else [shell]
    whole = scripts.as_a_whole(body.encode())
    for length in range(0, whole.index(b"\n)") + 2, 3):
        subprocess.run([*words, "-s"], input=whole[:length], capture_output=True, timeout=10, check=False)
        assert not made.exists(), length
    done = subprocess.run([*words, "-s"], input=whole, capture_output=True, timeout=10, check=False)
    assert made.exists()
    process, _, rest = done.stdout.decode().partition(" ")
    assert process.isdigit()
    assert rest.partition("\n")[2] == "text\n\n== skyward_lite ended 7 ==\n"
    assert done.returncode == 7


@pytest.mark.parametrize("fault", ["none", "banner", "noeof", "lingers", "forgets:20*2", "forgets:999*2", "cuts:25*2"])
def test_a_script_behind_a_command(faulty, fault):
    """Its report is whole, also if the command loses the end of the output at first, or never ends."""
    result = scripts.run(faulty(fault), REPORT, 20)
    assert (result.report["a"], result.status) == (["1"], 0)


def test_the_status_is_the_script_s_own(core):
    """The status of a command may say nothing of what it ran."""
    command = core.command(["sh", "-c", 'sh -c "$0"; exit 1'])
    assert scripts.run(command, REPORT, 20).status == 0
    command = core.command(["sh", "-c", 'sh -c "$0"; exit 0'])
    result = scripts.run(command, REPORT + b"echo why >&2\nexit 3\n", 20)
    assert (result.status, result.printed) == (3, "why")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("forgets:20", "has lost the end of what a script printed, 3 times (status 0). It printed: == skyward_lite =="),
        ("cuts:25", "has lost the end of what a script printed, 3 times (status 1). It printed: == skyward_lite =="),
        ("forgets:999", "did not run a script, 3 times (status 0). It printed: nothing"),
    ],
)
def test_a_script_whose_end_is_lost(faulty, fault, says):
    """A report of which a part may be missing is not used, whatever status the command ends with."""
    with pytest.raises(NodeStartError) as caught:
        scripts.run(faulty(fault), REPORT, 20)
    assert says in str(caught.value)
    assert str(caught.value).startswith("`")


def test_a_script_that_ends_before_its_report(faulty):
    """The script has run, so nothing is said of what forbids it to."""
    with pytest.raises(NodeStartError, match="a script ended there with status 4 before its report. It printed: no"):
        scripts.run(faulty("none"), b"echo no\nexit 4\n", 20)


@pytest.mark.parametrize("fault", ["none", "noeof"])
def test_a_file_behind_a_command(faulty, tmp_path, fault):
    """It is written as a whole when its bytes have arrived, without an end of the input; a part of it is an error."""
    upload, data = scripts.read("upload.sh"), os.urandom(100_000)

    def send(size: int, sent: bytes) -> scripts.Ended:
        words = (str(tmp_path / "to"), "file", str(size), "file", str(len(sent)))
        command = faulty(fault)
        return scripts.run_command(command, upload, *words, stdin=sent, bound=20, secrets=())

    asked = send(len(data), b"")
    assert (asked.status, asked.stdout.strip()) == (1, b"")
    part = send(len(data), data[:50_000])
    assert (part.status, part.stderr) == (1, b"50000 of its 100000 bytes are there\n")
    assert b"sent" in send(len(data), data).stdout
    assert (tmp_path / "to/file").read_bytes() == data
    assert send(len(data), b"").status == 0
