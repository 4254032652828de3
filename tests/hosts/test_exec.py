"""Nodes behind commands: the shell of this machine, and commands that cut, change, hang, die and print."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
import way
from joblib import Parallel, delayed
from processes import eventually, has_ended, ours
from skyward_lite.environment import scripts

BACK_SECONDS = 30
"""How long a node may take until it is ready again, on a busy machine."""

pytestmark = pytest.mark.usefixtures("functions_by_value")


def counted(path: str, number: int, seconds: float = 0.0) -> int:
    """Count this execution in a file."""
    with open(path, "a") as file:
        file.write(f"{number}\n")
    time.sleep(seconds)
    return -number


def end_children(number: int) -> list[int]:
    """Fork processes that are terminated at once, and return the signals that ended them."""
    ends = []
    for _ in range(number):
        child = os.fork()
        if not child:
            time.sleep(5)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        ends.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
    return ends


def node_name(_: int) -> str:
    """Return the name that the command has given the node."""
    time.sleep(0.02)
    return os.environ["NODE"]


class Ways:
    """A provider whose nodes are behind `way.py`, and the processes of the command that run."""

    def __init__(self, directory: Path, fault: str = "none", nodes: tuple[str, ...] = ("a",), **env: str) -> None:
        self.directory = directory
        variables = [f"{name}={value}" for name, value in {"NODE": "{node}", **env}.items()]
        words = [sys.executable, "-S", way.__file__, str(directory), fault, "{node}", "env", *variables, "sh", "-c"]
        self.command = shlex.join(words)
        self.nodes = nodes

    def provider(self, python: str | None = sys.executable) -> sky.Exec:
        return sky.Exec(self.command, self.nodes, python=python)

    def pool(self, python: str | None = sys.executable, **options: object) -> sky.ComputePool:
        """Return a pool, not yet entered."""
        settings = {"worker": sky.Worker(concurrency=2), "plugins": [], **options}
        return sky.pool(self.provider(python), **settings)  # type: ignore[arg-type]

    def running(self, kind: str = "agent") -> list[int]:
        """Return the process ids of the commands that run."""
        found = []
        for file in self.directory.glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if file.read_text().endswith(kind) and not has_ended(int(file.name)):
                    found.append(int(file.name))
        return found

    def end(self, number: int) -> list[int]:
        """Send a signal to the commands that lead to agents. Return their process ids."""
        found = self.running()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return found


# ------------------------------------------------------------------------------------------------ as it should be


def test_a_shell_of_this_machine():
    """Tasks of `Parallel` run on the named nodes, and the results are those of a serial run."""
    provider = sky.Exec("env NODE={node} sh -c", ["a", "b"], python=sys.executable)
    with sky.pool(provider, worker=sky.Worker(concurrency=2)) as pool:
        assert Parallel(n_jobs=-1)(delayed(operator.neg)(n) for n in range(500)) == [-n for n in range(500)]
        assert {*Parallel(n_jobs=-1, batch_size=1)(delayed(node_name)(n) for n in range(40))} == {"a", "b"}
        assert [node.name for node in pool.nodes()] == ["a", "b"]
        data = os.urandom(5_000_000)
        assert pool.submit(len, data).result(20) == len(data)


def test_an_environment_is_made_through_a_command(tmp_path, caplog):
    """It is made once, and found again; the command passes no end of the input on, or cuts what may be asked again."""
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_CONFIG_FILE": os.devnull}
    for fault, message in (
        ("noeof@script", "its environment took"),
        ("forgets:20@script+1*2", "the environment is there"),
    ):
        caplog.clear()
        (directory := tmp_path / fault.partition("@")[0]).mkdir()
        ways = Ways(directory, fault, **places)
        with caplog.at_level(logging.INFO, "skyward_lite"), ways.pool(None) as pool:
            assert str(tmp_path / "cache") in pool.submit(eval, "__import__('sys').executable").result(20)
            assert message in caplog.text
            if fault.startswith("forgets"):
                make_its_container_anew(pool, ways, tmp_path / "cache")
    assert "has lost the end of what a script printed" in caplog.text


def make_its_container_anew(pool: sky.ComputePool, ways: Ways, cache: Path) -> None:
    """Its agent and environment are gone: the node is lost at once, not only after its lease, and comes back."""
    cache.rename(cache.with_name("away"))
    agent = pool.nodes()[0].pid
    os.kill(agent, signal.SIGKILL)
    ways.end(signal.SIGKILL)
    assert eventually(lambda: pool.nodes()[0].state == "lost", 20), pool.nodes()
    cache.with_name("away").rename(cache)
    assert pool.submit(operator.neg, 1).result(30) == -1
    assert pool.nodes()[0].pid != agent


@pytest.mark.parametrize("fault", ["banner", "noeof", "lingers@script", "forgets:30@script+1*2", "cuts:30@script*2"])
def test_a_command_that_is_odd(tmp_path, monkeypatch, fault):
    """What it prints first, and how its scripts end, costs nothing; nor does an input without an end."""
    monkeypatch.setattr(scripts, "RERUN_PAUSES_SECONDS", (0.0, 0.0))
    ways = Ways(tmp_path, fault)
    with ways.pool() as pool:
        assert list(pool.map(operator.neg, range(50))) == [-n for n in range(50)]
    assert eventually(lambda: not ways.running(""), 5)


# ------------------------------------------------------------------------------------------------ refusals


def refusal(provider: sky.Exec, **options: object) -> str:
    """Return the error with which a pool does not start."""
    with pytest.raises(sky.NodeStartError) as caught:
        sky.pool(provider, plugins=[], **options).__enter__()  # type: ignore[arg-type]
    return str(caught.value)


def test_what_is_no_way_to_a_node(tmp_path, monkeypatch):
    """The command is named, with what it printed and what to do."""
    monkeypatch.setattr(scripts, "RERUN_PAUSES_SECONDS", (0.0, 0.0))
    assert "kubektl does not run here: No such file or directory" in refusal(sky.Exec("kubektl exec {node}", ["a"]))
    assert "(status 1). It printed: no such pod" in refusal(sky.Exec("sh -c 'echo no such pod; exit 1'", ["a"]))
    assert "has a terminal, which changes bytes: leave out" in refusal(Ways(tmp_path, "terminal").provider())
    assert "/nowhere/python cannot be used" in refusal(Ways(tmp_path).provider("/nowhere/python"))
    missing = refusal(Ways(tmp_path).provider(), image=sky.Image(pip=["no-such-package"]))
    assert "does not meet the image, and python= installs nothing: no-such-package" in missing


def test_one_of_two_nodes_is_missing(caplog):
    """The pool starts with the other, and says which is missing and why; `nodes=(1, 2)` is what allows that."""
    command = """sh -c 'test {node} = a && exec sh -c "$0"; echo "no pod {node}" >&2; exit 1'"""
    provider = sky.Exec(command, ["a", "b"], python=sys.executable)
    with sky.pool(provider, (1, 2), worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        assert pool.submit(operator.neg, 1).result(20) == -1
        assert eventually(lambda: [node.state for node in pool.nodes()] == ["ready", "lost"], 20)
    assert "no pod b" in caplog.text
    assert "no pod b" in refusal(provider)


# ------------------------------------------------------------------------------------------------ faults while it runs


@pytest.fixture(scope="module")
def ways(functions_by_value: None) -> Iterator[Ways]:
    """The processes of the command behind which the module's pool has its nodes."""
    with tempfile.TemporaryDirectory(prefix="sky", dir="/tmp") as directory:
        yield Ways(Path(directory), nodes=("a", "b"), TMPDIR=directory)


