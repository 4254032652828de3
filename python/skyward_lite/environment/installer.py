"""What pip, uv and git are told on a node: nothing secret on a command line, which every user of a host can read.

Requirements are lines of a file. Credentials of the index are pip's through a netrc file, because pip writes an index's
URL on the command lines of its own children; uv, which has none, gets them in its environment. Credentials of
repositories are git's through the program that it asks for them. The files are in the environment's temporary
directory, which only its user may enter, and are removed before the environment is complete.
"""

from __future__ import annotations

import re
import shlex
from urllib.parse import urlsplit

from .. import credentials
from ..credentials import Split
from ..image import Image

PRIVATE = '"$tmp"/private'
"""The directory of these files, as a word of the build's script."""

_RELATIVE = r"(?i)\.|[^\s:;/~$][^\s:;/]*/|[^\s:;/]+\.(?:whl|zip|tar\.gz|tgz|tar\.bz2)(?:$|[\s\[;])"
"""What a path begins with that is not absolute, as pip knows it: no name of a package has "/", nor ends like a file."""

_END = "== end of file =="
"""No line of the files is this."""

_NETRC = r"""
theirs=${NETRC:-${HOME:-/dev/null}/.netrc}
# What the user has there counts too, if Python can read it: one bad line would hide the rest.
if "$tmp/bin/python" -I -c 'import netrc, sys; netrc.netrc(sys.argv[1])' "$theirs" </dev/null 2>/dev/null; then
  cat "$theirs" >>"$tmp/private/netrc" && echo >>"$tmp/private/netrc"
fi
"""

_ASK = r"""
ask() {
  export "GIT_CONFIG_KEY_${GIT_CONFIG_COUNT:-0}=$1" "GIT_CONFIG_VALUE_${GIT_CONFIG_COUNT:-0}=$2"
  export GIT_CONFIG_COUNT=$((${GIT_CONFIG_COUNT:-0} + 1))
}
"""
"""Sets one option of git's, from version 2.31 on."""


def lines(image: Image, pip: str, *, uv: bool) -> tuple[list[str], str]:
    """Return lines of the build's script, which follow the making of `$tmp`, and the command of pip or uv with options.

    After them `"$tmp"/private/requirements` has the requirements.
    """
    script = [f"mkdir {PRIVATE} || exit 1"]
    repositories = [split for split in map(credentials.split, image.pip) if split and split.scheme.startswith("git+")]
    script.append(_file("requirements", [_requirement(text) for text in image.pip]))
    if repositories:
        script += _git(repositories)
    index = credentials.split(image.index_url or "")
    if index is None:
        return script, pip + (f" --index-url {shlex.quote(image.index_url)}" if image.index_url else "")
    host = urlsplit(index.bare).hostname or ""
    if uv:
        # The second name is that of older versions.
        url = shlex.quote(index.quoted)
        return [*script, f"export UV_DEFAULT_INDEX={url} UV_INDEX_URL={url}"], pip
    if ":" in host:
        # Not every pip finds an IPv6 address in a netrc file.
        return [*script, f"export PIP_INDEX_URL={shlex.quote(index.quoted)}"], pip
    user, password = index.login
    entry = f"machine {host} login {_token(user)} password {_token(password or '')}"
    # The last entry of a host counts. Where there is no password, the user may have one there for that name.
    entries = [_NETRC, _file("netrc", [entry], append=True)]
    script += [*(entries if password is not None else reversed(entries)), 'export NETRC="$tmp/private/netrc"']
    return script, f"{pip} --index-url {shlex.quote(index.bare)}"


def _requirement(text: str) -> str:
    """Return a requirement as a line of a requirements file."""
    split = credentials.split(text)
    if split is not None:
        return split.bare if split.scheme.startswith("git+") else split.quoted
    # A path from the home directory, in which the build does not run; both installers know variables in these files.
    return f"${{HOME}}/{text}" if re.match(_RELATIVE, text) else text


def _file(name: str, content: list[str], *, append: bool = False) -> str:
    """Return the lines that write a file. A here-document is on no command line."""
    body = "".join(f"{line}\n" for line in content)
    return f"cat {'>>' if append else '>'}{PRIVATE}/{name} <<'{_END}' || exit 1\n{body}{_END}"


def _token(text: str) -> str:
    """Quote a word of a netrc file for Python's parser (3.11 and later)."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


_ANSWER = r"""#!/bin/sh
# Git asks "Username for 'https://host/path': " or "Password for 'https://user@host/path': ". The host must be exactly
# the one that has credentials: a server may lead git to any other, and to any path there.
url=${1#*\'}
url=${url%\'*}
rest=${url#*://}
authority=${rest%%/*}
path=${rest#"$authority"}
path=${path%/}
site=${url%%://*}://${authority##*@}
# A user name without a password is a token, unless the user's own configuration of git has a password for that name.
stored() (
  unset GIT_CONFIG_COUNT
  export GIT_ASKPASS=true
  { printf 'protocol=%s\nhost=%s\npath=%s\nusername=' "${site%%://*}" "${site#*://}" "${path#/}"; cat; echo; } |
    git credential fill 2>/dev/null | sed -n 's/^password=//p'
)
answer() {
  case $1 in
"""


def _git(repositories: list[Split]) -> list[str]:
    """Return the lines that make git ask a program of ours for user names and passwords, and nobody else."""
    logins: dict[str, Split] = {}
    sites: dict[str, Split] = {}
    for split in repositories:
        site = f"{split.scheme.removeprefix('git+')}://{split.host}"
        path = re.split(r"[@#?;\s]", split.after, maxsplit=1)[0].rstrip("/").removesuffix(".git")
        logins.setdefault(f"{site}{path}", split)
        sites.setdefault(site, split)
    answers = []
    # Git before 2.31 does not name the repository, and a repository's submodules are elsewhere on its host.
    for place, split in {**sites, **logins}.items():
        user, password = split.login
        found = ("stored", user) if password is None else ("cat", password)
        for prompt, (command, text) in (("Username", ("cat", user)), ("Password", found)):
            answers.append(f"{shlex.quote(f'{prompt} {place}')}) {command} <<'= end ='\n{text}\n= end =\n;;")
    ask = '  *) return 1 ;;\nesac\n}\nanswer "${1%% *} $site${path%.git}" || answer "${1%% *} $site"'
    script = [_file("askpass", [_ANSWER.rstrip("\n"), *answers, ask])]
    script += ['chmod 700 "$tmp/private/askpass"', _ASK]
    script.append('export GIT_ASKPASS="$tmp/private/askpass" GIT_TERMINAL_PROMPT=0')
    for site in sites:
        # A helper of the user's may have other credentials for the same host, or keep ours.
        script.append(f"ask {shlex.quote(f'credential.{site}.helper')} ''")
        script.append(f"ask {shlex.quote(f'credential.{site}.useHttpPath')} true")
    return script
