"""How hosts are reached, and how we prove there who we are. Hosts are real `sshd`s."""

from __future__ import annotations

import getpass
import logging
import os
import pwd
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lab as the_lab
import pytest
import skyward_lite as sky
from lab import Lab, Sshd, connect, keygen, machine, ssh
from skyward_lite.providers import openssh, public_keys

RELAY = """
import os, socket, sys, threading
server = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def forward():
    while data := os.read(0, 65536):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)
threading.Thread(target=forward, daemon=True).start()
while data := server.recv(65536):
    os.write(1, data)
"""


@pytest.fixture(scope="module")
def host(lab) -> Sshd:
    """A host that takes the lab's own key."""
    return lab.host()


def configure(lab: Lab, host: Sshd, *lines: str) -> None:
    lab.extra[host.name] = list(lines)
    lab.write()


def fingerprint(path: Path) -> str:
    return subprocess.run(["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True).stdout.split()[1]


# ------------------------------------------------------------------------------------------------ authentication


class Keys:
    """Keys that the `door` takes, one that it does not, and one with a passphrase that an agent has."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.good = {kind: keygen(directory / kind, kind) for kind in ("ed25519", "ecdsa", "rsa")}
        self.wrong = [keygen(directory / f"wrong{number}") for number in range(3)]
        self.locked = keygen(directory / "locked")
        self.authority = keygen(directory / "authority")
        self.authorized = directory / "authorized"
        self.authorized.write_text(
            "".join(Path(f"{key}.pub").read_text() for key in [*self.good.values(), self.locked])
        )
        self.agent = directory / "agent"
        self.process = subprocess.Popen(
            ["ssh-agent", "-D", "-a", str(self.agent)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()  # it says where it listens once it does
        for key in (*self.wrong, self.locked):
            env = {**os.environ, "SSH_AUTH_SOCK": str(self.agent)}
            subprocess.run(["ssh-add", "-q", str(key)], env=env, check=True, stdin=subprocess.DEVNULL)
        lock = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(self.locked)]
        subprocess.run(lock, check=True, capture_output=True)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Iterator[Keys]:
    keys = Keys(tmp_path_factory.mktemp("keys"))
    yield keys
    keys.close()


@pytest.fixture(scope="module")
def door(lab, keys) -> Sshd:
    """A host that does not take the lab's own key, and few attempts."""
    options = (f"AuthorizedKeysFile {keys.authorized}", f"TrustedUserCAKeys {keys.authority}.pub", "MaxAuthTries 3")
    return lab.host(*options)


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_keys_of_all_types_serve(lab, door, keys, kind):
    """The key of an IdentityFile proves who we are."""
    configure(lab, door, f"IdentityFile {keys.good[kind]}")
    connect(lab, door.name)
    assert fingerprint(keys.good[kind]) in door.log_text()


def test_a_wrong_key_is_refused_and_named(lab, door, keys):
    """The text says what was tried and what the server takes, and it is tried once."""
    configure(lab, door, f"IdentityFile {keys.wrong[0]}")
    assert not ssh(lab, door.name)
    with pytest.raises(sky.NodeStartError) as caught:
        connect(lab, door.name)
    error = str(caught.value)
    assert f"{keys.wrong[0]} (ssh-ed25519 {fingerprint(keys.wrong[0])})" in error
    assert str(lab.user_key) in error
    assert "publickey" in error
    assert "ssh-copy-id" in error
    assert getpass.getuser() in error


def test_no_key_at_all(lab, door, keys):
    """A file that is missing is no key, as for ssh."""
    configure(lab, door)
    config = lab.directory / "keyless"
    config.write_text(Path(lab.config).read_text().replace(str(lab.user_key), str(keys.directory / "missing")))
    with pytest.raises(sky.NodeStartError, match="no key to try"):
        connect(lab, door.name, config=str(config))


def test_a_key_with_a_passphrase_needs_the_agent(lab, door, keys):
    """Without an agent the text says what to do."""
    configure(lab, door, f"IdentityFile {keys.locked}")
    with pytest.raises(sky.NodeStartError, match=f"{keys.locked} has a passphrase: `ssh-add {keys.locked}` first"):
        connect(lab, door.name)


@pytest.mark.parametrize("only", ["yes", "no"])
@pytest.mark.parametrize("suffix", ["", ".pub"])
def test_the_agents_key_of_the_identity_file_comes_first(lab, door, keys, only, suffix):
    """Of the agent's keys the one whose file is named is tried first, though the server takes few attempts."""
    configure(lab, door, f"IdentityFile {keys.locked}{suffix}", f"IdentityAgent {keys.agent}", f"IdentitiesOnly {only}")
    assert ssh(lab, door.name)
    connect(lab, door.name)


def test_the_agents_key_is_known_by_its_private_file_too(lab, door, keys, tmp_path):
    """A passphrase does not hide its public half; nobody is told to add what was added."""
    alone = tmp_path / "alone"
    shutil.copy(keys.locked, alone)
    configure(lab, door, f"IdentityFile {alone}", f"IdentityAgent {keys.agent}", "IdentitiesOnly yes")
    assert ssh(lab, door.name)
    connect(lab, door.name)
    host = lab.host("AuthorizedKeysFile none")
    configure(lab, host, f"IdentityFile {alone}", f"IdentityAgent {keys.agent}", "IdentitiesOnly yes")
    with pytest.raises(sky.NodeStartError, match="of the ssh-agent") as caught:
        connect(lab, host.name)
    assert "ssh-add" not in str(caught.value)


@pytest.mark.parametrize("after", ["\n", "\n# a note\n"])
def test_text_after_a_private_key_is_no_part_of_it(keys, tmp_path, after):
    """For ssh the key ends with its last line, and its public half is known all the same."""
    for key in (keys.good["ed25519"], keys.good["rsa"], keys.locked):
        file = tmp_path / "key"
        file.write_text(key.read_text() + after)
        expected = " ".join(Path(f"{key}.pub").read_text().split()[:2])
        assert public_keys.of_private_file(str(file)) == public_keys.of_private_file(str(key)) == expected


def indented(key: bytes) -> bytes:
    return b"\n".join(line if line.startswith(b"-----") else b"  " + line + b" " for line in key.splitlines()) + b"\n"


@pytest.mark.parametrize("passphrase", ["", "secret"])
@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_private_file_has_its_public_half_for_us_as_for_ssh(tmp_path, kind, passphrase):
    """With a comment of any bytes, and with blanks, empty lines and text that ssh does not mind."""
    file = tmp_path / "key"
    make = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", b"b\xfcro", "-f", file]
    subprocess.run(make, check=True)
    written = file.read_bytes()
    first, rest = written.split(b"\n", 1)
    for text in (written, indented(written), first + b"\n\n" + rest, written + b"more\n"):
        file.write_bytes(text)
        read = ["ssh-keygen", "-y", "-P", passphrase, "-f", file]
        printed = subprocess.run(read, capture_output=True, check=True).stdout
        key = public_keys.read(printed)
        assert key is not None
        assert public_keys.of_private_file(str(file)) == key.line
    file.write_bytes(written.replace(b"\n", b"\r\n"))
    assert public_keys.of_private_file(str(file)) == key.line


@pytest.mark.parametrize("form", ["PEM", "PKCS8"])
@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
def test_an_older_private_file_has_no_public_half(tmp_path, kind, form):
    """Only OpenSSH's own format has one beside the private key."""
    file = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-m", form, "-N", "", "-f", file], check=True)
    assert public_keys.of_private_file(str(file)) is None


@pytest.mark.parametrize(("kind", "where"), [("rsa", "agent"), ("ed25519", "beside"), ("rsa", "CertificateFile")])
def test_certificates_for_the_agents_keys_serve(lab, door, keys, tmp_path, kind, where):
    """They may be in the agent, too, or in a file where only the agent can sign."""
    key = keygen(tmp_path / "short-lived", kind)
    sign = ["ssh-keygen", "-q", "-s", keys.authority, "-I", "me", "-n", getpass.getuser(), f"{key}.pub"]
    # Comments may be in any encoding: the one of the key in the agent, and the one of the certificate.
    comment = ["ssh-keygen", "-q", "-c", "-C", b"b\xfcro\x85\x0c", "-f", key]
    subprocess.run(comment, check=True, capture_output=True)
    subprocess.run(sign, check=True, capture_output=True)
    certificate = Path(f"{key}-cert.pub")
    assert b"b\xfcro" in certificate.read_bytes()
    away = certificate.rename(tmp_path / "away") if where != "agent" else certificate
    env = {**os.environ, "SSH_AUTH_SOCK": str(keys.agent)}
    subprocess.run(["ssh-add", "-q", key], env=env, check=True)
    lock = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)]
    subprocess.run(lock, check=True, capture_output=True)
    if where == "beside":
        away.rename(certificate)
    elif where == "agent":
        certificate.unlink()
    named = [f"CertificateFile {away}"] if where == "CertificateFile" else []
    # With IdentitiesOnly ssh wants a certificate to be in a file; without it, it offers the agent's other keys first.
    only = "no" if where == "agent" else "yes"
    host = lab.host(f"TrustedUserCAKeys {keys.authority}.pub") if where == "agent" else door
    configure(lab, host, f"IdentityFile {key}", f"IdentityAgent {keys.agent}", f"IdentitiesOnly {only}", *named)
    try:
        assert ssh(lab, host.name)
        connect(lab, host.name)
    finally:
        subprocess.run(["ssh-add", "-q", "-d", f"{key}.pub"], env=env, check=True)


