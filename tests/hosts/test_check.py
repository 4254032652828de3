"""`python -m skyward_lite check` reports what works with real servers and what to fix."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
from lab import QUICK, Lab, Sshd, check, keygen, program
from skyward_lite._version import PYTHON
from skyward_lite.cli import hosts, survival
from skyward_lite.environment import own_uv, scripts

TOOLS = (
    "sh",
    "awk",
    "cat",
    "chmod",
    "cut",
    "df",
    "getconf",
    "head",
    "id",
    "ls",
    "mkdir",
    "nproc",
    "rm",
    "true",
    "uname",
)


LOGOUT = Path(__file__).parent.parent / "support/logout.py"
"""A forced command that ends what its session has started."""
COMMAND = ("-m", "skyward_lite")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def plain(lab: Lab, *options: str, known: bool = True, **env: str) -> Sshd:
    """Start a host whose sessions have an empty home directory, so that nobody's shell configuration counts."""
    home = lab.directory / "home"
    home.mkdir(exist_ok=True)
    return lab.host(*options, known=known, env={"HOME": str(home), **env})


def failed(lab: Lab, host: str, *options: str, command: tuple[str, str] = QUICK) -> tuple[str, str, str]:
    """Check a host that cannot be used. Return the name, the text and the fix of the last step that failed."""
    status, text = check(lab, "--json", host, *options, command=command)
    assert status == 1
    (report,) = json.loads(text)["hosts"]
    assert report["usable"] is False
    step = [step for step in report["steps"] if step["status"] == "fail"][-1]
    return step["step"], step["text"], step["fix"]


def python() -> str:
    """Return a directory that has this interpreter under the name that the probe looks for."""
    return os.path.dirname(os.path.realpath(sys.executable))


def test_a_host_that_can_be_used(lab):
    """A good host's report has every step with its figures, and the check makes only the cache directory there."""
    host = plain(lab, PATH=f"{python()}:/usr/bin:/bin")
    status, text = check(lab, "--json", host.name, command=COMMAND)
    printed = json.loads(text)
    assert status == 0, text
    assert printed["client"]["skyward_lite"] == sky.__version__
    (report,) = printed["hosts"]
    assert report["usable"] is True
    steps = {step["step"]: step for step in report["steps"] if step["status"] == "ok"}
    assert list(steps) == [
        *("resolve", "reach", "host key", "authentication", "shell", "system", "python", "cache", "package"),
        *("environment", "size", "limits", "round trip", "to it", "from it", "survival"),
    ]
    assert steps["resolve"]["figures"]["port"] == host.port
    fingerprint = subprocess.run(["ssh-keygen", "-lf", f"{host.keys['ed25519']}.pub"], capture_output=True, text=True)
    assert steps["host key"]["figures"]["fingerprint"] == fingerprint.stdout.split()[1]
    assert steps["size"]["figures"]["cores"] == len(os.sched_getaffinity(0))
    assert steps["to it"]["figures"]["mb_per_s"] > 0
    assert steps["from it"]["figures"]["mb_per_s"] > 0
    assert not list((host.cache / "skyward_lite").iterdir())


def test_the_lines_for_people(lab):
    """The report for people begins with the host's name, and has a line with a sign for each step."""
    host = plain(lab, PATH=f"{python()}:/usr/bin:/bin")
    status, text = check(lab, host.name)
    assert status == 0
    assert text.startswith(f"{host.name}: can be used\n  ok    resolve ")
    assert "to be made by the first pool" in text
    assert "FAIL" not in text


def test_an_environment_that_is_there(lab):
    """The versions in an environment that is there are compared with the client's."""
    host = plain(lab, PATH=f"{python()}:/usr/bin:/bin")
    host.make_environment(hosts.default_image())
    status, text = check(lab, host.name)
    assert status == 0
    assert "environment     is there: " in text
    assert f"skyward_lite {sky.__version__}, cloudpickle " in text


def test_an_unknown_key(lab):
    """An unknown key is reported with the ways to accept it; --accept-new records it."""
    host = plain(lab, known=False, PATH=f"{python()}:/usr/bin:/bin")
    step, text, fix = failed(lab, host.name)
    assert step == "host key"
    assert "SHA256:" in text
    assert "--accept-new" in fix
    status, _ = check(lab, "--accept-new", host.name)
    assert status == 0
    assert host.known() in lab.known_hosts.read_text()


def test_a_key_that_is_written_nowhere(lab):
    """A new key that the configuration accepts and has no file for is reported as not recorded."""
    options = ("UserKnownHostsFile /dev/null", "GlobalKnownHostsFile none", "StrictHostKeyChecking no")
    host = plain(lab, known=False, PATH=f"{python()}:/usr/bin:/bin")
    lab.extra[host.name] = list(options)
    lab.write()
    status, text = check(lab, host.name)
    assert status == 0
    assert "new, and not recorded: ssh-ed25519" in text


