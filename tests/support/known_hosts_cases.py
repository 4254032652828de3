"""Generated known_hosts files and ssh configurations: what we trust must be what `ssh` trusts.

A case is some files and the name of a host. We connect to that host, which is a real `sshd` behind a proxy command, so
that it can have any name and port; then `ssh` does. A host key that we accept and ssh does not is a failure. One that
ssh accepts and we do not is counted, and a failure too unless it has one of the reasons in `STRICTER`.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import getpass
import hashlib
import hmac
import os
import random
import re
import shutil
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import skyward_lite as sky
from lab import SSHD, keygen
from skyward_lite import SSH, Image, _core
from skyward_lite.providers import Machine, NodeRequest
from skyward_lite.providers.ssh import SSHMachine

KINDS = {"ed25519": "ssh-ed25519", "ecdsa": "ecdsa-sha2-nistp256", "rsa": "ssh-rsa"}
SERVERS = {"ed25519": ("ed25519",), "ecdsa": ("ecdsa",), "rsa": ("rsa",), "all": tuple(KINDS)}
"""Hosts, by the keys that they have. One more, "certified", has all keys and a certificate for node.example."""

STRICTER = {
    "a certificate authority": (r"known only by a certificate authority", b"@CERT-AUTHORITY"),
    "a revocation list (KRL)": (r"key revocation list", b"SSHKRL"),
    "StrictHostKeyChecking no accepts a changed key": (r"`ssh-keygen -R ", b"STRICTHOSTKEYCHECKING.*(NO|OFF)"),
    "StrictHostKeyChecking no accepts a revoked key": (r", which is revoked", b"STRICTHOSTKEYCHECKING.*(NO|OFF)"),
    "accept-new accepts at a port what is revoked for the host": (r", which is revoked", b"ACCEPT-NEW"),
    "a key of a type that is not supported": (r"types that are (not )?supported", b"SSH-DSS|CERT-V01"),
    "a NUL after the names of a line": (r"has a NUL after its names", b"\0"),
    "public keys are off": (r"turns public keys off", b"(PUBKEY|PREFERRED)AUTHENTICATION"),
    "an algorithm that is not supported": (r"that the ssh configuration allows is supported", b"CIPHERS|MACS|KEX"),
    "HostKeyAlgorithms removes some": (r"HostKeyAlgorithms decides|, which is revoked", b"HOSTKEYALGORITHMS.*-"),
    "names of files that can be split in several ways": (r"in more than one way", b"@DIR@/(A B|SOME WORDS)"),
}
"""Why we refuse what ssh accepts: a reason, what our error says then, and what is in the case in capitals."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison. In `config` and `files`, @DIR@ stands for the case's directory."""

    what: str
    server: str
    config: bytes
    files: dict[str, bytes]
    name: str = "node.example"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a host was trusted: with which key, or why not."""

    key: str | None
    """The fingerprint."""
    output: str
    files: dict[str, bytes]
    """What the case's files are afterwards."""