def test_the_agent_of_the_environment_serves(lab, keys, monkeypatch):
    """SSH_AUTH_SOCK is where the agent is, unless the configuration says another."""
    monkeypatch.setenv("SSH_AUTH_SOCK", str(keys.agent))
    host = lab.host(f"AuthorizedKeysFile {keys.authorized}", "MaxAuthTries 6")
    configure(lab, host, "IdentityAgent SSH_AUTH_SOCK", "IdentitiesOnly no")
    connect(lab, host.name)
    assert fingerprint(keys.locked) in host.log_text()


def test_an_agent_that_is_gone_is_named(lab, door, keys):
    """The other keys are tried all the same."""
    gone = keys.directory / "gone"
    configure(lab, door, f"IdentityAgent {gone}")
    with pytest.raises(sky.NodeStartError, match=f"no ssh-agent answers at {gone}, {lab.user_key}"):
        connect(lab, door.name)
    configure(lab, door, f"IdentityAgent {gone}", f"IdentityFile {keys.good['rsa']}")
    connect(lab, door.name)


def test_too_many_keys_are_told_from_a_fault(lab, door, keys):
    """A server that hangs up after so many keys is an authentication failure, with the remedy."""
    configure(lab, door, f"IdentityAgent {keys.agent}", "IdentitiesOnly no")
    with pytest.raises(sky.NodeStartError, match="authentication .*IdentitiesOnly yes"):
        connect(lab, door.name)


