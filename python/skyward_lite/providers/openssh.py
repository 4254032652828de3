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

MAGIC = b"openssh-key-v1\0"
TOOL_SECONDS = 20.0
"""Bound on one run of a tool; it may ask a name server."""

_PLACE = re.compile(
    r"\[(?P<address>[^]]+)\](?::(?P<a>\d+))?|(?P<name>[^:]+)(?::(?P<b>\d+))?|(?P<v6>[0-9a-fA-F:.]+(%\w+)?)"
)
_UNSAFE = re.compile(r"[\s'\"`$\\;&<>|(){}\[\]]")
"""What no name may have, as ssh has it too: names become words of the shell that runs a proxy command."""

HEEDED = frozenset(
    {
        *("certificatefile", "connecttimeout", "globalknownhostsfile", "hashknownhosts", "host", "hostkeyalias"),
        *("hostname", "identitiesonly", "identityagent", "identityfile", "port", "proxycommand", "proxyjump"),
        *("revokedhostkeys", "stricthostkeychecking", "user", "userknownhostsfile"),
    }
)
"""Options that mean for us what they mean for ssh."""

TYPES = frozenset(
    {
        *("ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
        *("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"),
    }
)
"""Of public keys that we can use."""

BESIDE = re.compile(
    # Forwarding, terminals, shared connections, other ways to authenticate, and what is only shown or logged.
    "(gateway|stream|dynamic|local|remote|exiton|clearall)?forward.*|.*x11.*|xauth.*|gatewayports|streamlocal.*|tunnel.*"
    "|control.*|permit.*|sendenv|setenv|requesttty|escapechar|enableescape.*|sessiontype|remotecommand|stdinnull|fork.*"
    "|batchmode|password.*|numberofpassword.*|kbdinteractive.*|hostbased.*|gssapi.*|enablesshkeysign|addkeystoagent"
    "|updatehostkeys|visualhostkey|fingerprinthash|log.*|syslog.*|tcpkeepalive|serveralive.*|proxyusefdpass|checkhostip"
    "|canonical.*|ipqos|compression|tag|nohostauthenticationforlocalhost|pubkeyauthentication|connectionattempts"
)
"""Options that do not matter to what we do, or whose part `ssh -G` has already done."""


@dataclasses.dataclass(frozen=True)
class Destination:
    """A host as the user names it."""

    host: str
    user: str | None = None
    port: int | None = None


def parse(text: str) -> Destination:
    """Read "host", "user@host", "host:port", "[address]:port" or "ssh://user@host:port"."""
    user, _, place = text.removeprefix("ssh://").rstrip("/").rpartition("@")
    match = _PLACE.fullmatch(place)
    host = match and (match["address"] or match["name"] or match["v6"])
    port = match and (match["a"] or match["b"])
    unsafe = not host or any(name.startswith("-") or _UNSAFE.search(name) for name in (host, user))
    if unsafe or not host or not 0 < int(port or 1) <= 65535 or text.startswith("@"):
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
    """Files: the user's, then the system's."""
    new_keys: str | None
    """The file of the user's that takes new keys."""
    revoked: tuple[str, ...]
    """Files with keys that no host may show."""
    strict: str
    """StrictHostKeyChecking, in the words of `ssh -G`: "true", "false", "ask" or "accept-new"."""
    hashed: bool
    connect_timeout: float | None
    unheeded: tuple[str, ...]
    """Options that are set and that we do not heed."""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        # Comments beside keys may be in any encoding.
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=TOOL_SECONDS,
            check=False,
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
    tokens |= {"d": _home("~"), "u": pwd.getpwuid(os.getuid()).pw_name, "i": str(os.getuid())}
    tokens |= {"l": socket.gethostname(), "L": socket.gethostname().partition(".")[0], "j": one("proxyjump")}

    def filled(text: str) -> str:
        return re.sub(r"%(.)", lambda m: tokens.get(m[1], m[0]), text)

    def expand(text: str) -> str:
        """Fill in tokens and variables, where ssh does both: in the names of files."""
        return re.sub(r"\$\{(\w+)\}", lambda m: os.environ.get(m[1], ""), filled(text))

    def files(key: str) -> tuple[str, ...]:
        named = options.get(key, [])
        if key.endswith("knownhostsfile"):
            named = [name for value in named for name in _names(value)]
        return tuple(_home(expand(name)) for name in named if name != "none")

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
        agent=None if agent == "none" or not agent else _home(expand(agent)),
        identities_only=one("identitiesonly") == "yes",
        proxy=_jumps(one("proxyjump", "none"), hostname, port, other) or _command(filled(one("proxycommand", "none"))),
        known_hosts=files("userknownhostsfile") + files("globalknownhostsfile"),
        new_keys=next(iter(files("userknownhostsfile")), None),
        revoked=files("revokedhostkeys"),
        strict=one("stricthostkeychecking", "ask"),
        hashed=one("hashknownhosts") == "yes",
        connect_timeout=float(timeout) if timeout.isdigit() else None,
        unheeded=tuple(sorted(key for key in options if _matters(key) and options[key] != plain.get(key))),
    )


def _matters(key: str) -> bool:
    return key not in HEEDED and BESIDE.fullmatch(key) is None


def _home(path: str) -> str:
    """Expand a leading ~ as ssh does, for which the user's home is what the system says and not what $HOME says."""
    home, slash, rest = path.partition("/")
    return pwd.getpwuid(os.getuid()).pw_dir + slash + rest if home == "~" else os.path.expanduser(path)


