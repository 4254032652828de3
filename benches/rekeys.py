"""Gibibytes in both directions over SSH connections whose keys are renewed every MiB, or every two seconds.

The host is an `sshd` on loopback. Each row must have the same hashes at both ends, the same agent and no lost node; the
slowest exchange tells of a stall.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import skyward_lite as sky
from lab import Lab, Sshd

PIECE = 64 << 20
"""Bytes that cross at once in each direction."""
VOLUME, TIME = "RekeyLimit 1M", "RekeyLimit default 2s"
ROWS: dict[str, tuple[str | None, str | None]] = {
    "never": (None, None),
    "every MiB, ours": (VOLUME, None),
    "every MiB, the server's": (None, VOLUME),
    "every MiB, both": (VOLUME, VOLUME),
    "every 2 s, both": (TIME, TIME),
}
"""What is measured: the limits of our end and those of the server's."""


def swap(data: bytes, size: int) -> tuple[int, bytes, int]:
    """Return the hash of what came, and other bytes with their hash."""
    back = os.urandom(size)
    return zlib.crc32(data), back, zlib.crc32(back)


def exchanges(host: Sshd) -> int:
    """Return how often the ends of the host's connections agreed on keys."""
    return host.log_text().count("SSH2_MSG_NEWKEYS received")


def measure(lab: Lab, name: str, pieces: int) -> bool:
    """Move the bytes and print a row. Return whether all is well."""
    ours, servers = ROWS[name]
    host = lab.host("LogLevel DEBUG1", *filter(None, [servers]), ssh_options=tuple(filter(None, [ours])))
    provider = sky.SSH(host.name, config=lab.config, python=sys.executable)
    with sky.pool(provider, worker=sky.Worker(concurrency=1, retries=0)) as pool:
        pid, before, took, good = pool.nodes()[0].pid, exchanges(host), [], 0
        for _ in range(pieces):
            data = os.urandom(PIECE)
            begin = time.perf_counter()
            there, back, crc = pool.submit(swap, data, PIECE).result()
            took.append(time.perf_counter() - begin)
            good += (there, crc, len(back)) == (zlib.crc32(data), zlib.crc32(back), PIECE)
        node = pool.nodes()[0]
        well = good == pieces and (node.state, node.pid) == ("ready", pid)
        rate = 2 * pieces * PIECE / sum(took) / 1e6
        print(
            f"{name:26} {pieces * PIECE / 2**30:.2f} GiB each way, {rate:5.0f} MB/s together, "
            f"{exchanges(host) - before:5} rekeys, slowest exchange {max(took):.2f} s, "
            f"{good} of {pieces} hashes equal, node {node.state}{'' if node.pid == pid else ', another agent'}",
            flush=True,
        )
    return well


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="in each direction of each row")
    parser.add_argument("--only", default="", help="the rows whose name contains this")
    options = parser.parse_args()
    pieces = max(1, round(options.gib * 2**30 / PIECE))
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        try:
            well = [measure(lab, name, pieces) for name in ROWS if options.only in name]
        finally:
            lab.close()
    sys.exit(not all(well))


if __name__ == "__main__":
    main()