@pytest.mark.parametrize(
    ("kind", "name"), [("ed25519", "key-cert.pub"), ("rsa", "key-cert.pub"), ("ecdsa", "any name.pub")]
)
def test_a_certificate_serves(lab, door, keys, tmp_path, kind, name):
    """A user certificate is found beside its key, or where CertificateFile says, whatever it is called."""
    key = keygen(tmp_path / "key", kind)
    sign = ["ssh-keygen", "-q", "-s", keys.authority, "-I", "me", "-n", getpass.getuser(), f"{key}.pub"]
    subprocess.run(sign, check=True, capture_output=True)
    beside, file = Path(f"{key}-cert.pub"), tmp_path / name
    beside.rename(file)
    configure(lab, door, f"IdentityFile {key}", *([f'CertificateFile "{file}"'] if file != beside else []))
    assert ssh(lab, door.name)
    connect(lab, door.name)
    file.unlink()
    with pytest.raises(sky.NodeStartError, match=f"{key} "):
        connect(lab, door.name)


def test_names_of_identity_files_may_have_tokens(lab, door, keys, monkeypatch):
    """%h, %n, %p, %r, %%, ${VARIABLE} and ~ are what they are for ssh; a name may have spaces."""
    monkeypatch.setenv("LAB_KEYS", str(keys.directory))
    key = keys.directory / f"{door.address} {door.port} {getpass.getuser()} {door.name} %"
    shutil.copy(keys.good["rsa"], key)
    configure(lab, door, 'IdentityFile "${LAB_KEYS}/%h %p %r %n %%"')
    assert ssh(lab, door.name)
    connect(lab, door.name)
    configure(lab, door, "IdentityFile ~/%h/key")
    monkeypatch.setenv("HOME", "/elsewhere")
    home = pwd.getpwuid(os.getuid()).pw_dir
    found = openssh.resolve(openssh.parse(door.name), lab.config)
    assert found.identity_files[0] == f"{home}/{door.address}/key"


