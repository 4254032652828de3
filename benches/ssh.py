"""How long SSH hosts take to come up: bare, with their environment, connection alone, and many at once.

The hosts are `sshd`s on loopback, with an empty home directory, and share this machine's cores: a real host does its
part on its own. Opponents run in the same rounds.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import skyward_lite as sky
from environments import BARE_TOOLS
from lab import UNSET_PIP, Lab, Sshd
from mirror import Mirror, pack_python
from proxy import before
from skyward_lite import _core
from skyward_lite._version import PYTHON
from skyward_lite.environment import bundle, probe, scripts
from skyward_lite.providers import NodeRequest, known_hosts, openssh
from skyward_lite.providers.ssh import Host, SSHMachine

PATH = f"{os.path.dirname(os.path.realpath(sys.executable))}:/usr/local/bin:/usr/bin:/bin"
NOTHING = sky.Image()


def timed(run: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def host(lab: Lab, cache: Path | None = None) -> Sshd:
    """Start a host; its own cache directory is empty."""
    home = lab.directory / "home"
    home.mkdir(exist_ok=True)
    shared = {} if cache is None else {"XDG_CACHE_HOME": str(cache)}
    return lab.host(env={"HOME": str(home), "PATH": PATH, **shared})


def ssh(lab: Lab, name: str, command: str, *options: str) -> None:
    """Run a command with OpenSSH's client."""
    subprocess.run(
        ["ssh", "-F", lab.config, *options, name, command], check=True, stdin=subprocess.DEVNULL, capture_output=True
    )


def median(seconds: Iterable[float]) -> str:
    """Median and extremes."""
    values = list(seconds)
    if len(values) == 1:
        return f"{values[0]:6.3f} s"
    return f"{statistics.median(values):6.3f} s ({min(values):.3f} to {max(values):.3f})"


class Builds(logging.Handler):
    """Seconds that environments took, as the provider says."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "%s: its environment took %.1f s" and isinstance(record.args, tuple):
            self.seconds.append(float(str(record.args[1])))


def bare(lab: Lab, rounds: int, smoke: bool) -> None:
    """From an account with nothing but Python to the first result; then the same by hand."""
    builds, log = Builds(), logging.getLogger("skyward_lite")
    log.addHandler(builds)
    log.setLevel(logging.INFO)
    plugins = [] if smoke else [sky.plugins.joblib()]
    wheels = [] if smoke else ["joblib", "threadpoolctl"]
    ours, by_hand = [], []
    for _ in range(rounds):
        new = host(lab)

        def first(name: str = new.name) -> None:
            with sky.pool(sky.SSH(name, config=lab.config), plugins=plugins) as pool:
                assert pool.submit(abs, -1).result() == 1

        ours.append(timed(first))
        python, env = shlex.quote(os.path.realpath(sys.executable)), shlex.quote(str(new.cache / "by-hand"))
        pip = f"{env}/bin/pip install --quiet cloudpickle {' '.join(wheels)}" if wheels else "true"
        by_hand.append(timed(lambda new=new, c=f"{python} -m venv {env} && {pip}": ssh(lab, new.name, c)))
    log.removeHandler(builds)
    log.setLevel(logging.ERROR)
    what = f"venv, our package, pip install of {', '.join(wheels)}" if wheels else "venv and our package"
    print(f"Bare account → first result; medians of {rounds} new hosts")
    print(f"  skyward_lite                         {median(ours)}")
    print(f"    the environment ({what}) {median(builds.seconds)}")
    rest = [all_of_it - build for all_of_it, build in zip(ours, builds.seconds, strict=True)]
    print(f"    all the rest                       {median(rest)}")
    print(f"  by hand: ssh host 'venv && pip'      {median(by_hand)}")


FIRST = """
import sys, time
import skyward_lite as sky
begin = time.perf_counter()
with sky.pool(sky.SSH(sys.argv[1], config=sys.argv[2]), plugins=[] if sys.argv[3] else None) as pool:
    ready = time.perf_counter()
    pool.submit(abs, -1).result()
    first = time.perf_counter()
