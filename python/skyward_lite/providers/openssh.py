"""What OpenSSH's own client says of a host: its configuration, by `ssh -G`.

Only the output is read here, so that a host is the same for skyward_lite as for `ssh`. It is read as bytes
(public_keys.py). What is known of a host's key is in known_hosts.py, and the user's keys are in identities.py.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import os
import pwd
import re
import shlex
import socket
import subprocess
import threading

from ..errors import NodeStartError
from . import public_keys

TOOL_SECONDS = 20.0
"""Bound on one run of `ssh -G` or `ssh-keygen`, which may ask a name server."""

_PLACE = re.compile(
    r"\[(?P<address>[^]]+)\](?::(?P<a>\d+))?|(?P<name>[^:]+)(?::(?P<b>\d+))?|(?P<v6>[0-9a-fA-F:.]+(%\w+)?)"
)
_UNSAFE = re.compile(r"[\s'\"`$\\;&<>|(){}\[\]]")
"""Characters that no name may have, as with ssh: names become words of the shell that runs a proxy command."""

REKEY_BYTES = 1 << 30
REKEY_SECONDS = 3600.0
"""When keys are renewed, as RFC 4253 recommends it (section 9). ssh itself never does so by the clock."""

SUPPORTED_OPTIONS = frozenset(
    {
        *("certificatefile", "ciphers", "connecttimeout", "globalknownhostsfile", "hashknownhosts", "host"),
        *("hostkeyalgorithms", "hostkeyalias", "hostname", "identitiesonly", "identityagent", "identityfile"),
        *("kexalgorithms", "macs", "port", "preferredauthentications", "proxycommand", "proxyjump"),
        *("pubkeyauthentication", "rekeylimit", "requiredrsasize", "revokedhostkeys", "stricthostkeychecking", "user"),
        "userknownhostsfile",
    }
)
"""Options that have the same effect here as in ssh."""

IRRELEVANT_OPTIONS = re.compile(
    # Forwarding, terminals, shared connections, other ways to authenticate, and what is only shown or logged.
    "(gateway|stream|dynamic|local|remote|exiton|clearall)?forward.*|.*x11.*|xauth.*|gatewayports|streamlocal.*|tunnel.*"
    "|control.*|permit.*|sendenv|setenv|requesttty|escapechar|enableescape.*|sessiontype|remotecommand|stdinnull|fork.*"
    "|batchmode|password.*|numberofpassword.*|kbdinteractive.*|hostbased.*|gssapi.*|enablesshkeysign|addkeystoagent"
    "|updatehostkeys|visualhostkey|fingerprinthash|log.*|syslog.*|tcpkeepalive|serveralive.*|proxyusefdpass"
    "|canonical.*|ipqos|compression|tag|nohostauthenticationforlocalhost|connectionattempts|casignaturealgorithms"
)
"""Options that have no effect on a node's connection, or that `ssh -G` has already applied."""

