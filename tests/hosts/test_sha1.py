"""Signatures with SHA-1 are refused, as by OpenSSH. Hosts are real `sshd`s."""

from __future__ import annotations

import pytest
import skyward_lite as sky
from lab import connect, ssh


@pytest.mark.parametrize(("algorithm", "good"), [("rsa-sha2-256", True), ("rsa-sha2-512", True), ("ssh-rsa", False)])
def test_a_new_host_must_not_sign_with_sha1(lab, algorithm, good):
    """An unknown host is accepted with an RSA key if it signs with SHA-2, and refused if it only signs with SHA-1."""
    host = lab.host(f"HostKeyAlgorithms {algorithm}", kinds=("ed25519", "rsa"))
    unknown = [f"UserKnownHostsFile {lab.directory}/{host.name}_known", "StrictHostKeyChecking accept-new"]
    lab.extra[host.name] = unknown
    lab.write()
    if good:
        assert connect(lab, host.name, accept_new=True).startswith("ssh-rsa ")
    else:
        with pytest.raises(sky.NodeStartError, match="ssh-rsa"):
            connect(lab, host.name, accept_new=True)
    assert ssh(lab, host.name) == good