left = time.perf_counter()
print(ready - begin, first - begin, left - first)
"""


def cached(lab: Lab, rounds: int, smoke: bool) -> None:
    """From pool() to the first result, where the environment is there, in fresh interpreters."""
    there = host(lab)
    command = [sys.executable, "-c", FIRST, there.name, lab.config, "plain" if smoke else ""]
    rows, python = [], []
    for number in range(rounds + 1):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        interpreter = next((there.cache / "skyward_lite").glob("env-*/bin/python"))
        module = "cloudpickle" if smoke else "joblib, cloudpickle"
        opponent = timed(lambda c=f"{interpreter} -c 'import {module}'": ssh(lab, there.name, c))
        if number:  # the first one makes the environment
            rows.append([float(x) for x in done.stdout.split()])
            python.append(opponent)
    ready, first, leave = zip(*rows, strict=True)
    met = "met" if statistics.median(first) <= 1.5 else "MISSED"
    print(f"Environment is there → first result; medians of {rounds} fresh interpreters, interleaved")
    print(f"  skyward_lite: ready                  {median(ready)}")
    print(f"  skyward_lite: first result           {median(first)}; target 1.5 s: {met}")
    print(f"  skyward_lite: left after             {median(leave)}")
    print(f"  ssh host python -c 'import …'        {median(python)}")


def by_uv(lab: Lab, rounds: int, smoke: bool) -> None:
    """From a bare account to the first result: by pip, and by our own uv, with the host's Python and without."""
    mirror = Mirror(lab.directory)
    pack_python(lab.directory / "python.tar.gz")
    few = lab.directory / "few"
    few.mkdir()
    for tool in (*BARE_TOOLS, "gzip"):
        (few / tool).symlink_to(shutil.which(tool) or "/nonexistent")
    image = sky.Image(python=PYTHON, pip=[] if smoke else ["numpy"])
    plain: dict[str, str | None] = {**UNSET_PIP, "HOME": str(lab.directory / "home")}
    bare = {"PATH": str(few), "UV_PYTHON_DOWNLOADS_JSON_URL": mirror.python_list("python.tar.gz")}
    rows: dict[str, tuple[dict[str, str | None], list[float]]] = {
        "Python and pip of the host": ({"HOME": plain["HOME"], "PATH": PATH}, []),
        "our uv, Python of the host": ({**plain, "PATH": PATH}, []),
        "our uv, Python from a mirror": ({**plain, **bare}, []),
    }
    if smoke:
        rows.popitem()
        rows.pop("Python and pip of the host")
    crossed = 0
    try:
        for _ in range(rounds):
            for env, seconds in rows.values():
                new = lab.host(env=env)
                proxy = before(lab, new)

                def first(name: str = new.name) -> None:
                    with sky.pool(sky.SSH(name, config=lab.config), image=image, plugins=[]) as pool:
                        assert pool.submit(eval, "1" if smoke else "__import__('numpy').zeros(1)[0] + 1").result() == 1

                seconds.append(timed(first))
                crossed = proxy.up.bytes
    finally:
        mirror.close()
    what = f"Image(python={PYTHON!r}, pip={list(image.pip)})"
    print(f"Bare account, {what} → first result; medians of {rounds} new hosts")
    for name, (_, seconds) in rows.items():
        print(f"  {name:<37}{median(seconds)}")
    print(f"  {crossed / 1e6:.1f} MB crossed to the last of them, uv and our package")


def machine(lab: Lab, name: str) -> SSHMachine:
    """Give a host as a pool makes it."""
    wanted = NodeRequest(nodes=1, least=1, image=NOTHING, vcpus=None, memory_gb=None, connect_timeout=20)
    return SSHMachine(Host(name), sky.SSH(name, config=lab.config), wanted)


