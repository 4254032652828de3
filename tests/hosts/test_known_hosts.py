"""Which host keys are trusted: each case is also put to `ssh` itself."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from pathlib import Path

import pytest
import skyward_lite as sky
from lab import Lab, Sshd, connect, keygen, ssh
from processes import eventually

OTHER = "[other.example]:22"


@pytest.fixture(scope="module")
def both(lab) -> Sshd:
    """A host with keys of two types, that no file names yet."""
    return lab.host("LogLevel DEBUG1", known=False, kinds=("ed25519", "ecdsa"))


def public(path: Path) -> str:
    return " ".join(Path(f"{path}.pub").read_text().split()[:2])


def key(host: Sshd, kind: str = "ed25519") -> str:
    return public(host.keys[kind])


def fingerprint(path: Path) -> str:
    return subprocess.run(["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True).stdout.split()[1]


@pytest.fixture(scope="module")
def another(lab) -> dict[str, str]:
    """A key that no host has: its line and its fingerprint."""
    path = keygen(lab.directory / "another")
    return {"key": public(path), "fingerprint": fingerprint(path)}


def options(lab: Lab, host: Sshd, *lines: str) -> None:
    lab.extra[host.name] = list(lines)
    lab.write()


@pytest.fixture
def say(lab, both):
    """Write the known_hosts file, and the host's options in the configuration."""

    def write(*lines: str, ssh_options: tuple[str, ...] = ()) -> None:
        lab.known_hosts.write_text("".join(f"{line}\n" for line in lines))
        options(lab, both, *ssh_options)

    yield write
    write()


def ended(host: Sshd, start: int) -> bool:
    """Say whether every connection that the host has logged since then is over, and there was one."""
    log = host.log_text()[start:]
    ports = re.findall(r"Connection from \S+ port (\d+)", log)
    ends = "Connection (?:closed|reset) by|Unable to negotiate|Received disconnect"
    return bool(ports) and all(re.search(rf"(?:{ends}).* port {port}\b", log) for port in ports)


def refused(lab: Lab, host: Sshd, *, connects: bool = True, **kwargs: object) -> str:
    """Give the text with which the host is refused, by ssh too, before anybody tried to prove who he is.

    `connects` is False where the known keys alone decide, and the host never hears from us.
    """
    start = len(host.log_text())
    assert not ssh(lab, host.name)
    assert eventually(lambda: ended(host, start), 10), host.log_text()[start:]
    start = len(host.log_text())
    with pytest.raises(sky.NodeStartError) as caught:
        connect(lab, host.name, **kwargs)
    assert not connects or eventually(lambda: ended(host, start), 10), host.log_text()[start:]
    assert connects or "Connection from" not in host.log_text()[start:]
    assert "userauth-request" not in host.log_text()[start:]
    return str(caught.value)


def accepted(lab: Lab, host: Sshd, **kwargs: object) -> str:
    """Give the key that was accepted, which ssh accepts too."""
    assert ssh(lab, host.name)
    return connect(lab, host.name, **kwargs)


def place(host: Sshd) -> str:
    return f"[{host.address}]:{host.port}"


def test_an_unknown_host_is_refused(lab, both, say):
    """The text names the host, the file, the fingerprint that it shows, and what to do."""
    say()
    error = refused(lab, both)
    shown = [fingerprint(path) for path in both.keys.values()]
    assert place(both) in error
    assert str(lab.known_hosts) in error
    assert any(one in error for one in shown)
    assert f"ssh {both.name}" in error
    assert "accept_new=True" in error


def test_a_changed_key_is_refused(lab, both, say, another):
    """Both fingerprints are shown, and how to forget the old one; `accept_new` does not help."""
    say(f"{place(both)} {another['key']}")
    for kwargs in ({}, {"accept_new": True}):
        error = refused(lab, both, **kwargs)
        assert fingerprint(both.keys["ed25519"]) in error
        assert another["fingerprint"] in error
        assert f"ssh-keygen -R '{place(both)}'" in error


def test_the_key_type_that_is_known_is_asked_for(lab, both, say):
    """A host that has several keys shows the one that is known."""
    for kind in ("ed25519", "ecdsa"):
        say(f"{place(both)} {key(both, kind)}")
        assert accepted(lab, both) == key(both, kind)


def test_a_key_known_only_of_another_type_is_refused(lab, both, say):
    """What is known is an RSA key, and the host has none: both are named."""
    rsa = keygen(lab.directory / "rsa_host", "rsa")
    say(f"{place(both)} {public(rsa)}")
    error = refused(lab, both)
    assert fingerprint(rsa) in error
    assert "ssh-ed25519" in error


