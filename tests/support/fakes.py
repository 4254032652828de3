"""Nodes whose agent is `fake_agent.py`, beside good ones: behind the embedded SSH server, or behind a real `sshd`.

    with fakes.pool("silent") as pool:                             # one fake node, and a good one beside it
    with fakes.pool("floods", kind="output", lab=lab) as pool:     # the fake one behind a host of the lab

`pool.provider.journals[0]` has the frames that the first fake node got, a line each.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import fake_agent
import skyward_lite as sky
from lab import Lab
from skyward_lite.providers import Machine, NodeRequest
from skyward_lite.providers.local import LocalMachine
from skyward_lite.providers.ssh import SSHMachine

HERE = Path(__file__).parent
AGENT = HERE / "fake_agent.py"


@functools.cache
def embedded_server() -> str:
    """Return the program that is the embedded server in front of any command; build it if need be, for minutes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyward_lite/target"
    target = os.environ.get("CARGO_TARGET_DIR") or str(cache)
    program = Path(target) / "release/examples/embedded_server"
    rust = HERE.parent.parent / "rust"
    sources = [rust / "Cargo.lock", *rust.glob("src/**/*.rs"), rust / "examples/embedded_server.rs"]
    # `make test` and `make chaos` have built it; cargo would wait here for other builds.
    if not program.exists() or program.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        command = ["cargo", "build", "--quiet", "--release", "--locked", "--manifest-path", str(rust / "Cargo.toml")]
        env = {**os.environ, "CARGO_TARGET_DIR": target}
        subprocess.run([*command, "--example", "embedded_server"], check=True, env=env, stdin=subprocess.DEVNULL)
        # Cargo does not rebuild the program for a source that is no part of it.
        program.touch()
    return str(program)


@functools.cache
def journals() -> Path:
    """Return the directory of all journals, which is removed with this process."""
    directory = tempfile.mkdtemp(prefix="skyward-fakes-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


class FakeMachine(LocalMachine):
    """A fake node behind the embedded server. It plays its part once."""

    returns = False

    def __init__(self, name: str, timeout: float, command: list[str]) -> None:
        # The interpreter becomes the server, which starts the command.
        become = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
        self.program = ("-c", become, embedded_server(), *command)
        super().__init__(name, timeout)


class Fakes(sky.Local):
    """A provider of fake nodes, each with its behaviour and its arguments, and of good nodes of this machine.

    A behaviour is one of `fake_agent.py`, or "path.py:name". With a lab, each fake node is behind a host of it.
    """

    def __init__(self, *behaviours: tuple[str, dict[str, object]], good: int = 1, lab: Lab | None = None) -> None:
        super().__init__(good + len(behaviours))
        self.good = good
        self.lab = lab
        if lab is None:
            # Before any node waits for its client.
            embedded_server()
        self.shares_files = lab is None
        self.journals = [journals() / f"journal-{uuid.uuid4().hex}" for _ in behaviours]
        self.commands = []
        for (behaviour, args), journal in zip(behaviours, self.journals, strict=True):
            file, _, name = behaviour.rpartition(":")
            assert file or callable(getattr(fake_agent, name)), behaviour
            wanted = {"behaviour": behaviour, "args": args, "journal": str(journal)}
            self.commands.append([sys.executable, "-P", str(AGENT), json.dumps(wanted)])

    def __repr__(self) -> str:
        return f"Fakes({len(self.commands)}, good={self.good})"

    def start(self, wanted: NodeRequest, machines: list[Machine]) -> None:
        for number in range(self.good):
            machines.append(LocalMachine(f"good-{number}", wanted.connect_timeout))
        for number, command in enumerate(self.commands):
            if self.lab is None:
                machines.append(FakeMachine(f"fake-{number}", wanted.connect_timeout, command))
            else:
                host = self.lab.host(name=f"fake-{number}-{uuid.uuid4().hex[:6]}")
                # The host has the environment already, and its Python is the fake agent where an agent is started.
                host.make_environment(wanted.image)
                (python,) = host.cache.glob("skyward_lite/*/bin/python")
                lines = python.read_text().splitlines()
                fake = f'case "$*" in *skyward_lite.node.attach*) exec {shlex.join(command)};; esac'
                python.write_text("\n".join([lines[0], fake, *lines[1:], ""]))
                sky.SSH(host.name, config=self.lab.config).start(wanted, machines)
                machines[-1].returns = False

    def stop(self, machines: list[Machine], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for machine in machines:
            assert isinstance(machine, LocalMachine | SSHMachine)
            machine.end(deadline)

    def heard(self, number: int = 0) -> list[str]:
        """Return the frames that a fake node got so far."""
        journal = self.journals[number]
        return journal.read_text().splitlines() if journal.exists() else []


def pool(
    behaviour: str, *, good: int = 1, lab: Lab | None = None, concurrency: int = 2, options: dict | None = None, **args
) -> sky.ComputePool:
    """Make a pool of good nodes and one fake node, whose behaviour gets `args`; `options` are those of `sky.pool`."""
    provider = Fakes((behaviour, args), good=good, lab=lab)
    options = {"worker": sky.Worker(concurrency=concurrency), **(options or {})}
    return sky.pool(provider, **options)
