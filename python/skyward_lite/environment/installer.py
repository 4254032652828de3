"""What pip, uv and git are told on a node: nothing secret on a command line, which every user of a host can read.

Requirements are lines of a file. Credentials of the index reach pip through a netrc file, because pip writes an index's
URL on the command lines of its own children; uv, which starts none, gets them in its environment. Credentials of
repositories reach git through a program that git runs to ask for them. The files are in the environment's temporary
directory, which only its user may enter, and are removed before the environment is complete.
"""

from __future__ import annotations

import re
import shlex
from urllib.parse import urlsplit

from .. import credentials
from ..image import Image
from . import scripts

PRIVATE = '"$tmp"/private'
"""The directory of these files, as a word of the build's script."""

_RELATIVE = r"(?i)\.|[^\s:;/~$][^\s:;/]*/|[^\s:;/]+\.(?:whl|zip|tar\.gz|tgz|tar\.bz2)(?:$|[\s\[;])"
"""What a relative path begins with, as pip knows it: the name of a package has no "/", nor ends like a file."""

_END_OF_FILE = "== end of file =="
"""Ends a here-document with a file. No line of the files is equal to it."""
_END_OF_ANSWER = "= end ="
"""Ends a here-document with an answer for git, within the file of the program that git runs."""


def steps(image: Image, pip: str, *, uv: bool) -> tuple[list[str], str]:
    """Return lines of shell that follow the making of `$tmp`, and the command of pip or uv with further options.

    After them `"$tmp"/private/requirements` has the requirements.
    """
    lines = [f"mkdir {PRIVATE} || exit 1"]
    repositories = [split for split in map(credentials.split, image.pip) if split and split.scheme.startswith("git+")]
    lines.append(_write("requirements", [_requirement(text) for text in image.pip]))
    if repositories:
        lines += _answer_git(repositories)
    index = credentials.split(image.index_url or "")
    if index is None:
        return lines, pip + (f" --index-url {shlex.quote(image.index_url)}" if image.index_url else "")
    host = urlsplit(index.bare).hostname or ""
    if uv:
        # UV_INDEX_URL is for older versions.
        url = shlex.quote(index.quoted)
        return [*lines, f"export UV_DEFAULT_INDEX={url} UV_INDEX_URL={url}"], pip
    if ":" in host:
        # Not every pip finds an IPv6 address in a netrc file.
        return [*lines, f"export PIP_INDEX_URL={shlex.quote(index.quoted)}"], pip
    user, password = index.login
    entry = f"machine {host} login {_netrc_token(user)} password {_netrc_token(password or '')}"
    # The last entry of a host counts. If the URL has no password, the user's own netrc file may have one for that name.
    entries = ["append_user_netrc", _write("netrc", [entry], append=True)]
    lines += [*(entries if password is not None else reversed(entries)), 'export NETRC="$tmp/private/netrc"']
    return lines, f"{pip} --index-url {shlex.quote(index.bare)}"


def _requirement(text: str) -> str:
    """Return a requirement as a line of a requirements file."""
    split = credentials.split(text)
    if split is not None:
        return split.bare if split.scheme.startswith("git+") else split.quoted
    # The build does not run in the home directory, from which the path leads. Both installers replace variables here.
    return f"${{HOME}}/{text}" if re.match(_RELATIVE, text) else text


def _write(name: str, content: list[str], *, append: bool = False) -> str:
    """Return the lines of shell that write a file. A here-document is on no command line."""
    body = "".join(f"{line}\n" for line in content)
    return f"cat {'>>' if append else '>'}{PRIVATE}/{name} <<'{_END_OF_FILE}' || exit 1\n{body}{_END_OF_FILE}"


def _netrc_token(text: str) -> str:
    """Return a word of a netrc file, quoted for Python's parser (3.11 and later)."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _answer_git(repositories: list[credentials.Split]) -> list[str]:
    """Return lines of shell that make git ask a program of ours for user names and passwords, and nothing else."""
    logins: dict[str, credentials.Split] = {}
    sites: dict[str, credentials.Split] = {}
    for split in repositories:
        site = f"{split.scheme.removeprefix('git+')}://{split.host}"
        path = re.split(r"[@#?;\s]", split.after, maxsplit=1)[0].rstrip("/").removesuffix(".git")
        logins.setdefault(f"{site}{path}", split)
        sites.setdefault(site, split)
    cases = []
    # Git before 2.31 does not name the repository, and a repository's submodules are elsewhere on its host.
    for place, split in {**sites, **logins}.items():
        user, password = split.login
        answers = {"Username": ("cat", user), "Password": ("stored", user) if password is None else ("cat", password)}
        for prompt, (command, text) in answers.items():
            cases.append(f"{shlex.quote(f'{prompt} {place}')}) {command} <<'{_END_OF_ANSWER}'")
            cases += [text, _END_OF_ANSWER, ";;"]
    answer = ["#!/bin/sh", "answer() {", "case $1 in", *cases, "*) return 1 ;;", "esac", "}"]
    lines = [
        _write("askpass", [*answer, scripts.read("askpass.sh").rstrip("\n")]),
        'chmod 700 "$tmp/private/askpass"',
        'export GIT_ASKPASS="$tmp/private/askpass" GIT_TERMINAL_PROMPT=0',
    ]
    for site in sites:
        # A helper of the user's may have other credentials for the same host, or store ours.
        lines.append(f"set_git_option {shlex.quote(f'credential.{site}.helper')} ''")
        lines.append(f"set_git_option {shlex.quote(f'credential.{site}.useHttpPath')} true")
    return lines