class Bench:
    """Host keys, certificates and servers that all cases share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.core = _core.Core(1, 1 << 30)
        self.user = keygen(directory / "user")
        self.own: dict[str, bytes] = {}
        self.foreign: dict[str, bytes] = {}
        for kind in KINDS:
            self.own[kind] = _public(keygen(directory / f"own_{kind}", kind))
            self.foreign[kind] = _public(keygen(directory / f"foreign_{kind}", kind))
        authority = keygen(directory / "authority")
        self.authority = _public(authority)
        self.certificates: dict[str, bytes] = {}
        for kind in KINDS:
            public = directory / f"own_{kind}.pub"
            sign = ["ssh-keygen", "-q", "-s", authority, "-I", "host", "-h", "-n", "node.example", public]
            subprocess.run(sign, check=True, capture_output=True)
            self.certificates[kind] = b" ".join((directory / f"own_{kind}-cert.pub").read_bytes().split()[:2])
        self.foreign["p384"] = _public(keygen(directory / "p384", "ecdsa-sha2-nistp384"))
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for server, kinds in SERVERS.items():
            lines = [
                *(f"HostKey {directory}/own_{kind}" for kind in kinds),
                f"AuthorizedKeysFile {self.user}.pub",
                *("StrictModes no", "UsePAM no", "PasswordAuthentication no", "KbdInteractiveAuthentication no"),
                # The post-quantum exchange that OpenSSH prefers is several times slower.
                *("PermitRootLogin yes", "LogLevel QUIET", "KexAlgorithms curve25519-sha256", "PidFile none"),
            ]
            (directory / f"sshd_{server}").write_text("\n".join(lines) + "\n")
        lines.insert(0, f"HostCertificate {directory}/own_ed25519-cert.pub")
        (directory / "sshd_certified").write_text("\n".join(lines) + "\n")
        krl = ["ssh-keygen", "-q", "-k", "-f", directory / "krl", directory / "foreign_ed25519.pub"]
        subprocess.run(krl, check=True, capture_output=True)
        self.krl = (directory / "krl").read_bytes()
        self.numbers = iter(range(1 << 30))

    def close(self) -> None:
        """Let go of what connects."""
        self.core.close()

    def run(self, case: Case) -> tuple[Verdict, Verdict]:
        """Put a case to us and to ssh: both verdicts."""
        directory = self.directory / f"case{next(self.numbers)}"
        directory.mkdir()

        def filled(data: bytes) -> bytes:
            return data.replace(b"@DIR@", os.fsencode(directory))

        def write() -> None:
            for name, data in case.files.items():
                path = Path(os.fsdecode(directory / name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(filled(data))

        def read() -> dict[str, bytes]:
            return {name: (directory / name).read_bytes() for name in case.files}

        end = [
            *("Match all", f"User {getpass.getuser()}", f"IdentityFile {self.user}", "IdentityAgent none"),
            *("IdentitiesOnly yes", "GlobalKnownHostsFile none", f"UserKnownHostsFile {directory}/known_hosts"),
            f"ProxyCommand {SSHD} -i -f {self.directory}/sshd_{case.server}",
        ]
        config = directory / "config"
        config.write_bytes(filled(case.config) + b"\n" + "\n".join(end).encode() + b"\n")
        write()
        ours = self._ours(case, config)
        ours = dataclasses.replace(ours, files=read())
        write()
        theirs = self._theirs(case, config)
        if ours.key and theirs.key and ours.key != theirs.key:
            # Of several keys ssh and we may like different ones: ssh must trust ours as well.
            kind = next(k for k, key in self.own.items() if fingerprint(key) == ours.key)
            write()
            names = {"rsa": "rsa-sha2-512,rsa-sha2-256"}
            theirs = self._theirs(case, config, f"HostKeyAlgorithms={names.get(kind, KINDS[kind])}")
        theirs = dataclasses.replace(theirs, files=read())
        shutil.rmtree(directory)
        return ours, theirs

    def _ours(self, case: Case, config: Path) -> Verdict:
        provider = SSH(case.name, config=str(config))
        machines: list[Machine] = []
        provider.start(NodeRequest(1, 1, Image(), None, None, 20.0), machines)
        (one,) = machines
        assert isinstance(one, SSHMachine)
        try:
            shown = one.connect(self.core).host_key
        except sky.NodeStartError as error:
            return Verdict(None, str(error), {})
        finally:
            provider.stop(machines, 5.0)
        return Verdict(fingerprint(shown.encode()), "", {})

    def _theirs(self, case: Case, config: Path, *options: str) -> Verdict:
        # To prove who we are is no part of it.
        set_here = ["BatchMode=yes", "UpdateHostKeys=no", "PubkeyAuthentication=no", "FingerprintHash=sha256"]
        set_here += options
        command = ["ssh", "-v", "-F", config, *(w for o in set_here for w in ("-o", o)), "--", case.name, "true"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        output = done.stderr.decode(errors="replace")
        shown = re.findall(r"Server host (?:key|certificate): \S+ (SHA256:\S+)", output)
        return Verdict(shown[-1] if shown and "Permission denied (" in output else None, output, {})


def _public(path: Path) -> bytes:
    return b" ".join(Path(f"{path}.pub").read_bytes().split()[:2])


def fingerprint(key: bytes) -> str:
    """Return the fingerprint of a public key in one line, as ssh prints it."""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def hashed(name: bytes, salt: bytes = b"12345678901234567890") -> bytes:
    """Return a name as `HashKnownHosts` writes it."""
    digest = hmac.new(salt, name, hashlib.sha1).digest()
    return b"|1|" + base64.b64encode(salt) + b"|" + base64.b64encode(digest)


def judge(case: Case, ours: Verdict, theirs: Verdict) -> tuple[str, str]:
    """Compare two verdicts: what is wrong, or nothing; and why we were stricter, if we were."""
    if ours.key and not theirs.key:
        last = [line for line in theirs.output.splitlines() if not line.startswith("debug")][-3:]
        return f"{case.what}: we accept {ours.key} and ssh does not ({last}): {show(case)}", ""
    # A salt is new each time; and ssh (9.2) spoils a last line that has no end.
    comparable = all(data[-1:] in (b"", b"\n") for data in case.files.values()) and b"HASH" not in case.config.upper()
    if ours.key == theirs.key and ours.files != theirs.files and comparable:
        return f"{case.what}: other files afterwards, {ours.files} and {theirs.files}: {show(case)}", ""
    if not theirs.key or ours.key:
        return "", ""
    text = b"\n".join([case.config, *case.files.values()]).upper()
    reasons = [
        why for why, (output, has) in STRICTER.items() if re.search(output, ours.output) and re.search(has, text)
    ]
    reason = next(iter(reasons), "")
    return ("", reason) if reason else (f"{case.what}: ssh accepts, and we print {ours.output!r}: {show(case)}", "")


def show(case: Case) -> str:
    """Return a case so that it can be read, and made again."""
    files = "; ".join(f"{name}: {data!r}" for name, data in case.files.items())
    return f"host {case.name} (keys: {case.server}), config {case.config!r}; {files}"


# ------------------------------------------------------------------------------------------------ cases with a name

SEPARATORS = [
    b"\f",
    b"\v",
    b"\r",
    b"\x1c",
    b"\x1d",
    b"\x1e",
    b"\x85",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xe2\x80\xa9",
    b"\0",
]
"""What is a line end for Python's text functions, and is none for OpenSSH."""


