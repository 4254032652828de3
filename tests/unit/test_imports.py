"""The names of modules that functions and sources import."""

from __future__ import annotations

import itertools
import warnings

import pytest
from skyward_lite import imports


def importing():
    """Import modules in each place of a function where a name may stand."""
    import os.path
    from email import message as renamed

    def inner():
        from xml.dom import minidom

        return [__import__, (lambda: __import__("not.seen")), minidom]

    class Local:
        import json as names

    return os, renamed, inner, Local


def test_a_function_imports_what_its_code_names():
    """Imports within nested functions and classes are found; those that are computed are not, nor are attributes."""
    assert set(imports.in_code(importing.__code__)) == {"os.path", "email", "xml.dom", "json"}
    assert set(imports.in_code((lambda: itertools.count).__code__)) == set()


def test_a_function_of_many_names_imports_the_right_ones():
    """Names whose numbers do not fit a byte are read as Python does."""
    names = [f"name{number}" for number in range(600)]
    body = "\n".join(f"  {name} = other.{name}\n  import module_{name}" for name in names)
    space: dict = {}
    exec(f"def function(other):\n{body}", space)
    assert list(imports.in_code(space["function"].__code__)) == [f"module_{name}" for name in names]


@pytest.mark.parametrize(
    ("text", "package", "names"),
    [
        ("import a.b, c as d", "", {"a.b", "c"}),
        ("from a import b, c", "", {"a", "a.b", "a.c"}),
        ("from a.b import *", "", {"a.b"}),
        ("def f():\n if 1:\n  import a", "", {"a"}),
        ("from . import x\nfrom ..y import z", "p.q", {"p.q", "p.q.x", "p.y", "p.y.z"}),
        ("from . import x\nfrom .... import y", "p", {"p", "p.x"}),
        ("from . import x", "", set()),
        ("print 'not Python 3'", "", set()),
        ("nul = '\0'", "", set()),
        ("import a\nx = " + "(" * 9000 + ")" * 9000, "", set()),
        ("if TYPE_CHECKING:\n import a\nelse:\n import b", "", {"b"}),
        ("if typing.TYPE_CHECKING:\n from a import x\nelif 1:\n import b", "", {"b"}),
        ("if not TYPE_CHECKING:\n import a", "", {"a"}),
        ("try:\n import a\nexcept ImportError:\n import b", "", {"a", "b"}),
    ],
)
def test_a_source_imports_what_its_statements_name(text, package, names):
    """Relative imports are resolved where that is possible; a text that is no Python imports nothing."""
    assert imports.in_source(text, package) == names


@pytest.mark.parametrize("action", ["error", "always"])
def test_a_source_is_read_without_warnings(action, recwarn):
    """Backslashes that mean nothing are no reason to warn, nor, where warnings are errors, to find no imports."""
    text = r"""
import a
x = "\d \\d \" \400", f"\{a}\N{EM DASH}\x41 \' ", b"\d", r"\d\"", \
    1
'''\
\w'''; import b
"""
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert imports.in_source(text) == {"a", "b"}
    assert not recwarn.list