# ------------------------------------------------------------------------------------------------ reaching


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lab", openssh.Destination("lab")),
        ("me@lab:22", openssh.Destination("lab", "me", 22)),
        ("m@e@lab", openssh.Destination("lab", "m@e")),
        ("[::1]:2222", openssh.Destination("::1", None, 2222)),
        ("me@[fe80::1%eth0]", openssh.Destination("fe80::1%eth0", "me")),
        ("::1", openssh.Destination("::1")),
        ("ssh://me@lab:2222/", openssh.Destination("lab", "me", 2222)),
    ],
)
def test_destinations(text, expected):
    """What ssh and people write for a host."""
    assert openssh.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "me@", "@lab", "lab:", "lab:ssh", "lab:0", "lab:65536", "lab:22:22", "a lab", "-oProxyCommand=x"),
        *("-l@lab", "[::1", "[]:22", "lab;id", "$(id)", "`id`@lab", "a'b", "lab\n"),
    ],
)
def test_bad_destinations_are_refused_at_once(text):
    """Also what a shell would run, for names become words of proxy commands."""
    with pytest.raises(ValueError, match="a host is"):
        sky.SSH(text)


def test_hosts_are_named_once():
    """A host named twice would share its cores with itself."""
    with pytest.raises(ValueError, match="names a host twice: a"):
        sky.SSH("a", "b", sky.Host("a"))
    with pytest.raises(ValueError, match="without hosts"):
        sky.SSH()
    with pytest.raises(ValueError, match="at least 1"):
        sky.Host("a", concurrency=0)


def test_the_configuration_is_what_ssh_says_it_is(lab, host):
    """`Include`, `Match` and patterns in the file; what the destination says comes before it."""
    included = lab.directory / "included"
    included.write_text(f"Host far*\n  HostName {host.address}\n  Port 1\n")
    file = lab.directory / "config2"
    matching = "Match originalhost farther user nobody\n  ConnectTimeout 7\n"
    file.write_text(f"Include {included}\n{matching}{Path(lab.config).read_text()}")
    connect(lab, f"farther:{host.port}", config=str(file))
    found = openssh.resolve(openssh.parse("nobody@farther"), str(file))
    assert (found.hostname, found.port, found.user, found.connect_timeout) == (host.address, 1, "nobody", 7.0)
    assert found.key_name == f"[{host.address}]:1"


def test_a_broken_configuration_is_shown(lab, tmp_path):
    """ssh's own text says where."""
    file = tmp_path / "broken"
    file.write_text("Host *\n  Nonsense yes\n")
    with pytest.raises(sky.NodeStartError, match=f"{file}.*(?i:nonsense)"):
        connect(lab, "lab", config=str(file))