@pytest.fixture(scope="module")
def far(ways: Ways) -> Iterator[sky.ComputePool]:
    """A pool of two nodes."""
    with ways.pool() as pool:
        yield pool
    assert eventually(lambda: not ways.running(""), 5)
    assert eventually(lambda: not list(ways.directory.glob("skyward-lite-*")), 5)


@pytest.fixture
def shared_processes(far: sky.ComputePool) -> None:
    """The nodes of this file's pool outlive its tests."""


def is_back(pool: sky.ComputePool) -> bool:
    """Wait until all nodes are ready."""
    return eventually(lambda: {node.state for node in pool.nodes()} == {"ready"}, BACK_SECONDS)


def is_led_to_again(pool: sky.ComputePool, ways: Ways, ended: list[int]) -> bool:
    """Wait until other processes of the command lead to all nodes, and these are ready."""

    def again() -> bool:
        running = ways.running()
        return len(running) == len(ways.nodes) and not {*running} & {*ended}

    return eventually(again, BACK_SECONDS) and is_back(pool)


@pytest.mark.usefixtures("shared_processes")
class TestFaults:
    """Commands that are ended while tasks run."""

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_command_that_dies(
        self, far: sky.ComputePool, ways: Ways, tmp_path: Path, number: signal.Signals
    ) -> None:
        """The agent lives on, another process of the command attaches to it, and no task runs twice."""
        file = tmp_path / "counts"
        futures = [far.submit(counted, str(file), n, 0.02) for n in range(150)]
        chance = random.Random(5)
        for _ in range(4):
            time.sleep(chance.uniform(0.02, 0.1))
            ended = ways.end(number)
            assert len(ended) == 2
            assert is_led_to_again(far, ways, ended), far.nodes()
        assert [future.result(30) for future in futures] == [-n for n in range(150)]
        assert sorted(map(int, file.read_text().split())) == list(range(150))

    def test_a_command_that_hangs(self, far: sky.ComputePool, ways: Ways, tmp_path: Path) -> None:
        """Silence is a cut, too."""
        file = tmp_path / "counts"
        futures = [far.submit(counted, str(file), n, 0.01) for n in range(50)]
        ended = ways.end(signal.SIGSTOP)
        assert [future.result(40) for future in futures] == [-n for n in range(50)]
        assert is_led_to_again(far, ways, ended)
        assert sorted(map(int, file.read_text().split())) == list(range(50))


