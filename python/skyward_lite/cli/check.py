"""What `python -m skyward_lite check` does: each host is asked, step by step, what a pool would need of it.

resolve → reach → host key → authentication → shell → system → python → cache → package → environment → size → speed

The steps go the way of `providers/ssh.py`, with its own code and messages, and stop where that would. Nothing is built:
all that is left behind is the cache directory, and with `--accept-new` a line of known_hosts.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import platform
import shlex
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from .. import _core, credentials, plugins
from .._version import PYTHON, __version__
from ..environment import build as bootstrap
from ..errors import NodeStartError
from ..image import Image, installed
from ..providers import NodeRequest
from ..providers import ssh as provider_ssh
from ..providers.openssh import Config, known, parse, resolve, warnings_of
from ..providers.ssh import SSH, SSHMachine

T = TypeVar("T")

AT_ONCE = 32
"""Hosts that are checked at once."""
CONNECT_SECONDS = 20.0
POLL_SECONDS = 0.1
"""Bound on one wait for a report, so that Ctrl-C is heard."""
COMMAND_SECONDS = 30.0
"""Bound on one command; what is slower than that cannot be worked with."""
ROUNDS = 5
"""Empty commands whose median is a command's round trip."""
SIZES = (1 << 20, 4 << 20, 16 << 20)
"""Bytes sent each way, growing until they take LONG seconds."""
LONG = 0.5
SPEED_SECONDS = 15.0
"""Bound on measuring the round trip, and on measuring each way: other hosts wait for their turn."""
PACKAGES = ("skyward_lite", "cloudpickle", "joblib")
FEW_FILES = 1024

DETAILS = r"""
echo '@MARK@'
echo "shell=${SHELL:-unknown}"
echo "cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null)"
echo "memory=$(awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo 2>/dev/null)"
echo "available=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo 2>/dev/null)"
echo "group_memory=$(cat /sys/fs/cgroup/memory.max 2>/dev/null)"
echo "load=$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null)"
echo "release=$(. /etc/os-release 2>/dev/null; echo "${PRETTY_NAME:-$(uname -sr)}")"
echo "files=$(ulimit -n 2>/dev/null)"
echo "processes=$(ulimit -u 2>/dev/null || ulimit -p 2>/dev/null)"
"""

VERSIONS = r"""
echo '@MARK@'
exec @PYTHON@ @HOW@ - <<'PYTHON_ENDS_HERE'
from importlib import metadata
for name in @NAMES@:
    try:
        print(name + "=" + metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
PYTHON_ENDS_HERE
"""


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of what is said of a host. `fail` means that a pool could not use it, `note` that it could."""

    step: str
    status: Literal["ok", "note", "fail"]
    text: str
    fix: str = ""
    figures: dict[str, float | str | None] = dataclasses.field(default_factory=dict)
    """For programs; the unit is in the name."""


@dataclasses.dataclass
class Report:
    """What was found of a host."""

    host: str
    steps: list[Step] = dataclasses.field(default_factory=list)

    @property
    def usable(self) -> bool:
        return all(step.status != "fail" for step in self.steps)

    def ok(self, step: str, text: str, **figures: float | str | None) -> None:
        self.steps.append(Step(step, "ok", _core.printable(text), figures=figures))

    def note(self, step: str, text: str, fix: str = "") -> None:
        self.steps.append(Step(step, "note", _core.printable(text), fix))

    def fail(self, step: str, text: str, fix: str) -> None:
        self.steps.append(Step(step, "fail", _core.printable(text), fix))

    def lines(self) -> str:
        """Give the report for people."""
        lines = [f"{self.host}: {'can be used' if self.usable else 'CANNOT be used'}"]
        for step in self.steps:
            sign = {"ok": "ok  ", "note": "note", "fail": "FAIL"}[step.status]
            lines.append(f"  {sign}  {step.step:<14}  {step.text}".replace("\n", f"\n{'':24}"))
            if step.fix:
                lines.append(f"{'':24}→ {step.fix}")
        return "\n".join(lines)

    def fields(self) -> dict[str, Any]:
        """Give the report for programs."""
        return {"host": self.host, "usable": self.usable, "steps": [dataclasses.asdict(step) for step in self.steps]}


class InspectedHost(SSHMachine):
    """A host whose way is made visible: its socket is opened here, and timed."""

    fd = -1

    def reach(self, config: Config) -> float | None:
        """Open the way to its server: seconds of TCP's handshake, None where a command leads there."""
        if config.proxy is not None:
            self.fd = self._through(config.proxy)
            return None
        reasons = []
        for family, kind, protocol, _, address in socket.getaddrinfo(
            config.hostname, config.port, type=socket.SOCK_STREAM
        ):
            began = time.perf_counter()
            way = socket.socket(family, kind, protocol)
            way.settimeout(config.connect_timeout or self.wanted.connect_timeout)
            try:
                way.connect(address)
            except OSError as error:
                way.close()
                reasons.append(f"{address[0]}: {error}")
                continue
            took = time.perf_counter() - began
            way.settimeout(None)
            self.fd = way.detach()
            return took
        raise ConnectionError("; ".join(reasons))

    def _endpoint(self, config: Config) -> int:
        if self.fd < 0:
            self.reach(config)
        fd, self.fd = self.fd, -1
        return fd

    def end(self, deadline: float) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        super().end(deadline)


