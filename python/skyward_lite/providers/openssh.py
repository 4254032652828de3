"""What OpenSSH's own tools say of a host: `ssh -G` its configuration, `ssh-keygen -F` its known keys.

Only their output is read here, so that a host is what it is for `ssh`.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import hmac
import os
import pwd
import re
import shlex
import socket
import subprocess
import threading
from pathlib import Path

from ..errors import NodeStartError

TOOL_SECONDS = 20.0
"""Bound on one run of a tool; it may ask a name server."""

_PLACE = re.compile(r"\[(?P<address>[^]]+)\](?::(?P<a>\d+))?|(?P<name>[^:]+)(?::(?P<b>\d+))?|(?P<v6>[0-9a-fA-F:.%\w]+)")

HEEDED = frozenset(
    {
        *("certificatefile", "connecttimeout", "globalknownhostsfile", "hashknownhosts", "host", "hostkeyalias"),
        *("hostname", "identitiesonly", "identityagent", "identityfile", "port", "proxycommand", "proxyjump"),
        *("stricthostkeychecking", "user", "userknownhostsfile"),
    }
)
"""Options that mean for us what they mean for ssh."""


@dataclasses.dataclass(frozen=True)
class Destination:
    """A host as the user names it."""

    host: str
    user: str | None = None
    port: int | None = None


def parse(text: str) -> Destination:
    """Read "host", "user@host", "host:port", "[address]:port" or "ssh://user@host:port"."""
    user, _, place = text.removeprefix("ssh://").rstrip("/").rpartition("@")
    match = re.fullmatch(
        r"\[(?P<address>[^]]+)\](?::(?P<a>\d+))?|(?P<name>[^:]+)(?::(?P<b>\d+))?|(?P<v6>[0-9a-fA-F:.%\w]+)", place
    )
    host = match and (match["address"] or match["name"] or match["v6"])
    port = match and (match["a"] or match["b"])
    if not host or host.startswith("-") or user.startswith("-") or re.search(r"\s", text) or int(port or 1) > 65535:
        raise ValueError(f'SSH({text!r}): a host is "name", "user@name", "name:port" or "[address]:port"')
    return Destination(host, user or None, int(port) if port else None)


@dataclasses.dataclass(frozen=True)
class Config:
    """How to reach a host."""

    hostname: str
    port: int
    user: str
    key_name: str
    """The name under which its key is known."""
    identity_files: tuple[str, ...]
    certificates: tuple[str, ...]
    agent: str | None
    """The agent's socket."""
    identities_only: bool
    proxy: str | None
    """A shell command whose standard input and output lead to the host's SSH server."""
    known_hosts: tuple[str, ...]
    """Files: the user's, of which the first takes new keys, then the system's."""
    strict: str
    """StrictHostKeyChecking."""
    hashed: bool
    connect_timeout: float | None
    unheeded: tuple[str, ...]
    """Options that are set and that we do not heed."""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False
        )
    except FileNotFoundError:
        raise NodeStartError(
            f"{command[0]} is not installed here: SSH() asks it about hosts (openssh-client)"
        ) from None
    except subprocess.TimeoutExpired:
        raise NodeStartError(f"{shlex.join(command)} did not answer within {TOOL_SECONDS:.0f} s") from None


def _options(*arguments: str) -> dict[str, list[str]]:
    done = _run("ssh", "-G", *arguments)
    if done.returncode:
        raise NodeStartError(f"{shlex.join(['ssh', '-G', *arguments])}: {done.stderr.strip()}")
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key.lower(), []).append(value)
    return found


_asking = threading.Lock()
"""Held while the defaults are asked for: the hosts of a pool want them at once, and one of them does it for all."""


@functools.cache
def _plain() -> dict[str, list[str]]:
    """Give ssh's options where nothing is configured. Those that depend on the host are heeded anyway."""
    return _options("-F", "none", "--", "localhost")


