"""Shell scripts: filled in, included in one another, run, and their reports read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import skyward_lite
from skyward_lite.environment import scripts

ODD = ["", "a b", "it's", '"$HOME"', "`id`", "a\nb", "\\n", "!!", "ä", "GIVEN_A", "*"]
SHELLS = [shell for shell in ("sh", "bash", "dash", "zsh", "fish", "tcsh") if shutil.which(shell)]
FILES = sorted(Path(skyward_lite.__file__).parent.rglob("*.sh"))


@pytest.mark.parametrize("value", ODD)
def test_script_values_are_quoted(value):
    """A value of any characters reaches a script as it is."""
    script = scripts.compose('printf \'%s|%s\' "$GIVEN_A" "$GIVEN_NUMBER"\n', A=value, NUMBER=7)
    done = subprocess.run(["sh", "-s"], input=script, capture_output=True, timeout=10, check=True)
    assert done.stdout.decode() == f"{value}|7"


@pytest.mark.parametrize("shell", SHELLS)
def test_command_arguments_under_any_login_shell(shell):
    """A command gets its arguments under any login shell, and its standard input is free for content."""
    text = '# A comment that\'s left out\nif true; then\n  printf \'%s|\' "$1" "$2";\nfi;\ncat\n'
    command = scripts.command(text.replace("'", '"'), "a b", "it's")
    done = subprocess.run([shell, "-c", command], input=b"content", capture_output=True, timeout=10, check=True)
    assert done.stdout == b"a b|it's|content"


def test_script_files_are_included(tmp_path):
    """A file's name is relative to the file that includes it, at any depth."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "outer.sh").write_text("echo 1\n. ./inner/middle.sh\necho 4\n")
    (tmp_path / "inner/middle.sh").write_text("echo 2\n. ../last.sh\n")
    (tmp_path / "last.sh").write_text("echo 3\n")
    text = scripts.read("outer.sh", str(tmp_path / "module.py"))
    assert subprocess.run(["sh", "-c", text], capture_output=True, timeout=10, check=True).stdout == b"1\n2\n3\n4\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_script_is_complete_and_valid_sh(file):
    """A script has no include left, and a shell reads it to its end."""
    text = scripts.read(file.name, str(file))
    assert "\n. ./" not in text
    subprocess.run(["sh", "-n"], input=text.encode(), timeout=10, check=True)


def test_report_follows_its_marker():
    """A report begins after its marker, so output of a login shell is no part of it, nor is a cut-off last line."""
    stdout = f"root=/no\n{scripts.REPORT_MARKER}\nroot=/a\nfound=1\nfound=2=3\nmachine=x86".encode()
    assert scripts.parse_report(stdout) == {"root": ["/a"], "found": ["1", "2=3"]}
    assert scripts.parse_report(b"root=/no\n") is None


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("17", 17), ("", None), ("-1", None), ("1.5", None), ("٣", None), ("9" * 19, None)]
)
def test_report_numbers_are_digits(text, number):
    """A number of a report is taken only if it consists of digits."""
    assert scripts.parse_number(text) == number