RESTRICTING_OPTIONS = {
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
"""Options that restrict what ssh trusts or uses and that are not applied here: the consequence, and the remedy."""

HOST_KEY_ALGORITHMS = {
    **{name: name for name in public_keys.TYPES if name != "ssh-rsa"},
    **dict.fromkeys(("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa"), "ssh-rsa"),
}
"""The algorithms with which a host may prove that it has its key: the type of the key."""

_COMMON_TYPES = frozenset(kind for kind in public_keys.TYPES if not kind.startswith("sk-"))
"""Types of the keys that users have in files. The policies of some systems leave out keys in hardware."""


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
    if unsafe or not host or not 0 < int(port or 1) <= 65535 or text.startswith("@") or "," in place:
        is_list = len(re.split(r"[\s,;]+", text.strip())) > 1
        several = '. Each host is a text of its own: SSH("lab1", "lab2")' if is_list else ""
        raise ValueError(f'SSH({text!r}): a host is "name", "user@name", "name:port" or "[address]:port"{several}')
    return Destination(host, user or None, int(port) if port else None)


@dataclasses.dataclass(frozen=True)
class Config:
    """How to reach a host."""

    hostname: str
    port: int
    user: str
    key_name: str
    """The name under which known_hosts files list its key."""
    portless: str | None
    """The name that is looked up if they do not list `key_name`; None if there is no other name."""
    identity_files: tuple[str, ...]
    certificates: tuple[str, ...]
    ssh_agent: str | None
    """The ssh-agent's socket."""
    identities_only: bool
    """Whether only the keys in `identity_files` may be used."""
    proxy: str | None
    """A shell command whose standard input and output lead to the host's SSH server."""
    known_hosts: tuple[str, ...]
    """Files: the user's, then the system's."""
    new_keys: str | None
    """The user's file to which new keys are appended."""
    revoked: tuple[str, ...]
    """Files with keys that no host may show."""
    strict: str
    """StrictHostKeyChecking, in the words of `ssh -G`: "true", "false", "ask" or "accept-new"."""
    hashed: bool
    """Whether the names of new keys are hashed."""
    connect_timeout: float | None
    algorithms: dict[str, list[str]]
    """The algorithms that may be used, for those of "kex", "cipher" and "mac" that the user has restricted."""
    host_key_algorithms: tuple[str, ...]
    """What may prove the host's key; unsupported algorithms are left out."""
    known_first: bool
    """Whether the server is asked for a key of a type that is known for the host, rather than in the list's order."""
    rekey: tuple[int, float]
    """The keys are renewed after so many bytes in one direction, and after so many seconds."""
    rsa_bits: int
    """Bits that RSA keys must have."""
    public_keys: bool
    """Whether public keys may prove who the user is."""
    unsupported: tuple[str, ...]
    """Options that are set and that are not applied here."""
    restricting: dict[str, str]
    """The unsupported options of `RESTRICTING_OPTIONS`, with their values."""


def run_tool(*command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program of OpenSSH's. Raises `NodeStartError` if it is not installed or does not end in time."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_SECONDS, check=False)
    except FileNotFoundError:
        raise NodeStartError(
            f"{command[0]} is not installed here: SSH() asks it about hosts (openssh-client)"
        ) from None
    except subprocess.TimeoutExpired:
        raise NodeStartError(f"{shlex.join(command)} did not answer within {TOOL_SECONDS:.0f} s") from None


def _read_options(*arguments: str) -> dict[str, list[str]]:
    """Return the options that `ssh -G` prints: name in lower case, values. Raises `NodeStartError` if it fails."""
    done = run_tool("ssh", "-G", *arguments)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise NodeStartError(f"{shlex.join(['ssh', '-G', *arguments])}: {message}")
    found: dict[str, list[str]] = {}
    for line in public_keys.lines(done.stdout):
        key, _, value = os.fsdecode(line).partition(" ")
        found.setdefault(key.lower(), []).append(value)
    return found


_reading_defaults = threading.Lock()
"""Held while the defaults are read: the hosts of a pool need them at once, and one of them reads them for all."""


@functools.cache
def _defaults() -> dict[str, list[str]]:
    """Return ssh's options without any configuration. The values that depend on the host are of no interest."""
    return _read_options("-F", "none", "--", "localhost")


class _Options:
    """A host's options, with the tokens (%h) and variables (${HOME}) in their values expanded where ssh does that."""

    def __init__(self, to: Destination, options: dict[str, list[str]]) -> None:
        self._options = options
        self.hostname, self.port = self.one("hostname", to.host), int(self.one("port", "22"))
        self.user, self.alias = self.one("user"), self.one("hostkeyalias")
        here = socket.gethostname()
        self._tokens = {"h": self.hostname, "p": str(self.port), "r": self.user, "n": to.host, "%": "%"}
        self._tokens |= {"k": self.alias or to.host, "j": self.one("proxyjump"), "l": here, "L": here.partition(".")[0]}
        self._tokens |= {"d": _home("~"), "u": pwd.getpwuid(os.getuid()).pw_name, "i": str(os.getuid())}

    def one(self, key: str, default: str = "") -> str:
        """Return the first value of an option."""
        return self._options.get(key, [default])[0]

    def all(self, key: str) -> list[str]:
        """Return all values of an option."""
        return self._options.get(key, [])

    def algorithms(self, key: str) -> list[str]:
        """Return an option's value that is a list of algorithms."""
        return [name for name in self.one(key).split(",") if name]

    def with_tokens(self, text: str) -> str:
        """Return the text with its tokens expanded."""
        return re.sub(r"%(.)", lambda token: self._tokens.get(token[1], token[0]), text)

    def file(self, name: str) -> str:
        """Return the name of a file with its tokens, its variables and a leading ~ expanded."""
        return _home(re.sub(r"\$\{(\w+)\}", lambda name: os.environ.get(name[1], ""), self.with_tokens(name)))

    def files(self, key: str) -> tuple[str, ...]:
        """Return the files that an option names, one a value."""
        return tuple(self.file(name) for name in self.all(key) if name != "none")

    def known_hosts(self, key: str) -> tuple[str, ...]:
        """Return the known_hosts files that an option names, any number in each value."""
        # `ssh -G` has expanded the tokens in these: %%h is by now a file whose name is %h.
        named = [name for value in self.all(key) for name in _split_names(value)]
        return tuple(_home(name) for name in named if name != "none")

    def ssh_agent(self) -> str | None:
        """Return the ssh-agent's socket."""
        agent = self.one("identityagent", "SSH_AUTH_SOCK")
        if agent == "SSH_AUTH_SOCK":
            agent = os.environ.get("SSH_AUTH_SOCK", "none")
        elif agent.startswith("$") and not agent.startswith("${"):
            agent = os.environ.get(agent[1:], "none")
        return None if agent == "none" or not agent else self.file(agent)


def resolve(to: Destination, file: str | None = None) -> Config:
    """Return how to reach a host, by the user's ssh configuration or by another file.

    Raises `NodeStartError` if `ssh -G` does not print a configuration.
    """
    user, port = (["-l", to.user] if to.user else []), (["-p", str(to.port)] if to.port else [])
    other_file = [] if file is None else ["-F", file]
    printed = _read_options(*other_file, *user, *port, "--", to.host)
    with _reading_defaults:
        defaults = _defaults()
    return _config(_Options(to, printed), {key for key in printed if printed[key] != defaults.get(key)}, other_file)


def _config(options: _Options, changed: set[str], other_file: list[str]) -> Config:
    """Return the configuration. `changed` are the options that differ from their defaults."""
    one, hostname, port = options.one, options.hostname, options.port
    timeout, methods = one("connecttimeout", "none"), options.algorithms("preferredauthentications")
    proxy_command = one("proxycommand", "none")
    proxy = None if proxy_command == "none" else f"exec {options.with_tokens(proxy_command)}"
    restricted = {"kex": "kexalgorithms", "cipher": "ciphers", "mac": "macs"}
    host_keys, default = (
        options.algorithms("hostkeyalgorithms"),
        _defaults().get("hostkeyalgorithms", [""])[0].split(","),
    )
    unsupported = sorted(key for key in changed if _is_unsupported(key))
    users_files = options.known_hosts("userknownhostsfile")
    return Config(
        hostname=hostname,
        port=port,
        user=options.user,
        key_name=options.alias or (hostname if port == 22 else f"[{hostname}]:{port}"),
        portless=None if options.alias or port == 22 else hostname,
        identity_files=options.files("identityfile"),
        certificates=options.files("certificatefile"),
        ssh_agent=options.ssh_agent(),
        identities_only=one("identitiesonly") == "yes",
        proxy=_jumps(one("proxyjump", "none"), hostname, port, other_file) or proxy,
        known_hosts=users_files + options.known_hosts("globalknownhostsfile"),
        new_keys=next(iter(users_files), None),
        # ssh (9.2) takes the name as it is, without a ~ or tokens.
        revoked=tuple(name for name in options.all("revokedhostkeys") if name != "none"),
        strict=one("stricthostkeychecking", "ask"),
        hashed=one("hashknownhosts") == "yes",
        connect_timeout=float(timeout) if timeout.isdigit() else None,
        algorithms={kind: options.algorithms(key) for kind, key in restricted.items() if key in changed},
        host_key_algorithms=tuple(name for name in host_keys if name in HOST_KEY_ALGORITHMS),
        # As ssh does: a list of the user's own is taken as it is, unless it only adds to the default.
        known_first=host_keys[: len(default)] == default,
        rekey=_rekey_limits(one("rekeylimit")),
        rsa_bits=int(one("requiredrsasize", "0")),
        public_keys=one("pubkeyauthentication") not in ("no", "false") and (not methods or "publickey" in methods),
        unsupported=tuple(unsupported),
        restricting={key: one(key) for key in unsupported if key in RESTRICTING_OPTIONS},
    )


def _rekey_limits(option: str) -> tuple[int, float]:
    """Return RekeyLimit: bytes and seconds, 0 for those that the user leaves to the program."""
    size, _, seconds = option.partition(" ")
    return int(size or 0) or REKEY_BYTES, float(seconds or 0) or REKEY_SECONDS


def _is_unsupported(key: str) -> bool:
    return key not in SUPPORTED_OPTIONS and IRRELEVANT_OPTIONS.fullmatch(key) is None


def warnings_of(config: Config, host: str) -> list[str]:
    """Return a sentence for each option that restricts ssh for this host and is not applied here."""
    sentences = []
    for key, value in config.restricting.items():
        if not _restricts(config, key, value):
            continue
        consequence, remedy = RESTRICTING_OPTIONS[key]
        shown = value if len(value) <= 100 else f"{value[:100]}..."
        sentences.append(
            f"{host}: the ssh configuration sets {key} to {shown!r}, which skyward_lite does not apply: {consequence}. "
            f"Remedy: {remedy}"
        )
    return sentences


def _restricts(config: Config, key: str, value: str) -> bool:
    """Return whether an option of `RESTRICTING_OPTIONS` makes a difference with this value for this host."""
    if key == "pubkeyacceptedalgorithms":
        # Policies of whole systems set it, and usually name all that is used.
        accepted = {HOST_KEY_ALGORITHMS.get(name) for name in value.split(",") if name != "ssh-rsa"}
        read, read_private = public_keys.in_file, public_keys.of_private_file
        files = [read(file) or read_private(file) or read(f"{file}.pub") for file in config.identity_files]
        ours = {key.partition(" ")[0] for key in files if key}
        return not (ours if config.identities_only else _COMMON_TYPES) <= accepted
    if key == "checkhostip" and (config.proxy is not None or _is_address(config.hostname)):
        return False  # ssh does not apply it to such a host either
    return value not in ("no", "none")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def too_short(config: Config, key: str) -> bool:
    """Return whether a public key in one line is an RSA key with fewer bits than RequiredRSASize asks for."""
    read = public_keys.read(key.encode())
    return read is not None and (read.rsa_bits or config.rsa_bits) < config.rsa_bits


def _home(path: str) -> str:
    """Return the path with a leading ~ expanded. As for ssh, the user's home is the one in passwd, not $HOME."""
    home, slash, rest = path.partition("/")
    return pwd.getpwuid(os.getuid()).pw_dir + slash + rest if home == "~" else os.path.expanduser(path)


def _split_names(value: str) -> list[str]:
    """Return the names in a list of files that `ssh -G` does not quote: a name begins with / or ~, and may have spaces.

    Raises `NodeStartError` if a part of a name with spaces is a file: then it is unknown which files ssh reads.
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
    """Return the command that leads over jump hosts: `ssh -W`, which does all that has to do with their keys."""
    if jumps == "none":
        return None
    *before, last = jumps.split(",")
    to = parse(last)
    words = ["exec", "ssh", *options, "-o", "BatchMode=yes", "-W", f"[{hostname}]:{port}"]
    words += ["-l", to.user] if to.user else []
    words += ["-p", str(to.port)] if to.port else []
    words += ["-J", ",".join(before)] if before else []
    return shlex.join([*words, "--", to.host])