def test_an_address_of_ipv6(lab):
    """In brackets, with a port."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
        port = probe.getsockname()[1]
    host = lab.host(address="::1", port=port)
    connect(lab, f"[::1]:{port}")
    connect(lab, host.name)


def test_a_proxy_command_leads_to_the_host(lab, host, tmp_path):
    """Its tokens are the host's; nothing is connected to directly."""
    relay = tmp_path / "relay.py"
    relay.write_text(RELAY)
    configure(lab, host, f"ProxyCommand {sys.executable} {relay} {host.address} %p", "HostKeyAlias behind")
    with lab.known_hosts.open("a") as file:
        file.write(host.known().replace(f"[{host.address}]:{host.port}", "behind") + "\n")
    try:
        connect(lab, host.name)
    finally:
        configure(lab, host)


def test_a_proxy_command_has_its_own_variables(lab, host, tmp_path):
    """They are its shell's: ssh fills in tokens only."""
    relay = tmp_path / "relay.py"
    relay.write_text(RELAY)
    configure(lab, host, f"ProxyCommand sh -c 'to={host.address}; exec {sys.executable} {relay} ${{to}} %p'")
    try:
        assert ssh(lab, host.name)
        connect(lab, host.name)
    finally:
        configure(lab, host)


@pytest.mark.skipif(os.getuid() != 0, reason="a hosts file of one's own needs root")
def test_all_addresses_of_a_name_are_tried(lab, host, tmp_path):
    """Each within the bound: one that does not answer does not hide the next."""
    silent = socket.create_server(("127.0.0.9", host.port), backlog=0)
    filling = [socket.socket() for _ in range(3)]
    for one in filling:
        one.setblocking(False)
        one.connect_ex(silent.getsockname())
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.9 twice\n{host.address} twice\n")
    configure(lab, host, "HostName twice", f"HostKeyAlias [{host.address}]:{host.port}", "ConnectTimeout 2")
    script = (
        f"import sys; sys.path[:0] = {[str(Path(the_lab.__file__).parent)]!r}; import lab, socket, types\n"
        f"found = [a[4][0] for a in socket.getaddrinfo('twice', {host.port}, type=socket.SOCK_STREAM)]\n"
        f"assert found == ['127.0.0.9', {host.address!r}], found\n"
        f"print(lab.connect(types.SimpleNamespace(config={lab.config!r}), {host.name!r}))"
    )
    bound = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts && exec {shlex.join([sys.executable, '-c', script])}"
    try:
        done = subprocess.run(["unshare", "--mount", "sh", "-c", bound], capture_output=True, text=True, timeout=40)
    finally:
        configure(lab, host)
        for one in (*filling, silent):
            one.close()
    assert "ssh-ed25519" in done.stdout, done.stderr


def test_what_a_failing_proxy_command_prints_is_shown(lab, host):
    """So is why the host cannot be reached through it."""
    configure(lab, host, "ProxyCommand echo no way to %h >&2; exit 3")
    try:
        with pytest.raises(sky.NodeStartError, match=f"the proxy command printed: no way to {host.address}"):
            connect(lab, host.name)
    finally:
        configure(lab, host)


def test_a_new_key_is_logged_once(lab, host, caplog):
    """A machine that connects anew after each cut says once that it trusts a key, also if no file keeps it."""
    configure(lab, host, "UserKnownHostsFile /dev/null")
    try:
        with machine(lab, host.name, accept_new=True) as (one, core):
            assert one.connect(core).host_key == one.connect(core).host_key
    finally:
        configure(lab, host)
    assert len([message for message in caplog.messages if "its new key was added to /dev/null" in message]) == 1


def test_only_what_the_last_proxy_command_has_printed_is_shown(lab, host):
    """A machine connects anew after each cut, for days: what an earlier proxy command said is not the reason now."""
    try:
        with machine(lab, host.name) as (one, core):
            for words in ("a first and longer reason", "another one"):
                configure(lab, host, f"ProxyCommand echo {words} >&2; exit 3")
                with pytest.raises(sky.NodeStartError, match=f"the proxy command printed: {words}$"):
                    one.connect(core)
    finally:
        configure(lab, host)


def test_a_proxy_command_that_is_not_there_is_shown(lab, host):
    """The shell says so."""
    configure(lab, host, "ProxyCommand /nonexistent/proxy %h")
    try:
        with pytest.raises(sky.NodeStartError, match="the proxy command printed: .*/nonexistent/proxy"):
            connect(lab, host.name)
    finally:
        configure(lab, host)


