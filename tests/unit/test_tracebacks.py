"""A task's traceback: written on the node without our frames, completed at the client with source and an arrow."""

from __future__ import annotations

import linecache
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import skyward_lite as sky
from skyward_lite.client import folding
from skyward_lite.node.batch import run_batch
from skyward_lite.pickling import payload, tracebacks
from skyward_lite.pickling.route import BY_VALUE

SCRIPT = """\
def divide(x):
    return (1 +
            2 / x)
def fail(x):
    try:
        divide(x)
    except ZeroDivisionError as error:
        raise KeyError("é" * 3, divide) from error
def group(x):
    raise ExceptionGroup("several", [fail_alone(x), fail_alone(x)])
def fail_alone(x):
    try:
        divide(x)
    except ZeroDivisionError as error:
        return error
"""


@pytest.fixture
def script(tmp_path) -> types.ModuleType:
    """A module like a script's, whose functions travel by value."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    module = types.ModuleType("__main__")
    module.__file__ = str(file)
    exec(compile(SCRIPT, str(file), "exec"), vars(module))
    del module.__loader__, module.__spec__
    return module


def raised(function, *args) -> BaseException:
    try:
        run_batch([(function, args, {})], [])
    except BaseException as error:
        return error
    raise AssertionError


def written(error: BaseException) -> str:
    return tracebacks.written(error, error.__traceback__)


def test_the_node_shows_no_line_of_another_file(script):
    """Source lines of functions that travel by value are left to the client: the node's file may be another one."""
    Path(script.__file__).write_text("another file\n" * 20)
    text = written(raised(script.fail, 0))
    assert "another file" not in text
    assert text.count("\0") == 6


def test_the_client_adds_lines_and_an_arrow(script):
    """The client adds its source lines with the marks below them, and an arrow at the last line of the user's own."""
    text = tracebacks.completed(written(raised(script.fail, 0)))
    assert "\0" not in text
    assert "node" not in re.findall(r"File .*/(\w+)/\w+\.py", text)
    assert f'File "{script.__file__}", line 3, in divide\n    2 / x)\n    ~~^~~\n' in text
    assert text.count("-->") == 1
    assert '--> raise KeyError("é" * 3, divide) from error\n' in text


def test_groups_of_exceptions(script):
    """The frames of each member of a group get their lines, with the group's margin."""
    text = tracebacks.completed(written(raised(script.group, 0)))
    assert len(re.findall(r"^    \|     2 / x\)$", text, re.MULTILINE)) == 2
    assert "--> raise ExceptionGroup" in text


def test_files_of_others_get_no_arrow(script):
    """The arrow is at the line of the user's own code, though an installed package raised the exception."""
    package = types.FunctionType(
        script.divide.__code__.replace(co_filename="/venv/lib/python3.11/site-packages/pack/age.py"), {}
    )
    script.inner = package
    exec(compile("def outer(x):\n    return inner(x)\n", script.__file__, "exec"), vars(script))
    Path(script.__file__).write_text("def outer(x):\n    return inner(x)\n")
    linecache.checkcache(script.__file__)
    assert "--> return inner(x)\n" in tracebacks.completed(written(raised(script.outer, 0)))


@pytest.mark.parametrize("file", ["/dev/zero", "/dev/stdin", "/nowhere/at all", "a\0b", "<string>", "/etc"])
def test_a_node_cannot_have_the_client_read_what_is_no_file(file):
    """A device, a pipe or a directory in a node's traceback is not read, and text that looks odd is kept."""
    text = f'Traceback\n  File "{file}", line 1, in f\n    \x001 0 5\0\nValueError\n'
    done = tracebacks.completed(text)
    assert "\0" not in done
    assert done.startswith("Traceback")
    assert done.endswith("ValueError\n")


@pytest.mark.parametrize(
    "mark", ["", "x y z", "9 9 9 9 9", "1 5 2", "99999999999999 1 2", "None None None", "1 100 200"]
)
def test_marks_that_make_no_sense(script, mark):
    """Whatever a node writes into its marks, the client shows the frame."""
    text = f'  File "{script.__file__}", line 1, in f\n    \0{mark}\0\nValueError\n'
    done = tracebacks.completed(text)
    assert f'File "{script.__file__}", line 1, in f\n' in done
    assert "\0" not in done