def named(bench: Bench) -> Iterator[Case]:
    """Yield cases that went wrong once, and their neighbours."""
    good, bad = bench.own["ed25519"], bench.foreign["ed25519"]
    host = b"node.example "
    for end in SEPARATORS:
        # The host's line hides in another one, which is another host's or has another key.
        hidden = end + host + good
        yield Case(f"comment with {end!r}", "ed25519", b"", {"known_hosts": host + bad + b" a" + hidden + b"\n"})
        yield Case(f"comment line with {end!r}", "ed25519", b"", {"known_hosts": b"# a" + hidden + b"\n"})
        yield Case(f"{end!r} after a key", "ed25519", b"", {"known_hosts": host + bad + hidden + b"\n"})
        yield Case(f"{end!r} for a space", "ed25519", b"", {"known_hosts": host[:-1] + end + good + b"\n"})
        revoked = (
            b"@revoked * " + good.replace(b" ", b" " + end.replace(b"\0", b"\f")) + end + b"\n" + host + good + b"\n"
        )
        yield Case(f"revoked with {end!r}", "ed25519", b"", {"known_hosts": revoked})
        for marker, key in ((b"", bad), (b"@revoked ", good)):
            lines = marker + host[:-1] + end + key + b"\n" + (host + good + b"\n" if marker else b"")
            yield Case(f"new with {end!r}", "ed25519", b"StrictHostKeyChecking accept-new\n", {"known_hosts": lines})
        lists = {"known_hosts": host + good + b"\n", "revoked": bad + b" c" + end + good + b"\n"}
        yield Case(f"RevokedHostKeys with {end!r}", "ed25519", b"RevokedHostKeys @DIR@/revoked", lists)
        value = b"UserKnownHostsFile @DIR@/none" + end + b"userknownhostsfile @DIR@/known_hosts\n"
        yield Case(f"configuration with {end!r}", "ed25519", value, {"known_hosts": host + good + b"\n"})
        alias = b"HostKeyAlias other" + end + b"hostkeyalias node.example\n"
        yield Case(f"alias with {end!r}", "ed25519", alias, {"known_hosts": host + good + b"\n"})
    new = b"StrictHostKeyChecking accept-new\n"
    authority = b"@cert-authority * " + bench.authority + b"\n"
    yield Case("an authority", "certified", b"", {"known_hosts": authority})
    yield Case("an authority and a key", "certified", b"", {"known_hosts": authority + host + good + b"\n"})
    yield Case("an unknown authority", "certified", b"", {"known_hosts": host + good + b"\n"})
    yield Case("an authority, no certificate", "all", b"", {"known_hosts": authority})
    yield Case("an authority, new", "all", new, {"known_hosts": authority})
    both = {"known_hosts": host + good + b"\n", "r": bench.krl}
    yield Case("a revocation list", "ed25519", b"RevokedHostKeys @DIR@/r", both)
    yield Case("another type is known, new", "rsa", new, {"known_hosts": host + good + b"\n"})
    for names in (b"#,node.example", b"*", b"\t node.example", b"#"):
        line = b"@revoked " + names + b"\0" + good + b"\n" + host + good + b"\n"
        yield Case("revoked behind a NUL", "ed25519", b"", {"known_hosts": line})
        yield Case("commented behind a NUL", "ed25519", b"", {"known_hosts": b"# " + line})
    yield Case("CRLF", "ed25519", b"", {"known_hosts": host + good + b"\r\n"})
    yield Case("CRLF after a comment", "ed25519", b"", {"known_hosts": host + good + b" me\r\n"})
    yield Case("no line end", "ed25519", b"", {"known_hosts": host + good})
    yield Case("nothing", "ed25519", b"", {"known_hosts": b""})
    yield Case("new", "ed25519", new, {"known_hosts": b"other " + bad})
    dss = base64.b64encode(_fields(b"ssh-dss", b"\1" * 128, b"\1" * 20, b"\1" * 128, b"\1" * 128))
    for line in (b"ssh-dss " + dss, b"ssh-dss AAAA", bench.certificates["ed25519"], b"ssh-nonsense AAAA"):
        # A host that is known by what we cannot use is not new.
        yield Case("another type, new", "ed25519", new, {"known_hosts": host + line + b"\n"})
        port = b"Port 2222\n"
        both = b"[node.example]:2222 " + line + b"\n" + host + good + b"\n"
        yield Case("another type at this port", "ed25519", port, {"known_hosts": both})
        yield Case("another type, new port", "ed25519", port + new, {"known_hosts": both})
    for alias in (b"[node.example]:2222", b"node.example"):
        # Only without an alias is the name without the port looked for too.
        lines = port + b"HostKeyAlias " + alias + b"\n"
        yield Case("an alias with the port", "ed25519", lines, {"known_hosts": host + good + b"\n"})
    for line in (bench.certificates["ed25519"], b"ssh-ed25519 " + bench.certificates["ed25519"].split()[1]):
        yield Case(
            "a revoked certificate", "ed25519", b"", {"known_hosts": b"@revoked * " + line + b"\n" + host + good}
        )
    name, number, modulus = _unpacked(bench.own["rsa"])
    for name, fields in {
        b"rsa-sha2-512": (b"ssh-rsa", number, modulus),
        b"ssh-rsa": (b"ssh-rsa", number, b"\0\0" + modulus),
        b"rsa-sha2-256": (b"ssh-rsa", b"\0" + number, modulus),
    }.items():
        line = name + b" " + base64.b64encode(_fields(*fields)) + b"\n"
        right = host + bench.own["rsa"] + b"\n"
        yield Case(f"revoked as {name!r}", "rsa", b"", {"known_hosts": b"@revoked * " + line + right})
        yield Case(f"RSA as {name!r}", "rsa", b"", {"known_hosts": host + line})
        yield Case(f"in a file as {name!r}", "rsa", b"RevokedHostKeys @DIR@/r", {"r": line, "known_hosts": right})
    name, curve, point = _unpacked(bench.own["ecdsa"])
    off = name + b" " + base64.b64encode(_fields(name, curve, point[:-1] + bytes([point[-1] ^ 1])))
    small = name + b" " + base64.b64encode(_fields(name, curve, b"\4" + b"\0" * 63 + b"\1"))
    short = b"ssh-dss " + base64.b64encode(_fields(b"ssh-dss", b"\1"))
    for line in (off, small, short, b"ssh-dss " + dss, bench.certificates["ed25519"]):
        files = {"known_hosts": host + good + b"\n", "r": line + b"\n"}
        yield Case("RevokedHostKeys with no key", "ed25519", b"RevokedHostKeys @DIR@/r", files)
        yield Case("known with no key", "ecdsa", new, {"known_hosts": host + line + b"\n"})
    for text in (b"nonsense\n", b"\r\n", b"ssh-ed25519 AAAA\n", b" \t\n# a\n\n", b"\0x\n", b"\x0c\n", bad + b"\r\n"):
        files = {"known_hosts": host + good + b"\n", "r": text}
        yield Case("broken RevokedHostKeys", "ed25519", b"RevokedHostKeys @DIR@/r", files)
    for value in (b"@DIR@/%h", b"@DIR@/%%h", b"@DIR@/%n", b'"@DIR@/a b"', b"@DIR@/a b", b"@DIR@/x @DIR@/%h"):
        files = {"node.example": host + bad, "%h": host + good, "%%h": host + good, "a b": host + good, "a": host + bad}
        for option in (b"UserKnownHostsFile", b"GlobalKnownHostsFile"):
            yield Case(f"{option.decode()} {value!r}", "ed25519", option + b" " + value, files)
        files = {"node.example": bad, "%h": bad, "a b": bad, "known_hosts": host + good}
        yield Case(f"RevokedHostKeys {value!r}", "ed25519", b"RevokedHostKeys " + value, files)
        yield Case(
            f"no RevokedHostKeys {value!r}", "ed25519", b"RevokedHostKeys " + value, {"known_hosts": host + good}
        )
    for value, files in {
        b'"@DIR@/a b"': ["a"],
        b'"@DIR@/a b" "@DIR@/c d"': ["c"],
        b'"@DIR@/a b/known_hosts" "@DIR@/a b/known_hosts2"': ["a b/known_hosts2"],
        b'"@DIR@/a  b c"': ["a  b"],
    }.items():
        # A file that is missing is not a part of its name.
        yield Case(f"missing {value!r}", "ed25519", b"UserKnownHostsFile " + value, dict.fromkeys(files, host + good))


