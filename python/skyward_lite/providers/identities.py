"""With which keys the user can prove who they are, in ssh's order: those of the ssh-agent, then those in files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias

from . import public_keys
from .openssh import Config, run_tool, too_short

Identity: TypeAlias = str | tuple[str, str | None] | tuple[str, list[str], bool, list[str]]
"""As `_core.Core.connect` takes it: a private key; a file with a private key, and one with its certificate; or the
ssh-agent's socket, the keys wanted first, whether only these may be used, and files with certificates for its keys."""


def identities(config: Config) -> list[Identity]:
    """Return the user's identities for a host. Keys of the ssh-agent that the configuration names come first."""
    found: list[Identity] = []
    if config.ssh_agent is not None:
        wanted = [
            key
            for file in config.identity_files
            if (
                key := public_keys.in_file(file)
                or public_keys.in_file(f"{file}.pub")
                or public_keys.of_private_file(file)
            )
        ]
        certificates = [*config.certificates, *(f"{file}-cert.pub" for file in config.identity_files)]
        there = [file for file in certificates if Path(file).exists()]
        found.append((config.ssh_agent, wanted, config.identities_only, there))
    for file in config.identity_files:
        if public_keys.in_file(file) is not None:
            continue  # a file with a public key names a key of the ssh-agent
        key = public_keys.of_private_file(file) or public_keys.in_file(f"{file}.pub")
        if key is not None and too_short(config, key):
            continue
        certificates = [name for name in config.certificates if _certifies(name, file)]
        certificates.append(f"{file}-cert.pub")
        found.append((file, next((name for name in certificates if Path(name).exists()), None)))
    return found


def _certifies(certificate: str, file: str) -> bool:
    """Return whether a certificate is for the key in a file, whatever their names are."""
    printed = re.search(
        rb"^ +Public key: \S+ (SHA256:\S+)", run_tool("ssh-keygen", "-L", "-f", certificate).stdout, re.M
    )
    # `ssh-keygen -l` prints the key's length in bits, its fingerprint, and a comment of any content.
    listed = public_keys.words(run_tool("ssh-keygen", "-l", "-f", file).stdout, 2)
    return printed is not None and printed[1] in listed[1:2]
