"""What nodes, hosts and clouds say of themselves reaches errors, logs and terminals without doing anything there."""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
import subprocess
import sys
import traceback
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import fakes
import pytest
import skyward_lite as sky
from fake_agent import MAGIC, PROTOCOL, block, frame
from hostile import FORGED, HOSTILE, is_harmless, serving
from lab import Lab, Sshd, check, opened
from processes import eventually
from skyward_lite import Image, _core
from skyward_lite._version import PYTHON
from skyward_lite.environment import scripts

WORDS = Path(fakes.__file__).with_name("fake_words.py")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def fake_python(host: Sshd, script: str) -> None:
    """Let a host have its environment, whose interpreter is a shell script."""
    host.make_environment(Image())
    (python,) = host.cache.glob("skyward_lite/*/bin/python")
    python.write_text(f"#!/bin/sh\n{script}\n")


def fake(behaviour: str, **args: object) -> sky.ComputePool:
    """Make a pool of one node, with a behaviour of `fake_words.py`."""
    worker = sky.Worker(concurrency=1, task_timeout=100.0)
    options: dict[str, object] = {"plugins": [], "start_timeout": 20.0, "worker": worker}
    return fakes.pool(f"{WORDS}:{behaviour}", good=0, options=options, **args)


def opening(kind: str, body: bytes) -> bytes:
    """Return the beginning of a session, up to its first frame."""
    return MAGIC + struct.pack("<I", PROTOCOL) + block(frame(kind, body))


def on_host(lab: Lab, host: Sshd) -> sky.ComputePool:
    """Make a pool of one host."""
    return sky.pool(sky.SSH(host.name, config=lab.config), plugins=[], start_timeout=20.0)


def refused(pool: sky.ComputePool, caplog: pytest.LogCaptureFixture) -> str:
    """Return why a pool does not start; neither that nor the log does anything."""
    with pytest.raises(sky.NodeStartError) as caught, pool:
        pass
    assert all(is_harmless(record.getMessage()) for record in caplog.records)
    shown = "".join(traceback.format_exception(caught.value))
    assert is_harmless(shown), shown
    return str(caught.value)


IGNORABLE = {
    *(0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x2065, 0x3164, *range(0xFE00, 0xFE10), 0xFFA0),
    *range(0xFFF0, 0xFFF9),
    *range(0xE0000, 0xE1000),
}
"""What Unicode calls default-ignorable, beside the format characters: it takes no room."""


def test_every_character_that_does_something_is_escaped():
    """Unicode says which these are; all others stay as they are, and nothing is changed twice."""
    for code in (*range(0x32000), *range(0xE0000, 0xE2000)):  # there is none between
        c = chr(code)
        hidden = code in IGNORABLE or unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")
        shown = _core.printable(c, lines=False)
        # What a later Unicode will say of others is not known to every Python.
        assert (shown != c) is hidden or unicodedata.category(c) == "Cn", hex(code)
        assert _core.printable(shown, lines=False) == shown
    assert _core.printable(b"byte \xe9\n") == "byte \\xe9\n  | "
    assert _core.printable("x" * 9000, 500).endswith("bytes are left out … " + "x" * 218)


@pytest.mark.parametrize(
    ("behaviour", "args"),
    [
        ("begins", {"first": opening("goodbye", HOSTILE.encode()).hex()}),
        ("begins", {"first": opening("drain", HOSTILE.encode()).hex()}),
        ("says", {"hello": {"cores": HOSTILE}, "answers": []}),
    ],
    ids=["goodbye", "drain", "field"],
)
def test_an_agent_without_a_good_hello(caplog, behaviour, args):
    """What it sends in place of one is in the error, made harmless."""
    assert "CRITICAL" in refused(fake(behaviour, **args), caplog)


def test_two_nodes_that_do_not_start(caplog):
    """Where one has message several lines, each node begins a line of its own, which no node can forge."""
    message = b"one\nfake-1 is ready"
    behaviour = (f"{WORDS}:begins", {"first": opening("goodbye", message).hex()})
    provider = fakes.Fakes(behaviour, behaviour, good=0)
    text = refused(sky.pool(provider, nodes=(1, 2), plugins=[], start_timeout=20.0), caplog)
    assert text.count("one\n  | fake-1 is ready") == 2
    assert re.findall(r"^fake-1 is (\w+)", text, re.MULTILINE) == ["lost"]