class _Check:
    """The steps for one host."""

    def __init__(self, machine: InspectedHost, core: _core.Core, line: threading.Lock) -> None:
        self.machine = machine
        self.core = core
        self.line = line
        """Held while speed is measured: hosts would share this machine's line."""
        self.report = Report(machine.name)

    def run(self) -> Report:
        """Take the steps until one fails that the others need."""
        try:
            self._steps()
        except _core.CoreError as error:
            self.report.fail("connection", str(error), "see the server's log; try again")
        except NodeStartError as error:
            self.report.fail("shell", str(error), f"look at what `ssh {self.machine.name} 'exec sh -s'` does")
        except Exception as error:
            # Whatever one host has answered, the others are to be reported.
            what = f"its answers could not be made sense of: {type(error).__name__}: {error}"
            self.report.fail("check", what, "look at what its login shell prints; this is a fault of `check`, too")
        finally:
            self.machine.end(time.monotonic() + 1.0)
        return self.report

    def _steps(self) -> None:
        config = self._resolve()
        if config is None or not self._reach(config):
            return
        connection = self._connect(config)
        if connection is None:
            return
        details = self._details(connection)
        facts = self._system(connection)
        if self.machine.python is not None:
            python = self._given(connection, self.machine.python)
        else:
            python = self._environment(facts)
        if python is not None:
            self._versions(connection, python)
        self._size(details)
        with self.line:
            self._speed(connection)

    def _resolve(self) -> Config | None:
        name = self.machine.name
        try:
            config = resolve(parse(name), self.machine.config)
        except NodeStartError as error:
            self.report.fail("resolve", str(error), f"`ssh -G {name}` must print a configuration")
            return None
        proxy = None if config.proxy is None else credentials.mask(config.proxy)
        way = f", through `{proxy.removeprefix('exec ')}`" if proxy else ""
        self.report.ok(
            "resolve",
            f"{config.user}@{config.hostname}, port {config.port}{way}",
            hostname=config.hostname,
            port=config.port,
            user=config.user,
            proxy=proxy,
        )
        if config.unheeded:
            self.report.note("resolve", f"ssh's options {', '.join(config.unheeded)} are set and not heeded")
        for sentence in warnings_of(config, name):
            self.report.note("resolve", sentence)
        return config

    def _reach(self, config: Config) -> bool:
        try:
            took = self.machine.reach(config)
        except (socket.gaierror, UnicodeError) as error:
            self.report.fail("reach", f"{config.hostname} has no address: {error}", "correct the name, or its HostName")
        except OSError as error:
            self.report.fail(
                "reach",
                f"nothing can be reached at port {config.port} of {error}",
                "is the host up, is its SSH server running at that port, does a firewall let you through?",
            )
        else:
            if took is not None:
                self.report.ok("reach", f"the port answers in {_ms(took)} (TCP's handshake)", tcp_ms=took * 1000)
            return True
        return False

    def _connect(self, config: Config) -> _core.Connection | None:
        before = known(config)
        began = time.perf_counter()
        try:
            connection = self.machine.connect_to(self.core, config)
        except NodeStartError as error:
            self._refused(error, config, bool(before.keys))
            return None
        took = time.perf_counter() - began
        how = "known" if {*before.keys, *before.portless} else "new, and not recorded"
        if how != "known" and connection.host_key in known(config).keys:
            how = f"new, and now in {config.new_keys}"
        kind, _, digest = connection.fingerprint.partition(" ")
        self.report.ok("host key", f"{how}: {kind} {digest}", key_type=kind, fingerprint=digest)
        text = f"as {config.user}, with {_offers(config)}; {_ms(took)} with the key exchange"
        self.report.ok("authentication", text, connect_ms=took * 1000)
        return connection

    def _refused(self, error: NodeStartError, config: Config, is_known: bool) -> None:
        name, cause = self.machine.name, error.__cause__
        if not config.public_keys:
            self.report.fail("authentication", str(error), "PubkeyAuthentication yes, and publickey among the methods")
        elif isinstance(cause, _core.RevokedHostKeyError):
            self.report.fail("host key", str(error), "this key is marked as revoked: give the host a new one")
        elif isinstance(cause, _core.HostKeyError) and is_known:
            self.report.fail("host key", str(error), f"find out why; then `ssh-keygen -R '{config.key_name}'`")
        elif isinstance(cause, _core.HostKeyError):
            self.report.fail("host key", str(error), f"compare and accept it with `ssh {name}`, or use --accept-new")
        elif isinstance(cause, _core.AuthenticationError):
            self.report.ok("host key", "as expected")
            self.report.fail(
                "authentication", str(error), f"`ssh-copy-id {name}`, `ssh-add` for a key with a passphrase, or User"
            )
        elif cause is None:
            self.report.fail("host key", str(error), f"`ssh-keyscan {config.hostname}` shows the host's own keys")
        else:
            self.report.fail("connection", str(error), f"`ssh -v {name}` says how far it comes")

    def _details(self, connection: _core.Connection) -> dict[str, str]:
        began = time.perf_counter()
        said, _, _ = self.machine._run(connection, bootstrap._fill(DETAILS).encode(), COMMAND_SECONDS)
        took = time.perf_counter() - began
        details = {key: values[0] for key, values in said.items()}
        shell = details.get("shell", "an unknown shell")
        self.report.ok("shell", f"{shell} runs our scripts, the first in {_ms(took)}", script_ms=took * 1000)
        return details

    def _system(self, connection: _core.Connection) -> bootstrap.Facts:
        image = self.machine.wanted.image
        facts = self.machine._probe(connection, bootstrap.name(image))
        if facts.ready:
            # What has its environment is not asked for the rest; what has not is.
            facts = dataclasses.replace(self.machine._probe(connection, "none"), ready=True, root=facts.root)
        libc = f"glibc {'.'.join(map(str, facts.libc))}" if facts.libc else "no glibc"
        text = f"{facts.system or 'unknown'}, {facts.machine or 'unknown architecture'}, {libc}"
        if facts.system == "Linux":
            self.report.ok("system", text, system=facts.system, machine=facts.machine)
        else:
            self.report.fail("system", text, "nodes run Linux")
        return facts

    def _given(self, connection: _core.Connection, python: str) -> str | None:
        try:
            self.machine._verified(connection, python)
        except NodeStartError as error:
            self.report.fail("python", str(error), f"install what is missing with `{python} -m pip install`")
            return None
        self.report.ok("python", f"{python} is used as it is, and has what is needed")
        return python

    def _environment(self, facts: bootstrap.Facts) -> str | None:
        """Say whether there is an environment, or how it would be made; its interpreter."""
        image = self.machine.wanted.image
        env = bootstrap.name(image)
        python = bootstrap.interpreter(facts, env)
        uv = f", uv at {facts.uv}" if facts.uv else ""
        try:
            # For its objections; the places do not matter.
            bootstrap.build(dataclasses.replace(facts, root=facts.root or "/", free=None), image, env, {})
        except NodeStartError as error:
            fix = f"install python{PYTHON} with its venv module, or uv (https://docs.astral.sh/uv)"
            if facts.ready:
                self.report.note("python", f"{error}; the environment that is there does not need it")
            else:
                self.report.fail("python", str(error), fix)
        else:
            self.report.ok("python", f"{facts.python or f'{PYTHON}, which uv provides'}{uv}", python=facts.python)
        self._cache(facts)
        if bootstrap.fits(facts):
            self.report.ok("package", "the client's own runs there, and is sent")
        else:
            needed = ".".join(map(str, bootstrap._needed_libc()))
            self.report.note(
                "package",
                f"the client's own does not run there: it is for {sys.platform}, {platform.machine()}, "
                f"glibc {needed} or newer; pip will look for skyward_lite=={__version__}",
                "give a wheel for it with Image(wheel=)",
            )
        if facts.ready:
            self.report.ok("environment", f"is there: {python} (of the default image)", environment=python)
            return python
        self.report.ok(
            "environment", f"to be made by the first pool; of the default image, pip fetches {', '.join(image.pip)}"
        )
        return None

    def _cache(self, facts: bootstrap.Facts) -> None:
        fix = bootstrap.remedy(facts)
        if not facts.root:
            self.report.fail("cache", f"there is no directory for the environment:{facts.why}", fix)
        elif facts.free is not None and facts.free < bootstrap.NEEDED and not facts.ready:
            self.report.fail("cache", f"{facts.root} has {facts.free} MB left of {bootstrap.NEEDED} MB needed", fix)
        else:
            free = "" if facts.free is None else f", {facts.free / 1024:,.1f} GB free"
            self.report.ok("cache", f"{facts.root}{free}", root=facts.root, free_mb=facts.free)
        if facts.root and facts.why:
            self.report.note("cache", f"not the first choice:{facts.why}".rstrip(";"))

    def _versions(self, connection: _core.Connection, python: str) -> None:
        # As its agent would be started.
        how = "-I" if self.machine.python is None else "-P"
        script = bootstrap._fill(VERSIONS, PYTHON=shlex.quote(python), HOW=how, NAMES=repr(PACKAGES))
        said, _, printed = self.machine._run(connection, script.encode(), COMMAND_SECONDS)
        theirs = {name: said.get(name, [""])[0] for name in PACKAGES}
        ours = {name: __version__ if name == "skyward_lite" else installed(name) for name in PACKAGES}
        other = [name for name in PACKAGES if theirs[name] != ours[name]]
        text = ", ".join(f"{name} {theirs[name] or 'missing'}" for name in PACKAGES)
        if not any(theirs.values()):
            self.report.fail(
                "versions", f"{python}: {printed[-500:] or text}", f"remove {python} and what is around it"
            )
        elif other:
            here = ", ".join(f"{name} {ours[name]}" for name in other)
            self.report.note("versions", f"{text}; here {here}", "equal versions are what pickles need")
        else:
            self.report.ok("versions", f"{text}, as here", **theirs)

    def _size(self, details: dict[str, str]) -> None:
        cores, memory = _number(details, "cores"), _number(details, "memory")
        available, group = _number(details, "available"), _number(details, "group_memory")
        parts = [details.get("release") or "an unknown system", f"{cores or 'unknown'} cores"]
        if memory:
            parts.append(f"{memory / 1e6:.1f} GB memory" + (f", {available / 1e6:.1f} available" if available else ""))
        if details.get("load"):
            parts.append(f"load {details['load']}")
        memory_gb = memory / 1e6 if memory else None
        self.report.ok("size", ", ".join(parts), cores=cores, memory_gb=memory_gb)
        if group and memory and group < memory * 1024:
            self.report.note("limits", f"the session's control group allows {group / 1e9:.1f} GB memory")
        files = _number(details, "files")
        self.report.ok(
            "limits",
            f"open files {details.get('files', 'unknown')}, processes {details.get('processes', 'unknown')}",
            open_files=files,
        )
        if files is not None and files < FEW_FILES:
            self.report.note("limits", f"only {files} open files", "raise `ulimit -n` for sessions there")

    def _speed(self, connection: _core.Connection) -> None:
        times: list[float] = []
        while len(times) < ROUNDS and sum(times) < SPEED_SECONDS:
            began = time.perf_counter()
            status, _, _ = connection.run("true", b"", SPEED_SECONDS)
            times.append(time.perf_counter() - began)
            if status != 0:
                self.report.note("round trip", f"not measured: `true` ended with status {status}")
                return
        command = statistics.median(times)
        text = f"{_ms(command)}, median of {len(times)} times `true`, the login shell's start included"
        self.report.ok("round trip", text, command_ms=command * 1000)
        # Random bytes, which no proxy compresses.
        data = os.urandom(SIZES[-1])
        for step, ways in (
            ("to it", [("exec cat >/dev/null", size, data[:size]) for size in SIZES]),
            ("from it", [(f"exec head -c {size} /dev/urandom", size, b"") for size in SIZES]),
        ):
            self._bandwidth(connection, step, ways, command)

    def _bandwidth(
        self, connection: _core.Connection, step: str, ways: list[tuple[str, int, bytes]], command: float
    ) -> None:
        size, took = 0, 0.0
        until = time.monotonic() + SPEED_SECONDS
        for line, size, stdin in ways:
            began = time.perf_counter()
            bound = max(1.0, until - time.monotonic())
            try:
                status, came, _ = connection.run(line, stdin, bound)
            except _core.CoreError as error:
                rate = size / 1e6 / bound
                self.report.note(step, f"less than {rate:.3f} MB/s: {error}", "is the line that slow?")
                return
            took = time.perf_counter() - began
            if status != 0:
                self.report.note(step, f"not measured: `{line}` ended with status {status}")
                return
            if not stdin and len(came) < SIZES[0]:
                self.report.note(step, f"not measured: of {size:,} bytes that `{line}` should print {len(came):,} came")
                return
            if took - command > LONG:
                break
        net = took - command
        sure = net > command / 2
        rate = size / 1e6 / (net if sure else took)
        how = f"{size >> 20} MiB in {took:.2f} s" + (f", less {_ms(command)} for a command" if sure else "")
        self.report.ok(step, f"{'' if sure else 'at least '}{rate:,.1f} MB/s ({how})", mb_per_s=rate)


