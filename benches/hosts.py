"""Real `sshd`s for the data bench: on loopback, behind an interface whose bytes are counted, or far away."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import skyward_lite as sky
from lab import Lab, Sshd

CIPHER = "aes256-gcm@openssh.com"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


_islands = itertools.count(1)
"""Numbers of the network namespaces that this process has made."""


class Hosts:
    """Hosts that are started when they are first asked for, and end with the block."""

    def __init__(self, directory: Path, *, counted: bool) -> None:
        """`counted`: each has an interface of its own, if this user may make some."""
        self.lab = Lab(directory)
        self.is_counted = counted and os.getuid() == 0 and shutil.which("ip") is not None
        self._near: list[Sshd] = []
        self._far: dict[float, Sshd] = {}
        self._interfaces: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.lab.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def near(self, count: int) -> list[str]:
        """Return the names of so many hosts of this machine."""
        while len(self._near) < count:
            self._near.append(self._start(*self._island() if self.is_counted else (None, None)))
        return [host.name for host in self._near[:count]]

    def far(self, round_trip: float) -> str:
        """Return the name of a host that is so many seconds of round trip away."""
        if round_trip not in self._far:
            host = self._start(None, None)
            command = [sys.executable, str(Path(__file__).with_name("delay.py")), host.address, str(host.port)]
            relay = subprocess.Popen(
                [*command, str(round_trip * 1000 / 2)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._stack.callback(relay.communicate)
            assert relay.stdout is not None
            port = int(relay.stdout.readline())
            self.lab.extra[host.name] = ["HostName 127.0.0.1", f"Port {port}", *self.lab.extra[host.name]]
            with self.lab.known_hosts.open("a") as file:
                file.write(f"[127.0.0.1]:{port} {host.known().split(maxsplit=1)[1]}\n")
            self.lab.write()
            self._far[round_trip] = host
        return self._far[round_trip].name

    def _start(self, address: str | None, namespace: str | None) -> Sshd:
        home = self.lab.directory / "home"
        home.mkdir(exist_ok=True)
        env = {"HOME": str(home), "PATH": f"{os.path.dirname(os.path.realpath(sys.executable))}:{PATH}"}
        host = self.lab.host(
            f"Ciphers {CIPHER}",
            ssh_options=(f"Ciphers {CIPHER}", "Compression no"),
            address=address,
            namespace=namespace,
            env=env,
            port=0 if namespace is None else 2022,
        )
        transform = sky.plugins.joblib().transform
        assert transform is not None
        host.make_environment(transform(sky.Image()))
        if namespace is not None:
            self._interfaces[host.name] = f"{namespace}v"
        return host

    def _island(self) -> tuple[str, str]:
        """Make a network namespace that one pair of interfaces leads to; return its address and its name."""
        # The kernel takes a moment to remove the interfaces of a section before.
        number = next(_islands)
        name = f"sb{os.getpid() % 100_000}n{number}"
        network = f"10.214.{(os.getpid() + number) % 250}"

        def ip(line: str) -> None:
            subprocess.run(["ip", *shlex.split(line)], check=True, capture_output=True, timeout=10)

        ip(f"netns add {name}")
        # Before it the host ends, which was started later.
        self._stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True, check=False)
        self._stack.callback(self.lab.close)
        ip(f"-n {name} link set lo up")
        ip(f"link add {name}v type veth peer name {name}w netns {name}")
        ip(f"addr add {network}.1/24 dev {name}v")
        ip(f"link set {name}v up")
        ip(f"-n {name} addr add {network}.2/24 dev {name}w")
        ip(f"-n {name} link set {name}w up")
        return f"{network}.2", name

    def counters(self, names: Sequence[str]) -> tuple[int, int] | None:
        """Return the bytes that the interfaces of these hosts have sent to them and received; None if not counted."""
        if not names or not all(name in self._interfaces for name in names):
            return None
        directories = [Path(f"/sys/class/net/{self._interfaces[name]}/statistics") for name in names]
        sent = sum(int((each / "tx_bytes").read_text()) for each in directories)
        return sent, sum(int((each / "rx_bytes").read_text()) for each in directories)

    def ssh(self, name: str, command: str, *, stdin: Path | None = None) -> float:
        """Run a command with OpenSSH's client; return the seconds that it takes. Its output is thrown away."""
        with contextlib.ExitStack() as stack:
            source = subprocess.DEVNULL if stdin is None else stack.enter_context(stdin.open("rb"))
            begin = time.perf_counter()
            line = ["ssh", "-F", self.lab.config, name, command]
            subprocess.run(line, stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
            return time.perf_counter() - begin