@pytest.mark.parametrize(
    "fault", ["cuts:900", "cuts:30000", "doubles:20000", "flips:25000", "spoils:30000", "forgets:7"]
)
def test_a_stream_that_is_not_what_was_sent(tmp_path, fault):
    """It is cut where the fault is seen, and goes on behind it: all results are right, and no task runs twice."""
    file = tmp_path / "counts"
    with Ways(tmp_path, f"{fault}@agent*2").pool() as pool:
        futures = [pool.submit(counted, str(file), n) for n in range(400)]
        assert [future.result(60) for future in futures] == [-n for n in range(400)]
        data = [os.urandom(30_000) for _ in range(4)]
        assert [future.result(60) for future in [pool.submit(bytes, one) for one in data]] == data
    assert sorted(map(int, file.read_text().split())) == list(range(400))


def test_an_agent_that_gets_sigterm(tmp_path):
    """The node drains: what runs there finishes, other tasks run elsewhere, and none is started a second time."""
    file = tmp_path / "counts"
    ways = Ways(tmp_path, nodes=("a", "b"))
    with ways.pool(worker=sky.Worker(concurrency=2, retries=0)) as pool:
        assert pool.submit(end_children, 20).result(30) == [signal.SIGTERM] * 20
        futures = [pool.submit(counted, str(file), n, 0.05) for n in range(80)]
        assert eventually(lambda: file.exists() and file.read_text(), 20)
        agent = pool.nodes()[0].pid
        os.kill(agent, signal.SIGTERM)
        assert [future.result(30) for future in futures] == [-n for n in range(80)]
        assert eventually(lambda: has_ended(agent), 20)
    assert sorted(map(int, file.read_text().split())) == list(range(80))


# ------------------------------------------------------------------------------------------------ what is left

CLIENT = """
import sys, skyward_lite as sky
with sky.pool(sky.Exec({command!r}, ["a", "b"], python=sys.executable), lease=5, plugins=[]) as pool:
    print(pool.submit(abs, -1).result(), flush=True)
    {then}
"""


@pytest.mark.parametrize(
    ("fault", "then", "within"),
    [("none", "pass", 0.5), ("lingers", "pass", 6), ("none", "import os; os.kill(os.getpid(), 9)", 15)],
)
def test_nothing_is_left(tmp_path, fault, then, within):
    """No process of the command or of a node outlives a client that leaves, even if commands hang, or is killed."""
    ways = Ways(tmp_path, fault)
    program = CLIENT.format(command=ways.command, then=then)
    before = set(ours())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=50, check=False)
    assert done.stdout == b"1\n", done.stderr
    left: Callable[[], object] = lambda: (ways.running(""), set(ours()) - before)  # noqa: E731
    assert eventually(lambda: left() == ([], set()), within), left()
