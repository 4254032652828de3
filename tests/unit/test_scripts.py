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
def test_values_reach_a_script_as_they_are(value):
    script = scripts.compose('printf \'%s|%s\' "$GIVEN_A" "$GIVEN_NUMBER"\n', A=value, NUMBER=7)
    done = subprocess.run(["sh", "-s"], input=script, capture_output=True, timeout=10, check=True)
    assert done.stdout.decode() == f"{value}|7"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_command_gets_its_arguments_under_any_login_shell(shell):
    """Its standard input is free for content."""
    text = '# A comment that\'s left out\nif true; then\n  printf \'%s|\' "$1" "$2";\nfi;\ncat\n'
    command = scripts.command(text.replace("'", '"'), "a b", "it's")
    done = subprocess.run([shell, "-c", command], input=b"content", capture_output=True, timeout=10, check=True)
    assert done.stdout == b"a b|it's|content"


def test_files_are_included_where_a_script_names_them(tmp_path):
    """Relative to the file that includes them, in any depth."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "outer.sh").write_text("echo 1\n. ./inner/middle.sh\necho 4\n")
    (tmp_path / "inner/middle.sh").write_text("echo 2\n. ../last.sh\n")
    (tmp_path / "last.sh").write_text("echo 3\n")
    text = scripts.read("outer.sh", str(tmp_path / "module.py"))
    assert subprocess.run(["sh", "-c", text], capture_output=True, timeout=10, check=True).stdout == b"1\n2\n3\n4\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_script_is_complete_and_understood_by_sh(file):
    """Nothing is left to include, and a shell reads it to its end."""
    text = scripts.read(file.name, str(file))
    assert "\n. ./" not in text
    subprocess.run(["sh", "-n"], input=text.encode(), timeout=10, check=True)


def test_a_report_follows_its_marker():
    """What a login shell printed before it is no part of it, nor is a last line that was cut off."""
    stdout = f"root=/no\n{scripts.REPORT_MARKER}\nroot=/a\nfound=1\nfound=2=3\nmachine=x86".encode()
    assert scripts.parse_report(stdout) == {"root": ["/a"], "found": ["1", "2=3"]}
    assert scripts.parse_report(b"root=/no\n") is None


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("17", 17), ("", None), ("-1", None), ("1.5", None), ("٣", None), ("9" * 19, None)]
)
def test_numbers_of_a_report_are_digits(text, number):
    assert scripts.parse_number(text) == number