def test_a_jump_host_that_is_unknown_is_refused_by_ssh(lab, host):
    """ssh verifies the hosts that we jump over, and its text is shown."""
    hop = lab.host(known=False)
    configure(lab, host, f"ProxyJump {hop.name}")
    try:
        with pytest.raises(sky.NodeStartError, match="the proxy command printed: .*Host key verification failed"):
            connect(lab, host.name)
    finally:
        configure(lab, host)


def test_jumps_over_three_hosts(lab, host):
    """Each host is reached over the one before it, and each is in the configuration."""
    hops = [lab.host() for _ in range(3)]
    configure(lab, host, f"ProxyJump {','.join([hops[0].name, f'{getpass.getuser()}@{hops[1].name}', hops[2].name])}")
    try:
        connect(lab, host.name)
    finally:
        configure(lab, host)
    assert all("Accepted publickey" in hop.log_text() for hop in hops)


@pytest.fixture
def islands() -> Iterator[list[str]]:
    """Three network namespaces in a row, none of which forwards: here – 1 – 2 – 3."""
    names = [f"sky{os.getpid()}n{number}" for number in (1, 2, 3)]

    def ip(line: str) -> None:
        subprocess.run(["ip", *shlex.split(line)], check=True, capture_output=True, timeout=10)

    try:
        for number, name in enumerate(names, 1):
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
            here = f"-n {names[number - 2]}" if number > 1 else ""
            left, right = f"sk{os.getpid() % 10000}l{number}", f"sk{os.getpid() % 10000}r{number}"
            ip(f"{here} link add {left} type veth peer name {right} netns {name}")
            ip(f"{here} addr add 10.213.{number}.1/24 dev {left}")
            ip(f"{here} link set {left} up")
            ip(f"-n {name} addr add 10.213.{number}.2/24 dev {right}")
            ip(f"-n {name} link set {right} up")
        yield names
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2")
def test_a_host_that_only_the_last_jump_reaches(lab, islands):
    """From here there is no way to it."""
    hops = [lab.host(address=f"10.213.{number}.2", port=2022, namespace=name) for number, name in enumerate(islands, 1)]
    final = lab.host(address="127.0.0.1", port=2023, namespace=islands[2])
    configure(lab, final, f"ProxyJump {','.join(hop.name for hop in hops)}")
    connect(lab, final.name)
    configure(lab, final, f"ProxyJump {','.join(hop.name for hop in hops[:2])}")
    with pytest.raises(sky.NodeStartError, match="the proxy command printed: .*(refused|unreachable)"):
        connect(lab, final.name)
    for host in [*hops, final]:
        host.close()


def test_nobody_there(lab, host):
    """The error tells a refused connection from an unknown name."""
    with socket.socket() as closed:
        closed.bind((host.address, 0))
        with pytest.raises(sky.NodeStartError, match="(?i)refused"):
            connect(lab, f"{host.address}:{closed.getsockname()[1]}", accept_new=True)
    with pytest.raises(sky.NodeStartError, match="(?i)name|resolve|lookup"):
        connect(lab, "nowhere.invalid", accept_new=True)