def connection(lab: Lab, rounds: int) -> None:
    """Resolve, connect, authenticate and probe in this process, against `ssh host true`."""
    name = host(lab, lab.directory / "shared").name
    with sky.pool(sky.SSH(name, config=lab.config), plugins=[]):
        pass  # makes the environment
    core = _core.Core(1, 1 << 20)
    parts: dict[str, list[float]] = {"resolve": [], "known keys": [], "connect, authenticate": [], "probe": []}
    ours, theirs, classic = [], [], []

    def opened() -> None:
        one = machine(lab, name)
        one.open(core)
        one.end(0)

    def in_parts() -> None:
        begin = time.perf_counter()
        config = openssh.resolve(openssh.parse(name), lab.config)
        resolved = time.perf_counter()
        known_hosts.known(config)
        known = time.perf_counter()
        one = machine(lab, name)
        way = one.connect_to(core, config)
        connected = time.perf_counter()
        way.run(scripts.SHELL, probe.probe_script(bundle.environment_name(NOTHING)), 20)
        done = time.perf_counter()
        one.end(0)
        # `connect_to` asks for the known keys too.
        took = (resolved - begin, known - resolved, connected - known - (known - resolved), done - connected)
        for part, seconds in zip(parts.values(), took, strict=True):
            part.append(seconds)

    opened()
    for _ in range(rounds):
        ours.append(timed(opened))
        theirs.append(timed(lambda: ssh(lab, name, "true")))
        # Its default key exchange is costly where both ends are on one machine.
        classic.append(timed(lambda: ssh(lab, name, "true", "-o", "KexAlgorithms=curve25519-sha256")))
        in_parts()
    core.close()
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"Connection alone; medians of {rounds} interleaved rounds")
    print(f"  skyward_lite, probe included         {median(ours)}")
    for part, seconds in parts.items():
        print(f"    {part:<35}{median(seconds)}")
    print(f"  ssh host true                        {median(theirs)}")
    print(f"  ssh host true, curve25519            {median(classic)}")
    print(f"  {ratio:.2f} × ssh; target at most 3 ×: {'met' if ratio <= 3 else 'MISSED'}")


MANY = """
import os, sys, time
import skyward_lite as sky
config, *names = sys.argv[1:]
begin = time.perf_counter()
with sky.pool(sky.SSH(*names, config=config), worker=sky.Worker(concurrency=1), plugins=[]) as pool:
    ready = time.perf_counter()
    pool.submit(os.getpid).result()
    assert pool.slots() == len(names)
    last = time.perf_counter()
print(ready - begin, time.perf_counter() - last)
"""


def many(lab: Lab, counts: tuple[int, ...], rounds: int) -> None:
    """Many hosts at once, whose environment is there; against as many `ssh host true` at once."""
    cache = lab.directory / "shared"
    names = [host(lab, cache).name for _ in range(max(counts))]
    print(f"Many hosts at once, all of them on these {os.cpu_count()} cores; medians of {rounds} fresh interpreters")
    for count in counts:
        rows, theirs = [], []
        for _ in range(rounds):
            command = [sys.executable, "-c", MANY, lab.config, *names[:count]]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append([float(x) for x in done.stdout.split()])
            begin = time.perf_counter()
            running = [subprocess.Popen(["ssh", "-F", lab.config, name, "true"]) for name in names[:count]]
            assert not any([process.wait() for process in running])  # noqa: C419 (wait for all of them)
            theirs.append(time.perf_counter() - begin)
        ready, leave = (statistics.median(column) for column in zip(*rows, strict=True))
        ssh_true = statistics.median(theirs)
        print(
            f"  {count:>3}: all ready after {ready:6.3f} s ({ready / count * 1000:3.0f} ms each), left after "
            f"{leave:.3f} s; ssh host true {ssh_true:6.3f} s: {ready / ssh_true:.2f} ×",
            flush=True,
        )


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few hosts and no package index: does it run at all?")
    smoke = parser.parse_args().smoke
    logging.getLogger("skyward_lite").setLevel(logging.ERROR)  # what differs between the ends is meant to
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        try:
            bare(lab, 1 if smoke else 3, smoke)
            by_uv(lab, 1 if smoke else 5, smoke)
            cached(lab, 1 if smoke else 7, smoke)
            connection(lab, 1 if smoke else 15)
            many(lab, (1, 3) if smoke else (1, 10, 25, 50), 1 if smoke else 3)
        finally:
            lab.close()


if __name__ == "__main__":
    main()
