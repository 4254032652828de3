"""The page of errors is that of the docstrings."""

from __future__ import annotations

import runpy

import skyward_lite as sky
from snippets import ROOT


def test_the_page_is_that_of_the_docstrings():
    """`docs/errors.md` is what `docs/make_errors.py` writes, with a section, a text and advice for each error."""
    made = runpy.run_path(str(ROOT / "docs/make_errors.py"))["page"]()
    assert (ROOT / "docs/errors.md").read_text() == made
    for name in sky.errors.__all__:
        _, _, section = made.partition(f"\n## {name}\n")
        section = section.partition("\n## ")[0]
        assert "**What to do:**" in section
        assert name in ("SkywardError", "RemoteTraceback") or "```text\n" in section
