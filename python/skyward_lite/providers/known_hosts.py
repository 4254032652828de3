"""What known_hosts files say of a host, by `ssh-keygen -F`; which key is trusted for it; and where new keys go."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import os
import re
from pathlib import Path

from ..errors import NodeStartError
from . import public_keys
from .openssh import HOST_KEY_ALGORITHMS, Config, run_tool, too_short

_FOUND = re.compile(rb"# Host .* found: line (\d+) ?(CA|REVOKED)?", re.DOTALL)
"""What `ssh-keygen -F` prints before each line that it has found."""

_CUT_NAMES = re.compile(rb"^[ \t]*(?:@[^ \t\n\0]*[ \t]+[^ \t\n\0]+|[^ \t\n\0#@][^ \t\n\0]*)\0", re.MULTILINE)
"""A line whose names, after a marker or without one, are ended by a NUL."""


@dataclasses.dataclass(frozen=True)
class Known:
    """What the known_hosts files say of a host. Keys are in OpenSSH's one-line format."""

    keys: tuple[str, ...]
    portless: tuple[str, ...]
    """Keys known for the host's name without its port. If its server shows another key, the key is new, not changed."""
    revoked: tuple[str, ...]
    authorities: tuple[str, ...]
    """File and line of each certificate authority that is named for the host."""
    others: tuple[str, ...]
    """File and line of each key of an unsupported type. A host with such a key is known, and not new."""
    unreadable: tuple[str, ...]
    """Files that could not be read."""


def known(config: Config) -> Known:
    """Return what is known of the host's key. `ssh-keygen -F` decides about hashed names, wildcards and markers."""
    found = _known_as(config, config.key_name)
    if config.portless is not None and not (found.keys or found.others):
        portless = _known_as(config, config.portless)
        found = dataclasses.replace(found, portless=portless.keys, revoked=found.revoked + portless.revoked)
    return dataclasses.replace(found, revoked=found.revoked + _revoked(config))


def _known_as(config: Config, name: str) -> Known:
    """Return what is known under one of the host's names."""
    keys, revoked, authorities, others, unreadable = [], [], [], [], []
    for file in config.known_hosts:
        if not os.path.lexists(file):
            continue
        if not os.access(file, os.R_OK):
            unreadable.append(file)
            continue
        _refuse_cut_names(file)
        asked = run_tool("ssh-keygen", "-F", name, "-f", file)
        if asked.returncode > 1:
            unreadable.append(file)
        printed = public_keys.lines(asked.stdout)
        # Two lines for each entry: where it was found, and the entry itself, which may look like any other line.
        for header, line in zip(printed[::2], printed[1::2], strict=False):
            found = _FOUND.fullmatch(header)
            if found is None:
                unreadable.append(file)
                break
            marker = found[2]
            # The words of an entry: a marker, which may be absent; the names; the key.
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


def _revoked(config: Config) -> tuple[str, ...]:
    """Return the keys in the files of RevokedHostKeys. Raises `NodeStartError` if a file is unreadable, as ssh does."""
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


@dataclasses.dataclass(frozen=True)
class Trust:
    """Which key a host may show."""

    host_keys: tuple[str, ...]
    accept_new: bool
    """Whether it may show any other key, which is new then."""
    algorithms: tuple[str, ...]
    """What the host's server is asked to prove its key with, the preferred one first."""


def trust(config: Config, known: Known, accept_new: bool) -> Trust:
    """Return which key the host may show, as ssh decides; `accept_new` comes before the ssh configuration.

    Raises `NodeStartError` if no key that the host can show would be trusted.
    """
    # ssh accepts a new key only if it can record it in a file; `accept_new` does without.
    accept_new = accept_new or (config.strict in ("accept-new", "false") and config.new_keys is not None)
    if known.authorities and not (known.keys or known.portless):
        raise NodeStartError(
            f"{config.key_name} is known only by a certificate authority ({', '.join(known.authorities)}), and "
            f"host certificates are not supported: add the host's own key to {config.new_keys or 'a file'}"
        )
    if known.others and not known.keys:
        raise NodeStartError(
            f"{config.key_name} is known only by keys of types that are not supported ({', '.join(known.others)}), "
            f"so it is not trusted: add another key of the host to {config.new_keys or 'a known_hosts file'}"
        )
    if known.unreadable and accept_new and not known.keys:
        raise NodeStartError(
            f"{', '.join(known.unreadable)} cannot be read, so whether the key of {config.key_name} is new is "
            "unknown, and it is not accepted: make the file readable"
        )
    algorithms = _algorithms(config, known)
    # Where any new key is accepted, the host shall show the one that its server prefers.
    candidates = known.keys or (() if accept_new else known.portless)
    good = tuple(key for key in candidates if not too_short(config, key))
    types = {HOST_KEY_ALGORITHMS[name] for name in algorithms}
    asked_for = {key for key in candidates if key.partition(" ")[0] in types}
    if asked_for and not asked_for & set(good):
        raise short_key(config)
    return Trust(good, accept_new and not known.keys, algorithms)


def short_key(config: Config) -> NodeStartError:
    """Return the error for a host whose RSA key is too short."""
    return NodeStartError(
        f"the RSA key of {config.key_name} has fewer bits than the ssh configuration asks for "
        f"(RequiredRSASize {config.rsa_bits}): the host must get a longer key, or one of another type"
    )


def _algorithms(config: Config, known: Known) -> tuple[str, ...]:
    """Return the algorithms to ask the host's key for, as ssh does. Raises `NodeStartError` if none is left."""
    types = {key.partition(" ")[0] for key in known.keys}
    names = tuple(
        name
        for name in config.host_key_algorithms
        if not types or not config.known_first or HOST_KEY_ALGORITHMS[name] in types
    )
    if not names:
        raise NodeStartError(
            f"HostKeyAlgorithms in the ssh configuration allows no key of {config.key_name} that is known "
            f"({', '.join(sorted(types)) or 'none'}) and supported: add its type to HostKeyAlgorithms"
        )
    return names


def record(config: Config, key: str) -> str:
    """Append a new key to the user's first known_hosts file, as ssh does. Return the file's name. Raises `OSError`."""
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
        # A last line without its end would become one line with ours.
        end = "\n" if size and os.pread(fd, 1, size - 1) != b"\n" else ""
        opened.write(os.fsencode(f"{end}{name} {' '.join(key.split()[:2])}\n"))
    return str(file)