def _names(value: str) -> list[str]:
    """Split a list of files that `ssh -G` does not quote: the longest that exist, so that names may have spaces."""
    words, names = value.split(" "), []
    while words:
        ends = (end for end in range(len(words), 0, -1) if end == 1 or os.path.exists(_home(" ".join(words[:end]))))
        end = next(ends)
        names.append(" ".join(words[:end]))
        words = words[end:]
    return [name for name in names if name]


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


def public(file: str) -> str | None:
    """Read a file that holds a public key in OpenSSH's one-line format; None if it does not."""
    try:
        words = Path(file).read_text("utf-8", errors="replace").split()
    except OSError:
        return None
    return _key(*words[:2]) if len(words) > 1 else None


def public_half(file: str) -> str | None:
    """Read the public key in a private key's file in OpenSSH's format, where a passphrase does not hide it."""
    try:
        text = Path(file).read_text("ascii")
        data = base64.b64decode("".join(text.split("-----")[2].split()))
        at = len(MAGIC)
        # Cipher, KDF, its options; the number of keys; the first one. PROTOCOL.key of OpenSSH.
        for _ in range(3):
            at += 4 + int.from_bytes(data[at : at + 4], "big")
        at += 4
        blob = data[at + 4 : at + 4 + int.from_bytes(data[at : at + 4], "big")]
        kind = blob[4 : 4 + int.from_bytes(blob[:4], "big")].decode("ascii")
    except (OSError, ValueError, IndexError):
        return None
    return _key(kind, base64.b64encode(blob).decode()) if data.startswith(MAGIC) else None


def _key(kind: str, blob: str) -> str | None:
    """Give a public key in one line; None for what is broken or of a type that we do not have."""
    try:
        data = base64.b64decode(blob, validate=True)
    except ValueError:
        return None
    begin = len(kind).to_bytes(4, "big") + kind.encode()
    return f"{kind} {blob}" if kind in TYPES and data.startswith(begin) and len(data) > len(begin) + 32 else None


def certifies(certificate: str, file: str) -> bool:
    """Say whether a certificate is for the key in a file, whose name need not tell."""
    printed = re.search(r"Public key: .*(SHA256:\S+)", _run("ssh-keygen", "-L", "-f", certificate).stdout)
    return printed is not None and printed[1] in _run("ssh-keygen", "-l", "-f", file).stdout.split()


@dataclasses.dataclass(frozen=True)
class Known:
    """What the known_hosts files say of a host. Keys are in OpenSSH's one-line format."""

    keys: tuple[str, ...]
    portless: tuple[str, ...]
    """Keys known for the host without its port: any of them will do, and another is new rather than changed."""
    revoked: tuple[str, ...]
    authorities: tuple[str, ...]
    """Where a certificate authority is named for it: file and line."""
    unreadable: tuple[str, ...]


def known(config: Config) -> Known:
    """Ask `ssh-keygen -F` about the host's key: hashed names, wildcards, negations and markers are its business."""
    found = _known(config, config.key_name)
    if not found.keys and config.key_name == f"[{config.hostname}]:{config.port}":
        plain = _known(config, config.hostname)
        found = dataclasses.replace(found, portless=plain.keys, revoked=found.revoked + plain.revoked)
    return dataclasses.replace(found, revoked=found.revoked + _revoked(config))


def _revoked(config: Config) -> tuple[str, ...]:
    """Read the files of RevokedHostKeys. Without them no host is trusted, as with ssh. Raises `NodeStartError`."""
    keys = []
    for file in config.revoked:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise NodeStartError(f"RevokedHostKeys {file} cannot be read, so no host is trusted: {error}") from error
        if data.startswith(b"SSHKRL"):
            raise NodeStartError(
                f"RevokedHostKeys {file} is a key revocation list (KRL), which is not supported: "
                "a text file with a public key a line is"
            )
        for words in map(str.split, data.decode(errors="replace").splitlines()):
            if len(words) >= 2 and (key := _key(words[0], words[1])) is not None:
                keys.append(key)
    return tuple(keys)


def _known(config: Config, name: str) -> Known:
    keys, revoked, authorities, unreadable = [], [], [], []
    for file in config.known_hosts:
        if not os.path.lexists(file):
            continue
        if not os.access(file, os.R_OK):
            unreadable.append(file)
            continue
        number = ""
        asked = _run("ssh-keygen", "-F", name, "-f", file)
        if asked.returncode > 1:
            unreadable.append(file)
        for line in asked.stdout.splitlines():
            if line.startswith("#"):
                match = re.search(r"found: line (\d+)", line)
                number = match[1] if match else number
                continue
            words = line.split()
            marker = words.pop(0) if words and words[0].startswith("@") else ""
            if len(words) < 3:
                continue
            key = _key(words[1], words[2])
            if key is None:
                continue
            if marker == "@revoked":
                revoked.append(key)
            elif marker == "@cert-authority":
                authorities.append(f"{file}:{number}")
            else:
                keys.append(key)
    return Known(tuple(dict.fromkeys(keys)), (), tuple(revoked), tuple(authorities), tuple(unreadable))


def record(config: Config, key: str) -> str:
    """Append a new key to the user's first known_hosts file, as ssh does; the file's name. Raises `OSError`."""
    if config.new_keys is None:
        raise FileNotFoundError("UserKnownHostsFile is none")
    name = config.key_name
    if config.hashed:
        salt = os.urandom(20)
        digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
        name = "|1|" + "|".join(base64.b64encode(part).decode() for part in (salt, digest))
    file = Path(config.new_keys)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(fd, "rb+", buffering=0) as opened:
        size = os.fstat(fd).st_size
        # A last line without its end must not take ours with it.
        end = "\n" if size and os.pread(fd, 1, size - 1) != b"\n" else ""
        opened.write(f"{end}{name} {' '.join(key.split()[:2])}\n".encode())
    return str(file)
