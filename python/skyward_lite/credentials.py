"""Credentials in URLs: masked in every text that is shown, and taken out of command lines, which others can read."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

# Patterns are compiled at their first use, because each worker imports this module and few need them. Hosts print any
# text, and searching must not take long in any: so patterns begin with a literal, and have hardly a repetition without
# a bound.
_USERINFO = r"://([^\s/?#]*)@"
"""Greedy, because a password may contain "@": the host begins after the last "@" before the path."""
_SLASHED = r"://[^\s/?#@:\[]{0,250}:(?!\d{0,6}(?:[/?#\s'\"`,;)\]>]|$))[^\r\n@]{0,250}@"
"""A password with "/", "?", "#" or a blank in it: no port follows the ":". No program reads such a URL as meant."""
_VALUE = r"=([^&#\s'\"]+)"
_PARAMETER = r"(?i)[?&][^=&#\s'\"]*(?:token|secret|passw(?:or)?d|signature|credential|api[-_]?key|sig)$"
"""The text before the value of a URL's parameter whose name tells that the value is secret."""
_URL = r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s/?#]*)@([^\s/?#@]*)"
_BEFORE = 60
"""Characters before a match that are searched: more than a scheme or a parameter's name has."""
_MIN_SECRET = 4
"""Characters of the shortest secret that is masked outside of its URL, too: shorter ones are part of many words."""
_MIN_TOKEN = 20
"""Characters of the shortest user name that may be a token."""

MASKED = "***"


class Login(NamedTuple):
    """The credentials in a URL. `password` is None where the URL has no colon: then `user` may be a token."""

    user: str
    password: str | None


class Split(NamedTuple):
    """A text with one URL that has credentials, taken apart."""

    before: str
    scheme: str
    login: Login
    host: str
    """The host with its port."""
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
    """Return the text with the credentials of every URL in it, and these secrets, replaced by `***`."""
    text = re.sub(_USERINFO, _masked, text)
    text = re.sub(_SLASHED, f"://{MASKED}@", text)
    text = re.sub(_VALUE, _masked_parameter, text)
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MASKED)
    return text


def _masked(match: re.Match[str]) -> str:
    scheme = re.search("[A-Za-z0-9+.-]*$", _before(match))
    # With ssh, a user name without a password is shown: ssh takes no password from a URL, and "git" is no secret.
    if scheme is not None and scheme[0].rpartition("+")[2].lower() == "ssh" and ":" not in match[1]:
        return match[0]
    return f"://{MASKED}@"


def _masked_parameter(match: re.Match[str]) -> str:
    return match[0] if re.search(_PARAMETER, _before(match)) is None else f"={MASKED}"


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - _BEFORE) : match.start()]


def split(text: str) -> Split | None:
    """Return the parts of a requirement or a URL with credentials; None if it has none.

    Raise `ValueError`, whose text has no credentials, if they cannot be kept off the nodes' command lines.
    """
    if re.search(_SLASHED, re.sub(_USERINFO, _masked, text)):
        raise ValueError(f'{mask(text)}: percent-encode "/", "?", "#" and blanks in a password: %2F, %3F, %23, %20')
    match = re.search(_URL, text)
    if match is None or re.sub(_USERINFO, _masked, match[0]) == match[0]:
        return None
    scheme, userinfo, host = match.groups()
    if scheme.lower() not in ("http", "https", "git+http", "git+https"):
        raise ValueError(
            f"{mask(text)}: credentials can be given for http, https, git+http and git+https only: with {scheme} they "
            "would be seen in the node's list of processes"
        )
    if re.search(_URL, text[match.end() :]):
        raise ValueError(f"{mask(text)}: one URL with credentials at most")
    user, colon, password = userinfo.partition(":")
    login = Login(unquote(user), unquote(password) if colon else None)
    if any(not character.isprintable() for part in login for character in part or ""):
        raise ValueError(f"{mask(text)}: its user name or its password contains a control character")
    # Older versions of pip look a host up in a netrc file as it is written.
    return Split(text[: match.start()], scheme.lower(), login, host.lower(), text[match.end() :])


def bare(text: str) -> str:
    """Return a requirement or a URL without its credentials."""
    found = split(text)
    return text if found is None else found.bare


def secrets(text: str) -> frozenset[str]:
    """Return the secrets in a requirement or a URL, each as it is and percent-encoded."""
    found = split(text)
    if found is None:
        return frozenset()
    user, password = found.login
    # Some sites take the token as the user name, with a password that is no secret: "token:x-oauth-basic".
    parts = [password or user, *([user] if len(user) >= _MIN_TOKEN else [])]
    return frozenset(text for part in parts for text in (part, quote(part, safe="")) if len(text) >= _MIN_SECRET)