def _offers(config: Config) -> str:
    offers = [str(one[0] if isinstance(one, tuple) else one) for one in provider_ssh._identities(config)]
    if config.agent is not None:
        offers[0] = f"the agent at {offers[0]}"
    there = [one for one in offers if one.startswith("the agent") or os.path.exists(one)]
    return there[0] if len(there) == 1 else f"one of {', '.join(there)}"


def _number(details: dict[str, str], key: str) -> int | None:
    return bootstrap.number(details.get(key, ""))


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def _image() -> Image:
    """Give the image of a pool that is told nothing of it."""
    transform = plugins.joblib().transform
    return Image() if transform is None else transform(Image())


def wanted(provider: SSH) -> NodeRequest:
    """Return what a pool with these hosts would want that is told nothing else."""
    return NodeRequest(
        nodes=len(provider.hosts),
        least=0,
        image=_image(),
        vcpus=None,
        memory_gb=None,
        connect_timeout=CONNECT_SECONDS,
    )


def in_order(jobs: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Run the jobs, AT_ONCE at a time, and yield their results in order. Ctrl-C is heard meanwhile."""
    workers = concurrent.futures.ThreadPoolExecutor(min(AT_ONCE, len(jobs)))
    try:
        for future in [workers.submit(job) for job in jobs]:
            while not future.done():
                concurrent.futures.wait([future], POLL_SECONDS)
            yield future.result()
    finally:
        # What still runs was interrupted; its waits end with the core that it uses.
        workers.shutdown(wait=False, cancel_futures=True)


def check(provider: SSH, *, as_json: bool = False) -> int:
    """Check the provider's hosts, print what was found, and give the exit status: 0 if all can be used, else 1."""
    core, line = _core.Core(1, 1 << 20), threading.Lock()
    reports = []
    try:
        checks = [_Check(InspectedHost(host, provider, wanted(provider)), core, line) for host in provider.hosts]
        for report in in_order([one.run for one in checks]):
            reports.append(report)
            if not as_json:
                print(report.lines(), flush=True)
    finally:
        core.close()
    if as_json:
        ours = {"python": PYTHON} | {name: installed(name) for name in PACKAGES} | {"skyward_lite": __version__}
        print(json.dumps({"client": ours, "hosts": [report.fields() for report in reports]}, indent=2))
    return 0 if all(report.usable for report in reports) else 1
