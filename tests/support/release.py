"""What a release needs of this checkout: one version everywhere, and links that hold outside of it.

    release.py version 0.2.0       writes the version into every file that has it, and its heading into the changelog
    release.py check v0.2.0        fails unless they all have this tag's version
    release.py links URL v0.2.0    writes the repository's address into pyproject.toml and the README

rust/Cargo.toml has the version: maturin takes a wheel's from there. The other files repeat it because they are read
where Cargo.toml is not: on nodes, whose first steps import one small module, by cargo, and by those who cite. A test
compares them. The workflow that builds a release knows the repository's address, and no file of this checkout does.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

PLACES = {
    "rust/Cargo.toml": r'^version = "(.+)"$',
    "rust/Cargo.lock": r'^name = "skyward_lite"\nversion = "(.+)"$',
    "rust/fuzz/Cargo.lock": r'^name = "skyward_lite"\nversion = "(.+)"$',
    "python/skyward_lite/_version.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
}
"""Each file that has the version, and the pattern whose group it is."""
VERSION = r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?"
"""A version as Python and cargo both read it: without a suffix, or before the release with one that cargo writes with a
hyphen (0.2.0-rc1) and Python without (0.2.0rc1)."""
RELEASE_HEADING = r"^## \[(.+)\] - \d{4}-\d\d-\d\d$"

PROJECT_URLS = {
    "Repository": "",
    "Documentation": "/blob/{tag}/docs/index.md",
    "Changelog": "/blob/{tag}/CHANGELOG.md",
    "Issues": "/issues",
    "Security": "/blob/{tag}/SECURITY.md",
}
"""The names that package indexes show, and where each is below the repository's address."""
PICTURES = (".svg", ".png", ".gif", ".jpg")
RELATIVE_LINK = re.compile(r"""(?P<before>\]\(|(?:src|srcset|href)=")(?![a-z]+:|#|/)(?:\./)?(?P<path>[^)"\s]+)""")
"""A link or a picture of Markdown or HTML that is relative to the file, without its end."""


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("version").add_argument("version")
    commands.add_parser("check").add_argument("tag")
    links = commands.add_parser("links")
    links.add_argument("url")
    links.add_argument("tag")
    arguments = parser.parse_args()
    if arguments.command == "version":
        if not re.fullmatch(VERSION, arguments.version):
            sys.exit(f"{arguments.version!r} is not a version such as 0.2.0 or 0.2.0rc1")
        set_version(arguments.version)
    elif arguments.command == "check":
        problems = differences(arguments.tag)
        for problem in problems:
            print(problem, file=sys.stderr)
        sys.exit(bool(problems))
    else:
        add_links(arguments.url.rstrip("/"), arguments.tag)


def versions(root: Path = ROOT) -> dict[str, str]:
    """Return the version that each file has, as Python writes it."""
    return {place: find(root / place, pattern)[1].replace("-", "") for place, pattern in PLACES.items()}


def released(root: Path = ROOT) -> list[str]:
    """Return the versions that the changelog has, the newest first."""
    return re.findall(RELEASE_HEADING, (root / "CHANGELOG.md").read_text(), re.MULTILINE)


def differences(tag: str, root: Path = ROOT) -> list[str]:
    """Return what keeps this tag from being released: files with another version, a changelog without it."""
    problems = [
        f"{place} has {version}, and the tag is {tag}"
        for place, version in versions(root).items()
        if f"v{version}" != tag
    ]
    if released(root)[:1] != [tag.removeprefix("v")]:
        problems.append(
            f"the newest release in CHANGELOG.md is not {tag.removeprefix('v')}: `make version` adds its heading"
        )
    return problems


def set_version(version: str, root: Path = ROOT) -> None:
    """Write the version into every file, and its heading, with today's date, below the changelog's Unreleased."""
    for place, pattern in PLACES.items():
        path = root / place
        found = find(path, pattern)
        cargo = re.sub(r"(?<=\d)(?=a|b|rc)", "-", version) if place.startswith("rust/") else version
        text = path.read_text()
        path.write_text(text[: found.start(1)] + cargo + text[found.end(1) :])
    if version not in released(root):
        changelog = root / "CHANGELOG.md"
        heading = f"## [Unreleased]\n\n## [{version}] - {datetime.date.today().isoformat()}\n"
        changelog.write_text(changelog.read_text().replace("## [Unreleased]\n", heading, 1))


def add_links(url: str, tag: str, root: Path = ROOT) -> None:
    """Write the repository's address into the package's metadata, and into the README's links to files.

    Outside of the repository, as on a package index, a link such as `docs/errors.md` leads nowhere and a picture is not
    shown.
    """
    project = root / "pyproject.toml"
    urls = "\n".join(f'{name} = "{url}{path.format(tag=tag)}"' for name, path in PROJECT_URLS.items())
    project.write_text(f"{project.read_text()}\n[project.urls]\n{urls}\n")
    readme = root / "README.md"

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if Path(link["path"]).suffix in PICTURES else "blob"
        return f"{link['before']}{url}/{kind}/{tag}/{link['path']}"

    readme.write_text(RELATIVE_LINK.sub(absolute, readme.read_text()))


def find(path: Path, pattern: str) -> re.Match[str]:
    """Return where the file has the version; fail if it does not have it exactly once."""
    (found,) = re.finditer(pattern, path.read_text(), re.MULTILINE)
    return found


if __name__ == "__main__":
    main()
