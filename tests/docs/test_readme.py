"""The README's examples run and do what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import joblib
import skyward_lite as sky
from lab import Lab

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent.parent / "README.md").read_text(), re.DOTALL)


def run(block: str, names: dict[str, object]) -> dict[str, object]:
    exec(compile(block, "README.md", "exec"), names)
    return names


def names() -> dict[str, object]:
    return {
        "__name__": "__main__",
        "sky": sky,
        "Parallel": joblib.Parallel,
        "delayed": joblib.delayed,
        "f": abs,
        "slow_task": lambda x: x,
    }


def test_readme_has_a_test_for_every_block():
    """The number of Python blocks is the number of tests here and in test_aws.py."""
    assert len(BLOCKS) == 6


def test_readme_first_example():
    """The first example runs with shorter sleeps."""
    done = run(BLOCKS[0].replace("sleep(5)", "sleep(0.01)"), {"__name__": "__main__"})
    assert done["results"] == [2 * i for i in range(100)]


def test_readme_executor_example():
    """Parallel, submit and map run on one pool."""
    run(BLOCKS[1], names())


def test_readme_compute_example():
    """The operators of lazy calls return the values of the comments."""
    done = run(BLOCKS[2], names())
    assert done["future"].result() == done["text"] == "3"
    assert done["texts"] == ["3", "3"]
    assert (done["a"], done["b"]) == ("1", "2")
    assert done["many"] == tuple(str(i) for i in range(100))


def test_readme_plugin_example(capsys):
    """The plugin of ten lines times each call on its node, and prints it here."""
    given = names()

    def slow_task(x):
        return x

    given["slow_task"] = slow_task
    run(BLOCKS[3], given)
    out = capsys.readouterr().out
    assert out.startswith("[local-0] slow_task took ")
    # Two threads' lines may get into one: print writes a line's end by itself.
    assert len(re.findall(r"slow_task took 0\.\d{3} s", out)) == 3


def test_readme_ssh_example(tmp_path):
    """The example with hosts runs on three hosts that have the environment, of which the last has its own
    concurrency.
    """
    lab = Lab(tmp_path)
    try:
        hosts = [lab.host(name=name) for name in ("lab1", "lab2", "gpu")]
        for host in hosts:
            host.make_environment(sky.plugins.joblib().transform(sky.Image(pip=["numpy"])))
        block = (
            BLOCKS[4].replace("me@lab1", "lab1").replace("lab2:2222", "lab2").replace("concurrency=64", "concurrency=3")
        )
        block = block.replace("))\nwith", f"), config={lab.config!r})\nwith") + "    nodes = pool.nodes()\n"
        done = run(block, names())
    finally:
        lab.close()
    assert [node.name for node in done["nodes"]] == ["lab1", "lab2", "gpu"]
    assert done["nodes"][2].slots == 3
