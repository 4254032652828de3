"""Nodes of other packages: what the log says, what `strict_env` refuses, and what `Image.like_here` pins."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skyward_lite as sky
from lab import Lab, Sshd
from processes import eventually

OWN = ("cloudpickle", "packaging", "joblib")
"""What the nodes of these tests have, beside skyward_lite."""


def version(name: str) -> str:
    """Return this interpreter's version of a distribution."""
    return importlib.metadata.version(name)


def node_with(lab: Lab, **versions: str) -> Sshd:
    """Start a host that has an environment with `OWN` and these distributions alone; "=" is the version here."""
    host = lab.host()
    host.make_environment(sky.Image())
    (packages,) = host.cache.glob("skyward_lite/*/lib/*/site-packages")
    (packages / "lab.pth").write_text(f"{Path(sky.__file__).parent.parent}\n")
    for name in OWN:
        install(packages, name, "=")
    for name, there in versions.items():
        install(packages, name, there)
    return host


def install(packages: Path, name: str, there: str) -> None:
    """Put a distribution of this interpreter into a directory of packages, under its own version or another one."""
    found = importlib.metadata.distribution(name)
    for top in {file.parts[0] for file in found.files or () if ".." not in file.parts}:
        target = top.replace(f"-{found.version}.", f"-{found.version if there == '=' else there}.")
        if not (packages / target).exists():
            (packages / target).symlink_to(Path(str(found.locate_file(top))))


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> dict[str, Sshd]:
    """A host of equal packages, one that lacks numpy, and one with another numpy."""
    return {
        "equal": node_with(lab, numpy="="),
        "bare": node_with(lab),
        "older": node_with(lab, numpy="1.2.3"),
    }


def pool(lab: Lab, *hosts: Sshd, **options: object) -> sky.ComputePool:
    """Make a pool of hosts."""
    provider = sky.SSH(*(host.name for host in hosts), config=lab.config)
    return sky.pool(provider, worker=sky.Worker(concurrency=1), plugins=[], **options)  # type: ignore[arg-type]


def lacking(host: Sshd) -> str:
    """Return the whole message about a host that lacks numpy only."""
    return (
        f"node {host.name}: numpy is not installed there: tasks that use it may fail or differ. "
        f'Image(pip=["numpy=={version("numpy")}"]) installs it'
    )


# ------------------------------------------------------------------------------------------------ what is said

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
import joblib, pytest, hypothesis  # the nodes do not have them all, and no task uses them
import numpy as np
import skyward_lite as sky

def total(values):
    return int(np.sum(values))

def inner():
    try:
        import numpy
    except ImportError:
        return "lacks it"
    return "has it"

def on(host):
    provider = sky.SSH(host, config=sys.argv[1])
    return sky.pool(provider, worker=sky.Worker(concurrency=1), plugins=[])

with on(sys.argv[2]) as pool:
    print(pool.submit(total, np.arange(3)).result(20), pool.submit(inner).result(20))
with on(sys.argv[3]) as pool:
    print(pool.submit(len, "none").result(20))
    print(pool.submit(inner).result(20), pool.submit(inner).result(20))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "IPython"]], ids=["script", "ipython"])
def test_only_what_tasks_name_is_compared(lab, hosts, tmp_path, launcher):
    """A node of equal packages is no message; one that lacks numpy is one message, of numpy only, in all programs."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    names = [lab.config, hosts["equal"].name, hosts["bare"].name]
    done = subprocess.run(
        [sys.executable, *launcher, str(program), *(["--"] if launcher else []), *names],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if "IPython" not in line]
    assert shown == ["3 has it", "4", lacking(hosts["bare"]), "lacks it lacks it"], done.stderr


def test_each_node_gets_one_message_and_a_further_one_for_further_names(lab, hosts, caplog):
    """What is named first is told of each node that differs, in one message; what is named later in another."""
    # What the modules beside this file import would count, if they were served.
    with pool(lab, *hosts.values(), ship_modules=False) as opened:

        def first() -> None:
            with contextlib.suppress(ImportError):
                import numpy  # noqa: F401

        def second() -> None:
            with contextlib.suppress(ImportError):
                import pandas  # noqa: F401

        opened.submit(len, "").result(20)
        assert not caplog.messages
        opened.submit(first).result(20)
        opened.submit(first).result(20)
        older = f"node {hosts['older'].name}: numpy is 1.2.3 there and {version('numpy')} here: tasks that use it may"
        assert sorted(message[: len(older)] for message in caplog.messages) == sorted(
            [lacking(hosts["bare"])[: len(older)], older]
        )
        caplog.clear()
        opened.submit(second).result(20)
        assert sorted(message.partition(": ")[0] for message in caplog.messages) == sorted(
            f"node {host.name}" for host in hosts.values()
        )
        line = f'Image(pip=["pandas=={version("pandas")}"]'
        pandas = f"pandas is not installed there: tasks that use it may fail or differ. {line}"
        assert all(pandas in message for message in caplog.messages)


def test_an_interpreter_that_is_used_as_it_is_gets_a_line_of_its_own(lab, hosts, caplog):
    """With `SSH(python=)` the message says what to run there, as the pool installs nothing."""
    host = hosts["bare"]
    (python,) = host.cache.glob("skyward_lite/*/bin/python")
    provider = sky.SSH(host.name, config=lab.config, python=str(python))
    with (
        sky.pool(provider, worker=sky.Worker(concurrency=1), plugins=[]) as opened,
        pytest.raises(ModuleNotFoundError),
    ):
        opened.submit(np.add, 1, 2).result(20)
    (message,) = caplog.messages
    assert message.endswith(f'There, `{python} -m pip install "numpy=={version("numpy")}"` installs it')


# ------------------------------------------------------------------------------------------------ strict_env

NOTEBOOK = """
import json, sys
from jupyter_client.manager import start_new_kernel