@pytest.mark.parametrize(
    ("more", "then"),
    [(b"\xff\xfe", ""), (b"." * (1 << 17), ""), (b"\xff\xfe", ">&2; exit 3")],
    ids=["end", "noise", "stderr"],
)
def test_a_program_that_is_no_agent(lab, caplog, more, then):
    """What it prints is in the error, made harmless."""
    host = lab.host()
    file = host.directory / "printed"
    file.write_bytes(HOSTILE.encode() + more)
    fake_python(host, f"cat {file} {then}")
    text = refused(on_host(lab, host), caplog)
    assert "CRITICAL" in text
    # It ended by itself, so it is not taken for a connection that was cut, and not tried again.
    assert then or len(more) > 2 or "ended with status 0 and is no agent of ours" in text


def test_what_a_node_says_of_itself(lab, caplog):
    """Packages in its hello, the reason for which it drains and its goodbye are in the log, made harmless."""
    packages = {
        HOSTILE: "1",
        "x" * 5_000: "1",
        "cloudpickle": HOSTILE + "y" * 5_000,
        **{f"p{n}": "1" for n in range(900)},
    }
    hello = {"packages": packages}
    answers = [frame("drain", HOSTILE.encode()), frame("goodbye", (HOSTILE + "y" * 20_000).encode())]
    with (
        caplog.at_level(logging.INFO, "skyward_lite"),
        fake("says", lab=lab, hello=hello, answers=[block(answer).hex() for answer in answers]) as opened_pool,
    ):
        # The log says what differs only while the node takes tasks.
        assert eventually(lambda: "may fail or differ" in caplog.text, 20)
        future = opened_pool.submit(len, "")
        assert eventually(lambda: "takes no more tasks" in caplog.text, 20)
        (node,) = opened_pool.status().nodes
        assert node.state == "draining"
        assert "CRITICAL" in node.reason
        assert is_harmless(node.reason)
        future.cancel()
        assert eventually(lambda: "is lost" in caplog.text, 20)
        (node,) = opened_pool.status().nodes
        assert node.reason.count("CRITICAL") == 2
        assert is_harmless(node.reason)
        with pytest.raises(sky.NodeLostError) as caught:
            opened_pool.submit(len, "").result(20)
        assert is_harmless(str(caught.value))
    for part in ("may fail or differ", "takes no more tasks", "is lost"):
        (message,) = [r.getMessage() for r in caplog.records if part in r.getMessage()]
        assert "CRITICAL" in message
        assert is_harmless(message), message
        assert len(message) < 20_000


def test_how_a_task_ended():
    """The end of standard error of a crashed worker, and any other text about an end, is harmless and bounded."""
    ends = {
        "crashed": sky.WorkerCrashedError,
        "timed_out": sky.TaskTimeoutError,
        "partial": sky.RemoteError,
    }
    with fake("ends", outcomes=list(ends), text=f"it died:\n{HOSTILE}{'x' * 20_000}") as opened_pool:
        for error in ends.values():
            caught = opened_pool.submit(len, "").exception(20)
            assert type(caught) is error
            assert "CRITICAL" in str(caught)
            assert is_harmless(str(caught))
            assert len(str(caught)) < 17_000


def test_what_the_users_function_raises_is_its_own(shared_pool):
    """Its text is the user's, and comes as it is."""

    def fail(text):
        raise ValueError(text)

    caught = shared_pool.submit(fail, HOSTILE).exception(20)
    assert caught.args == (HOSTILE,)


def test_what_pip_prints(lab, tmp_path, caplog):
    """The end of a failed build is in the error, each of its lines marked as one."""
    tools = tmp_path / "tools"
    tools.mkdir()
    words = tmp_path / "printed"
    words.write_bytes(f"{FORGED}\n{HOSTILE}\n{FORGED}\nno such package\n".encode())
    python = tools / f"python{PYTHON}"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *sys.version_info*) echo {PYTHON}.0;; *import*) ;; *) cat {words} >&2; exit 9; esac\n'
    )
    python.chmod(0o755)
    text = refused(on_host(lab, lab.host(env={"PATH": f"{tools}:/usr/bin:/bin"})), caplog)
    assert "its environment could not be made" in text
    assert f"\n  | {FORGED}\n  | no such package" in text


def test_a_forced_command_and_a_proxy(lab, caplog):
    """What a server runs in place of our script, and what a proxy command prints, is harmless; so is a banner."""
    printed = lab.directory / "printed"
    printed.write_bytes(HOSTILE.encode() + b"\xff")
    forced = lab.host(f"ForceCommand cat {printed}", f"Banner {printed}")
    behind = lab.host(ssh_options=(f"ProxyCommand cat {printed} >&2",))
    for host in (forced, behind):
        assert "CRITICAL" in refused(on_host(lab, host), caplog)
        status, shown = check(lab, host.name)
        assert status == 1
        assert "CRITICAL" in shown
        assert all(is_harmless(line) for line in shown.split("\n")), shown


