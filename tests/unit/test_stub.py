"""The stub of the core, `_core.pyi`, against the module that it describes."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import skyward_lite
from skyward_lite import _core

STUB = ast.parse((Path(skyward_lite.__file__).parent / "_core.pyi").read_text("utf-8"))
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
CONSTANTS = {
    node.target.id: ast.unparse(node.annotation).removeprefix("Final[").removesuffix("]")
    for node in STUB.body
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and "Final" in ast.dump(node.annotation)
}
RECORDS = {"NodeRow", "Totals", "AgentSpec"}
"""Classes of the stub that are dicts at run time."""
TYPES = [name for name in CLASSES if name not in RECORDS]
METHODS = [
    pytest.param(name, method, id=f"{name}.{method.name}")
    for name in TYPES
    for method in CLASSES[name].body
    if isinstance(method, ast.FunctionDef) and not method.name.startswith("__")
]


def positional_and_keyword(function: ast.FunctionDef) -> tuple[list[str], list[str]]:
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args)], [a.arg for a in arguments.kwonlyargs]


def optional(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    first = [*arguments.posonlyargs, *arguments.args]
    defaults = first[len(first) - len(arguments.defaults) :]
    by_keyword = [a for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value is not None]
    return {a.arg for a in (*defaults, *by_keyword)}


def assert_same_parameters(stub: ast.FunctionDef, found: inspect.Signature) -> None:
    keyword = [p.name for p in found.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    positional = [name for name in found.parameters if name not in keyword]
    expected = positional_and_keyword(stub)
    names = [*(given for given in expected[0] if given != "self")], expected[1]
    assert names == ([name for name in positional if name != "self"], keyword)
    assert optional(stub) == {p.name for p in found.parameters.values() if p.default is not p.empty}


def test_the_stub_has_each_name_of_the_core_and_no_other():
    """Functions, classes and constants."""
    assert {*FUNCTIONS, *TYPES, *CONSTANTS} == set(_core.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_the_parameters_of_the_stub(name):
    """Names, order, which are given by keyword only, which may be left out."""
    assert_same_parameters(FUNCTIONS[name], inspect.signature(getattr(_core, name)))


@pytest.mark.parametrize("name", TYPES)
def test_classes_have_the_methods_and_attributes_of_the_stub(name):
    """Special methods aside, which Python versions name differently."""
    found = {attribute for attribute in vars(getattr(_core, name)) if not attribute.startswith("__")}
    body = CLASSES[name].body
    expected = {node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("__")}
    expected |= {
        node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert expected == found


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_methods_take_the_parameters_of_the_stub(name, method):
    """Names, order, which may be left out; and static methods are static in both."""
    found = vars(getattr(_core, name))[method.name]
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in method.decorator_list)
    assert static == isinstance(found, staticmethod)
    assert_same_parameters(method, inspect.signature(getattr(getattr(_core, name), method.name)))


@pytest.mark.parametrize("name", ["Core", "WorkerRuntime"])
def test_classes_are_made_with_the_parameters_of_the_stub(name):
    """The stub has `__init__`, and the core `__new__`."""
    [init] = [n for n in CLASSES[name].body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    assert_same_parameters(init, inspect.signature(getattr(_core, name)))


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_have_the_type_of_the_stub(name):
    """As annotated: `Final[int]` is an int."""
    assert type(getattr(_core, name)).__name__ == CONSTANTS[name]


@pytest.mark.parametrize("name", [name for name in TYPES if name.endswith("Error")])
def test_exceptions_have_the_base_of_the_stub(name):
    """Handlers of `CoreError` get each of them."""
    [base] = CLASSES[name].bases
    assert [found.__name__ for found in getattr(_core, name).__bases__] == [ast.unparse(base)]
