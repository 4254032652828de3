"""Credentials in URLs: masked in whatever can be read, and taken out of what a command line would show."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

_AUTHORITY = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<userinfo>[^\s/?#]*)@(?P<host>[^\s/?#@]*)")
"""A password may contain "@": what follows the last one before the path is the host."""
_SLASHED = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://[^\s/?#@:\[]*:(?!\d*(?:[/?#\s'\"`,;)\]>]|$))[^\s@]*@")
"""A password with "/", "?" or "#" in it, which no program reads as the user meant it: what follows ":" is no port."""
_PARAMETER = re.compile(
    r"(?P<name>[?&][^=&#\s'\"]*(?:token|secret|passw(?:or)?d|signature|credential|api[-_]?key|sig)=)[^&#\s'\"]+", re.I
)
"""A parameter of a URL that says by its name that its value is secret."""
_PLAIN = 4
"""Characters below which a secret is masked only where it stands in a URL: it would be part of many words."""

MASKED = "***"


class Login(NamedTuple):
    """Who one is for a URL. `password` is None where the URL has no colon: then `user` may be a token."""

    user: str
    password: str | None


class Split(NamedTuple):
    """A text with one URL that has credentials, taken apart."""

    before: str
    scheme: str
    login: Login
    host: str
    """With its port."""
    after: str

    @property
    def bare(self) -> str:
        """The text without its credentials."""
        return f"{self.before}{self.scheme}://{self.host}{self.after}"

    @property
    def quoted(self) -> str:
        """The text with its credentials percent-encoded, so that every program finds the same host in it."""
        user, password = self.login
        userinfo = quote(user, safe="") + ("" if password is None else f":{quote(password, safe='')}")
        return f"{self.before}{self.scheme}://{userinfo}@{self.host}{self.after}"


def mask(text: str, secrets: frozenset[str] = frozenset()) -> str:
    """Return the text without the credentials of any URL in it, and without these secrets."""
    text = _AUTHORITY.sub(_masked, text)
    text = _SLASHED.sub(rf"\g<scheme>://{MASKED}@", text)
    text = _PARAMETER.sub(rf"\g<name>{MASKED}", text)
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MASKED)
    return text


def _masked(match: re.Match[str]) -> str:
    scheme, userinfo, host = match.groups()
    # The user of a repository's SSH server ("git") is an address, and ssh takes no password from a URL.
    shown = userinfo if _is_ssh(scheme) and ":" not in userinfo else MASKED
    return f"{scheme}://{shown}@{host}"


def _is_ssh(scheme: str) -> bool:
    return scheme.rpartition("+")[2].lower() == "ssh"


def split(text: str) -> Split | None:
    """Take a requirement or a URL with credentials apart; None if it has none.

    Raises `ValueError`, without the credentials, for those that cannot be kept off the nodes' command lines.
    """
    if _SLASHED.search(_AUTHORITY.sub(_masked, text)):
        raise ValueError(f'{mask(text)}: percent-encode "/", "?" and "#" in a user name or a password: %2F, %3F, %23')
    match = _AUTHORITY.search(text)
    if match is None or _masked(match) == match[0]:
        return None
    scheme, userinfo, host = match.groups()
    if scheme.lower() not in ("http", "https", "git+http", "git+https"):
        raise ValueError(
            f"{mask(text)}: credentials can be given for http, https, git+http and git+https only: with {scheme} they "
            "would be seen in the node's list of processes"
        )
    if _AUTHORITY.search(text, match.end()):
        raise ValueError(f"{mask(text)}: one URL with credentials at most")
    user, colon, password = userinfo.partition(":")
    login = Login(unquote(user), unquote(password) if colon else None)
    if any(not character.isprintable() for part in login for character in part or ""):
        raise ValueError(f"{mask(text)}: its user name or its password contains a control character")
    return Split(text[: match.start()], scheme.lower(), login, host, text[match.end() :])


def bare(text: str) -> str:
    """Return a requirement or a URL without its credentials."""
    found = split(text)
    return text if found is None else found.bare


def secrets(text: str) -> frozenset[str]:
    """Return what must not be shown of a requirement or a URL, as it is sent and as it is written."""
    found = split(text)
    if found is None:
        return frozenset()
    user, password = found.login
    secret = password or user
    return frozenset(one for one in (secret, quote(secret, safe="")) if len(one) >= _PLAIN)
