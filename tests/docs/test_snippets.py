"""Every snippet of the documentation runs, or is compared with the public names; tests/support/snippets.py says how."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import joblib
import pytest
import skyward_lite as sky
import snippets
from lab import Lab
from snippets import PAGES, ROOT

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("name", [n for n, p in zip(NAMES, PAGES, strict=True) if snippets.snippets(p, "python", "")])
def test_snippets_run(name, tmp_path):
    """The page's Python blocks run in order, as one program, and print what the page says."""
    snippets.run(ROOT / name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_parameters_exist(name):
    """What blocks and inline code name of ours is public, parameters too; blocks that do not run compile."""
    page = ROOT / name
    blocks = snippets.snippets(page, "python")
    assert {block.mark for block in blocks} <= {"", "hosts", "ec2", "slurm", "check"}
    assert [word for block in blocks for word in snippets.unknown(block)] == []
    assert list(snippets.unknown_in_prose(page)) == []


def test_snippets_with_hosts_run(tmp_path, monkeypatch):
    """The blocks that need hosts run on three of them, which have the environment already."""
    lab = Lab(tmp_path)
    real_ssh = sky.SSH

    def plain(host):
        address = host if isinstance(host, str) else host.address
        bare = re.sub(r"^\w+@|:\d+$", "", address)
        return bare if isinstance(host, str) else sky.Host(bare, host.concurrency, host.python)

    def ssh(*hosts):
        return real_ssh(*map(plain, hosts), config=lab.config)

    try:
        for name in ("lab1", "lab2", "gpu"):
            lab.host(name=name).make_environment(sky.plugins.joblib().transform(sky.Image(pip=["numpy"])))
        monkeypatch.setattr(sky, "SSH", ssh)
        blocks = [block for page in PAGES for block in snippets.snippets(page, "python", "hosts")]
        assert blocks
        for block in blocks:
            names = {
                "__name__": "__main__",
                "sky": sky,
                "Parallel": joblib.Parallel,
                "delayed": joblib.delayed,
                "f": abs,
            }
            exec(compile(block.text, block.place, "exec"), names)
            assert names.get("results", []) == list(range(len(names.get("results", []))))
    finally:
        lab.close()


def test_outputs_are_compared():
    """`...` is anything within a line; in outputs that are only alike, numbers with their units and spaces are any."""
    assert snippets.printed("caught: ... zero").fullmatch("caught: division by zero")
    assert not snippets.printed("8 slots, 2.5 MB").fullmatch("8 slots, 2.6 MB")
    alike = snippets.printed("8 slots, 2.5 MB sent", like=True)
    assert alike.fullmatch("10 slots,  312 bytes sent")
    assert not alike.fullmatch("some slots, 2.5 MB sent")


@functools.cache
def usage(command):
    """Return the help of one of our commands."""
    done = subprocess.run([sys.executable, "-m", "skyward_lite", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, command
    return done.stdout


def test_commands_exist():
    """The commands of ours that pages have exist, with their options."""
    commands = [
        (command, re.sub(r"#.*", "", rest))
        for page in PAGES
        for block in snippets.snippets(page, "sh")
        for command, rest in re.findall(r"^(?:python -m skyward_lite|skyward) (\w+)(.*)", block.text, re.MULTILINE)
    ]
    assert {command for command, _ in commands} == {"check", "clean", "reap"}
    for command, rest in commands:
        assert [option for option in re.findall(r"--[\w-]+", rest) if option not in usage(command)] == []
