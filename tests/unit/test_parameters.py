"""What public classes and functions say to wrong parameters: the name, the value and what was probably meant."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skyward_lite as sky
from skyward_lite import keywords

NAMED: dict[str, Any] = {
    "Worker": sky.Worker,
    "pool": sky.pool,
    "Host": sky.Host,
    "SSH": sky.SSH,
    "Slurm": sky.Slurm,
    "Exec": sky.Exec,
    "Local": sky.Local,
    "AWS": sky.AWS,
    "Image": sky.Image,
    "Plugin": sky.Plugin,
    "map": sky.ComputePool.map,
}
"""What explains names that it does not have."""


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: sky.Worker(n_jobs=4), "Worker() has no parameter n_jobs: .* write Worker(concurrency=4)"),
        (lambda: sky.Worker(max_workers=np.int64(4)), "max_workers: .* concurrency"),
        (lambda: sky.Worker(threads=8), 'Worker(concurrency=8, executor="thread")'),
        (lambda: sky.Worker(processes=8), 'Worker(concurrency=8, executor="process")'),
        (lambda: sky.Worker(timeout=60), "Worker(task_timeout=60)"),
        (lambda: sky.Worker(concurrent=4), "did you mean concurrency?"),
        (lambda: sky.Worker(colour=4), "its parameters are concurrency, executor, retries"),
        (lambda: sky.Worker(1, "thread", 3, 4, 5, 6, 7), "Worker() takes 6 arguments .* not 7"),
        (lambda: sky.pool(n_jobs=4), "pool() has no parameter n_jobs: .* pool(worker=sky.Worker(concurrency=4))"),
        (lambda: sky.pool(workers=2), "pool(worker=sky.Worker(concurrency=2))"),
        (lambda: sky.pool(cores=2), "pool(worker=sky.Worker(concurrency=2))"),
        (lambda: sky.pool(hosts=["lab1"]), 'pool(provider=sky.SSH("me@lab1", "lab2"))'),
        (lambda: sky.pool(n_nodes=2), "pool(nodes=2)"),
        (lambda: sky.pool(concurrency=4), "parameter of Worker: write pool(worker=sky.Worker(concurrency=4))"),
        (lambda: sky.pool(pip=["numpy"]), "parameter of Image: write pool(image=sky.Image(pip=...))"),
        (lambda: sky.pool(region="eu-west-1"), "parameter of AWS: write pool(provider=sky.AWS(region=...))"),
        (lambda: sky.pool(start_timout=60), "did you mean start_timeout?"),
        (lambda: sky.pool(sky.Local(), 2, sky.Worker()), r"takes 2 arguments .* as in pool(..., vcpus=...)"),
        (lambda: sky.Slurm("short"), "Slurm() takes no arguments without their names: write each as Slurm(NAME=VALUE)"),
        (lambda: sky.Local(1, 2), "Local() takes 1 argument without its name (nodes), not 2"),
        (lambda: sky.SSH("lab", user="me", port=22), "ssh configuration"),
        (lambda: sky.SSH("lab", nodes=2), 'SSH("me@lab1", "lab2")'),
        (lambda: sky.Exec("sh -c", hosts=["a"]), 'Exec("docker exec -i {node} sh -c", nodes=["a", "b"])'),
        (lambda: sky.pool(command="sh -c"), "pool(provider=sky.Exec(command=...))"),
        (lambda: sky.Host("lab", slots=4), "Host(..., concurrency=4)"),
        (lambda: sky.Local(workers=4), "pool(worker=sky.Worker(concurrency=4))"),
        (lambda: sky.AWS(spot=True), 'AWS(allocation="spot")'),
        (lambda: sky.AWS(nodes=4), "pool(nodes=4, provider=sky.AWS(...))"),
        (lambda: sky.AWS(nodes="a token"), "pool(nodes=..., provider"),
        (lambda: sky.Image(packages=["numpy"]), "Image(pip=[...])"),
        (lambda: sky.Image(environment={}), "Image(env={...})"),
        (lambda: sky.Image.like_here(packages=["numpy"]), "Image(pip=[...])"),
        (lambda: sky.Plugin("mine", around_workers=print), "did you mean around_worker?"),
        (lambda: sky.pool().map(abs, [1], chunk_size=3), "map(..., chunksize=3)"),
        (lambda: dataclasses.replace(sky.Worker(), n_jobs=4), "Worker(concurrency=4)"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_name_that_was_meant(wrong, says):
    """A parameter under another library's name, of another class, or misspelt is named with what to write."""
    with pytest.raises(TypeError) as caught:
        wrong()
    assert_says(str(caught.value), says)


