"""What OpenSSH's own tools say of a host: `ssh -G` its configuration, `ssh-keygen -F` its known keys.

Only their output is read here, so that a host is what it is for `ssh`. It is read as bytes (public_keys.py).
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import hmac
import ipaddress
import os
import pwd
import re
import shlex
import socket
import subprocess
import threading
from pathlib import Path

from .. import _core
from ..errors import NodeStartError
from . import public_keys

TOOL_SECONDS = 20.0
"""Bound on one run of a tool; it may ask a name server."""

_PLACE = re.compile(
    r"\[(?P<address>[^]]+)\](?::(?P<a>\d+))?|(?P<name>[^:]+)(?::(?P<b>\d+))?|(?P<v6>[0-9a-fA-F:.]+(%\w+)?)"
)
_UNSAFE = re.compile(r"[\s'\"`$\\;&<>|(){}\[\]]")
"""What no name may have, as ssh has it too: names become words of the shell that runs a proxy command."""

HEEDED = frozenset(
    {
        *("certificatefile", "ciphers", "connecttimeout", "globalknownhostsfile", "hashknownhosts", "host"),
        *("hostkeyalgorithms", "hostkeyalias", "hostname", "identitiesonly", "identityagent", "identityfile"),
        *("kexalgorithms", "macs", "port", "preferredauthentications", "proxycommand", "proxyjump"),
        *("pubkeyauthentication", "requiredrsasize", "revokedhostkeys", "stricthostkeychecking", "user"),
        "userknownhostsfile",
    }
)
"""Options that mean for us what they mean for ssh."""

BESIDE = re.compile(
    # Forwarding, terminals, shared connections, other ways to authenticate, and what is only shown or logged.
    "(gateway|stream|dynamic|local|remote|exiton|clearall)?forward.*|.*x11.*|xauth.*|gatewayports|streamlocal.*|tunnel.*"
    "|control.*|permit.*|sendenv|setenv|requesttty|escapechar|enableescape.*|sessiontype|remotecommand|stdinnull|fork.*"
    "|batchmode|password.*|numberofpassword.*|kbdinteractive.*|hostbased.*|gssapi.*|enablesshkeysign|addkeystoagent"
    "|updatehostkeys|visualhostkey|fingerprinthash|log.*|syslog.*|tcpkeepalive|serveralive.*|proxyusefdpass"
    "|canonical.*|ipqos|compression|tag|nohostauthenticationforlocalhost|connectionattempts|casignaturealgorithms"
)
"""Options that do not matter to what we do, or whose part `ssh -G` has already done."""

RESTRICTING = {
    "checkhostip": (
        "the keys that are known for the host's addresses are not compared with the key that it shows",
        "name the host by its address, or set CheckHostIP no for it",
    ),
    "knownhostscommand": (
        "a key that this command lists, or revokes, is not known to skyward_lite",
        "list these keys in a file of UserKnownHostsFile as well",
    ),
    "pubkeyacceptedalgorithms": (
        "your keys also sign with the algorithms that it leaves out",
        "name the key to use with IdentityFile and IdentitiesOnly yes",
    ),
}
"""Options that restrict what ssh trusts or uses, and that we do not apply: what follows from that, and what to do."""

HOST_KEY_ALGORITHMS = {
    **{name: name for name in public_keys.TYPES if name != "ssh-rsa"},
    **dict.fromkeys(("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa"), "ssh-rsa"),
}
"""Algorithms with which a host may prove that it has its key: the type of the key."""

_COMMON_TYPES = frozenset(kind for kind in public_keys.TYPES if not kind.startswith("sk-"))
"""Types of keys that users have, but for keys in hardware, which the policies of some systems leave out."""


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
    portless: str | None
    """The name under which its key may be known instead if none is known at its port; None if there is no such name."""
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
    algorithms: dict[str, list[str]]
    """Of "kex", "cipher" and "mac", those that the user has restricted: the algorithms that may be used."""
    host_key_algorithms: tuple[str, ...]
    """What may prove the host's key, of what we support."""
    known_first: bool
    """Whether the host is asked for a key of a type that is known for it; else for what the list above names first."""
    rsa_bits: int
    """Bits that RSA keys must have."""
    public_keys: bool
    """Whether public keys may prove who we are."""
    unheeded: tuple[str, ...]
    """Options that are set and that we do not apply."""
    missed: dict[str, str]
    """Those of them that can restrict what ssh trusts or uses, with their values."""


def _run(*command: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_SECONDS, check=False)
    except FileNotFoundError:
        raise NodeStartError(
            f"{command[0]} is not installed here: SSH() asks it about hosts (openssh-client)"
        ) from None
    except subprocess.TimeoutExpired:
        raise NodeStartError(f"{shlex.join(command)} did not answer within {TOOL_SECONDS:.0f} s") from None


