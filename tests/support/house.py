"""The rules of the house, checked by `make lint`: sizes of files and functions, private names, and Rust's directions.

Directions between Python modules are import-linter's (pyproject.toml). Here are the rules that no linter knows:

- A file has at most 400 lines, but for those in `LONG_FILES`, whose heads say why. A function has at most 60.
- A name that begins with an underscore is used in its own module only.
- Rust modules import only what is below them, and no two files import each other, over however many steps.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "python" / "skyward_lite"
RUST = ROOT / "rust" / "src"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FILES = {RUST / "queue.rs"}
"""Files that may be longer; the head of each says why."""
ALLOWED_NAMES = {"_core", "_signals", "_version", "_fields", "_listeners", "_ready_batches"}
"""The names of private modules, which the whole package uses, and names of other packages that one of our modules has,
too: named tuples' `_fields`, scikit-learn's `_listeners`, joblib's `_ready_batches`."""
LONG_FUNCTIONS: set[str] = set()
"""Functions that may be longer, as `file:name`; a comment in each says why."""

BELOW = {
    "python": {"client", "node", "transport", "queue", "wire", "error", "locks", "pages", "text", "timing"},
    "client": {"transport", "queue", "wire", "error", "locks", "pages", "text", "timing"},
    "node": {"transport", "queue", "wire", "error", "locks", "pages", "text", "timing"},
    "transport": {"wire", "error", "locks", "pages", "text", "timing"},
    "queue": {"wire", "error", "locks", "pages", "text", "timing"},
    "wire": {"error", "locks", "pages", "text", "timing"},
    "locks": set[str](),
    "error": {"text", "timing"},
    "pages": set[str](),
    "text": set[str](),
    "timing": set[str](),
}
"""Each room of the Rust core, and the rooms that it may import."""


def main() -> int:
    problems = [*long_files(), *long_functions(), *private_names(), *rust_directions(), *rust_circles()]
    for problem in problems:
        print(problem)
    return bool(problems)