@pytest.mark.parametrize("accept_new", [False, True])
def test_a_revoked_key_is_refused(lab, both, say, accept_new):
    """Also if another line trusts it, and without the advice to accept it."""
    revoked = [f"@revoked * {key(both, kind)}" for kind in both.keys]
    for lines in (revoked, [*revoked, f"{place(both)} {key(both)}"]):
        say(*lines)
        error = refused(lab, both, accept_new=accept_new)
        assert "revoked" in error
        assert "accept_new" not in error
        assert "ssh-keygen -R" not in error


@pytest.mark.parametrize(
    ("pattern", "good"),
    [
        ("{place}", True),
        ("other,{place}", True),
        ("[127.0.*]:{port}", True),
        ("[127.0.?.*]:*,[127.0.??.*]:*,[127.0.???.*]:*", True),
        ("*,!{place}", True),  # for ssh looks for the name without the port too
        ("*,!{place},!{address}", False),
        ("!{place},!{address},*", False),
        ("*,!other", True),
        ("{address}", True),
        ("[{address}]:1", False),
        ("other", False),
    ],
)
def test_patterns_are_those_of_ssh(lab, both, say, pattern, good):
    """Wildcards, negations, other names, other ports and a key that is known for all ports."""
    name = pattern.format(place=place(both), port=both.port, address=both.address)
    say(f"{name} {key(both)}")
    if good:
        assert accepted(lab, both) == key(both)
    else:
        assert "is not in" in refused(lab, both)


def test_hashed_names_are_found(lab, both, say):
    """As `ssh-keygen -H` writes them."""
    say(f"other {key(both, 'ecdsa')}", f"{place(both)} {key(both)}")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", lab.known_hosts], check=True, capture_output=True)
    assert both.address not in lab.known_hosts.read_text()
    assert accepted(lab, both) == key(both)


def test_tabs_comments_and_broken_lines_are_skipped(lab, both, say):
    """One line that nobody understands does not hide the next."""
    say(
        "# a comment",
        "",
        "nonsense",
        f"{place(both)} ssh-ed25519 AAAA!",
        f"{place(both)} ssh-dss AAAA",
        f"{place(both)}\t{key(both)} a comment",
    )
    assert accepted(lab, both) == key(both)


def test_comments_of_any_encoding_are_skipped(lab, both, say):
    """Nobody reads them."""
    say(f"{place(both)} {key(both)} b\xfcro")
    lab.known_hosts.write_bytes(lab.known_hosts.read_text().encode("latin-1"))
    assert accepted(lab, both) == key(both)


def test_revoked_host_keys_are_refused(lab, both, say, another):
    """The files of RevokedHostKeys: a key in one is good for no host; without the file no host is trusted."""
    revoked = lab.directory / "revoked keys"
    say(f"{place(both)} {key(both)}", ssh_options=(f'RevokedHostKeys "{revoked}"',))
    assert "cannot be read, so no host is trusted" in refused(lab, both, connects=False)
    revoked.write_text(f"# not this host's\n{another['key']}\n")
    assert accepted(lab, both) == key(both)
    revoked.write_text(f"{another['key']}\n{key(both)} the host's\n")
    assert "is revoked" in refused(lab, both)
    subprocess.run(["ssh-keygen", "-q", "-k", "-f", revoked, f"{both.keys['ed25519']}.pub"], check=True)
    assert "key revocation list" in refused(lab, both, connects=False)


def test_a_certificate_authority_alone_is_refused_clearly(lab, both, say, another):
    """Host certificates are not supported, and the text says so, and where the authority is named."""
    say("# first", f"@cert-authority * {another['key']}")
    error = refused(lab, both, connects=False)
    assert "certificate authority" in error
    assert f"{lab.known_hosts}:2" in error
    say(f"@cert-authority * {another['key']}", f"{place(both)} {key(both)}")
    assert accepted(lab, both) == key(both)


@pytest.mark.parametrize("hashed", ["no", "yes"])
def test_accept_new_records_the_key_once(lab, both, say, another, hashed, caplog):
    """A new key is logged and recorded, also after a line without its end; from then on it is the one that counts."""
    say(ssh_options=(f"HashKnownHosts {hashed}",))
    lab.known_hosts.write_text(f"other {another['key']}")
    with caplog.at_level(logging.WARNING, "skyward_lite"):
        shown = connect(lab, both.name, accept_new=True)
    assert "was added to" in caplog.text
    lines = lab.known_hosts.read_text().splitlines()
    assert len(lines) == 2
    assert lines[0] == f"other {another['key']}"
    assert (both.address in lines[1]) == (hashed == "no")
    assert accepted(lab, both) == shown
    connect(lab, both.name, accept_new=True)
    assert lab.known_hosts.read_text().splitlines() == lines
    lab.known_hosts.write_text(lines[1].rpartition(" ")[0].rpartition(" ")[0] + f" {another['key']}\n")
    assert "ssh-keygen -R" in refused(lab, both, accept_new=True)


