"""How the commands reach hosts: as a pool would, many at once, with the results in the order of the command line."""

from __future__ import annotations

import concurrent.futures
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from .. import plugins
from ..image import Image
from ..providers import NodeRequest, Provider
from ..providers.openssh import Config
from ..providers.ssh import SSHMachine

T = TypeVar("T")

MAX_HOSTS_AT_ONCE = 32
CONNECT_SECONDS = 20.0
"""Bound on connecting to one host, as is `pool(connect_timeout=)` by default."""
POLL_SECONDS = 0.1
"""Longest wait for a report in one piece: Ctrl-C is handled between two of them."""


class InspectedHost(SSHMachine):
    """A host whose socket is opened here, so that `check` can time TCP's handshake and report how it fails."""

    fd = -1
    """The socket that `reach` has opened and no connection has taken over yet; -1 without one."""

    def reach(self, config: Config) -> float | None:
        """Open the socket to the host's server. Return the seconds of TCP's handshake, None behind a proxy command.

        Raises `OSError` or `UnicodeError`.
        """
        if config.proxy is not None:
            self.fd = self.open_proxy(config.proxy)
            return None
        reasons = []
        for family, kind, protocol, _, address in socket.getaddrinfo(
            config.hostname, config.port, type=socket.SOCK_STREAM
        ):
            began = time.perf_counter()
            attempt = socket.socket(family, kind, protocol)
            attempt.settimeout(config.connect_timeout or self.wanted.connect_timeout)
            try:
                attempt.connect(address)
            except OSError as error:
                attempt.close()
                reasons.append(f"{address[0]}: {error}")
                continue
            took = time.perf_counter() - began
            attempt.settimeout(None)
            self.fd = attempt.detach()
            return took
        raise ConnectionError("; ".join(reasons))

    def endpoint(self, config: Config) -> int:
        if self.fd < 0:
            self.reach(config)
        fd, self.fd = self.fd, -1
        return fd

    def end(self, deadline: float) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        super().end(deadline)


def default_request(provider: Provider) -> NodeRequest:
    """Return what a pool asks this provider for if it is given no other parameter: all its nodes, or one."""
    return NodeRequest(
        nodes=provider.nodes or 1,
        least=0,
        image=default_image(),
        vcpus=None,
        memory_gb=None,
        connect_timeout=CONNECT_SECONDS,
    )


def default_image() -> Image:
    """Return the image of a pool that is given none: `pool()` has the joblib plugin, which may add to it."""
    transform = plugins.joblib().transform
    return Image() if transform is None else transform(Image())


def in_order(jobs: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Run the jobs, at most `MAX_HOSTS_AT_ONCE` at a time, and yield their results in order. Ctrl-C ends the wait."""
    workers = concurrent.futures.ThreadPoolExecutor(min(MAX_HOSTS_AT_ONCE, len(jobs)))
    try:
        for future in [workers.submit(job) for job in jobs]:
            while not future.done():
                concurrent.futures.wait([future], POLL_SECONDS)
            yield future.result()
    finally:
        # After Ctrl-C jobs may still run. They end when the caller closes the core that they wait in.
        workers.shutdown(wait=False, cancel_futures=True)
