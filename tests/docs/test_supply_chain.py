"""Promises of SECURITY.md about dependencies and workflows, as far as files can show them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
DENY = tomllib.loads((ROOT / "rust/deny.toml").read_text())

PERMISSIONS = {"release.yml": [["contents:", "read", "id-token:", "write", "attestations:", "write"]]}
"""What single jobs may do, by workflow: the one that publishes proves to the index which workflow it is."""


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_are_pinned_and_can_only_read(file):
    """Actions are pinned by commit, no job may write but the one that publishes, and no secret is used."""
    text = file.read_text()
    actions = re.findall(r"uses: (\S+)", text)
    assert actions
    assert [action for action in actions if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)] == []
    whole, *jobs = re.findall(r"permissions:\n((?: +[a-z-]+: (?:read|write)\n)+)", text)
    assert whole == "  contents: read\n"
    assert [job.split() for job in jobs] == PERMISSIONS.get(file.name, [])
    assert "secrets." not in text


def test_only_tags_are_published():
    """The job that publishes comes after all others, for tags alone, and waits for the approval of an environment."""
    text = (ROOT / ".github/workflows/release.yml").read_text()
    jobs = re.findall(r"^  (\w+):\n", text.partition("\njobs:\n")[2], re.MULTILINE)
    publish = text.partition("\n  publish:\n")[2]
    assert jobs[0] == "check"
    assert f"    needs: [{', '.join(jobs[1:-1])}]\n" in publish
    assert "    if: ${{ startsWith(github.ref, 'refs/tags/v') }}\n" in publish
    assert "    environment: pypi\n" in publish
    assert "id-token" not in text.partition("\n  publish:\n")[0]


def test_open_advisories_are_argued():
    """Each advisory that the audit ignores has its reason where users look."""
    ignored = {entry["id"]: entry["reason"] for entry in DENY["advisories"]["ignore"]}
    assert all(ignored.values())
    assert set(ignored) == set(re.findall(r"RUSTSEC-\d{4}-\d{4}", (ROOT / "SECURITY.md").read_text()))


def test_crates_come_from_one_registry():
    """All locked crates are from crates.io and have a checksum."""
    crates = tomllib.loads((ROOT / "rust/Cargo.lock").read_text())["package"]
    others = [crate for crate in crates if crate["name"] != "skyward_lite"]
    assert {crate["source"] for crate in others} == {"registry+https://github.com/rust-lang/crates.io-index"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", crate["checksum"]) for crate in others)