def _fields(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def _unpacked(key: bytes) -> list[bytes]:
    data, fields = base64.b64decode(key.split()[1]), []
    while data:
        length = 4 + int.from_bytes(data[:4], "big")
        fields.append(data[4:length])
        data = data[length:]
    return fields


# ------------------------------------------------------------------------------------------------ generated cases

BLANKS = [b" "] * 8 + [b"\t", b"  ", b" \t", b"\f", b"\v", b"\x85", b"\r", b"\xa0"]
ENDS = [b"\n"] * 12 + [b"\r\n", b" \n", b"\n\n", b"\r", b"\f\n", b"\v\n", b"\0\n", b"\x1e", b"\xe2\x80\xa8", b""]


class Maker:
    """Makes cases from a seed."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench = bench
        self.rng = random.Random(seed)
        self.seed = seed

    def case(self) -> Case:
        """Return a case."""
        rng = self.rng
        server = rng.choice(list(SERVERS))
        name = rng.choice(["node.example"] * 5 + ["NODE.example", "node", "10.0.0.9", "fe80::1"])
        config, key_names, files = self.config(name)
        content = {file: self.known_hosts(server, key_names) for file in files}
        if rng.random() < 0.15:
            config = b"RevokedHostKeys @DIR@/revoked\n" + config
            content["revoked"] = self.revoked(server)
        if b"Include" in config:
            content["included"] = rng.choice([b"", b"HostKeyAlias alias\r\n", b"Port=2222\n", b"Host other\nPort 1\n"])
        return Case(f"seed {self.seed}", server, config, content, name)

    # ---- configurations

    def config(self, name: str) -> tuple[bytes, list[bytes], list[str]]:
        """Return a configuration, names by which the host's key may be known with it, and the files that it names."""
        rng = self.rng
        lines: list[bytes] = []
        names = [name.encode().lower()]
        files = ["known_hosts"]

        def some(chance: float) -> bool:
            return rng.random() < chance

        if some(0.3):
            lines.append(self.option(b"Port", rng.choice([b"22", b"2222"])))
        if some(0.2):
            lines.append(self.option(b"HostName", rng.choice([b"real.example", b"%h.x", b"REAL.example", b"10.0.0.7"])))
            names += [b"real.example", name.encode().lower() + b".x", b"10.0.0.7"]
        if some(0.2):
            lines.append(
                self.option(
                    b"HostKeyAlias", rng.choice([b"alias", b"ALIAS", b"al-ias.x", b"node.example", b"[alias]:2222"])
                )
            )
            names += [b"alias", b"al-ias.x"]
        if some(0.5):
            values = [b"accept-new"] * 4 + [b"yes", b"no", b"ask", b"off"]
            lines.append(self.option(b"StrictHostKeyChecking", rng.choice(values)))
        if some(0.1):
            lines.append(self.option(b"HashKnownHosts", b"yes"))
        if some(0.25):
            restricted = [
                *(
                    (b"HostKeyAlgorithms", value)
                    for value in (b"ssh-ed25519", b"rsa-sha2-256,ssh-ed25519", b"+ssh-rsa")
                ),
                *(
                    (b"HostKeyAlgorithms", value)
                    for value in (b"-ssh-ed25519*", b"^rsa-sha2-512", b"ssh-rsa", b"*ecdsa*")
                ),
                *((b"Ciphers", value) for value in (b"aes128-ctr", b"-aes*", b"aes128-gcm@openssh.com", b"nonsense")),
                *((b"MACs", value) for value in (b"hmac-sha2-256", b"umac-64@openssh.com", b"-hmac-sha1")),
                *((b"KexAlgorithms", value) for value in (b"curve25519-sha256", b"-ecdh*", b"ecdh-sha2-nistp256")),
                *((b"RequiredRSASize", value) for value in (b"2048", b"4096")),
                *((b"PubkeyAuthentication", value) for value in (b"yes", b"no")),
                (b"PreferredAuthentications", b"password,publickey"),
                *((b"CheckHostIP", b"yes"), (b"VerifyHostKeyDNS", b"yes"), (b"FingerprintHash", b"md5")),
            ]
            lines.append(self.option(*rng.choice(restricted)))
        if some(0.3):
            option = rng.choice([b"UserKnownHostsFile", b"GlobalKnownHostsFile"])
            more = {
                b"@DIR@/two @DIR@/known_hosts": ["two"],
                b'"@DIR@/two words" @DIR@/known_hosts': ["two words"],
                b'"@DIR@/other words" "@DIR@/more words"': [],
                b'"@DIR@/some words"  "@DIR@/more words"': ["some"],
                b"@DIR@/%h @DIR@/known_hosts": ["node.example", "%h"],
                b"@DIR@/%%h @DIR@/known_hosts": ["%h", "%%h"],
                b"@DIR@/k-%k": ["k-alias", "k-node.example", "k-%k"],
                b"@DIR@/missing": [],
                b"none": [],
                b"/dev/null": [],
                b"@DIR@": [],
                b"@DIR@/b\xfcro\xff": ["b\udcfcro\udcff"],
                b"@DIR@/a'b": ["a'b"],
            }
            value = rng.choice(list(more))
            lines.append(self.option(option, value, quote=False))
            files += more[value]
        rng.shuffle(lines)
        if some(0.4) and lines:
            block = rng.choice(
                [
                    *(b"Host *", b"Host " + name.encode(), b"Host node* !nodeless", b"Host !node* *", b"Host other\f"),
                    *(b"Match host node*", b"Match originalhost node*", b"Match exec true", b"Match exec false"),
                    *(b"Match all", b'Host "node.example"', b"HOST=node.example", b"Match user nobody", b"Host *\v"),
                ]
            )
            lines.insert(rng.randrange(len(lines)), block)
        if some(0.1):
            lines.insert(0, b"Include @DIR@/included")
        if some(0.2):
            lines.insert(rng.randrange(len(lines) + 1), b"# " + self.junk())
        ends = [rng.choice([b"\n"] * 10 + [b"\r\n", b" \n", b"\f\n", b"\t\r\n"]) for _ in lines]
        return b"".join(line + end for line, end in zip(lines, ends, strict=True)), names, files

    def option(self, key: bytes, value: bytes, *, quote: bool = True) -> bytes:
        """Return a line that sets an option, spelled in one of many ways."""
        rng = self.rng
        key = rng.choice([key, key.lower(), key.upper()])
        if quote and rng.random() < 0.2:
            value = b'"' + value + b'"'
        blank = rng.choice([b" "] * 6 + [b"=", b" = ", b"\t", b"  "])
        lead = rng.choice([b""] * 4 + [b"  ", b"\t"])
        trail = rng.choice([b""] * 12 + [b"\f", b"\v", b" # comment", b"\x0bPort 1", b"\rPort 1"])
        if value in (b"none", b"/dev/null"):
            trail = b""  # or new keys would be recorded in files outside of the case's directory
        return lead + key + blank + value + trail

    # ---- known_hosts files

    def known_hosts(self, server: str, names: list[bytes]) -> bytes:
        """Return a known_hosts file."""
        return b"".join(self.line(server, names) for _ in range(self.rng.choice([0, 1, 1, 2, 2, 3, 5])))

    def line(self, server: str, names: list[bytes]) -> bytes:
        """Return a line of a known_hosts file, more or less whole."""
        rng = self.rng
        kind = rng.random()
        end = rng.choice(ENDS)
        if kind < 0.06:
            return (
                rng.choice([b"#", b" #", b"\t# "])
                + self.junk()
                + rng.choice(SEPARATORS)
                + self.entry(server, names)
                + end
            )
        if kind < 0.1:
            return rng.choice([b"", b" ", b"\t", b"\f", b"\0", self.junk(), b"x" * 70_000]) + end
        return self.entry(server, names) + end

    def entry(self, server: str, names: list[bytes]) -> bytes:
        """Return names and a key."""
        rng = self.rng
        marker = b""
        if rng.random() < 0.15:
            marker = rng.choice(
                [b"@revoked"] * 6 + [b"@cert-authority", b"@Revoked", b"@", b"@revoked @revoked", b"@x"]
            )
            marker += rng.choice(BLANKS)
        lead = rng.choice([b""] * 8 + [b" ", b"\t", b"\f"])
        comment = b""
        if rng.random() < 0.3:
            comment = rng.choice(BLANKS) + self.junk()
            if rng.random() < 0.4:
                comment += rng.choice(SEPARATORS) + self.name(names) + b" " + rng.choice(list(self.bench.own.values()))
        return lead + marker + self.name(names) + rng.choice(BLANKS) + self.key(server) + comment

    def name(self, names: list[bytes]) -> bytes:
        """Return the names of a line."""
        rng = self.rng
        name = rng.choice(names)
        place = b"[" + name + b"]:2222"
        at = rng.choice([name, name, place])
        return rng.choice(
            [
                *([at] * 8),
                *(at.upper(), b"*", b"node*", b"[*]:2222", b"[node*]:*", b"n?de.example", b"other"),
                *(b"other," + at, at + b",other", b"*,!" + at, b"!" + at + b",*", b"!" + at, b"*,!other", b"," + at),
                *(hashed(at), hashed(at), hashed(at.upper()), hashed(at)[:-2], hashed(at) + b"," + at, b"|1|" + at),
                *(
                    at + b",10.0.0.9",
                    b"[" + name + b"]",
                    b"[" + name + b"]:22",
                    name + b":2222",
                    b"\xff" + at,
                    b"a\rb," + at,
                ),
            ]
        )

    def key(self, server: str) -> bytes:
        """Return a key: usually a right one of the server's, sometimes another or a broken one."""
        rng = self.rng
        kind = rng.choice(SERVERS[server])
        key = self.bench.own[kind]
        chance = rng.random()
        if chance < 0.6:
            return key
        if chance < 0.7:
            return rng.choice(list(self.bench.own.values()))
        if chance < 0.8:
            return rng.choice(list(self.bench.foreign.values()))
        return self.broken(key, kind)

    def broken(self, key: bytes, kind: str) -> bytes:
        """Return something like a key, which may still be one."""
        rng = self.rng
        name, blob = key.split()
        raw = base64.b64decode(blob)
        at = rng.randrange(4, len(blob))
        return rng.choice(
            [
                *(
                    name + b" " + blob[:at],
                    name + b" " + blob[:at] + rng.choice(SEPARATORS) + blob[at:],
                    name,
                    blob,
                    b"",
                ),
                *(
                    name + b" " + blob + b"A",
                    name + b" " + blob.rstrip(b"="),
                    name + b" " + blob + b"=",
                    name.upper() + b" " + blob,
                ),
                name + b" " + base64.b64encode(raw + b"\0"),
                name + b" " + base64.b64encode(raw[:-1]),
                name + b" " + base64.b64encode(raw[:-1] + bytes([raw[-1] ^ 1])),
                *(
                    n + b" " + blob
                    for n in (b"ssh-dss", b"rsa-sha2-512", b"ssh-ed25519", b"ssh-rsa", b"ED25519", b"1024", b"x")
                ),
                *(name + rng.choice(BLANKS) + blob, name + b" #" + blob, b"# " + key, name + b"  \t " + blob),
                self.bench.certificates[kind],
                self.bench.authority,
                b"x" * rng.choice([10, 5000]) + b" " + key,
            ]
        )

    def junk(self) -> bytes:
        """Return a comment in any encoding."""
        rng = self.rng
        return rng.choice(
            [
                b"me@home",
                b"b\xfcro",
                "büro \u2028".encode(),
                b"a b\tc",
                bytes(rng.randbytes(8)).replace(b"\n", b""),
                b'"',
                b"'",
            ]
        )

    def revoked(self, server: str) -> bytes:
        """Return a file for RevokedHostKeys."""
        rng = self.rng
        count = rng.choice([0, 1, 1, 2])
        made = [
            rng.choice([b"", b" ", b"\t"]) + self.key(server) + rng.choice([b"", b" me", b" a\r", b"\f"])
            for _ in range(count)
        ]
        return b"".join(line + rng.choice([b"\n"] * 6 + [b"\r\n", b"\n\n", b"\n# a\n"]) for line in made)


def compare(
    directory: Path, chosen: Callable[[Bench], list[Case]], threads: int = 1
) -> tuple[list[str], Counter[str], int]:
    """Run cases: what went wrong, how often we were stricter for which reason, and how often both accept."""
    bench = Bench(directory)
    failures, stricter, accepted = [], Counter[str](), 0
    with contextlib.closing(bench), concurrent.futures.ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = chosen(bench)
        for case, (ours, theirs) in zip(cases, pool.map(bench.run, cases), strict=True):
            wrong, reason = judge(case, ours, theirs)
            failures += [wrong] if wrong else []
            stricter.update([reason] if reason else [])
            accepted += bool(ours.key and theirs.key)
    return failures, stricter, accepted


def generated(count: int, seed: int) -> Callable[[Bench], list[Case]]:
    """Return a function that makes `count` cases for a bench."""
    return lambda bench: [Maker(bench, seed + number).case() for number in range(count)]
