"""joblib's own tests of `Parallel`, run with skyward in the place of loky: `make conformance`.

For the oldest joblib that we support and the newest, and for both executors, the test module that joblib ships is
copied with "loky" replaced by "skyward" in its lists of backends, its calls and its scripts, and run by pytest with
`plugin.py`, inside `with sky.pool():`. `not_applicable.toml` lists the cases that assert what is different by design.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OLDEST = "1.3.0"
NEWEST = "newest"
INSTALLED = "installed"
EXECUTORS = ("thread", "process")
MODULE = "joblib_test_parallel"
RUN_SECONDS = 1200
"""Bound on one combination; a test that hangs is ended by pytest-timeout long before."""

SUBSTITUTIONS = (
    # Every place where joblib tests its own default backend by name, ours stands in for it.
    (r"""(["'])loky\1""", r"\1skyward\1"),
    (r"(is|==) LokyBackend\b", r"\1 SkywardBackend"),
    # What a script logs about its processes. Workers are not its children.
    (r"LokyProcess", "MainProcess"),
    # Loky's executor is one call's at a time, so a second call is an error there. A pool serves both.
    (r"""\(\s*(["'])skyward\1, True\)""", r"(\1skyward\1, False)"),
)
EPILOGUE = """

# ---- appended by skyward_lite's tests/parallel/conformance/run.py
from in_pool import check_subprocess_call
from skyward_lite.client.joblib_backend import SkywardBackend
"""


def install(version: str, cache: Path) -> Path:
    """Put joblib, and nothing else, into a directory of its own; the path to put before site-packages."""
    if version == INSTALLED:
        import joblib

        return Path(joblib.__file__).parent.parent
    target = cache / f"joblib-{version}"
    if version == NEWEST or not (target / "joblib").is_dir():
        requirement = "joblib" if version == NEWEST else f"joblib=={version}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(target), requirement], check=True)
    return target


def adapted(joblib: Path) -> str:
    """Give the source of joblib's test module with skyward in the place of loky."""
    source = (joblib / "joblib" / "test" / "test_parallel.py").read_text()
    for pattern, replacement in SUBSTITUTIONS:
        source, count = re.subn(pattern, replacement, source)
        if not count:
            raise SystemExit(f"joblib's test module no longer has {pattern!r}")
    return source + EPILOGUE


def run(joblib: Path, executor: str, cache: Path, pytest_args: list[str]) -> dict[str, object]:
    """Run the tests of the joblib in a directory on one executor; plugin.py's report."""
    report = cache / "report.json"
    report.unlink(missing_ok=True)
    module = cache / "tests" / f"{MODULE}.py"
    module.parent.mkdir(exist_ok=True)
    module.write_text(adapted(joblib))
    path = [str(joblib), str(module.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-c", str(HERE / "pytest.ini"), str(module)]
    options = ["--executor", executor, "--report", str(report), "--rootdir", str(module.parent), *pytest_args]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in path if p)}
    done = subprocess.run([*command, *options], env=env, timeout=RUN_SECONDS, check=False)
    if not report.exists():
        raise SystemExit(f"pytest ended with status {done.returncode} and without a report")
    result: dict[str, object] = json.loads(report.read_text())
    return result


def main() -> None:
    """Run the combinations asked for. Exit with 1 if a case failed, or no case of an entry in the list did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--joblib", nargs="+", default=[OLDEST, NEWEST], help="versions, or newest, or installed (default: %(default)s)"
    )
    parser.add_argument("--executor", nargs="+", default=EXECUTORS, choices=EXECUTORS)
    parser.add_argument("--cache", type=Path, required=True, help="directory for the installed joblibs")
    parser.add_argument("pytest_args", nargs="*", help="for pytest, after --; the list is then not checked")
    asked = parser.parse_args()
    asked.cache.mkdir(parents=True, exist_ok=True)
    reports = []
    for version in asked.joblib:
        joblib = install(version, asked.cache)
        reports += [run(joblib, executor, asked.cache, asked.pytest_args) for executor in asked.executor]
    columns = ("joblib", "executor", "passed", "not applicable", "skipped", "failed")
    print("\n" + "  ".join(columns))
    for report in reports:
        print("  ".join(f"{report[column]!s:>{len(column)}}" for column in columns))
    failed = sum(report["failed"] for report in reports)
    stale = set.intersection(*(set(report["stale"]) for report in reports))
    whole = set(asked.joblib) >= {OLDEST, NEWEST} and set(asked.executor) == set(EXECUTORS) and not asked.pytest_args
    for entry in sorted(stale) if whole else ():
        print(f"not_applicable.toml: {entry!r} fits no case that fails")
        failed += 1
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