def test_a_text_that_was_cut_within_a_mark(script):
    """The rest of a mark is not shown."""
    text = written(raised(script.fail, 0))
    for at in range(0, len(text), 3):
        assert "\0" not in tracebacks.completed(text[:at] + "\n… 3 characters left out …\n" + text[at + 3 :])


def test_functions_that_travel_by_value_keep_their_file(script):
    """Code that is sent names its file, and so do tracebacks, warnings and debuggers."""
    pickled, buffers = payload.Encoder(1 << 20, BY_VALUE).dumps(script.divide)
    assert payload.loads(pickled, buffers).__code__.co_filename == script.__file__


def failing_task(call):
    try:
        call()
    except ZeroDivisionError as error:
        error.__cause__ = sky.RemoteTraceback("Traceback", "lab1", 3, "f(0)")
        return error
    raise AssertionError


def test_only_frames_of_others_are_folded(monkeypatch):
    """Where a task's error is shown, frames of the program stay, and those of joblib and this package go."""
    import joblib

    error = failing_task(lambda: joblib.Parallel(n_jobs=1)([joblib.delayed(lambda: 1 / 0)()]))
    before = [each.tb_frame.f_code.co_filename for each in tracebacks._entries(error.__traceback__)]
    folding.fold(error)
    after = [each.tb_frame.f_code.co_filename for each in tracebacks._entries(error.__traceback__)]
    assert any("joblib" in file for file in before)
    assert {*after} == {__file__}
    others = ValueError("not a task's")
    folding.fold(others)
    assert others.__traceback__ is None


def test_hooks_are_installed_once(monkeypatch):
    """`sys.excepthook` calls what was there before; SKYWARD_TRACEBACK=full leaves it as it is."""
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *given: shown.append(given))
    monkeypatch.setenv("SKYWARD_TRACEBACK", "full")
    own = sys.excepthook
    folding.install()
    assert sys.excepthook is own
    monkeypatch.delenv("SKYWARD_TRACEBACK")
    folding.install()
    hook = sys.excepthook
    folding.install()
    assert sys.excepthook is hook is not own
    error = failing_task(lambda: 1 / 0)
    hook(type(error), error, error.__traceback__)
    assert shown == [(ZeroDivisionError, error, error.__traceback__)]


def test_errors_travel_between_processes():
    """Each error, and a remote traceback with what it knows, can be pickled."""
    for name in sky.errors.__all__:
        error = getattr(sky.errors, name)("some text")
        error.add_note("a note")
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), back.args, back.__notes__) == (type(error), ("some text",), ["a note"])
    back = pickle.loads(pickle.dumps(sky.RemoteTraceback("text", "lab1", 3, "f(0)")))
    assert (back.text, back.node, back.task, back.call) == ("text", "lab1", 3, "f(0)")
    assert str(back) == 'on node lab1, task 3: f(0)\n"""\ntext"""'


@pytest.mark.parametrize(
    ("use", "lines"),
    [
        ("sky.progress().__enter__()", ["2"]),
        ("joblib.Parallel(backend='skyward')", ["2"]),
        ("sky.pool(plugins=[]).submit(abs, 1)", ["2"]),
        ("with sky.pool() as pool: pool.submit(abs, (i for i in 'ab'))", ["2"]),
        ("with sky.pool() as pool: list(pool.map(abs, [Bad()]))", ["2", "4"]),
    ],
)
def test_a_script_shows_its_own_lines_of_other_errors(tmp_path, use, lines):
    """Of errors before a task is sent, a script shows its own lines, also those that pickling has called."""
    script = tmp_path / "script.py"
    bad = "class Bad:\n    def __reduce__(self): raise OSError('bad')\n"
    script.write_text(f"import joblib, skyward_lite as sky\n{use}\n")
    if "Bad" in use:
        script.write_text(f"import joblib, skyward_lite as sky; from bad import Bad\n{use}\n")
        (tmp_path / "bad.py").write_text("\n\n" + bad)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False)
    assert re.findall(r'File ".*", line (\d+)', done.stderr) == lines, done.stderr