def _options(*arguments: str) -> dict[str, list[str]]:
    done = _run("ssh", "-G", *arguments)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise NodeStartError(f"{shlex.join(['ssh', '-G', *arguments])}: {said}")
    found: dict[str, list[str]] = {}
    for line in public_keys.lines(done.stdout):
        key, _, value = os.fsdecode(line).partition(" ")
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
        return tuple(_home(expand(name)) for name in options.get(key, []) if name != "none")

    def known_hosts(key: str) -> tuple[str, ...]:
        # `ssh -G` has filled in the tokens where ssh does so: %%h is by now a file that is called %h.
        named = [name for value in options.get(key, []) for name in _names(value)]
        return tuple(_home(name) for name in named if name != "none")

    agent = one("identityagent", "SSH_AUTH_SOCK")
    if agent == "SSH_AUTH_SOCK":
        agent = os.environ.get("SSH_AUTH_SOCK", "none")
    elif agent.startswith("$") and not agent.startswith("${"):
        agent = os.environ.get(agent[1:], "none")
    timeout = one("connecttimeout", "none")

    def algorithms(key: str) -> list[str]:
        return [name for name in one(key).split(",") if name]

    def changed(key: str) -> bool:
        return options.get(key) != plain.get(key)

    lists = {"kex": "kexalgorithms", "cipher": "ciphers", "mac": "macs"}
    host_keys, usual = algorithms("hostkeyalgorithms"), plain.get("hostkeyalgorithms", [""])[0].split(",")
    methods = algorithms("preferredauthentications")
    unheeded = sorted(key for key in options if _matters(key) and changed(key))
    return Config(
        hostname=hostname,
        port=port,
        user=user,
        key_name=alias or (hostname if port == 22 else f"[{hostname}]:{port}"),
        portless=None if alias or port == 22 else hostname,
        identity_files=files("identityfile"),
        certificates=files("certificatefile"),
        agent=None if agent == "none" or not agent else _home(expand(agent)),
        identities_only=one("identitiesonly") == "yes",
        proxy=_jumps(one("proxyjump", "none"), hostname, port, other) or _command(filled(one("proxycommand", "none"))),
        known_hosts=known_hosts("userknownhostsfile") + known_hosts("globalknownhostsfile"),
        new_keys=next(iter(known_hosts("userknownhostsfile")), None),
        # ssh (9.2) takes the name as it is, without a ~ or tokens.
        revoked=tuple(name for name in options.get("revokedhostkeys", []) if name != "none"),
        strict=one("stricthostkeychecking", "ask"),
        hashed=one("hashknownhosts") == "yes",
        connect_timeout=float(timeout) if timeout.isdigit() else None,
        algorithms={kind: algorithms(key) for kind, key in lists.items() if changed(key)},
        host_key_algorithms=tuple(name for name in host_keys if name in HOST_KEY_ALGORITHMS),
        # As ssh has it: a list of the user's own is taken as it is, unless it only adds to the usual one.
        known_first=host_keys[: len(usual)] == usual,
        rsa_bits=int(one("requiredrsasize", "0")),
        public_keys=one("pubkeyauthentication") not in ("no", "false") and (not methods or "publickey" in methods),
        unheeded=tuple(unheeded),
        missed={key: one(key) for key in unheeded if key in RESTRICTING},
    )


def _restricts(config: Config, key: str, value: str) -> bool:
    """Return whether an option of `RESTRICTING` makes a difference with this value for this host."""
    if key == "pubkeyacceptedalgorithms":
        # Policies of whole systems set it, and usually name all that is used.
        accepted = {HOST_KEY_ALGORITHMS.get(name) for name in value.split(",") if name != "ssh-rsa"}
        files = [public(file) or public_half(file) or public(f"{file}.pub") for file in config.identity_files]
        ours = {key.partition(" ")[0] for key in files if key}
        return not (ours if config.identities_only else _COMMON_TYPES) <= accepted
    if key == "checkhostip" and (config.proxy is not None or _is_address(config.hostname)):
        return False  # nor does ssh apply it there
    return value not in ("no", "none")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def warnings_of(config: Config, host: str) -> list[str]:
    """Return a sentence for each option that restricts ssh and is not applied here."""
    sentences = []
    for key, value in config.missed.items():
        if not _restricts(config, key, value):
            continue
        consequence, remedy = RESTRICTING[key]
        shown = value if len(value) <= 100 else f"{value[:100]}..."
        sentences.append(
            f"{host}: the ssh configuration sets {key} to {shown!r}, which skyward_lite does not apply: {consequence}. "
            f"Remedy: {remedy}"
        )
    return sentences


