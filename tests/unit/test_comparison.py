"""What is said of nodes with other packages, and when, without nodes."""

from __future__ import annotations

import types
from typing import Any

import cloudpickle
import numpy as np
import pytest
import skyward_lite as sky
from skyward_lite import distributions
from skyward_lite.client.comparison import Comparison, Difference, sentence
from skyward_lite.distributions import Distribution
from skyward_lite.pickling import batches, modules, payload

NUMPY = {"numpy": np.__version__}
CLOUDPICKLE = {"cloudpickle": cloudpickle.__version__}


class Core:
    """A core with some nodes: the state of each, and the packages that it tells."""

    def __init__(self, *nodes: tuple[str, dict[str, str] | None]) -> None:
        self.all = list(nodes)
        self.required: dict[str, str] = {}

    def nodes(self) -> list[dict[str, str]]:
        return [{"name": f"n{number}", "state": state} for number, (state, _) in enumerate(self.all)]

    def packages(self, number: int) -> dict[str, str] | None:
        return self.all[number][1]

    def require(self, packages: dict[str, str]) -> None:
        self.required = packages


def comparison(core: Core, strict: bool = False) -> tuple[Comparison, modules.Modules]:
    """Return a comparison that has begun, and the modules whose names it compares."""
    machines: Any = [types.SimpleNamespace(name=f"n{n}", shares_files=False, python=None) for n in range(len(core.all))]
    made, kept = Comparison(core, machines, strict), modules.Modules(shares_files=False)  # type: ignore[arg-type]
    made.begin(kept)
    return made, kept


def named(kept: modules.Modules, call: Any, *args: Any) -> set[str]:
    """Pickle a call, and return the distributions that have been named so far."""
    before = kept.begin(0)
    try:
        batches.dump_call(payload.Encoder(1 << 20), (call, args, {}))
    finally:
        modules.end(before)
    return {each.name for name in kept.named for each in distributions.of_module(name)} - {"cloudpickle"}


def importing() -> None:
    import packaging.version  # noqa: F401


@pytest.mark.parametrize(
    ("call", "args", "names"),
    [
        (len, ("",), set()),
        (np.add, (1, 2), {"numpy"}),
        (np.dot, (1, 2), {"numpy"}),
        (len, (np.arange(3),), {"numpy"}),
        (len, ([np.float64(1)],), {"numpy"}),
        (lambda: np.pi, (), {"numpy"}),
        (lambda: pytest, (), {"pytest"}),
        (lambda value: [lambda: pytest.raises, value], (np.int8,), {"pytest", "numpy"}),
        (cloudpickle.dumps, (1,), set()),
        (sky.Image, (), set()),
    ],
)
def test_what_a_pickle_names_is_of_a_distribution(call, args, names):
    """Named are the modules of functions, classes, arrays and functions of types of their own, by whatever way."""
    assert named(modules.Modules(shares_files=False), call, *args) == names


def test_a_function_that_is_sent_names_what_it_imports(monkeypatch):
    """Its code is sent, so its own imports count; a function that goes by name brings no code."""
    kept = modules.Modules(shares_files=False)
    assert named(kept, importing) == {"packaging"}  # this file is no module that nodes have
    monkeypatch.setattr(importing, "__module__", "json")
    monkeypatch.setattr("json.importing", importing, raising=False)
    assert named(modules.Modules(shares_files=False), importing) == set()


def test_nothing_is_compared_twice(caplog):
    """A node is told of once for each package, also if it is ready again; what it has otherwise then is told anew."""
    core = Core(("ready", CLOUDPICKLE), ("lost", {}), ("ready", {**CLOUDPICKLE, **NUMPY}), ("connecting", None))
    made, kept = comparison(core)
    made.ready(0)
    made.look()
    assert not caplog.messages
    kept.named.add("numpy.linalg")
    for _ in range(2):
        made.look()
        made.ready(0)
    (message,) = caplog.messages
    assert message.startswith("node n0: numpy is not installed there: ")
    core.all[3] = core.all[1] = "ready", {"numpy": "0.1", "cloudpickle": "0.2"}
    made.ready(1)
    made.ready(3)
    assert [text.partition(": ")[0] for text in caplog.messages[1:]] == ["node n1", "node n3"]
    assert f"cloudpickle is 0.2 there and {cloudpickle.__version__} here, numpy is 0.1 there" in caplog.messages[1]
    core.all[0] = "ready", {**CLOUDPICKLE, "numpy": "0.3"}
    made.ready(0)
    assert "numpy is 0.3 there" in caplog.messages[3]
    core.all[0] = "ready", {}
    kept.named.add("pytest")
    made.look()
    assert len(caplog.messages) == 7
    assert not [text for text in caplog.messages[4:] if "n0" in text]


def test_served_modules_name_what_they_import(caplog):
    """The imports of sources that nodes get count as much as what pickles name."""
    made, kept = comparison(Core(("ready", CLOUDPICKLE)))
    kept.sources = types.SimpleNamespace(imports={"numpy.linalg", "nothing_of_that_name"})  # type: ignore[attr-defined]
    made.look()
    assert "numpy is not installed there" in caplog.text


def test_a_strict_pool_takes_no_call_while_a_node_differs():
    """Every call raises from the one on that named the package, until no such node is left."""
    core = Core(("ready", {**CLOUDPICKLE, **NUMPY}), ("connecting", CLOUDPICKLE), ("lost", CLOUDPICKLE))
    made, kept = comparison(core, strict=True)
    assert core.required == CLOUDPICKLE
    made.look()
    kept.named.add("numpy")
    for _ in range(2):
        with pytest.raises(
            sky.EnvironmentMismatchError, match="not sent: node n1: numpy is not installed there"
        ) as caught:
            made.look()
        assert "n0" not in str(caught.value)
        assert "n2" not in str(caught.value)
    assert core.required == {**CLOUDPICKLE, **NUMPY}
    core.all[1] = "lost", CLOUDPICKLE
    made.look()
    core.all[1] = "ready", {}
    kept.named.add("pytest")
    with pytest.raises(sky.EnvironmentMismatchError, match="node n1: it does not tell which packages it has"):
        made.look()


def test_the_line_that_mends_it():
    """Each package has the remedy that fits where it came from, and where the node's interpreter is used as it is."""

    def of(name: str, url: str = "", directory: str = "", there: str | None = None) -> Difference:
        return Difference(Distribution(name, "1.0", "", url, directory, False), there)

    assert sentence([of("a"), of("b", there="2")], None) == (
        "a is not installed there, b is 2 there and 1.0 here: tasks that use them may fail or differ. "
        'Image(pip=["a==1.0", "b==1.0"]) installs them'
    )
    assert sentence([of("a", url="git+https://host/a@1")], "/opt/my python") == (
        "a is not installed there: tasks that use it may fail or differ. "
        'There, `/opt/my python -m pip install "a @ git+https://host/a@1"` installs it'
    )
    assert sentence([of("a", directory="file:///srv/a")], None) == (
        "a is not installed there: tasks that use it may fail or differ. a was installed here from file:///srv/a: "
        "send its modules with Image(includes=[...]), or a wheel of it with Image(wheelhouse=)"
    )