def test_a_changed_key(lab):
    """A changed key is refused even with --accept-new."""
    host = plain(lab, known=False)
    other = keygen(lab.directory / "other")
    words = Path(f"{other}.pub").read_text().split()
    lab.known_hosts.write_text(f"[{host.address}]:{host.port} {words[0]} {words[1]}\n")
    step, _, fix = failed(lab, host.name, "--accept-new")
    assert step == "host key"
    assert f"ssh-keygen -R '[{host.address}]:{host.port}'" in fix


def test_a_revoked_key(lab):
    """A revoked key is refused, and reported as revoked."""
    host = plain(lab)
    with lab.known_hosts.open("a") as file:
        file.write(f"@revoked {host.known()}\n")
    step, text, fix = failed(lab, host.name)
    assert (step, "revoked" in text, "revoked" in fix) == ("host key", True, True)


def test_refused_authentication(lab):
    """Refused authentication is reported with the identities that were tried."""
    host = plain(lab, "AuthorizedKeysFile none")
    step, text, fix = failed(lab, host.name)
    assert step == "authentication"
    assert str(lab.user_key) in text
    assert f"ssh-copy-id {host.name}" in fix


def test_a_closed_port(lab):
    """A closed port fails the step before the keys."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    step, text, fix = failed(lab, f"127.0.0.1:{port}")
    assert step == "reach"
    assert str(port) in text
    assert "firewall" in fix


def test_a_name_without_an_address(lab):
    """A name without an address is reported as a wrong name."""
    step, _, fix = failed(lab, "nowhere.invalid")
    assert step == "reach"
    assert "HostName" in fix


@pytest.mark.skipif(
    any(Path(f"{place}/bin/python{PYTHON}").exists() for place in ("/usr/local", "/opt/python")),
    reason="the probe looks at a place that cannot be hidden",
)
def test_a_host_without_the_clients_python(lab):
    """Without the client's Python and any uv the step fails, and steps that need neither are still taken."""
    tools = lab.directory / "tools"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    host = plain(lab, PATH=str(tools))
    without = program("from skyward_lite.environment import own_uv; own_uv.find = lambda: None")
    step, text, fix = failed(lab, host.name, command=without)
    assert step == "python"
    assert f"no Python {PYTHON}" in text
    assert own_uv.EXTRA in text
    assert f"python{PYTHON}" in fix
    assert "round trip" in check(lab, host.name)[1]


def test_an_interpreter_that_is_used_as_it_is(lab):
    """`--python` is verified; a path that is not there fails."""
    package = Path(sky.__file__).parent.parent
    host = plain(lab, PYTHONPATH=str(package))
    status, text = check(lab, "--python", sys.executable, host.name)
    assert (status, "is used as it is" in text) == (0, True), text
    step, text, _ = failed(lab, host.name, "--python", "/nowhere/python")
    assert (step, "/nowhere/python" in text) == ("python", True)


def test_an_interpreter_in_the_home_directory(lab):
    """`--python ~/…` is found by the host's shell, and its versions are compared, too."""
    host = plain(lab, PYTHONPATH=str(Path(sky.__file__).parent.parent))
    python = lab.directory / "home" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    status, text = check(lab, "--python", "~/python", host.name)
    assert (status, "~/python is used as it is" in text) == (0, True), text
    assert f"skyward_lite {sky.__version__}, cloudpickle " in text


def test_a_forced_command(lab):
    """A server that forces another command than ours is reported."""
    host = plain(lab, "ForceCommand echo none of that")
    step, text, _ = failed(lab, host.name)
    assert step == "shell"
    assert "none of that" in text


def test_a_server_that_ends_what_a_connection_has_started(lab):
    """A server that takes the processes of a session along is reported, and its host can be used all the same."""
    host = plain(lab, f"ForceCommand {sys.executable} {LOGOUT}", PATH=f"{python()}:/usr/bin:/bin")
    status, text = check(lab, "--json", host.name)
    assert status == 0
    (step,) = [step for step in json.loads(text)["hosts"][0]["steps"] if step["step"] == "survival"]
    assert step["status"] == "note"
    assert step["text"].startswith("the server ends what a connection has started when the connection ends")
    assert "ForceCommand" in step["fix"]


@pytest.mark.parametrize(
    ("left", "cause", "remedy"),
    [
        (
            {"logind": ["KillUserProcesses=no", " killuserprocesses = Yes"]},
            "KillUserProcesses=yes",
            "KillExcludeUsers=",
        ),
        ({"group": ["/system.slice/system-sshd.slice/sshd@3.service"]}, "service of each connection", "KillMode="),
        ({"logind": ["KillUserProcesses=yes", "KillUserProcesses=no"], "group": ["/user.slice"]}, "server", "init"),
    ],
)
def test_the_cause_and_the_remedy_are_named(left, cause, remedy):
    """What ends processes at logout is told by systemd's settings and the session's control group."""
    assert cause in survival.cause(left)
    assert remedy in survival.remedy(left, "me")