def offer(config: Config, known: Known) -> list[str]:
    """Return the algorithms to ask the host's key for, as ssh does. Raises `NodeStartError` if none is left."""
    types = {key.partition(" ")[0] for key in known.keys}
    names = [
        name
        for name in config.host_key_algorithms
        if not types or not config.known_first or HOST_KEY_ALGORITHMS[name] in types
    ]
    if not names:
        raise NodeStartError(
            f"HostKeyAlgorithms in the ssh configuration allows no key of {config.key_name} that is known "
            f"({', '.join(sorted(types)) or 'none'}) and supported: add its type to HostKeyAlgorithms"
        )
    return names


def too_short(config: Config, key: str) -> bool:
    """Return whether a public key in one line is an RSA key with fewer bits than RequiredRSASize asks for."""
    read = public_keys.read(key.encode())
    return read is not None and (read.rsa_bits or config.rsa_bits) < config.rsa_bits


def _matters(key: str) -> bool:
    return key not in HEEDED and BESIDE.fullmatch(key) is None


def _home(path: str) -> str:
    """Expand a leading ~ as ssh does, for which the user's home is what the system says and not what $HOME says."""
    home, slash, rest = path.partition("/")
    return pwd.getpwuid(os.getuid()).pw_dir + slash + rest if home == "~" else os.path.expanduser(path)


def _names(value: str) -> list[str]:
    """Split a list of files that `ssh -G` does not quote: a name begins at a / or ~, and may have spaces.

    Raises `NodeStartError` where a part of such a name is a file: whether ssh reads one file or more is then unknown.
    """
    groups: list[list[str]] = []
    for word in value.split(" "):
        if not groups or word.startswith(("/", "~")):
            groups.append([])
        groups[-1].append(word)
    for words in groups:
        size = len(words)
        parts = (words[begin:end] for begin in range(size) for end in range(begin + 1, size + 1) if end - begin < size)
        if any(os.path.isfile(_home(" ".join(part))) for part in parts):
            raise NodeStartError(
                f"{value!r} in the ssh configuration names known_hosts files in more than one way, for a part of "
                f"{' '.join(words)!r} exists: use full paths without spaces"
            )
    return [name for name in map(" ".join, groups) if name]


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
    """Return the public key in a file of OpenSSH's one-line format: its first line that is one. None without one."""
    try:
        data = Path(file).read_bytes()
    except OSError:
        return None
    for line in public_keys.lines(data):
        if line.startswith(b"-----BEGIN"):
            break  # a private key
        if line and not line.startswith(b"#") and (key := public_keys.read(line)) is not None:
            return key.line if key.usable else None
    return None


def public_half(file: str) -> str | None:
    """Return the public key in a private key's file in OpenSSH's format, where a passphrase does not hide it."""
    try:
        line = _core.public_half(Path(file).read_bytes())
    except OSError:
        return None
    key = None if line is None else public_keys.read(line.encode())
    return key.line if key is not None and key.usable else None


def certifies(certificate: str, file: str) -> bool:
    """Return whether a certificate is for the key in a file, whose name need not tell."""
    printed = re.search(rb"^ +Public key: \S+ (SHA256:\S+)", _run("ssh-keygen", "-L", "-f", certificate).stdout, re.M)
    # Its length in bits, its fingerprint, and a comment of any content.
    return printed is not None and printed[1] in public_keys.words(_run("ssh-keygen", "-l", "-f", file).stdout, 2)[1:2]


@dataclasses.dataclass(frozen=True)
class Known:
    """What the known_hosts files say of a host. Keys are in OpenSSH's one-line format."""

    keys: tuple[str, ...]
    portless: tuple[str, ...]
    """Keys known for the host without its port: any of them will do, and another is new rather than changed."""
    revoked: tuple[str, ...]
    authorities: tuple[str, ...]
    """Where a certificate authority is named for it: file and line."""
    others: tuple[str, ...]
    """Where a key of a type that we cannot use is known for it: file and line. Such a host is known, and not new."""
    unreadable: tuple[str, ...]


def known(config: Config) -> Known:
    """Ask `ssh-keygen -F` about the host's key: hashed names, wildcards, negations and markers are its business."""
    found = _known(config, config.key_name)
    if config.portless is not None and not (found.keys or found.others):
        plain = _known(config, config.portless)
        found = dataclasses.replace(found, portless=plain.keys, revoked=found.revoked + plain.revoked)
    return dataclasses.replace(found, revoked=found.revoked + _revoked(config))