def resolve(to: Destination, file: str | None = None) -> Config:
    """Ask `ssh -G`, of the user's configuration or of another file. Raises `NodeStartError` if it cannot say."""
    said = [*(["-l", to.user] if to.user else []), *(["-p", str(to.port)] if to.port else []), "--", to.host]
    other = [] if file is None else ["-F", file]
    options = _options(*other, *said)
    with _asking:
        plain = _plain()

    def one(key: str, default: str = "") -> str:
        return options.get(key, [default])[0]

    hostname, port, user = one("hostname", to.host), int(one("port", "22")), one("user")
    alias = one("hostkeyalias")
    tokens = {"h": hostname, "p": str(port), "r": user, "n": to.host, "k": alias or to.host, "%": "%"}
    tokens |= {"d": str(Path.home()), "u": pwd.getpwuid(os.getuid()).pw_name, "i": str(os.getuid())}
    tokens |= {"l": socket.gethostname(), "L": socket.gethostname().partition(".")[0], "j": one("proxyjump")}

    def expand(text: str) -> str:
        text = re.sub(r"%(.)", lambda m: tokens.get(m[1], m[0]), text)
        return re.sub(r"\$\{(\w+)\}", lambda m: os.environ.get(m[1], ""), text)

    def files(key: str) -> tuple[str, ...]:
        named = [name for value in options.get(key, []) for name in (shlex.split(value) if "known" in key else [value])]
        return tuple(str(Path(expand(name)).expanduser()) for name in named if name != "none")

    agent = one("identityagent", "SSH_AUTH_SOCK")
    if agent == "SSH_AUTH_SOCK":
        agent = os.environ.get("SSH_AUTH_SOCK", "none")
    elif agent.startswith("$") and not agent.startswith("${"):
        agent = os.environ.get(agent[1:], "none")
    timeout = one("connecttimeout", "none")
    return Config(
        hostname=hostname,
        port=port,
        user=user,
        key_name=alias or (hostname if port == 22 else f"[{hostname}]:{port}"),
        identity_files=files("identityfile"),
        certificates=files("certificatefile"),
        agent=None if agent == "none" or not agent else str(Path(expand(agent)).expanduser()),
        identities_only=one("identitiesonly") == "yes",
        proxy=_jumps(one("proxyjump", "none"), hostname, port, other) or _command(expand(one("proxycommand", "none"))),
        known_hosts=files("userknownhostsfile") + files("globalknownhostsfile"),
        strict=one("stricthostkeychecking", "ask"),
        hashed=one("hashknownhosts") == "yes",
        connect_timeout=float(timeout) if timeout.isdigit() else None,
        unheeded=tuple(sorted(key for key in options if key not in HEEDED and options[key] != plain.get(key))),
    )


def _jumps(jumps: str, hostname: str, port: int, options: list[str]) -> str | None:
    """Give the command that leads over jump hosts: `ssh -W`, as for ssh itself, whose business all keys there are."""
    if jumps == "none":
        return None
    *before, last = jumps.split(",")
    to = parse(last)
    words = ["exec", "ssh", *options, "-o", "BatchMode=yes", "-W", f"[{hostname}]:{port}"]
    words += ["-l", to.user] if to.user else []
    words += ["-p", str(to.port)] if to.port else []
    words += ["-J", ",".join(before)] if before else []
    return shlex.join([*words, "--", to.host])


def _command(command: str) -> str | None:
    return None if command == "none" else f"exec {command}"


@dataclasses.dataclass(frozen=True)
class Known:
    """What the known_hosts files say of a host. Keys are in OpenSSH's one-line format."""

    keys: tuple[str, ...]
    revoked: tuple[str, ...]
    authorities: tuple[str, ...]
    """Where a certificate authority is named for it: file and line."""
    unreadable: tuple[str, ...]


def known(config: Config) -> Known:
    """Ask `ssh-keygen -F` about the host's key: hashed names, wildcards, negations and markers are its business."""
    found = _known(config, config.key_name)
    if not found.keys and config.key_name.startswith("["):
        # As ssh does: a key that is known for the host serves every port.
        plain = _known(config, config.hostname)
        found = dataclasses.replace(found, keys=plain.keys, revoked=found.revoked + plain.revoked)
    return found


def _known(config: Config, name: str) -> Known:
    keys, revoked, authorities, unreadable = [], [], [], []
    for file in config.known_hosts:
        if not os.path.lexists(file):
            continue
        if not os.access(file, os.R_OK):
            unreadable.append(file)
            continue
        number = ""
        for line in _run("ssh-keygen", "-F", name, "-f", file).stdout.splitlines():
            if line.startswith("#"):
                match = re.search(r"found: line (\d+)", line)
                number = match[1] if match else number
                continue
            words = line.split()
            marker = words.pop(0) if words and words[0].startswith("@") else ""
            if len(words) < 3:
                continue
            key = f"{words[1]} {words[2]}"
            if marker == "@revoked":
                revoked.append(key)
            elif marker == "@cert-authority":
                authorities.append(f"{file}:{number}")
            else:
                keys.append(key)
    return Known(tuple(dict.fromkeys(keys)), tuple(revoked), tuple(authorities), tuple(unreadable))


def record(config: Config, key: str) -> str:
    """Append a new key to the first known_hosts file, as ssh does; the file's name."""
    name = config.key_name
    if config.hashed:
        salt = os.urandom(20)
        digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
        name = "|1|" + "|".join(base64.b64encode(part).decode() for part in (salt, digest))
    file = Path(config.known_hosts[0])
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(fd, "ab") as opened:
        opened.write(f"{name} {' '.join(key.split()[:2])}\n".encode())
    return str(file)
