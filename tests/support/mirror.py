"""An index of packages, and a mirror of Pythons, that hosts of the tests reach over HTTP."""

from __future__ import annotations

import http.server
import json
import os
import platform
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

from skyward_lite._version import PYTHON

_LEFT_OUT = (
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "tkinter", "lib2to3", "turtledemo"),
    *("ensurepip", "pydoc_data", "distutils"),
)
"""Parts of the standard library that no node needs."""


def pack_python(path: Path) -> None:
    """Write an archive of this interpreter, as uv downloads them: it runs wherever it is unpacked."""

    def wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = info.name.rpartition("/")[2]
        return None if name in _LEFT_OUT or name.startswith("config-") or name.endswith((".a", ".pyc")) else info

    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        base = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
        archive.add(base, f"python/bin/python{PYTHON}")
        archive.add(os.path.dirname(os.path.realpath(os.__file__)), f"python/lib/python{PYTHON}", filter=wanted)


class Mirror(http.server.ThreadingHTTPServer):
    """Serves the files of a directory: wheels by the pages of an index below /simple/, everything by its name."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.held: dict[str, threading.Event] = {}
        """Files of which only the first half is sent before the event is set."""
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    def python_list(self, archive: str) -> str:
        """Write a list of Pythons for uv, with the archive under this name alone; return its URL."""
        entry = {
            "name": "cpython",
            "arch": {"family": platform.machine(), "variant": None},
            "os": "linux",
            "libc": "gnu",
            "major": sys.version_info[0],
            "minor": sys.version_info[1],
            "patch": sys.version_info[2],
            "prerelease": "",
            "url": f"{self.url}/{archive}",
            "sha256": None,
            "variant": None,
            "build": "20240101",
        }
        name = f"cpython-{platform.python_version()}-linux-{platform.machine()}-gnu"
        (self.root / f"{archive}.json").write_text(json.dumps({name: entry}))
        return f"{self.url}/{archive}.json"

    def close(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: Mirror

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.strip("/")
        if path.startswith("simple/"):
            name = path.partition("/")[2].replace("-", "_")
            wheels = [file.name for file in self.server.root.glob(f"{name}-*.whl")]
            link = '<a href="/{0}" data-core-metadata="true" data-dist-info-metadata="true">{0}</a>'
            self.answer("".join(link.format(one) for one in wheels).encode(), "text/html")
        elif path.endswith(".metadata"):
            # What a package needs, apart from the package: installers ask for it first.
            with zipfile.ZipFile(self.server.root / path.removesuffix(".metadata")) as wheel:
                name = next(one for one in wheel.namelist() if one.endswith(".dist-info/METADATA"))
                self.answer(wheel.read(name), "text/plain")
        elif (self.server.root / path).is_file():
            self.answer((self.server.root / path).read_bytes(), "application/octet-stream", self.server.held.get(path))
        else:
            self.send_error(404)

    def answer(self, body: bytes, kind: str, held: threading.Event | None = None) -> None:
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        if held is not None and not held.wait(20):
            self.close_connection = True
            return
        self.wfile.write(body[half:])