def test_a_host_behind_another(lab):
    """For a host behind a proxy command the command is named, and no handshake is timed."""
    outer = plain(lab)
    inner = plain(lab, PATH=f"{python()}:/usr/bin:/bin")
    lab.extra[inner.name] = [f"ProxyCommand ssh -F {lab.config} -W %h:%p {outer.name}"]
    lab.write()
    status, text = check(lab, inner.name)
    assert status == 0, text
    assert f"-W {inner.address}:{inner.port} {outer.name}`" in text
    assert "reach" not in text


def test_several_hosts(lab):
    """Reports come in the order of the command line; one host that cannot be used makes the exit status 1."""
    good = plain(lab, PATH=f"{python()}:/usr/bin:/bin")
    bad = plain(lab, "AuthorizedKeysFile none")
    status, text = check(lab, bad.name, good.name)
    assert status == 1
    assert text.index(f"{bad.name}: CANNOT be used") < text.index(f"{good.name}: can be used")


def test_an_interrupt(lab):
    """Ctrl-C ends the command while a host keeps silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "skyward_lite", "check", "--config", lab.config, host]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            silent, _ = server.accept()
            with silent:
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=15)
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.parametrize("arguments", [[], ["check"], ["check", "a b"], ["check", "same", "same"], ["heal", "host"]])
def test_wrong_usage(arguments):
    """Wrong usage prints the usage, and the exit status is 2."""
    command = [sys.executable, "-m", "skyward_lite", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "usage: " in done.stderr


MARKED = f"echo '{scripts.REPORT_MARKER}'"
NONSENSE = {
    "garbage": "head -c 200000 /dev/urandom",
    "marked-garbage": f"{MARKED}; head -c 200000 /dev/urandom",
    "nothing": "exit 0",
    "no-fields": MARKED,
    "half-a-line": f"{MARKED}; printf 'shell=/bin/sh\\nsystem=Linux\\nroot=/tm'",
    "long-numbers": (
        f"n=$(head -c 100000 /dev/zero | tr '\\0' 9); {MARKED}; for key in cores memory available group_memory files "
        "free; do echo $key=$n; done; echo libc=glibc $n.$n; echo system=Linux; echo root=/tmp; echo machine=x86_64"
    ),
    "odd-numbers": (
        f"{MARKED}; for key in cores memory available group_memory files free; do echo $key=²; done; "
        "echo libc=glibc ...; echo system=Linux; echo root=/tmp; echo machine=x86_64"
    ),
    "deep": f"{MARKED}; for key in shell root; do echo \"$key=$(head -c 100000 /dev/zero | tr '\\0' '[')\"; done",
    "many-keys": f"{MARKED}; seq -f '%.0f=x' 50000; yes found=x | head -n 50000",
    "forged": f"{MARKED}; echo system=Linux; echo machine=x86_64; echo root=/nowhere; echo ready=yes; echo shell=none",
    "a-status": "exit 3",
    "cut-off": f"{MARKED}; kill -9 $PPID",
}


SILENT = {"endless": f"{MARKED}; exec yes cores=1", "hang": "exec sleep 60", "nothing": "exit 0"}


def answering(lab: Lab, answers: dict[str, str]) -> list[str]:
    """Start hosts that answer our scripts with `answers`, and run nothing else. Return their names."""
    for name, script in answers.items():
        file = lab.directory / f"answer-{name}"
        file.write_text(f"[ \"$SSH_ORIGINAL_COMMAND\" = '{scripts.SHELL}' ] || exit 1\n{script}\n")
        lab.host(f"ForceCommand sh {file}", name=name)
    return list(answers)


def test_hosts_that_answer_nonsense(lab):
    """Hosts that answer nonsense have a report of bounded length, and do not change that of a good host."""
    bad = answering(lab, NONSENSE)
    good = plain(lab, PATH=f"{python()}:/usr/bin:/bin")
    status, text = check(lab, "--json", *bad, good.name)
    assert status == 1
    reports = json.loads(text)["hosts"]
    assert [report["host"] for report in reports] == [*bad, good.name]
    for report in reports[:-1]:
        failed = [step["step"] for step in report["steps"] if step["status"] == "fail"]
        assert failed, report
        assert "check" not in failed, report  # what was not foreseen
        assert len(json.dumps(report)) < 50_000
    assert reports[-1]["usable"] is True, reports[-1]


def test_hosts_that_never_come_to_an_end(lab):
    """Hosts that never finish an answer are given up after a bound, and reported beside the others."""
    names = answering(lab, SILENT)
    status, text = check(lab, *names, command=program("inspection.COMMAND_SECONDS = probe.PROBE_SECONDS = 1.0"))
    assert status == 1
    assert text.count("CANNOT be used") == 3
    assert text.count("not done within 1 s") == 2
