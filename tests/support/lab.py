"""Hosts for the tests: real `sshd`s, each on an address of its own, with its own keys and cache directory.

They run as the user who runs the tests, on 127.0.0.x, so that no root is needed. A root user's hosts may be in network
namespaces.
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import skyward_lite as sky
from skyward_lite import SSH, Image, _core
from skyward_lite._version import PYTHON
from skyward_lite.environment import bundle
from skyward_lite.providers import Machine, NodeRequest, PreparedMachine
from skyward_lite.providers.ssh import SSHMachine

SSHD = next((p for p in ("/usr/sbin/sshd", "/usr/bin/sshd") if Path(p).exists()), "sshd")
_numbers = itertools.count(2)
UNSET_PIP: dict[str, str | None] = {
    **dict.fromkeys([name for name in os.environ if name.startswith("PIP_")]),
    "PIP_TRUSTED_HOST": None,
    "PIP_CONFIG_FILE": os.devnull,
}
"""Variables for a host whose pip has no settings of its own, not even in a file."""


def keygen(path: Path, kind: str = "ed25519", comment: str = "lab") -> Path:
    """Make a key without a passphrase."""
    # RSA's default of 3,072 bits takes several times as long.
    size = ["-b", "2048"] if kind == "rsa" else []
    subprocess.run(["ssh-keygen", "-q", "-t", kind, *size, "-N", "", "-C", comment, "-f", str(path)], check=True)
    return path


class Sshd:
    """One host. `options` are lines of its sshd_config; `namespace` is a network namespace to run in.

    `hidden` is a directory that is empty on the host, for which this user must be root.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        name: str = "",
        address: str | None = None,
        port: int = 0,
        namespace: str | None = None,
        hidden: Path | None = None,
        kinds: tuple[str, ...] = ("ed25519",),
        authorized: Path,
        env: dict[str, str | None] | None = None,
    ) -> None:
        number = next(_numbers)
        self.name = name or f"lab{number}"
        self.directory = directory / self.name
        self.directory.mkdir(mode=0o700)
        self.address = address or f"127.0.{os.getpid() % 250 + 1}.{number}"
        self.port = port or self._free_port()
        self.keys = {kind: keygen(self.directory / f"host_{kind}", kind) for kind in kinds}
        self.cache = self.directory / "cache"
        self.cache.mkdir()
        # An empty home, as the files that a login shell reads in the user's own are no part of the tests.
        home = self.directory / "home"
        home.mkdir()
        # Where pip has settings it installs, and no uv of ours is sent: `UNSET_PIP` lifts that.
        pip = {"PIP_TRUSTED_HOST": "127.0.0.1"}
        settings = {"XDG_CACHE_HOME": str(self.cache), "HOME": str(home), **pip, **(env or {})}
        # Other variables of this process stay here: a session starts without them.
        marked = {k: v for k, v in os.environ.items() if k.startswith(("SKYWARD_TEST", "PIP_"))}
        assignments = " ".join(f'"{k}={v}"' for k, v in {**marked, **settings}.items() if v is not None)
        lines = [
            *options,  # the first value counts
            f"ListenAddress {self.address}",
            f"Port {self.port}",
            *(f"HostKey {key}" for key in self.keys.values()),
            f"AuthorizedKeysFile {authorized}",
            f"SetEnv {assignments}",
            *("PidFile none", "StrictModes no", "UsePAM no", "PasswordAuthentication no"),
            *("KbdInteractiveAuthentication no", "PermitRootLogin yes"),
        ]
        config = self.directory / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        if os.getuid() == 0:
            # Debian's sshd wants its privilege separation directory, which only its init script makes.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        if hidden is not None:
            inside += ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden)]
        self.log = (self.directory / "log").open("w+")
        self.command = [*inside, SSHD, "-D", "-e", "-f", str(config)]
        self.start()

    def start(self) -> None:
        """Start the server, again after `kill`."""
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.write(line)
            if "Server listening" in line:
                break
        else:
            raise RuntimeError(f"sshd does not start: {self.log_text()}")
        # Keep the pipe drained, or sshd would block on it.
        self.drain = threading.Thread(target=self._drain, args=(self.process.stderr,), daemon=True)
        self.drain.start()

    def _drain(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self.log.write(line)
                self.log.flush()

    def _free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind((self.address, 0))
            port: int = probe.getsockname()[1]
            return port

    def log_text(self) -> str:
        """Return the log of this server."""
        self.log.flush()
        return Path(self.log.name).read_text()

    def known(self, kind: str = "ed25519") -> str:
        """Return its line for a known_hosts file."""
        public = Path(f"{self.keys[kind]}.pub").read_text().split()
        return f"[{self.address}]:{self.port} {public[0]} {public[1]}"

    def make_environment(self, image: sky.Image) -> None:
        """Make the image's environment on this host: of this interpreter, which takes no time."""
        root = self.cache / "skyward_lite" / f"{bundle.environment_name(image)}-{os.uname().machine}"
        (root / "bin").mkdir(parents=True)
        base = Path(sys._base_executable)  # type: ignore[attr-defined]
        (root / "bin/python3").symlink_to(base)
        # No link to this interpreter, which a test that writes another one here would overwrite.
        python = root / "bin/python"
        python.write_text(f"#!/bin/sh\nexec '{root}/bin/python3' \"$@\"\n")
        python.chmod(0o755)
        (root / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
        packages = root / f"lib/python{PYTHON}/site-packages"
        packages.mkdir(parents=True)
        there = [Path(sky.__file__).parent.parent, *(path for path in sys.path if path.endswith("-packages"))]
        (packages / "lab.pth").write_text("".join(f"{path}\n" for path in there))
        (root / "ready").touch()

    def kill(self) -> None:
        """End it and its sessions by force, as if the machine were gone."""
        # A session's processes are children of the server's until they lose it.
        subprocess.run(["pkill", "-9", "-P", str(self.process.pid)], check=False)
        self.process.kill()
        self.process.wait(10)
        self.close_pipe()

    def close_pipe(self) -> None:
        """Close this end of the pipe to which the server and its sessions write, when all of them have ended."""
        self.drain.join(10)
        if not self.drain.is_alive():
            assert self.process.stderr is not None
            self.process.stderr.close()

    def close(self) -> None:
        """End it and its sessions."""
        self.process.terminate()
        self.process.wait(10)
        # Sessions have the pipe too, and end by themselves.
        self.close_pipe()
        self.log.close()


class Lab:
    """Some hosts, and the ssh configuration that leads to them: `SSH(host.name, config=lab.config)`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.user_key = keygen(directory / "user")
        self.known_hosts = directory / "known_hosts"
        self.known_hosts.touch()
        self.config = str(directory / "ssh_config")
        self.hosts: list[Sshd] = []
        self.extra: dict[str, list[str]] = {}
        self._stack = contextlib.ExitStack()
        self.write()

    def host(self, *options: str, known: bool = True, ssh_options: tuple[str, ...] = (), **kwargs: object) -> Sshd:
        """Start a host; `ssh_options` are lines for it in the client's configuration."""
        host = Sshd(self.directory, *options, authorized=Path(f"{self.user_key}.pub"), **kwargs)  # type: ignore[arg-type]
        self._stack.callback(host.close)
        self.hosts.append(host)
        self.extra[host.name] = list(ssh_options)
        if known:
            with self.known_hosts.open("a") as file:
                file.write(host.known() + "\n")
        self.write()
        return host

    def write(self) -> None:
        """Write the client's configuration anew."""
        blocks = [
            "\n  ".join(
                [
                    f"Host {host.name}",
                    *self.extra[host.name],  # the first value counts
                    f"HostName {host.address}",
                    f"Port {host.port}",
                ]
            )
            for host in self.hosts
        ]
        common = [
            "Host *",
            f"User {getpass.getuser()}",
            f"IdentityFile {self.user_key}",
            *("IdentitiesOnly yes", "IdentityAgent none", "HashKnownHosts no", "GlobalKnownHostsFile none"),
            f"UserKnownHostsFile {self.known_hosts}",
        ]
        Path(self.config).write_text("\n".join([*blocks, "\n  ".join(common), ""]))

    def close(self) -> None:
        """End all hosts."""
        self._stack.close()


@contextlib.contextmanager
def machine(
    lab: Lab, name: str, timeout: float = 20.0, patience: float = 5.0, **options: object
) -> Iterator[tuple[SSHMachine, _core.Core]]:
    """Name a host as a pool would, and release it afterwards."""
    provider = SSH(name, **{"config": lab.config, **options})  # type: ignore[arg-type]
    machines: list[Machine] = []
    core = _core.Core(1, 1 << 30)
    try:
        provider.start(NodeRequest(1, 1, Image(), None, None, timeout), machines)
        (one,) = machines
        assert isinstance(one, SSHMachine)
        yield one, core
    finally:
        provider.stop(machines, patience)
        core.close()


@contextlib.contextmanager
def opened(lab: Lab, name: str, **options: Any) -> Iterator[PreparedMachine]:
    """Connect to a host and make its environment if it has none."""
    with machine(lab, name, **options) as (one, core):
        yield one.open(core)


def connect(lab: Lab, name: str, **options: Any) -> str:
    """Connect to a host, and return the key that it showed."""
    with machine(lab, name, **options) as (one, core):
        return one.connect(core).host_key


def run(lab: Lab, name: str, command: str, script: bytes) -> tuple[int | None, bytes, bytes]:
    """Run a command on a host. Return its status, standard output and standard error."""
    with machine(lab, name) as (one, core):
        return one.connect(core).run(command, script, 60.0)


def ssh(lab: Lab, name: str) -> bool:
    """Return whether `ssh` itself can run a command on a host."""
    command = ["ssh", "-F", lab.config, "-o", "BatchMode=yes", "-o", "UpdateHostKeys=no", name, "true"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30).returncode == 0


def program(settings: str) -> tuple[str, str]:
    """Return the arguments with which an interpreter runs the command with other settings."""
    return (
        "-c",
        (
            "import sys; from skyward_lite import __main__; from skyward_lite.environment import probe; "
            "from skyward_lite.cli import check_command, inspection, measure, survival; "
            f"{settings}; sys.exit(__main__.main())"
        ),
    )


QUICK = program("measure.SAMPLE_BYTES = (1 << 16,); survival.SETTLE_TENTHS = 2; check_command.END_SECONDS = 1.0")
"""Runs the command, but measures the connection's speed with few bytes, and looks only briefly at what survives."""


def check(lab: Lab, *arguments: str, command: tuple[str, str] = QUICK) -> tuple[int, str]:
    """Run the command `check`. Return its exit status and what it printed."""
    line = [sys.executable, *command, "check", "--config", lab.config, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=50, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr
