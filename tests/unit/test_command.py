"""The command `skyward`: its help, its versions, and what it answers to wrong usage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import joblib
import pytest
import skyward_lite as sky
from skyward_lite.cli import command


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process. Return its exit status, what it printed, and its errors."""
    try:
        status = command.main([*arguments])
    except SystemExit as left:
        status = int(left.code or 0)
    return status, *capsys.readouterr()


def test_help_explains_each_command_with_an_example(capsys):
    """The help of the command, and of each of its commands, has an example and the exit statuses, on short lines."""
    for arguments in ([], *([name] for name in command.COMMANDS)):
        status, out, err = said(capsys, *arguments, "--help")
        assert (status, err) == (0, "")
        assert f"  skyward {' '.join(arguments)}" in out
        assert "Exit status: 0" in out
        assert max(map(len, out.splitlines())) <= 90


def test_no_command_is_answered_with_the_help(capsys):
    """Without a command the help is printed as an error."""
    status, out, err = said(capsys)
    assert (status, out) == (2, "")
    assert "skyward check me@lab1 lab2" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["checks", "lab"], "there is no command 'checks': did you mean `check`?"),
        (["CHECK"], "did you mean `check`?"),
        (["me@lab1"], "there is no command 'me@lab1': to test a host, write `check me@lab1`"),
        (["install"], "the commands are check, clean, reap"),
        (["check"], "HOST"),
        (["check", "--foo", "lab"], "--foo"),
        (["check", "a,b"], "a host is"),
        (["check", "a", "a"], "names a host twice"),
        (["check", "--exec", "docker exec -i {node} sh -c"], "name at least one node"),
        (["check", "--exec", "sh -c"], "--exec"),
        (["check", "--exec", "docker exec -i sh -c", "a", "b"], "{node} says where the name"),
        (["check", "--exec", "docker 'exec", "a"], "No closing quotation"),
        (["check", "--exec", "sh -c", "a", "--accept-new"], "for hosts that SSH reaches"),
        (["check", "--exec", "sh -c", "a", "--slurm"], "check one after the other"),
        (["check", "--slurm"], "--slurm partition=short time=10"),
        (["check", "--slurm", "--partition=short"], "NAME=VALUE, as in --slurm partition=short"),
        (["check", "lab", "--slurm", "time=1"], "'lab' cannot be one of them"),
        (["check", "--slurm", "2=3"], "'2=3' is no option"),
        (["check", "--slurm", "python=x", "time=1"], "write --python PATH"),
        (["check", "--slurm", "array=3"], "write pool(nodes=...)"),
        (["clean", "-x"], "a host is|required|-x"),
        (["reap", "--run", "1"], "at least 6 characters"),
    ],
)
def test_wrong_usage_is_answered_with_a_hint(capsys, monkeypatch, arguments, says):
    """Wrong usage is answered with the reason and the way to the help, and the exit status is 2."""
    for name in ("SLURM_JOB_ID", "SLURM_JOBID"):
        monkeypatch.delenv(name, raising=False)
    status, out, err = said(capsys, *arguments)
    assert (status, out) == (2, "")
    assert any(part in err for part in says.split("|")), err
    assert "--help`" in err


def test_options_of_a_job_are_read_as_in_python(capsys):
    """What is True, False, None or a number for `sky.Slurm` may be written so, since the pages do it."""
    given = ("exclusive=True", "hint=False", "gres=None", "grace=30", "time=10", "contiguous")
    options = dict(command._option(command._parser(), word) for word in given)
    assert [*options.values()] == [True, False, None, 30.0, "10", True]


def test_versions_are_those_of_this_interpreter(capsys):
    """`--version` has the versions of skyward_lite, Python, joblib and the platform."""
    status, out, _ = said(capsys, "--version")
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == f"skyward_lite {sky.__version__}"
    assert ".".join(map(str, sys.version_info[:3])) in lines[1]
    assert f"joblib {joblib.__version__}" in lines
    assert sys.platform in lines[-1].lower() or "mac" in lines[-1].lower()


def test_the_command_is_installed():
    """`skyward` is installed beside the interpreter, and is `python -m skyward_lite`; neither needs a terminal."""
    script = Path(sys.executable).with_name("skyward")
    assert os.access(script, os.X_OK)
    for start, name in (([str(script)], "skyward"), ([sys.executable, "-m", "skyward_lite"], "python -m skyward_lite")):
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run([*start, "checks"], timeout=30, check=False, **streams)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"Try `{name} --help`" in done.stderr
        assert subprocess.run([*start, "--version"], timeout=30, check=True, **streams).stdout.startswith(
            "skyward_lite"
        )