@pytest.mark.parametrize("banner", [b"", b"SSH-2.0-OpenSSH_9.9\r\n"])
@pytest.mark.parametrize("by", ["pool", "configuration"])
def test_a_server_that_stalls_is_given_up(lab, banner, by):
    """`connect_timeout` bounds connection, key exchange and authentication; so does ConnectTimeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        file = lab.directory / "stalls"
        file.write_text(("ConnectTimeout 1\n" if by == "configuration" else "") + "UserKnownHostsFile /dev/null\n")
        peers = []

        def answer() -> None:
            peers.append(server.accept()[0])
            peers[0].sendall(banner)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with pytest.raises(sky.NodeStartError, match="took more than 1 s"):
                connect(
                    lab,
                    f"127.0.0.1:{server.getsockname()[1]}",
                    timeout=1 if by == "pool" else 50,
                    accept_new=True,
                    config=str(file),
                )
        finally:
            thread.join(10)
            peers[0].close()


def test_a_proxy_command_that_stalls_is_ended(lab, host):
    """It is given up after `connect_timeout`, and none is left."""
    marker = f"{os.getpid()}.25"
    configure(lab, host, f"ProxyCommand sleep {marker}")
    try:
        with pytest.raises(sky.NodeStartError, match="took more than 1 s"):
            connect(lab, host.name, timeout=1, patience=0.1)
    finally:
        configure(lab, host)
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            assert marker.encode() not in (directory / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile


def test_options_that_are_not_applied_are_logged(lab, host, caplog):
    """At INFO, and only those that could matter."""
    configure(
        lab, host, "AddressFamily inet", "BindAddress 127.0.0.1", "ForwardAgent yes", "SendEnv LANG", "LogLevel DEBUG"
    )
    try:
        with caplog.at_level(logging.INFO, "skyward_lite"):
            connect(lab, host.name)
    finally:
        configure(lab, host)
    assert [r.getMessage() for r in caplog.records] == [
        f"{host.name}: ssh's options addressfamily, bindaddress are set and not applied"
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "skyward_lite"):
        connect(lab, host.name)
    assert not caplog.records


RESTRICTIONS = {
    "CheckHostIP yes": "addresses are not compared",
    "KnownHostsCommand /bin/true": "lists, or revokes, is not known",
    "PubkeyAcceptedAlgorithms ssh-ed25519": "your keys also sign",
}


def warned(tmp_path: Path, host: str, *lines: str) -> list[str]:
    """Return the warnings about the restrictions in a configuration."""
    config = tmp_path / "config"
    config.write_text("".join(f"{line}\n" for line in lines))
    return openssh.warnings_of(openssh.resolve(openssh.parse(host), str(config)), host)


@pytest.mark.parametrize(("line", "consequence"), RESTRICTIONS.items())
def test_restrictions_that_are_not_applied_are_said(tmp_path, line, consequence):
    """The warning names the host, the option, its value, what follows and what to do."""
    option, value = line.split()
    (warning,) = warned(tmp_path, "node.example", line)
    assert warning.startswith(f"node.example: the ssh configuration sets {option.lower()} to {value!r}")
    assert consequence in warning
    assert "Remedy: " in warning


def test_restrictions_that_are_not_applied_are_logged_as_warnings(lab, host, caplog):
    """The node is there all the same: with warnings as errors too, as in these tests."""
    configure(lab, host, *RESTRICTIONS)
    try:
        with caplog.at_level(logging.WARNING, "skyward_lite"):
            connect(lab, host.name)
    finally:
        configure(lab, host)
    messages = "".join(record.getMessage() for record in caplog.records)
    assert f"{host.name}: the ssh configuration sets knownhostscommand" in messages


def test_restrictions_that_make_no_difference_are_not_said(tmp_path):
    """A policy of the whole system may name all that is used; and after the remedy there is no warning."""
    key, other = keygen(tmp_path / "key"), keygen(tmp_path / "other", "rsa")
    policy = "PubkeyAcceptedAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,ssh-ed25519"
    for host, *lines in (
        ("node", "CheckHostIP no", "CASignatureAlgorithms ssh-ed25519", "PubkeyAcceptedAlgorithms -ssh-rsa"),
        ("node", f"{policy},rsa-sha2-512"),
        ("node", policy, f"IdentityFile {key}", "IdentitiesOnly yes"),
        ("192.0.2.7", "CheckHostIP yes"),
        ("node", "CheckHostIP yes", "HostName 2001:db8::7"),
        ("node", "CheckHostIP yes", "ProxyCommand nc %h %p"),
    ):
        assert warned(tmp_path, host, *lines) == [], lines
    assert warned(tmp_path, "node", policy, f"IdentityFile {key}", f"IdentityFile {other}", "IdentitiesOnly yes")


@pytest.mark.parametrize("end", ["\f", "\v", "\r", "\x1c", "\u2028", "\0"])
def test_public_keys_are_read_by_ssh_rules(tmp_path, end):
    """Only a newline ends a line, and a NUL hides the rest of it; a file is the first key in it."""
    one, two = (Path(f"{keygen(tmp_path / name)}.pub").read_text().split()[:2] for name in ("one", "two"))
    first, second = " ".join(one), " ".join(two)
    file = tmp_path / "file.pub"
    for text, expected in {
        f"# comment{end}{first}\n{second}\n": second,
        f"x{end}{first}\n{second} me\n": second,
        f"{first} me{end}{second}": first,
        f"-----BEGIN{end}{first}\n{second}": None,
        f"{one[0]}{end}{one[1]}": None,
    }.items():
        file.write_text(text, newline="")
        assert public_keys.in_file(str(file)) == expected, text


@pytest.fixture(scope="module")
def talkative(lab) -> Sshd:
    """A host that logs what was negotiated."""
    return lab.host("LogLevel DEBUG1", kinds=("ed25519", "rsa"))


@pytest.mark.parametrize(
    ("line", "logged"),
    [
        ("Ciphers aes128-ctr", "cipher: aes128-ctr"),
        ("MACs hmac-sha2-512", "MAC: hmac-sha2-512 "),
        ("KexAlgorithms diffie-hellman-group16-sha512", "kex: algorithm: diffie-hellman-group16-sha512"),
        ("HostKeyAlgorithms rsa-sha2-256", "kex: host key algorithm: rsa-sha2-256"),
    ],
)
def test_algorithms_of_the_configuration_are_used(lab, talkative, line, logged):
    """What the user restricts is not offered otherwise."""
    with lab.known_hosts.open("a") as file:
        file.write(talkative.known("rsa") + "\n")
    configure(lab, talkative, "Ciphers aes256-ctr" if line.startswith("MACs") else "", line)
    start = len(talkative.log_text())
    connect(lab, talkative.name)
    assert logged in talkative.log_text()[start:]


def test_algorithms_that_are_not_supported_are_named(lab, talkative):
    """Nothing else is used in their place."""
    configure(lab, talkative, "MACs umac-64@openssh.com")
    with pytest.raises(sky.NodeStartError, match="no MAC algorithm that the ssh configuration allows.*umac-64"):
        connect(lab, talkative.name)


@pytest.mark.parametrize("line", ["PubkeyAuthentication no", "PreferredAuthentications password,gssapi-with-mic"])
def test_public_keys_that_are_turned_off_are_not_used(lab, talkative, tmp_path, line):
    """As with ssh, the host does not hear of our keys: nobody connects to it."""
    configure(lab, talkative, line, f"ProxyCommand touch {tmp_path}/connected")
    with pytest.raises(sky.NodeStartError, match=r"turns public keys off for .*allow them"):
        connect(lab, talkative.name)
    assert not (tmp_path / "connected").exists()


def test_short_rsa_keys_are_refused(lab, talkative):
    """RequiredRSASize counts for the keys of hosts, known or new; a short one is not recorded."""
    short = ("RequiredRSASize 4096", "HostKeyAlgorithms rsa-sha2-512")
    for more in ((), ("StrictHostKeyChecking accept-new", f"UserKnownHostsFile {lab.directory}/short_rsa")):
        configure(lab, talkative, *short, *more)
        assert not ssh(lab, talkative.name)
        with pytest.raises(sky.NodeStartError, match="RequiredRSASize 4096"):
            connect(lab, talkative.name)
    assert not (lab.directory / "short_rsa").exists()


def test_short_rsa_keys_of_ours_are_not_tried(lab, door, keys):
    """RequiredRSASize counts for our own keys too."""
    for size, good in (("2048", True), ("4096", False)):
        configure(lab, door, f"RequiredRSASize {size}", f"IdentityFile {keys.good['rsa']}")
        assert ssh(lab, door.name) == good
        if good:
            connect(lab, door.name)
        else:
            with pytest.raises(sky.NodeStartError, match="authentication"):
                connect(lab, door.name)
