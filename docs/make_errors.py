"""Write `errors.md` from the docstrings of `skyward_lite.errors`: `python docs/make_errors.py`.

A docstring has paragraphs. One that begins "Example:" is a text that the exception has, one that begins "What to do:"
is advice. `make docs` runs this, and a test compares the page with the docstrings.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from skyward_lite import errors

PAGE = Path(__file__).with_name("errors.md")
COLUMNS = 120
EXAMPLE_COLUMNS = 84
"""Characters of a line of an example: more would need to be scrolled."""
HEAD = """\
<!-- Written by docs/make_errors.py from the docstrings in python/skyward_lite/errors.py. Edit those. -->

# Errors

When one of your functions raises an exception in a task, you get that exception itself, with its own type. Its
`__cause__` is a [`RemoteTraceback`](#remotetraceback), which names the node, the task and the call:

```text
skyward_lite.errors.RemoteTraceback: on node lab1, task 2: mean([])
\"\"\"
Traceback (most recent call last):
  File "train.py", line 9, in mean
--> return sum(values) / len(values)
           ~~~~~~~~~~~~^~~~~~~~~~~~~
ZeroDivisionError: division by zero
\"\"\"

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "train.py", line 12, in <module>
    Parallel(n_jobs=-1)(delayed(mean)(values) for values in rows)
ZeroDivisionError: division by zero
node lab1, task 2: mean([])
```

The arrow is at the line of your own code that failed. Frames of skyward_lite and joblib are left out; with the
environment variable `SKYWARD_TRACEBACK=full` those of this process are shown.

What follows are the exceptions that skyward_lite raises itself. Each is in `skyward_lite` and in `skyward_lite.errors`.
For wrong parameters it raises Python's own `TypeError` and `ValueError`, which name the parameter, its value and what
to write.
"""


def page() -> str:
    """Return the text of the page."""
    names = ["SkywardError", *(name for name in vars(errors) if name in errors.__all__ and name != "SkywardError")]
    parts = [HEAD, *(part for name in names for part in section(getattr(errors, name)))]
    return "\n".join(parts)


def section(kind: type[BaseException]) -> Iterator[str]:
    """Yield the blocks of text about a class of exceptions."""
    yield f"## {kind.__name__}\n"
    bases = [base.__name__ for base in kind.__bases__ if base not in (errors.SkywardError, Exception)]
    if bases:
        yield f"It is a `{'` and a `'.join(bases)}`, too.\n"
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(kind.__doc__ or "")):
        lead, _, rest = paragraph.partition(": ")
        if lead == "Example":
            example = textwrap.fill(joined(rest), EXAMPLE_COLUMNS, break_long_words=False, break_on_hyphens=False)
            yield f"```text\n{example}\n```\n"
        elif lead == "What to do":
            yield filled(f"**What to do:** {joined(rest)}")
        elif paragraph.startswith("Attributes\n"):
            yield from attributes(paragraph)
        else:
            yield filled(joined(paragraph))


def attributes(paragraph: str) -> Iterator[str]:
    """Yield a list of the attributes of a numpydoc section."""
    for entry in re.split(r"\n(?=\w)", paragraph.partition("---\n")[2].lstrip("-\n")):
        name, _, text = entry.partition("\n")
        yield filled(f"- `{name.partition(' : ')[0]}`: {joined(text)}").rstrip("\n")
    yield ""


def joined(text: str) -> str:
    return " ".join(text.split())


def filled(text: str) -> str:
    """Return a paragraph with lines of at most `COLUMNS` characters, in which no code is broken."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.fill(whole, COLUMNS, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
