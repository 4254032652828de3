"""What importing the package costs: modules, not seconds; those are for `make bench`."""

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
    """Run the code in a fresh interpreter; the modules that it has then and that a bare one has not."""
    listed = "import sys; before = {*sys.modules}; exec(sys.argv[1]); print(*{*sys.modules} - before, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", listed, code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_imports_next_to_nothing():
    """What is heavy is imported where it is used; the package's own names when they are asked for."""
    modules = imported("import skyward_lite")
    assert "skyward_lite" in modules
    assert not modules & {*HEAVY, "cloudpickle", "typing", "skyward_lite.client.pool"}


def test_naming_the_pool_imports_nothing_heavy():
    """Neither do the names themselves: joblib comes with the pool's start, importlib.metadata with its image."""
    modules = imported("import skyward_lite as sky\nsky.pool(sky.Local(2)), sky.compute")
    assert {"cloudpickle", "skyward_lite.client.pool"} <= modules
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("image", "compares"),
    [("sky.Image()", False), ("sky.Image(pip=['joblib'])", False), ("sky.Image(pip=['joblib>=1'])", True)],
)
def test_an_image_without_requirements_imports_no_parser_of_them(image, compares):
    """Names, and the exact versions that a pool's own plugins ask for, are compared without it."""
    modules = imported(f"import skyward_lite as sky\nwith sky.pool(sky.Local(1), image={image}): pass")
    assert ("packaging.requirements" in modules) == compares


def test_the_nodes_processes_import_no_more_than_they_need():
    """The agent unpickles nothing; the worker has no pool."""
    assert not imported("import skyward_lite.node.agent") & {*HEAVY, "cloudpickle", "typing"}
    assert not imported("import skyward_lite.node.worker") & {*HEAVY, "skyward_lite.client.pool"}


@pytest.mark.parametrize(
    "room", ["client.lazy", "client.pool", "errors", "image", "pickling.payload", "plugins", "providers.local"]
)
def test_any_module_may_be_imported_first(room):
    """As unpickling does in a worker; then the package's names are there too."""
    assert "skyward_lite.client.pool" in imported(f"import skyward_lite.{room}, skyward_lite as sky\nsky.pool")


def test_the_package_has_the_names_that_it_lists():
    """And no others: those that it once imported lazily are looked up no more."""
    names = imported("from skyward_lite import *\nfor name in list(globals()): sys.modules[f'has.{name}'] = None")
    assert {f"has.{name}" for name in sky.__all__} <= names
    assert dir(sky) == sorted(sky.__all__)
    assert sky.pool is sky.pool
    with pytest.raises(AttributeError, match="'skyward_lite' has no attribute 'poll'"):
        sky.poll  # noqa: B018


def test_type_checkers_see_the_names_that_the_package_has():
    """The names that the package imports for type checkers are those that it looks up, in the same modules."""
    seen = {}
    for node in ast.walk(ast.parse(Path(sky.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            seen |= {alias.name: node.module or "" for alias in node.names if alias.asname == alias.name}
    assert seen == sky._MODULES


def test_pool_is_the_class():
    """Its signature is the class's own, and so is its docstring."""
    assert sky.pool is sky.ComputePool
    signature = inspect.signature(sky.pool)
    assert list(signature.parameters) == [
        *("provider", "nodes", "vcpus", "memory_gb", "worker", "image", "plugins"),
        *("lease", "connect_timeout", "start_timeout", "strict_env"),
    ]
    assert [parameter.default for parameter in signature.parameters.values()][7:] == [60.0, 20.0, 600.0, False]
    assert "`lease`: seconds" in sky.pool.__doc__