def assert_says(text: str, parts: str) -> None:
    """Check that the parts of a text, between which " .* " stands, are in it in this order."""
    rest = text
    for part in parts.split(" .* "):
        assert part in rest, text
        rest = rest.partition(part)[2]


TYPES = [
    (lambda: sky.pool(lease="60"), "pool(lease='60'): a number of seconds is needed, not a str: write lease=60"),
    (lambda: sky.pool(lease=datetime.timedelta(minutes=2)), "not a timedelta: write lease=120"),
    (lambda: sky.pool(start_timeout=None), "not None"),
    (lambda: sky.pool(vcpus="4"), "pool(vcpus='4'): a whole number is needed, not a str: write vcpus=4"),
    (lambda: sky.pool(vcpus=4.0), "pool(vcpus=4.0): a whole number is needed, not a float: write vcpus=4"),
    (lambda: sky.pool(vcpus=4.5), "pool(vcpus=4.5): a whole number is needed, not a float"),
    (lambda: sky.pool(nodes="2"), "pool(nodes='2'): a whole number, or two: (least, wanted), is needed, .* nodes=2"),
    (lambda: sky.pool(nodes=[2]), "pool(nodes=[2]): a whole number, or two: (least, wanted)"),
    (lambda: sky.pool(provider=sky.SSH), "pool(provider=sky.SSH): .* write provider=sky.SSH('me@lab1')"),
    (lambda: sky.pool(provider=sky.AWS), "write provider=sky.AWS()"),
    (lambda: sky.pool("aws"), "pool(provider='aws'): a provider, such as sky.AWS()"),
    (lambda: sky.pool(4), "sky.Local(nodes=4), or pool(nodes=4)"),
    (lambda: sky.pool(sky.Worker()), "a Worker goes to another parameter: write pool(worker=sky.Worker(...))"),
    (lambda: sky.pool(worker=4), "pool(worker=4): a sky.Worker, such as sky.Worker(concurrency=4)"),
    (lambda: sky.pool(worker=sky.Worker), "write worker=sky.Worker("),
    (lambda: sky.pool(image="numpy"), "pool(image='numpy'): a sky.Image, such as sky.Image(pip=['numpy'])"),
    (lambda: sky.pool(plugins=sky.plugins.sklearn()), "a list of plugins, such as [sky.plugins.sklearn()]"),
    (lambda: sky.pool(plugins=sky.plugins.sklearn), "a list of plugins, such as [sky.plugins.sklearn()]"),
    (lambda: sky.pool(plugins=[sky.plugins.joblib]), "a list of plugins, such as [sky.plugins.joblib()]"),
    (lambda: sky.pool(plugins="joblib"), "pool(plugins='joblib'): a list of plugins"),
    (lambda: sky.pool(plugins=4), "pool(plugins=4): a list of plugins"),
    (lambda: sky.Worker(concurrency="4"), "a whole number, or None for one per core, .* write concurrency=4"),
    (lambda: sky.SSH(["a"], "b"), 'SSH(["me@lab1", "lab2"])'),
    (lambda: sky.SSH(1), "SSH(1): each host is a text or a sky.Host"),
    (lambda: sky.SSH("lab", python=3.11), "SSH(python=3.11): the path of an interpreter"),
    (lambda: sky.SSH("lab", config=3), "SSH(config=3): a text is needed, not an int, as in config="),
    (lambda: sky.Host(1), "Host(address=1): a host is a text"),
    (lambda: sky.Host("lab", python=3), "Host(python=3): the path of an interpreter"),
    (lambda: sky.Host("lab", concurrency="3"), "concurrency='3'): .* write concurrency=3"),
    (lambda: sky.AWS(region=1), "AWS(region=1): a text is needed, not an int, as in region="),
    (lambda: sky.AWS(ssh_from=["10.0.0.0/8"]), "AWS(ssh_from=['10.0.0.0/8']): a text is needed"),
    (lambda: sky.AWS(tags=["a"]), "AWS(tags=...): a dict is needed, not a list, as in tags="),
    (lambda: sky.AWS(tags={"a": 1}), "AWS(tags={'a': 1}): the value of a tag is a text"),
    (lambda: sky.AWS(tags={1: "a"}), "AWS(tags={1: ...}): names are texts"),
    (lambda: sky.AWS(instance_type=[1]), "AWS(instance_type=[1]): a list of texts is needed"),
    (lambda: sky.AWS(instance_type=4), "AWS(instance_type=4): a list is needed, not an int"),
    (lambda: sky.AWS(disk_gb="16"), "write disk_gb=16"),
    (lambda: sky.Image(pip="numpy"), "Image(pip='numpy'): a list is needed: write pip=['numpy']"),
    (lambda: sky.Image(pip={"numpy": "2"}), "Image(pip={'numpy': '2'}): a list is needed, not a dict"),
    (lambda: sky.Image(pip=None), "Image(pip=None): a list is needed, not None"),
    (lambda: sky.Image(pip=[1]), "Image(pip=[1]): a list of texts is needed"),
    (lambda: sky.Image(includes=Path("src")), "Image(includes='src'): a list is needed: write includes=['src']"),
    (lambda: sky.Image(env={"A": None}), "Image(env={'A': ...}): a text is needed, not None"),
    (lambda: sky.Image(env={"A": True}), "Image(env={'A': ...}): a text is needed, not True"),
    (lambda: sky.Image(env={"A": ["secret"]}), "Image(env={'A': ...}): a text is needed, not a list"),
    (lambda: sky.Image(env=["A=1"]), "Image(env=...): a dict is needed, not a list"),
    (lambda: sky.Image(wheelhouse=1), "Image(wheelhouse=1): a text is needed, not an int"),
    (lambda: sky.Image(index_url=1), "Image(index_url=1): a text is needed, not an int"),
    (lambda: sky.Plugin(1), "Plugin(name=1): a text is needed"),
    (lambda: sky.Plugin("mine", preload="numpy"), "write preload=['numpy']"),
    (lambda: sky.Plugin("mine", decorate=3), "Plugin(decorate=3): a function is needed, not an int"),
    (lambda: sky.plugins.joblib(1.6), "joblib(version=1.6): a text is needed, not a float"),
    (lambda: sky.plugins.sklearn(1.7), "sklearn(version=1.7): a text is needed, not a float"),
    (lambda: sky.messages.listen(1, print), "listen(address=1): a text is needed"),
    (lambda: sky.messages.listen("a", "b"), "listen(listener='b'): a function is needed"),
    (lambda: sky.messages.send(1, "b"), "send(address=1): a text is needed"),
    (lambda: sky.pool().submit(3), "submit(3, ...): .* write pool.submit(f, 1), not pool.submit(f(1))"),
    (lambda: sky.pool().map(3, [1]), "map(3, ...): .* write pool.map(f, [1, 2])"),
    (lambda: sky.pool().map(abs, [1], timeout="3"), "map(timeout='3'): .* write timeout=3"),
    (lambda: sky.pool().map(abs, 3), "map(f, 3): .* not an int: write pool.map(f, [3])"),
    (lambda: sky.compute(3), "@sky.compute takes a function"),
    (lambda: sky.gather(3), "gather takes calls"),
]


