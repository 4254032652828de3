"""pytest plugin: a pool around the session, skyward as joblib's default, and the list of what is not applicable."""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOT_APPLICABLE = "not applicable"
LIST = Path(__file__).with_name("not_applicable.toml")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--executor", default="thread", choices=["thread", "process"])
    parser.addoption("--report", default=None, help="file for the counts, as JSON")


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Iterator[None]:
    """Collect and run inside a pool's block: the lists of backends are made when the test module is imported."""
    import skyward_lite as sky
    import worker_side
    from in_pool import CONCURRENCY
    from joblib.parallel import register_parallel_backend
    from skyward_lite.client.joblib_backend import NAME, SkywardBackend

    executor = config.getoption("--executor")
    os.environ["SKYWARD_CONFORMANCE_EXECUTOR"] = executor
    # The block makes it this thread's default. joblib's tests want other threads to have the same one.
    register_parallel_backend(NAME, SkywardBackend, make_default=True)
    # joblib's tests look into their workers by a multiprocessing.Manager, which lets in who has its process's key.
    image = sky.Image(env={worker_side.KEY: multiprocessing.current_process().authkey.hex()})
    plugins = [sky.plugins.joblib(), sky.Plugin("authkey", preload=["worker_side"])]
    worker = sky.Worker(concurrency=CONCURRENCY, executor=executor)
    with sky.pool(worker=worker, image=image, plugins=plugins):
        result = yield
    return result


def not_applicable(executor: str) -> dict[str, tuple[re.Pattern[str], str]]:
    """Read the list: entry → pattern of the cases' names, reason. In an entry, only `*` is special."""
    listed = tomllib.loads(LIST.read_text())
    entries = {**listed["both"], **listed[executor]}
    return {e: (re.compile(re.escape(e).replace(r"\*", ".*")), reason) for e, reason in entries.items()}


def is_ours(item: pytest.Item) -> bool:
    """Say whether a case involves our backend: it names it, or none."""
    from skyward_lite.client.joblib_backend import SkywardBackend

    params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    backends = [value for name, value in params.items() if name.endswith("backend")]
    foreign = [b for b in backends if b is not None and b != "skyward" and not isinstance(b, SkywardBackend)]
    return not backends or len(foreign) < len(backends)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = ours
    for entry, (pattern, reason) in not_applicable(config.getoption("--executor")).items():
        for item in items:
            if pattern.fullmatch(item.name):
                # It runs: a case that passes after all is told by no longer failing.
                item.add_marker(pytest.mark.xfail(reason=reason))
                item.user_properties.append((NOT_APPLICABLE, entry))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    import joblib

    counts = collections.Counter({"passed": 0, NOT_APPLICABLE: 0, "skipped": 0, "failed": 0})
    listed = set()
    for outcome, reports in terminalreporter.stats.items():
        if outcome in ("passed", "xfailed", "xpassed"):
            for report in reports:
                entries = {entry for name, entry in report.user_properties if name == NOT_APPLICABLE}
                if outcome == "xfailed" and entries:
                    counts[NOT_APPLICABLE] += 1
                    listed |= entries
                elif report.when == "call":
                    counts["passed"] += 1
        elif outcome == "skipped":
            counts["skipped"] += len(reports)
        elif outcome in ("failed", "error"):
            counts["failed"] += len(reports)
    if config.getoption("--report"):
        executor = config.getoption("--executor")
        stale = sorted(set(not_applicable(executor)) - listed)
        report = {"joblib": joblib.__version__, "executor": executor, **counts, "stale": stale}
        Path(config.getoption("--report")).write_text(json.dumps(report))
