"""A few of the known_hosts files and configurations on which we and `ssh` must agree; `make chaos` has thousands."""

from __future__ import annotations

import known_hosts_cases as cases
from known_hosts_cases import Bench, Case


def few(bench: Bench) -> list[Case]:
    """Return the cases that went wrong once, with some of their neighbours, and some generated ones."""
    named = list(cases.named(bench))
    first = sum(any(repr(end) in case.what for end in cases.SEPARATORS[:3]) for case in named)
    chosen = named[:first] + [case for case in named if case.what.startswith(("an alias", "missing "))]
    return chosen + named[first::6] + cases.generated(12, seed=7)(bench)


def test_what_ssh_refuses_is_refused(tmp_path):
    """No host key that ssh does not trust is accepted; what ssh trusts is refused for known reasons only."""
    failures, _, accepted = cases.compare(tmp_path, few, threads=2)
    assert failures == []
    assert accepted > 20, "hardly anything was accepted, by ssh neither: the comparison compares nothing"