@pytest.mark.parametrize(("wrong", "says"), TYPES)
def test_a_value_of_a_wrong_type_is_answered_with_what_to_write(wrong, says):
    """The error names the parameter, the value and a right value; secrets are not shown."""
    with pytest.raises(TypeError) as caught:
        wrong()
    assert_says(str(caught.value), says)
    assert "secret" not in str(caught.value)


def test_the_traceback_of_a_wrong_value_ends_beside_the_line_that_has_it():
    """Our own frames, which only check, are not in the traceback; errors that the user's objects raise keep theirs."""
    for wrong in (lambda: sky.pool(lease="60"), lambda: sky.SSH("a b"), lambda: sky.Image(wheelhouse="/no/where")):
        with pytest.raises((TypeError, ValueError, FileNotFoundError)) as caught:
            wrong()
        assert len(caught.traceback) == 3

    class Rude:
        def __len__(self):
            return 1

        def __float__(self):
            raise ValueError("rude")

    with pytest.raises(ValueError, match="rude") as caught:
        sky.pool(lease=Rude())
    assert caught.traceback[-1].name == "__float__"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: sky.pool(nodes=(10, 2)), "the smaller number comes first, as (least, wanted): write nodes=(2, 10)"),
        (lambda: sky.pool(sky.Local(2), 3), "pool(nodes=3) and Local(nodes=2) disagree: say the number of nodes once"),
        (lambda: sky.pool(lease=math.nan), "pool(lease=nan): more than 0"),
        (lambda: sky.pool(memory_gb=np.inf), "pool(memory_gb=inf): more than 0"),
        (lambda: sky.pool().map(abs, [1], timeout=-1), "map(timeout=-1): more than 0"),
        (lambda: sky.Worker(executor="threading"), 'write executor="thread"'),
        (lambda: sky.Worker(executor="loky"), 'write executor="process"'),
        (lambda: sky.Worker(executor=4), 'Worker(executor=4): "thread" or "process"'),
        (lambda: sky.SSH(), 'SSH() without hosts: name them, as in SSH("me@lab1", "lab2")'),
        (lambda: sky.SSH([]), "SSH() without hosts"),
        (lambda: sky.SSH("a b"), 'SSH("lab1", "lab2")'),
        (lambda: sky.SSH("a,b"), 'SSH("lab1", "lab2")'),
        (lambda: sky.SSH(""), "a host is"),
        (lambda: sky.AWS(region=" "), "AWS(region=' '): the text is empty; write region="),
        (lambda: sky.AWS(ssh_from="me"), "AWS(ssh_from='me'): the addresses that may reach SSH, as in ssh_from="),
        (lambda: sky.AWS(allocation="ondemand"), "one of spot-if-available, spot, on-demand"),
        (lambda: sky.AWS(tags={"aws:a": "b"}), "aws:a"),
        (lambda: sky.Image(python=3.11), "Image(python=3.11)"),
        (lambda: sky.Image(pip=["numpy=1"]), 'no requirement that pip would understand: write "numpy==1"'),
        (lambda: sky.Image(pip=["numpy 1.26"]), 'write "numpy==1.26"'),
        (lambda: sky.Image(pip=["numpy, pandas"]), "write ['numpy', 'pandas'], each an item of its own"),
        (lambda: sky.Image(pip=["$(touch x);`y`'\""]), 'write "numpy" or "numpy>=2", say'),
        (lambda: sky.Image(pip=["numpy>>1"]), 'write "numpy" or "numpy>=2", say'),
        (lambda: sky.Image(pip=["ä-paket"]), 'write "numpy" or "numpy>=2", say'),
        (lambda: sky.Plugin(""), "Plugin(name=''): the text is empty"),
    ],
)
def test_a_value_out_of_range_is_answered_with_the_range(wrong, says):
    """The error names the parameter, the value and the values that it takes."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        wrong()
    assert_says(str(caught.value), says)


def test_what_can_only_be_meant_in_one_way_is_taken(tmp_path):
    """A list of hosts, a list of two numbers of nodes, paths and numbers in an environment are as good as the rest."""
    assert [host.address for host in sky.SSH(["me@a", sky.Host("b")]).hosts] == ["me@a", "b"]
    assert len(sky.SSH(np.array(["a", "b"])).hosts) == len(sky.SSH(name for name in "ab").hosts) == 2
    assert (pool := sky.pool(nodes=[np.int64(2), 10])).min_nodes == 2
    assert pool.nodes_wanted == 10
    image = sky.Image(env={"A": 1, "B": np.int64(2), "C": 0.5, "D": tmp_path}, includes=[tmp_path], wheelhouse=tmp_path)
    assert image.env == {"A": "1", "B": "2", "C": "0.5", "D": str(tmp_path)}
    assert image.includes == (str(tmp_path),)
    assert image.wheelhouse == str(tmp_path)
    assert sky.SSH("a", python=tmp_path, config=tmp_path).python == str(tmp_path)
    assert sky.SSH("a", config="~/x").config == str(Path.home() / "x")


def test_names_that_are_explained_are_those_of_the_signatures():
    """Each parameter that an explanation names exists, no parameter is taken for a wrong name, and none is left out."""
    parameters = {owner: list(inspect.signature(thing).parameters) for owner, thing in NAMED.items()}
    for owner, meant in keywords.MEANT.items():
        others = [name for names in meant for name in names]
        assert len(others) == len(set(others)), owner
        assert not {*others} & ({*parameters[owner]} - {"hosts"}), owner
    for home, names in keywords.HOMES.items():
        owner = home.rpartition(".")[2]
        hidden = {"hosts", "python", "nodes", "options"} if owner in ("SSH", "Exec", "Slurm") else set()
        assert {*names} == {*parameters[owner]} - hidden, owner


def test_signatures_and_docstrings_stay():
    """Editors, `help()` and type checkers see the parameters themselves."""
    assert str(inspect.signature(sky.Local)).startswith("(nodes: 'int | None' = None)")
    assert "hosts" in inspect.signature(sky.SSH).parameters
    assert sky.ComputePool.map.__doc__
    assert sky.Worker(4) == sky.Worker(concurrency=4)
