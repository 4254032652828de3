"""A connection that fails raises the core's exception for the cause: what callers do next depends on its class."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from skyward_lite import _core

PRIVATE, PUBLIC = _core.generate_key()
HOST_PRIVATE, HOST_PUBLIC = _core.generate_key()
OTHER_PRIVATE, OTHER_PUBLIC = _core.generate_key()


@pytest.fixture
def core() -> Iterator[_core.Core]:
    core = _core.Core(1, 1 << 20)
    yield core
    core.close()


def connect(core, endpoint, **changed):
    """Connect to the embedded server as one may, but for what is changed."""
    usual = {"user": "me", "host_keys": [HOST_PUBLIC], "revoked": [], "accept_new": False, "identities": [PRIVATE]}
    return core.connect(endpoint=endpoint, **{"timeout": 20.0, **usual, **changed})


@pytest.fixture
def server() -> Iterator[int]:
    """The descriptor of a socket with an embedded server at its other end."""
    ours, theirs = socket.socketpair()
    spec: _core.AgentSpec = {
        "worker": ["false"],
        "version": "0",
        "python": "3",
        "epoch": "0",
        "packages": {},
        "notices": [],
        "directory": None,
        "cores": None,
    }

    def serve() -> None:
        try:
            keys = {"host_key": HOST_PRIVATE, "authorized_key": PUBLIC}
            _core.serve_embedded(spec, fd=theirs.detach(), timeout=20.0, **keys)
        except _core.CoreError:
            pass  # the client left

    thread = threading.Thread(target=serve)
    thread.start()
    yield ours.detach()
    thread.join(20)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def address(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()
    return host, port


def test_nobody_listens(core):
    """As when a machine is still starting."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = address(listener)
    with pytest.raises(_core.UnreachableError, match="cannot connect"):
        connect(core, nobody)


def test_a_server_says_nothing(core, listener):
    """Within the bound on all of it."""
    with pytest.raises(_core.ConnectTimeoutError, match="more than"):
        connect(core, address(listener), timeout=0.2)


def test_a_server_hangs_up(core, listener):
    """Before the host showed a key."""

    def hang_up() -> None:
        listener.accept()[0].close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(_core.HungUpError, match="before it showed its key"):
        connect(core, address(listener))
    thread.join()


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"host_keys": [OTHER_PUBLIC]}, _core.HostKeyError, "is not known for this host"),
        ({"host_keys": []}, _core.HostKeyError, "known: none"),
        ({"revoked": [HOST_PUBLIC]}, _core.RevokedHostKeyError, ", which is revoked is not known"),
        ({"identities": [OTHER_PRIVATE]}, _core.AuthenticationError, "tried: ssh-ed25519 SHA256:"),
        ({"identities": []}, _core.AuthenticationError, "no key to try"),
        ({"algorithms": {"kex": ["unknown"]}}, _core.CoreError, "no key exchange algorithm"),
    ],
)
def test_a_server_is_refused_or_refuses(core, server, changed, error, text):
    """The class is exactly that of the cause, and the only argument is the text."""
    with pytest.raises(_core.CoreError, match=text) as caught:
        connect(core, server, **changed)
    assert caught.type is error
    assert caught.value.args == (str(caught.value),)


def test_a_server_is_accepted(core, server):
    """The known key, or any if it may be new."""
    connection = connect(core, server, host_keys=[], accept_new=True)
    assert connection.host_key == HOST_PUBLIC
    assert connection.fingerprint.startswith("ssh-ed25519 SHA256:")


def test_the_core_is_closed(core, listener):
    """Before the connection is made."""
    core.close()
    with pytest.raises(_core.ClosedError, match="the pool is closed"):
        connect(core, address(listener))
