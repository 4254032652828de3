"""Cost of importing the package in modules; `make bench` measures the seconds."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import skyward_lite as sky

HEAVY = {"boto3", "importlib.metadata", "joblib", "numpy", "packaging", "scipy", "sklearn"}


def imported(code: str) -> set[str]:
    """Run code in a fresh interpreter. Return the modules that it imported beyond a bare interpreter's."""
    listed = "import sys; before = {*sys.modules}; exec(sys.argv[1]); print(*{*sys.modules} - before, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", listed, code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_imports_next_to_nothing():
    """Heavy modules are imported where they are used, and the package's own when their names are asked for."""
    modules = imported("import skyward_lite")
    assert "skyward_lite" in modules
    assert not modules & {*HEAVY, "cloudpickle", "typing", "skyward_lite.client.pool"}


def test_naming_the_pool_imports_nothing_heavy():
    """`sky.pool` imports nothing heavy: joblib comes with the pool's start, importlib.metadata with its image."""
    modules = imported("import skyward_lite as sky\nsky.pool(sky.Local(2)), sky.compute")
    assert {"cloudpickle", "skyward_lite.client.pool"} <= modules
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("image", "compares"),
    [("sky.Image()", False), ("sky.Image(pip=['joblib'])", False), ("sky.Image(pip=['joblib>=1'])", True)],
)
def test_image_without_requirements_does_not_import_packaging(image, compares):
    """Names, and exact versions that a pool's plugins ask for, are compared without the parser of requirements."""
    modules = imported(f"import skyward_lite as sky\nwith sky.pool(sky.Local(1), image={image}): pass")
    assert ("packaging.requirements" in modules) == compares


def test_the_nodes_processes_import_no_more_than_they_need():
    """The relay, for which each connection waits, imports no core; the agent no unpickling, the worker no pool."""
    relay = imported("import skyward_lite.node.attach")
    assert {module for module in relay if module.startswith("skyward_lite")} == {
        *("skyward_lite", "skyward_lite._version", "skyward_lite.node"),
        *("skyward_lite.node.attach", "skyward_lite.node.directories"),
    }
    assert not relay & {*HEAVY, "cloudpickle", "typing", "subprocess", "json", "pathlib"}
    assert not imported("import skyward_lite.node.agent") & {*HEAVY, "cloudpickle", "typing"}
    assert not imported("import skyward_lite.node.worker") & {*HEAVY, "skyward_lite.client.pool"}


@pytest.mark.parametrize(
    "room", ["client.lazy", "client.pool", "errors", "image", "pickling.payload", "plugins", "providers.local"]
)
def test_any_module_may_be_imported_first(room):
    """Each module can be imported first, as unpickling does in a worker, and the package's names are there then."""
    assert "skyward_lite.client.pool" in imported(f"import skyward_lite.{room}, skyward_lite as sky\nsky.pool")


def test_public_names_are_listed():
    """The package has the names of `__all__` and looks up no others."""
    names = imported("from skyward_lite import *\nfor name in list(globals()): sys.modules[f'has.{name}'] = None")
    assert {f"has.{name}" for name in sky.__all__} <= names
    assert dir(sky) == sorted(sky.__all__)
    assert sky.pool is sky.pool
    with pytest.raises(AttributeError, match="'skyward_lite' has no attribute 'poll'") as caught:
        sky.poll  # noqa: B018
    # What Python's own hint is made from.
    assert (caught.value.name, caught.value.obj) == ("poll", sky)


def test_type_checkers_see_the_public_names():
    """The names imported for type checkers are those that the package looks up, in the same modules."""
    seen = {}
    for node in ast.walk(ast.parse(Path(sky.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            seen |= {alias.name: node.module or "" for alias in node.names if alias.asname == alias.name}
    assert seen == sky._MODULES


def test_pool_is_the_class():
    """`sky.pool` has the class's signature and docstring."""
    assert sky.pool is sky.ComputePool
    signature = inspect.signature(sky.pool)
    assert list(signature.parameters) == [
        *("provider", "nodes", "vcpus", "memory_gb", "worker", "image", "plugins"),
        *("lease", "connect_timeout", "start_timeout", "strict_env", "ship_modules", "progress"),
    ]
    assert [parameter.default for parameter in signature.parameters.values()][7:] == [
        *(120.0, 20.0, 600.0, False, True, None)
    ]
    assert "    lease : float, default 120\n" in sky.pool.__doc__