def sources() -> Iterator[Path]:
    yield from sorted(PACKAGE.rglob("*.py"))
    yield from sorted(RUST.rglob("*.rs"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def long_files() -> Iterator[str]:
    for path in sources():
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES and path not in LONG_FILES:
            yield f"{shown(path)}: {lines} lines, more than {MAX_FILE_LINES}: split it"


def long_functions() -> Iterator[str]:
    for path in sources():
        found = python_functions(path) if path.suffix == ".py" else rust_functions(path)
        for name, line, lines in found:
            if lines > MAX_FUNCTION_LINES and f"{path.name}:{name}" not in LONG_FUNCTIONS:
                yield f"{shown(path)}:{line}: `{name}` has {lines} lines, more than {MAX_FUNCTION_LINES}"


def python_functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Return the name, the first line and the number of lines of each function, without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
            yield node.name, node.lineno, (node.end_lineno or 0) - node.lineno + 1 - docstring


def rust_functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """As `python_functions`. rustfmt puts a function's last brace below the first letter of its line."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        begin = re.match(r"( *)(?:pub(?:\([a-z]+\))? )?(?:const |async |unsafe )*fn (\w+)", line)
        if begin is None:
            continue
        end = next((n for n, later in enumerate(lines[number:]) if re.match(begin[1] + r"\}|.*;$|.*\}$", later)), 0)
        if not lines[number + end].startswith(begin[1] + "}") and end > 0:
            end = next(n for n, later in enumerate(lines[number:]) if later.rstrip(",;") == begin[1] + "}")
        yield begin[2], number + 1, end + 1


def private_names() -> Iterator[str]:
    """Find uses of private names that another module of the package defines, and this one does not."""
    defined: dict[Path, set[str]] = {}
    used: list[tuple[Path, str, int]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = defined[path] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                if isinstance(node.ctx, ast.Load):
                    used.append((path, name, node.lineno))
                else:
                    own.add(name)
            elif isinstance(node, ast.ImportFrom) and node.level:
                used += [(path, alias.name, node.lineno) for alias in node.names]
    for path, name, line in used:
        others = set().union(*(names for other, names in defined.items() if other != path))
        if re.fullmatch(r"_[a-z]\w*[^_]", name) and name in others - defined[path] - ALLOWED_NAMES:
            yield f"{shown(path)}:{line}: `{name}` is private to another module"


def code_of(path: Path) -> str:
    """Return a Rust file without its comments and its own tests."""
    return re.sub(r"//[^\n]*", "", path.read_text()).partition("mod tests")[0]


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Return the paths that a Rust file names below `crate::`, each as a tuple of its parts."""
    text = code_of(path)
    found = set()
    for start in re.finditer(r"\bcrate((?:::\w+)*)(?:::\{)?", text):
        head = tuple(start[1].split("::")[1:])
        if not start[0].endswith("{"):
            found.add(head)
            continue
        depth, end = 1, start.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found |= {(*head, *item) for item in items(text[start.end() : end - 1])}
    return found


def items(group: str) -> Iterator[tuple[str, ...]]:
    """Return the paths in the braces of a `use`, nested ones too."""
    for item in re.findall(r"[\w:]+(?:::\{[^{}]*\})?", group):
        outer, _, inner = item.partition("::{")
        head = tuple(part for part in outer.split("::") if part)
        yield from ((*head, *rest) for rest in items(inner[:-1])) if inner else [head]


def rust_directions() -> Iterator[str]:
    for path in sorted(RUST.rglob("*.rs")):
        room = path.relative_to(RUST).parts[0].removesuffix(".rs")
        if room == "lib":
            continue
        if room not in BELOW:
            yield f"{shown(path)}: a room of which tests/support/house.py does not say what it may import"
            continue
        for target in sorted({used[0] for used in imports_of(path) if used} - {room} - BELOW[room]):
            yield f"{shown(path)}: `{room}` may not import `{target}`"


def homes() -> dict[tuple[str, str], Path]:
    """Return where the names of each folder's face live: (folder, name) → file."""
    found = {}
    for face in RUST.glob("*/mod.rs"):
        for module, group in re.findall(r"pub(?:\(crate\))? use (\w+)::(?:\{([^}]*)\}|\w+);", face.read_text()):
            for name in re.findall(r"\w+", group):
                found[face.parent.name, name] = face.with_name(f"{module}.rs")
        for module, name in re.findall(r"pub(?:\(crate\))? use (\w+)::(\w+);", face.read_text()):
            found[face.parent.name, name] = face.with_name(f"{module}.rs")
    return found


def rust_circles() -> Iterator[str]:
    """Find files that import each other, over however many steps."""
    known = homes()
    edges: dict[Path, set[Path]] = {}
    for path in sorted(RUST.rglob("*.rs")):
        edges[path] = set()
        if path.name in ("lib.rs", "mod.rs"):
            continue
        for used in imports_of(path):
            if used[:2] in known:
                edges[path].add(known[used[0], used[1]])
            else:
                files = (RUST.joinpath(*used[:parts]).with_suffix(".rs") for parts in (2, 1) if used[:parts])
                edges[path].update(file for file in files if file.exists())
        edges[path].discard(path)
        for module in re.findall(r"\bsuper::(\w+)", code_of(path)):
            target = known.get((path.parent.name, module), path.with_name(f"{module}.rs"))
            if target.exists() and target != path:
                edges[path].add(target)
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> Iterator[str]:
        if path in way:
            yield "a circle of imports: " + " → ".join(map(shown, (*way[way.index(path) :], path)))
        elif path not in done:
            for target in sorted(edges[path]):
                yield from visit(target, (*way, path))
            done.add(path)

    for path in sorted(edges):
        yield from visit(path, ())


if __name__ == "__main__":
    sys.exit(main())
