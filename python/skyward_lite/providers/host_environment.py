"""The making of an image's environment on a host: what is sent, by which tools it is made, and what is told meanwhile.

send the files → choose uv or pip → send our own uv, if it is to be that → build; again with pip, if uv has failed
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .. import _core, credentials
from .._version import PYTHON
from ..environment import build, bundle, own_uv, probe, progress, scripts, tools
from ..environment.tools import Tools
from ..errors import NodeStartError
from ..image import Image

log = logging.getLogger("skyward_lite")

UPLOAD_SECONDS = 600.0
"""Bound on sending one file to a host."""
START_SECONDS = 30.0
"""Bound on a look whether our own uv starts on a host."""
UV_GAIN_SECONDS = 5.0
"""What uv gains over venv and pip at the least, as measured with numpy alone; sending uv must not take longer."""
LARGE_BYTES = 500_000
"""From this size on a file is sent only after a question whether it is there, and tells the connection's speed."""
NO_GZIP = 3
"""Exit status of upload.sh for a compressed file, if the host has no gzip."""


class HostEnvironment:
    """An environment that is being made on one host, by the thread of this host. For one `make`."""

    def __init__(
        self,
        connection: _core.Connection,
        name: str,
        facts: probe.Facts,
        image: Image,
        prelude: bytes = b"",
        tell: Callable[[str], object] = str,
    ) -> None:
        self.connection = connection
        self.name = name
        self.facts = facts
        self.image = image
        self.prelude = prelude
        """The head of a script that takes long."""
        self._tell = tell
        """Is called with what is being done, in a few words, each time that this changes."""
        self.bytes_per_second = 0.0
        """Speed at which a large file was sent; 0 before, and if the host had all of them."""

    def make(self, env: str) -> None:
        """Make the environment. Raises `NodeStartError`."""
        ways = tools.choose(self.facts, self.image, own_uv.unfit)
        began = time.monotonic()
        listed = ", ".join(self.image.masked_pip()) or "nothing beside skyward_lite"
        log.info("%s: making its environment in %s: %s", self.name, self.facts.root, listed)
        self._tell("sending files")
        uploads = {kind: self._send(name, data) for kind, name, data in bundle.files(self.facts, self.image)}
        while True:
            way = self._ready(ways.pop(0), bool(ways))
            if way is not None and self._build(env, uploads, way, bool(ways)):
                break
        log.info("%s: its environment took %.1f s", self.name, time.monotonic() - began)

    # ------------------------------------------------------------------------------------------------ tools

    def _ready(self, way: Tools, replaceable: bool) -> Tools | None:
        """Return these tools when they are on the host; None if they are not to be used, where others can be."""
        if self.facts.pip_settings and way.uv is None and not way.own:
            log.info("%s: pip installs, because it is configured there (%s)", self.name, self.facts.pip_settings)
        elif self.facts.pip_settings:
            log.warning(
                "%s: uv installs, and does not read what pip is told there (%s)", self.name, self.facts.pip_settings
            )
        if not way.own:
            return way
        program = own_uv.find()
        assert program is not None  # or `choose` would not have chosen it
        path = self._send_uv(program, replaceable)
        if path is None:
            return None
        started = scripts.run_command(
            self.connection, 'exec "$1" --version', path, bound=START_SECONDS, secrets=self.image.secrets()
        )
        version = scripts.shown(started.stdout, limit=256)
        if not started.status and version.startswith("uv "):
            log.info("%s: our own copy of uv makes the environment: %s", self.name, version)
            return dataclasses.replace(way, uv=path)
        printed = scripts.shown(started.stderr or started.stdout, limit=1000)
        why = f"our own copy of uv does not start there: {printed or 'no reason'}"
        if not replaceable:
            raise NodeStartError(f"{why}. Install uv there, or the client's Python with its venv module")
        log.info("%s: %s; pip takes its place", self.name, why)
        return None

    def _send_uv(self, program: own_uv.Program, replaceable: bool) -> str | None:
        """Return the path of our own uv on the host; None if pip is done before uv could be there."""
        upload = functools.partial(self._upload, program.digest, "uv", program.size)
        # With nothing to send, as in `_send`.
        sent = upload(b"", "packed")
        if not sent.status:
            return sent.path
        # Assigned, so that the hosts that come later share the compressed content.
        packed = own_uv.packed(program)
        seconds = len(packed.data) / self.bytes_per_second if self.bytes_per_second else 0.0
        if replaceable and seconds > UV_GAIN_SECONDS:
            log.info("%s: pip installs, because sending uv there would take %.0f s", self.name, seconds)
            return None
        if sent.status == NO_GZIP:
            data, kind = Path(program.path).read_bytes(), "program"
        else:
            data, kind = packed.data, "packed"
        log.info("%s: sending our own copy of uv, %.1f MB", self.name, len(data) / 1e6)
        self._tell(f"sending uv ({len(data) / 1e6:.1f} MB)")
        sent = upload(data, kind)
        if sent.status:
            raise NodeStartError(f"{sent.path} could not be written there: {sent.printed}")
        return sent.path

    # ------------------------------------------------------------------------------------------------ files

    def _send(self, name: str, data: bytes) -> str:
        """Send a file, unless the host has it; return its path there. Raises `NodeStartError`."""
        upload = functools.partial(self._upload, bundle.digest(data), name, len(data), kind="file")
        # First with nothing to send: a large file may be there, and much of it would cross before the host could tell.
        if len(data) >= LARGE_BYTES and not (sent := upload(b"")).status:
            return sent.path
        began = time.monotonic()
        sent = upload(data)
        if sent.status:
            raise NodeStartError(f"{sent.path} could not be written there: {sent.printed}")
        if sent.crossed and len(data) >= LARGE_BYTES:
            self.bytes_per_second = len(data) / (time.monotonic() - began)
        return sent.path

    def _upload(self, digest: str, name: str, size: int, data: bytes, kind: str) -> _Sent:
        """Send a file of this size and digest, unless the host has it. `kind` is upload.sh's."""
        # The file's name is unchanged: pip reads a wheel's.
        directory = f"{self.facts.root}/sent-{digest[:16]}"
        secrets = self.image.secrets()
        ended = scripts.run_command(
            self.connection,
            scripts.read("upload.sh"),
            *(directory, name, str(size), kind, str(len(data))),
            stdin=data,
            bound=UPLOAD_SECONDS,
            secrets=secrets,
        )
        printed = scripts.shown(ended.stderr, secrets)
        return _Sent(f"{directory}/{name}", ended.status, b"sent" in ended.stdout, printed)

    # ------------------------------------------------------------------------------------------------ the build

    def _build(self, env: str, uploads: dict[str, str], way: Tools, replaceable: bool) -> bool:
        """Make the environment by these tools. Return false if uv has failed, and others can be tried.

        Raises `NodeStartError`.
        """
        watch = progress.Progress(self._report, self.image.secrets())
        self._tell("making its environment")
        # Not in variables: the script has the credentials, and what reports errors may show variables.
        report, status, printed = scripts.run(
            self.connection,
            self.prelude + build.build_script(self.facts, self.image, env, uploads, way),
            build.BUILD_SECONDS,
            self.image.secrets(),
            watch,
        )
        if status:
            why = self._explain(report, status, printed, way)
            if (
                not replaceable
                or way.uv is None
                or not report.get("failed", [""])[0].partition(" ")[2].startswith(way.uv)
            ):
                raise NodeStartError(why)
            log.warning("%s: pip takes the place of uv: %s", self.name, why)
            return False
        for line in report.get("gone", []):
            log.info("%s: removed what nothing had used for a long time: %s", self.name, line.split(" ", 2)[-1])
        return True

    def _report(self, doing: str) -> None:
        log.info("%s: %s", self.name, doing)
        self._tell(doing)

    def _explain(self, report: dict[str, list[str]], status: int, printed: str, way: Tools) -> str:
        """Return why a build failed, and what to do."""
        failed = credentials.mask(report.get("failed", [""])[0].partition(" ")[2])
        # The failed command names only the file of requirements, which is gone.
        asked = f" for {', '.join(self.image.masked_pip())}" if failed.endswith("/requirements") else ""
        remedy = ""
        if way.uv is not None and way.python is None and failed.startswith(f"{way.uv} venv"):
            remedy = (
                f"\nuv finds no Python {self.image.python or PYTHON} there, and cannot download it: install it "
                "there, or let the host reach it (https_proxy, or a mirror's address in UV_PYTHON_INSTALL_MIRROR)"
            )
        return (
            f"its environment could not be made: {f'`{failed}`' if failed else 'the script'}{asked} ended with "
            f"status {status}:\n  | {progress.without(printed)}{remedy}"
        )


class _Sent(NamedTuple):
    """How a file was sent."""

    path: str
    """Its path on the host."""
    status: int
    """The exit status of upload.sh: 0 if the file is there."""
    crossed: bool
    """Whether it was not there before."""
    printed: str
    """Standard error, fit to be shown."""