def test_a_new_port_of_a_known_host_is_new_and_not_changed(lab, both, say, another):
    """A key that is known without a port serves all ports; another one there is an unknown one."""
    say(f"{both.address} {another['key']}")
    error = refused(lab, both)
    assert "accept_new=True" in error
    assert "ssh-keygen -R" not in error
    shown = connect(lab, both.name, accept_new=True)
    assert f"{place(both)} {shown}" in lab.known_hosts.read_text()
    say(f"{both.address} {key(both)}", f"{both.address} {key(both, 'ecdsa')}")
    connect(lab, both.name, accept_new=True)
    assert len(lab.known_hosts.read_text().splitlines()) == 2


@pytest.mark.parametrize("strict", ["accept-new", "no"])
def test_new_keys_of_the_configuration_need_a_file(lab, both, say, strict):
    """With `UserKnownHostsFile none` ssh trusts no new key; with /dev/null it trusts each."""
    say(ssh_options=("UserKnownHostsFile none", f"StrictHostKeyChecking {strict}"))
    assert "is not in any known_hosts file" in refused(lab, both)
    say(ssh_options=("UserKnownHostsFile /dev/null", f"StrictHostKeyChecking {strict}"))
    accepted(lab, both)


@pytest.mark.parametrize("strict", ["accept-new", "no", "yes", "ask"])
def test_strict_host_key_checking_is_heeded(lab, both, say, another, strict):
    """The configuration can trust new keys too; a changed one it cannot, here."""
    say(ssh_options=(f"StrictHostKeyChecking {strict}",))
    if strict in ("yes", "ask"):
        refused(lab, both)
    else:
        connect(lab, both.name)
        assert place(both) in lab.known_hosts.read_text()
        assert ssh(lab, both.name)
    lab.known_hosts.write_text(f"{place(both)} {another['key']}\n")
    with pytest.raises(sky.NodeStartError, match="ssh-keygen -R"):
        connect(lab, both.name)


def test_a_host_key_alias_is_the_name_of_the_key(lab, both, say):
    """With HostKeyAlias the host's own name does not count, nor its port."""
    say(f"elsewhere {key(both)}", ssh_options=("HostKeyAlias elsewhere",))
    assert accepted(lab, both) == key(both)
    say(f"{place(both)} {key(both)}", ssh_options=("HostKeyAlias elsewhere",))
    assert "elsewhere is not in" in refused(lab, both)


def test_no_file_at_all(lab, both, say):
    """`UserKnownHostsFile none` is no reason to fail otherwise than for an unknown host."""
    say(ssh_options=("UserKnownHostsFile none",))
    assert "is not in any known_hosts file" in refused(lab, both)
    connect(lab, both.name, accept_new=True)


def test_names_of_files_may_have_spaces(lab, both, say):
    """`ssh -G` does not quote them."""
    file = lab.directory / "known hosts 2"
    file.write_text(f"{place(both)} {key(both)}\n")
    say(ssh_options=(f'UserKnownHostsFile "{lab.directory}/none" "{file}"',))
    assert accepted(lab, both) == key(both)


def test_a_file_in_a_missing_directory_is_made(lab, both, say):
    """A user's first new key makes ~/.ssh."""
    file = lab.directory / "new" / "known_hosts"
    say(ssh_options=(f"UserKnownHostsFile {file}",))
    connect(lab, both.name, accept_new=True)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert accepted(lab, both)


def test_a_key_that_cannot_be_recorded_is_said(lab, both, say, caplog):
    """As for ssh, that is no reason to refuse."""
    (lab.directory / "a_file").touch()
    say(ssh_options=(f"UserKnownHostsFile {lab.directory}/a_file/known_hosts",))
    with caplog.at_level(logging.WARNING, "skyward_lite"):
        connect(lab, both.name, accept_new=True)
    assert "could not be recorded" in caplog.text


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_not_an_empty_one(lab, both, say):
    """What it may say of the host is unknown: the host is refused, with `accept_new` too, and the file named."""
    say()
    lab.known_hosts.chmod(0)
    try:
        for accept_new in (False, True):
            with pytest.raises(sky.NodeStartError, match=f"(?s){lab.known_hosts}.*read|not readable"):
                connect(lab, both.name, accept_new=accept_new)
    finally:
        lab.known_hosts.chmod(0o600)