cells = json.load(sys.stdin)
manager, client = start_new_kernel(kernel_name="python3")
shown = []
for code in cells:
    cell, idle, text = client.execute(code), False, ""
    while not idle:
        message = client.get_iopub_msg(timeout=20)
        content = message["content"]
        if message["parent_header"].get("msg_id") == cell:
            idle = content.get("execution_state") == "idle"
            text += content.get("text", content.get("evalue", ""))
    shown.append(text)
client.stop_channels()
manager.shutdown_kernel(now=True)
json.dump(shown, sys.stdout)
"""


def notebook(*cells: str) -> list[str]:
    """Run the cells of a notebook. Return what each has printed, or the text of its error."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown: list[str] = json.loads(done.stdout)
    return shown


@pytest.mark.slow
def test_strict_env_and_pins_in_a_notebook(lab, hosts):
    """IPython's own packages, which the nodes lack, are no difference; numpy is, as soon as a cell names it."""
    pytest.importorskip("ipykernel")
    open_pool = (
        "import skyward_lite as sky, numpy as np\n"
        f"provider = sky.SSH({hosts['equal'].name!r}, {hosts['bare'].name!r}, config={lab.config!r})\n"
        "pool = sky.pool(provider, worker=sky.Worker(concurrency=1), plugins=[], strict_env=True)\n"
        "pool.__enter__()\n"
        "def total(n):\n    return int(np.arange(n).sum())\n"
        "print(pool.submit(len, 'four').result(20))\n"
    )
    pins = "%cd -q .\nimport sklearn.utils\nprint(*sky.Image.like_here(env={'A': '1'}, pip=['joblib>=1']).pip)"
    shown = notebook(open_pool, "pool.submit(total, 3)", "pool.__exit__(None, None, None)", pins)
    assert shown[:3] == [
        "4\n",
        f"strict_env=True, and the call was not sent: {lacking(hosts['bare'])}. Open the pool anew then",
        "",
    ]
    *pinned, given = shown[3].split()
    assert given == "joblib>=1"
    assert {"numpy", "scikit-learn", "scipy", "threadpoolctl"} <= {pin.partition("==")[0] for pin in pinned}
    assert all(version(name) == there for name, _, there in (pin.partition("==") for pin in pinned))
    assert not {"ipython", "ipykernel", "traitlets", "joblib"} & {pin.partition("==")[0] for pin in pinned}


def test_strict_env_sends_nothing_that_names_what_a_node_lacks(lab, hosts, caplog):
    """The call that names numpy raises, however it is made, and so does each call after it; calls before it run."""
    with pool(lab, hosts["equal"], hosts["older"], strict_env=True) as opened:
        assert opened.submit(sum, [1, 2]).result(20) == 3
        calls = (
            lambda: opened.submit(np.add, 1, 2),
            lambda: list(opened.map(np.sqrt, [4.0])),
            lambda: sky.compute(np.dot)(1, 2) >> opened,
            lambda: opened.submit(sum, [1, 2]),
        )
        for call in calls:
            with pytest.raises(sky.EnvironmentMismatchError, match=r"numpy is 1\.2\.3 there and") as caught:
                call()
            assert hosts["older"].name in str(caught.value)
            assert hosts["equal"].name not in str(caught.value)
        assert opened.status().pending == 0
    assert not caplog.messages


def test_strict_env_leaves_a_later_node_out(lab, hosts, caplog):
    """A node that greets when numpy has been named, and lacks it, is lost for this reason, and the others go on."""
    held = lab.host()
    gate = held.directory / "gate"
    os.mkfifo(gate)
    node = node_with(lab)
    (python,) = node.cache.glob("skyward_lite/*/bin/python")
    program = python.read_text().replace("exec ", f'case "$*" in *agent*|*attach*) read _ < {gate};; esac\nexec ', 1)
    python.write_text(program)
    with pool(lab, hosts["equal"], node, strict_env=True, nodes=(1, 2)) as opened:
        assert opened.submit(np.add, 1, 2).result(20) == 3
        gate.write_text("\n")
        assert eventually(lambda: opened.nodes()[1].state == "lost", 20)
        reason = opened.nodes()[1].reason
        assert "strict_env=True: numpy is not installed there" in reason
        assert f'Image(pip=["numpy=={version("numpy")}"])' in reason
        assert opened.submit(np.add, 1, 2).result(20) == 3


def test_strict_env_refuses_a_start(lab):
    """A node of another cloudpickle, which makes the pickles, fails the start."""
    host = node_with(lab)
    (record,) = host.cache.glob("skyward_lite/*/lib/*/site-packages/cloudpickle-*.dist-info")
    record.rename(record.with_name("cloudpickle-1.0.dist-info"))
    with pytest.raises(sky.NodeStartError, match=r"strict_env=True: cloudpickle is 1\.0 there"):
        pool(lab, host, strict_env=True).__enter__()
