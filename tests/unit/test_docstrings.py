"""Docstrings of all that is public are in numpydoc's format, name the parameters that there are, and have examples that
work.
"""

from __future__ import annotations

import doctest
import inspect
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from test_public_api import PARTS, inherited

SECTIONS = ("Parameters", "Returns", "Yields", "Raises", "See Also", "Notes", "Examples", "Attributes")


def things() -> Iterator[tuple[str, Any]]:
    """Return each public class, function and method of ours, under its name, once."""
    seen = set()
    for name in sky.__all__:
        thing = getattr(sky, name)
        of_module = isinstance(thing, types.ModuleType)
        for part, value in (
            ((part, getattr(thing, part)) for part in sorted(PARTS[name])) if of_module else ((name, thing),)
        ):
            if not inspect.isclass(value) and not inspect.isfunction(value):
                continue
            if id(value) not in seen:
                seen.add(id(value))
                yield part, value
            if inspect.isclass(value) and not issubclass(value, BaseException):
                for method in inherited(value):
                    function = getattr(value, method)
                    if callable(function) and id(inspect.unwrap(function)) not in seen:
                        seen.add(id(inspect.unwrap(function)))
                        yield f"{value.__name__}.{method}", function


THINGS = dict(things())


def section(text: str, title: str) -> str | None:
    """Return the lines of a section of a docstring; None if it has none."""
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^(?:{'|'.join(SECTIONS)})\n-+\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return None if found is None else found[1]


@pytest.mark.parametrize("name", THINGS)
def test_docstrings_have_the_parameters_of_the_signature(name):
    """Each parameter is described with its type, under its name, in the order of the signature; and no other is."""
    thing = THINGS[name]
    text = inspect.getdoc(thing) or ""
    first = text.split("\n\n")[0]
    assert first.endswith((".", ":")), first
    assert len(text.splitlines()[0]) <= 120
    for title, line in re.findall(r"^(.*)\n(-{3,})$", text, re.MULTILINE):
        assert title in SECTIONS, title
        assert len(line) == len(title)
    if isinstance(thing, type) and issubclass(thing, BaseException):
        return
    signature = inspect.signature(thing)
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    wanted = [
        kinds.get(parameter.kind, "") + parameter.name
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    described = section(text, "Parameters")
    entries = re.findall(r"^(\S.*)$", described or "", re.MULTILINE)
    assert [part for entry in entries for part in entry.partition(" : ")[0].split(", ")] == wanted
    for parameter, entry in zip(wanted, entries, strict=False):
        assert " : " in entry or parameter in entry, entry
    returned = str(signature.return_annotation)
    if not isinstance(thing, type) and returned not in ("None", "Any") and "empty" not in returned:
        assert section(text, "Returns") is not None, f"{name}: -> {returned}"


def examples() -> Iterator[Any]:
    """Return the examples of the docstrings."""
    finder = doctest.DocTestFinder(recurse=False)
    for name, thing in THINGS.items():
        for test in finder.find(thing, name, globs={"sky": sky, "Parallel": Parallel, "delayed": delayed}):
            if test.examples:
                yield pytest.param(test, id=name)


@pytest.mark.parametrize("example", list(examples()))
def test_examples_of_docstrings_work(example, capsys):
    """What an example shows is what comes out."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    # Functions that an example defines are those of a script.
    example.globs["__name__"] = "__main__"
    failed = runner.run(example, out=sys.stderr.write).failed
    assert failed == 0, capsys.readouterr().err
