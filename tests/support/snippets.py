"""The snippets of the documentation's pages, and what a page says of each of them.

A block of Python runs as it stands, unless a comment right above it says otherwise:

    <!-- snippet: hosts -->   needs hosts; they are lab1, lab2 and gpu in the tests
    <!-- snippet: ec2 -->     needs EC2; the tests have a simulated one
    <!-- snippet: slurm -->   needs a job of a Slurm cluster; the tests have one
    <!-- snippet: check -->   is not run: its names and parameters are compared with the public ones

A block of text below `<!-- output -->` is what the block of Python above it prints; `...` stands for anything. Below
`<!-- output like -->` each number, with its unit, stands for any number and unit, and any white space for any other.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import skyward_lite as sky

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>[a-z0-9: ]+) -->\n(?:[ \t]*\n)?)?^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
SEPARATOR = "\N{INFORMATION SEPARATOR TWO}"


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its first line, from 1."""
    language: str
    mark: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(page: Path, language: str = "", mark: str | None = None) -> list[Snippet]:
    """Return the blocks of a page: those of a language, and with a mark ("" for those without one), if it is given."""
    text = page.read_text()
    blocks = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        code = textwrap.dedent(match["text"])
        blocks.append(Snippet(page, line, match["language"], (match["mark"] or "").removeprefix("snippet: "), code))
    return [b for b in blocks if language in ("", b.language) and mark in (None, b.mark)]


def script(page: Path) -> tuple[str, list[tuple[Snippet, Snippet | None]]]:
    """Return a program of a page's blocks, each on its own lines; and the blocks with what they are to print."""
    blocks = snippets(page)
    lines: list[str] = []
    runs: list[tuple[Snippet, Snippet | None]] = []
    for number, block in enumerate(blocks):
        if block.language != "python" or block.mark:
            continue
        after = blocks[number + 1] if number + 1 < len(blocks) else None
        runs.append((block, after if after is not None and after.mark in ("output", "output like") else None))
        lines += [""] * (block.line - 1 - len(lines))
        lines += block.text.splitlines()
        lines.append(f"print({SEPARATOR!r}, flush=True)")
    return "\n".join(lines) + "\n", runs


NUMBER = re.compile(r"\d[\d.,]*(?<=\d)(?: ?(?:[kMGT]?B|bytes|[mµn]?s|min|h|%)\b)?")


def printed(expected: str, *, like: bool = False) -> re.Pattern[str]:
    """Return what matches an output in which `...`, and numbers if only something like it is printed, are any."""
    lines = []
    for line in expected.strip().splitlines():
        pattern = re.escape(line.rstrip()).replace(r"\.\.\.", ".*")
        if like:
            pieces = NUMBER.split(line.strip())
            pattern = NUMBER.pattern.join(re.sub(r"(?:\\ )+", r"\\s+", re.escape(piece)) for piece in pieces)
            pattern = r"\s*" + pattern
        lines.append(pattern)
    return re.compile("\n".join(lines))


def run(page: Path, directory: Path) -> None:
    """Run a page's blocks as one program; compare what they print with what the page says."""
    program, runs = script(page)
    file = directory / f"{page.stem}.py"
    file.write_text(program)
    command = [sys.executable, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd=directory)
    assert done.returncode == 0, f"{page.name} (lines are the page's):\n{done.stdout}\n{done.stderr}"
    outputs = done.stdout.split(SEPARATOR + "\n")
    for (block, expected), output in zip(runs, outputs, strict=False):
        if expected is not None:
            text = "\n".join(line.rstrip() for line in output.strip().splitlines())
            pattern = printed(expected.text, like=expected.mark == "output like")
            assert pattern.fullmatch(text), f"{block.place} prints:\n{text}"


# ------------------------------------------------------------------------------------------------ names


def public(path: str) -> Any:
    """Return what a dotted path names in the public module; raise AttributeError."""
    found: Any = sky
    for name in path.split("."):
        found = getattr(found, name)
    return found


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` of an expression that is only names; "" of another one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (start := dotted(node.value)):
        return f"{start}.{node.attr}"
    return ""


def unknown(block: Snippet) -> Iterator[str]:
    """Yield the names and parameters of ours that a block has, and the public module has not."""
    for node in ast.walk(ast.parse(block.text)):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        called = dotted(node.func) if isinstance(node, ast.Call) else ""
        for owner, prefix in (("", "sky."), ("ComputePool.", "pool.")):
            try:
                if name.startswith(prefix):
                    public(owner + name.removeprefix(prefix).split("(")[0])
                if isinstance(node, ast.Call) and called.startswith(prefix):
                    yield from bad_parameters(owner + called.removeprefix(prefix), [k.arg for k in node.keywords])
            except AttributeError:
                yield f"{block.place}: {name or called}"


def bad_parameters(path: str, keywords: list[str | None]) -> Iterator[str]:
    """Yield those of the keywords that the callable of a public path has not."""
    parameters = inspect.signature(public(path)).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    yield from (f"{path}({word}=)" for word in keywords if word and word not in parameters and not free)


IN_PROSE = re.compile(
    r"\b(?P<name>pool|ComputePool|Worker|Image|SSH|Host|Local|AWS|Exec|Slurm|Plugin)\((?P<word>[a-z_]+)=|\bpool\.(?P<method>[a-z_]+)\("
)


def unknown_in_prose(page: Path) -> Iterator[str]:
    """Yield parameters and methods that a page's inline code names, and that are not there."""
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text()):
        for match in IN_PROSE.finditer(code):
            if match["method"]:
                if not hasattr(sky.ComputePool, match["method"]):
                    yield f"{page.name}: {code}"
            elif any(bad_parameters(match["name"], [match["word"]])):
                yield f"{page.name}: {code}"