def test_paths_that_cannot_be_shown(lab):
    """A directory whose name has a control character is refused: what is run must be what was shown."""
    cache = lab.directory / "a\x1b[31mb"
    cache.mkdir()
    host = lab.host(env={"XDG_CACHE_HOME": str(cache)})
    with pytest.raises(sky.NodeStartError, match=r"the root that it names .*a\\x1b\[31mb"), opened(lab, host.name):
        pass


@pytest.mark.parametrize("name", ["lab\u202e1", "lab\u200b", "me\x1b@lab", "l\U000e0041b", "l\u2066ab:22"])
def test_a_host_whose_name_cannot_be_seen(name):
    """It would be another one's in the log, and is refused."""
    with pytest.raises(ValueError, match="cannot be seen"):
        sky.SSH(name)


def test_what_a_script_of_ours_printed():
    """Values can be shown; a line that was cut off is none; a value without an end to it is bounded."""
    begin = f"noise\n{scripts.REPORT_MARKER}\n".encode()
    report = scripts.parse_report(begin + b"why=\x1b[2J\x85two\xe2\x80\xa8three\nsystem=Lin")
    assert report == {"why": ["\\x1b[2J\\x85two\\u2028three"]}
    many = scripts.parse_report(begin + b"found=x\n" * 10_000)
    assert many is not None
    assert len(many["found"]) == scripts.MAX_VALUES
    for name in scripts.PATH_KEYS:
        with pytest.raises(sky.NodeStartError, match="unprintable"):
            scripts.parse_report(begin + name.encode() + b"=/a\xffb\n")


def key_exchange(*names: str) -> bytes:
    """Return a server's first SSH packet, with its names of algorithms: key exchange, host key, cipher."""
    kex, key, cipher = names
    lists = [kex, key, cipher, cipher, "hmac-sha2-256", "hmac-sha2-256", "none", "none", "", ""]
    body = b"\x14" + bytes(16) + b"".join(struct.pack(">I", len(n)) + n.encode() for n in lists) + bytes(5)
    padding = 16 - (len(body) + 5) % 8
    return struct.pack(">IB", len(body) + padding + 1, padding) + body + bytes(padding)


ODD = HOSTILE.encode("ascii", "ignore").decode()
GOOD = ("curve25519-sha256", "ssh-ed25519", "aes256-gcm@openssh.com")
VERSION = b"SSH-2.0-odd\r\n"


@pytest.mark.parametrize(
    "greeting",
    [
        HOSTILE.encode() + b"\r\n" + VERSION,
        b"SSH-2.0-" + ODD.replace("\r\n", "").encode() + b"\r\n" + key_exchange(*GOOD),
        VERSION + key_exchange(ODD, *GOOD[1:]),
        VERSION + key_exchange(GOOD[0], ODD, GOOD[2]),
        VERSION + key_exchange(*GOOD[:2], ODD),
    ],
    ids=["before the version", "version", "key exchange", "host key", "cipher"],
)
def test_a_server_that_nobody_has_verified(greeting):
    """What it calls itself and its algorithms is harmless in the error: anybody can be there."""
    core = _core.Core(1, 1)
    private, public = _core.generate_key()

    def answer(one: socket.socket) -> None:
        one.sendall(greeting)
        one.shutdown(socket.SHUT_WR)
        while one.recv(1 << 16):
            pass

    with serving(answer) as server, pytest.raises(_core.CoreError) as caught:
        core.connect(
            endpoint=server.getsockname(),
            user="anybody",
            host_keys=[public],
            revoked=[],
            accept_new=False,
            identities=[private],
            timeout=20.0,
        )
    core.close()
    assert is_harmless(str(caught.value.args[0])), caught.value
    assert ("CRITICAL" in str(caught.value)) is (ODD.encode() in greeting), caught.value


def test_a_terminal_without_these_characters(lab):
    """The report comes all the same, with them escaped."""
    host = lab.host("ForceCommand echo größer")
    command = [sys.executable, "-m", "skyward_lite", "check", "--config", lab.config, host.name]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, timeout=50, check=False, env=env)
    assert done.returncode == 1
    assert b"gr\\xf6\\xdfer" in done.stdout
    assert b"Traceback" not in done.stderr
