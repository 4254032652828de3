"""The documentation builds, names all that is public, and keeps what it says of tests and links."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from skyward_lite import Provider
from snippets import PAGES, ROOT
from sphinx.util.inventory import InventoryFile

PUBLIC = (ROOT / "tests/unit/public_api.txt").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as `make docs` makes them."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(out / "trees"), str(ROOT / "docs")]
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return out


def test_public_names_are_in_the_api_pages(site):
    """Each public name and each public method has its entry; the methods of a kind of provider are Provider's."""
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    entries = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    wanted = set()
    for name in re.findall(r"^([\w.]+)", PUBLIC, re.MULTILINE):
        owner, _, method = name.rpartition(".")
        if owner in ("AWS", "Exec", "Local", "Slurm", "SSH") and hasattr(Provider, method):
            name = f"Provider.{method}"
        # Another name of the same.
        wanted.add("skyward_lite." + re.sub(r"^(pool\.|pool$)", lambda m: "ComputePool" + m[0][4:], name))
    wanted -= {"skyward_lite.messages.Listener", "skyward_lite.plugins.Plugin", "skyward_lite.plugins.WorkerInfo"}
    # The package shows the errors of `errors` under their names, too.
    missing = {name for name in wanted - entries if name.replace(".", ".errors.", 1) not in entries}
    assert sorted(missing) == []


def test_pages_load_nothing_from_elsewhere(site):
    """No page has a script, a style, a font or a picture of another server."""
    for page in site.glob("**/*.html"):
        assert re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]*"', page.read_text()) == []


def headings(text):
    """Return the names by which a Markdown file's headings are linked."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_files_lead_somewhere():
    """Relative links of all Markdown files lead to a file that is there, and to a heading that it has."""
    dead = []
    for page in {*PAGES, *ROOT.glob("*.md"), *ROOT.glob("benches/*.md")}:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"(?:\]\(|(?:src|srcset|href)=\")([^)\s\"]+)", text):
            path, _, anchor = target.partition("#")
            if re.match(r"\w+:", target):
                continue
            file = (page.parent / path) if path else page
            if not file.exists() or (anchor and anchor not in headings(file.read_text())):
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []


def test_the_tests_that_pages_name_exist():
    """A promise names the file and the test that shows it."""
    pattern = re.compile(r"`((?:tests|rust/tests)/[\w/.]+?\.(?:py|rs))(?:::(\w+))?`")
    named = {match for page in PAGES for match in pattern.findall(page.read_text())}
    assert named
    missing = [
        f"{file}::{test}"
        for file, test in sorted(named)
        if not (ROOT / file).is_file() or test not in (ROOT / file).read_text()
    ]
    assert missing == []