def _revoked(config: Config) -> tuple[str, ...]:
    """Read the files of RevokedHostKeys. Without them no host is trusted, as with ssh. Raises `NodeStartError`."""
    keys = []
    for file in config.revoked:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            literal = ". To ssh, ~ and % mean nothing in this name: write it out" if re.search("[~%$]", file) else ""
            raise NodeStartError(
                f"RevokedHostKeys {file} cannot be read, so no host is trusted: {error}{literal}"
            ) from error
        if data.startswith(b"SSHKRL"):
            raise NodeStartError(
                f"RevokedHostKeys {file} is a key revocation list (KRL), which is not supported: "
                "a text file with a public key a line is"
            )
        for number, line in enumerate(public_keys.lines(data), 1):
            text = line.lstrip(b" \t")
            if not text or text.startswith(b"#"):
                continue
            key = public_keys.read(text)
            if key is None or not key.usable:
                raise NodeStartError(
                    f"RevokedHostKeys {file}, line {number}, is no public key of the types that are supported, so no "
                    "host is trusted: correct the line or remove it"
                )
            keys.append(key.line)
    return tuple(keys)


_FOUND = re.compile(rb"# Host .* found: line (\d+) ?(CA|REVOKED)?", re.DOTALL)
"""What `ssh-keygen -F` prints before each line that it has found."""


_CUT_NAMES = re.compile(rb"^[ \t]*(?:@[^ \t\n\0]*[ \t]+[^ \t\n\0]+|[^ \t\n\0#@][^ \t\n\0]*)\0", re.MULTILINE)
"""A line whose names, after a marker or without one, are ended by a NUL."""


def _refuse_cut_names(file: str) -> None:
    """Raise `NodeStartError` where ssh would find a key, or a revoked one, that `ssh-keygen -F` does not show.

    A NUL hides the rest of a line, but after a line's names ssh (9.2) steps over it and reads on.
    """
    try:
        data = Path(file).read_bytes()
    except OSError:
        return
    cut = _CUT_NAMES.search(data) if b"\0" in data else None
    if cut is not None:
        number = data.count(b"\n", 0, cut.start()) + 1
        raise NodeStartError(
            f"{file}, line {number}, has a NUL after its names, so no host is trusted: remove the line"
        )


def _known(config: Config, name: str) -> Known:
    keys, revoked, authorities, others, unreadable = [], [], [], [], []
    for file in config.known_hosts:
        if not os.path.lexists(file):
            continue
        if not os.access(file, os.R_OK):
            unreadable.append(file)
            continue
        _refuse_cut_names(file)
        asked = _run("ssh-keygen", "-F", name, "-f", file)
        if asked.returncode > 1:
            unreadable.append(file)
        printed = public_keys.lines(asked.stdout)
        # Two lines each: where it was found, and the line itself, which may look like anything.
        for header, line in zip(printed[::2], printed[1::2], strict=False):
            found = _FOUND.fullmatch(header)
            if found is None:
                unreadable.append(file)
                break
            marker = found[2]
            # The line's words: a marker, if there is one; the names; the key.
            rest = public_keys.words(line, 2 if marker else 1)[-1]
            at = f"{file}:{found[1].decode()}"
            key = public_keys.read(rest)
            if key is None:
                continue
            if marker == b"REVOKED":
                if key.plain.usable:
                    revoked.append(key.plain.line)
            elif marker == b"CA":
                authorities.append(at)
            elif key.usable:
                keys.append(key.line)
            else:
                others.append(f"{at} ({key.type})")
    unreadable = list(dict.fromkeys(unreadable))
    return Known(tuple(dict.fromkeys(keys)), (), tuple(revoked), tuple(authorities), tuple(others), tuple(unreadable))


def record(config: Config, key: str) -> str:
    """Append a new key to the user's first known_hosts file, as ssh does; the file's name. Raises `OSError`."""
    if config.new_keys is None:
        raise FileNotFoundError("UserKnownHostsFile is none")
    name = config.key_name
    if config.hashed:
        salt = os.urandom(20)
        digest = hmac.new(salt, os.fsencode(name), hashlib.sha1).digest()
        name = "|1|" + "|".join(base64.b64encode(part).decode() for part in (salt, digest))
    file = Path(config.new_keys)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(fd, "rb+", buffering=0) as opened:
        size = os.fstat(fd).st_size
        # A last line without its end must not take ours with it.
        end = "\n" if size and os.pread(fd, 1, size - 1) != b"\n" else ""
        opened.write(os.fsencode(f"{end}{name} {' '.join(key.split()[:2])}\n"))
    return str(file)
