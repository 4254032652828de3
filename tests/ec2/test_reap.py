"""`reap` ends what is certainly over and lists the rest, whatever somebody has written into a tag."""

from __future__ import annotations

import datetime
import functools
import socket
import subprocess
import sys
import time
import traceback
import uuid
from typing import Any

import pytest
import skyward_lite as sky
from cloud import Cloud, aws
from hostile import FORGED, HOSTILE, is_harmless, serving
from skyward_lite.cli import reap
from skyward_lite.cli.reap import Resource, judge
from skyward_lite.providers.aws import launch as launching
from skyward_lite.providers.aws.api import Clients
from skyward_lite.providers.aws.tags import client_fate, machine_name, start_time, this_process

NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
AMI = "ami-12c6146b"
ELSEWHERE = "0123456789abcdef 4711 1234"
PAST, FUTURE = "2026-06-01T11:00:00+00:00", "2026-06-01T13:00:00+00:00"
UNREADABLE = [
    *("", "soon", "2026-06-01T11:00:00", "2026-06-01", "9999-12-31T23:59:59-23:59", "2999-01-01T00:00:00+00:00"),
    *("0", "1e9", "1" * 256, "2026-06-01T11:00:00+99:00", "\ud800", "2026-06-01T11:00:00\x00+00:00"),
]


def resource(kind: str = "instance", name: str = "i-1", **tags: str) -> Resource:
    """Return an instance of a run, or another resource, with these tags."""
    return Resource(kind, name, {f"skyward-lite:{key}": value for key, value in tags.items()})


def states(*resources: Resource, gone: tuple[str, ...] = (), lives: tuple[str, ...] = ()) -> list[str]:
    """Return the verdicts on the resources of one run, whose clients `gone` have ended and `lives` still run."""
    fates = {**dict.fromkeys(gone, "gone"), **dict.fromkeys(lives, "lives")}
    return [verdict.state for verdict in judge(resources, NOW, lambda tag: fates.get(tag, "unknown"))]


def ended_process() -> str:
    """Return the tag of a client that was a process of this machine and has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return f"{machine_name()} {process.pid} 1"


# ---------------------------------------------------------------------------------------------------- the tags


def test_what_is_certain():
    """An expired resource is over, and so is one whose client has ended; another one lives."""
    assert states(resource(expires=PAST, process=ELSEWHERE)) == ["over"]
    assert states(resource(expires=FUTURE, process=ELSEWHERE)) == ["lives"]
    assert states(resource(expires=FUTURE, process="gone"), gone=("gone",)) == ["over"]
    assert states(resource(process="gone"), gone=("gone",)) == ["over"]
    just = (NOW - datetime.timedelta(minutes=9)).isoformat()
    # Each of two clocks may be 5 minutes off.
    assert states(resource(expires=just, process=ELSEWHERE)) == ["lives"]


def test_a_client_that_lives_and_has_not_moved_the_expiry_on():
    """An expired run whose client lives is unclear, with all its resources: this machine may have slept."""
    mine, other = resource(expires=PAST, process="mine"), resource(name="i-2", expires=PAST, process=ELSEWHERE)
    assert states(mine, lives=("mine",)) == ["unclear"]
    assert states(mine, other, lives=("mine",)) == ["unclear", "unclear"]
    assert states(mine) == ["over"]


def test_the_latest_expiry_counts():
    """The latest expiry in a run counts for all its resources: moving it on may have reached some of them only."""
    assert states(resource(expires=PAST), resource("volume", "vol-1", expires=FUTURE)) == ["lives", "lives"]


@pytest.mark.parametrize("expires", UNREADABLE)
def test_an_expiry_that_cannot_be_read(expires):
    """A resource with an unreadable expiry is unclear, and does not change the verdict on the others."""
    odd = resource(expires=expires, process=ELSEWHERE)
    assert states(odd, resource(name="i-2", expires=PAST)) == ["unclear", "over"]
    assert states(odd, resource(name="i-2", expires=FUTURE)) == ["unclear", "lives"]


def test_a_tag_of_two_values():
    """A tag that is listed with two values has neither."""
    listed = [{"Key": "skyward-lite:expires", "Value": value} for value in (PAST, PAST, FUTURE)]
    assert states(Resource("instance", "i-1", reap.read_tags(listed))) == ["unclear"]
    assert states(Resource("instance", "i-1", reap.read_tags(listed[:2]))) == ["over"]
    assert reap.read_tags([{"Key": "alone"}, {}]) == {"alone": "", "": ""}


def test_no_expiry():
    """Without an expiry a resource of another machine's client is unclear."""
    assert states(resource(process=ELSEWHERE)) == ["unclear"]
    assert states(resource()) == ["unclear"]


def test_tags_that_contradict_one_another():
    """If the tags of one run name two clients, neither counts."""
    assert (
        states(resource(expires=FUTURE, process="gone"), resource(expires=FUTURE, process="b"), gone=("gone",))
        == ["lives"] * 2
    )
    assert states(resource(process="gone"), resource(name="i-2"), gone=("gone",)) == ["over", "unclear"]


def test_a_group_that_may_be_in_use():
    """A security group is unclear while an instance of its run may live."""
    group = resource("security group", "sg-1", expires=PAST)
    assert states(group, resource(expires="soon")) == ["unclear", "unclear"]
    assert states(group, resource(expires=PAST)) == ["over", "over"]


@pytest.mark.parametrize("pid", ["²", "0", "-1", "01", "9" * 30, "1" * 5000, "1 2", "", "1\n"])
def test_a_process_that_was_never_one(pid):
    """The fate of a process is unknown if its tag is none that a run writes."""
    assert client_fate(f"{machine_name()} {pid} 1") == "unknown"


def test_a_process_of_this_machine():
    """A process of this machine is gone when it has ended; without its start time its fate is unknown."""
    assert client_fate(ended_process()) == "gone"
    assert client_fate(this_process()) == "lives"
    assert client_fate(this_process().rpartition(" ")[0] + " ") == "unknown"


def test_a_program_with_any_name(tmp_path):
    """A process whose name is not text can be told to live, or to be gone."""
    script = "import sys; open('/proc/self/comm', 'wb').write(b'\\xff) R 1'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert client_fate(f"{machine_name()} {process.pid} 1") == "gone"
        assert client_fate(f"{machine_name()} {process.pid} {start_time(process.pid)}") == "lives"
        process.kill()


# ---------------------------------------------------------------------------------------------------- EC2


_clients = functools.cache(Clients)


@pytest.fixture(autouse=True)
def clients(monkeypatch):
    """Make boto3's clients once for all tests here: it takes half a second."""
    monkeypatch.setattr(reap, "Clients", _clients)


def launch(cloud: Cloud, run: str, **tags: str) -> str:
    """Launch an instance with these tags, and return its id."""
    ec2 = cloud.ec2()
    every = {"skyward-lite:run": run, **{f"skyward-lite:{key}": value for key, value in tags.items()}}
    listed = [{"Key": key, "Value": value} for key, value in every.items()]
    subnet = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    made = ec2.run_instances(
        ImageId=AMI,
        NetworkInterfaces=[{"DeviceIndex": 0, "SubnetId": subnet, "DeleteOnTermination": True}],
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": listed}],
    )
    name: str = made["Instances"][0]["InstanceId"]
    return name


def state(cloud: Cloud, name: str) -> str:
    """Return the state of an instance."""
    (reservation,) = cloud.ec2().describe_instances(InstanceIds=[name])["Reservations"]
    found: str = reservation["Instances"][0]["State"]["Name"]
    return found


def make_group(cloud: Cloud, run: str, **tags: str) -> str:
    """Make a security group with these tags, and return its id."""
    every = {"skyward-lite:run": run, **{f"skyward-lite:{key}": value for key, value in tags.items()}}
    listed = [{"Key": key, "Value": value} for key, value in every.items()]
    made: dict[str, Any] = cloud.ec2().create_security_group(
        GroupName=f"skyward-lite-{run}",
        Description="a test's",
        TagSpecifications=[{"ResourceType": "security-group", "Tags": listed}],
    )
    group: str = made["GroupId"]
    return group


def test_it_ends_what_is_over_and_lists_the_rest(cloud, capsys):
    """`reap` ends runs that are over. What may live is listed with the reason and with a command, which ends it."""
    runs = [uuid.uuid4().hex for _ in range(3)]
    old = "2020-01-01T00:00:00+00:00"
    over = launch(cloud, runs[0], owner="me@here", process=ELSEWHERE, expires=old)
    group = make_group(cloud, runs[0], process=ELSEWHERE, expires=old)
    ours = launch(cloud, runs[1], process=ended_process())
    odd = {
        expires: launch(cloud, runs[2], owner="other@there", expires=expires)
        for expires in ("2020-01-01T00:00:00", "soon")
    }
    bare = launch(cloud, runs[2], process=ELSEWHERE)
    assert reap.reap([None], dry_run=True) == 1
    assert {state(cloud, name) for name in (over, ours, bare, *odd.values())} == {"running"}
    capsys.readouterr()
    assert reap.reap(["us-east-1"], dry_run=False) == 1
    shown = capsys.readouterr().out
    assert [state(cloud, name) for name in (over, ours)] == ["terminated", "terminated"]
    assert [state(cloud, name) for name in (bare, *odd.values())] == ["running"] * 3
    assert group not in cloud.leftovers().get("groups", [])
    lines = [line for line in shown.splitlines() if runs[2] in line]
    assert len(lines) == 3
    for name, why in ((odd["soon"], "'soon', cannot be read"), (bare, "no expiry")):
        (line,) = [line for line in lines if name in line]
        assert why in line
        assert f"`python -m skyward_lite reap --region us-east-1 --run {runs[2]}` ends all of this run" in line
    assert reap.reap(["us-east-1"], dry_run=False, only=runs[2][:8]) == 0
    assert {state(cloud, name) for name in (bare, *odd.values())} == {"terminated"}


def test_hostile_tags(cloud, capsys):
    """Hostile tags are printed harmlessly; for a run whose id cannot be typed AWS's own command is listed."""
    # XML has no other control characters, C1's apart.
    text = HOSTILE.translate(dict.fromkeys(map(ord, "\x00\x07\x1b")))
    name = launch(cloud, text[:200], owner=text, process=text, expires=text)
    short, option = launch(cloud, "", owner=FORGED), launch(cloud, "--dry-run")
    assert reap.reap([None], dry_run=False) == 1
    shown = capsys.readouterr()
    assert shown.out.count("CRITICAL") >= 2
    assert all(is_harmless(line) for line in shown.out.splitlines())
    assert f"aws ec2 terminate-instances --region us-east-1 --instance-ids {name}" in shown.out
    assert all(f"--instance-ids {one}` ends it" in shown.out for one in (short, option))
    cloud.ec2().terminate_instances(InstanceIds=[name, short, option])


def test_a_run_that_is_named(cloud, capsys):
    """`--run` ends the run of that id alone. The beginning of several ids, or of none, ends nothing."""
    later = "2026-12-31T00:00:00+00:00"
    names = [launch(cloud, run, expires=later) for run in ("abcdef-one", "abcdef-two", "abcdef")]
    assert reap.reap([None], dry_run=False, only="abcdef-") == 1
    assert "may mean abcdef-one, abcdef-two" in capsys.readouterr().err
    assert reap.reap([None], dry_run=False, only="abcdefg") == 1
    assert "no run" in capsys.readouterr().err
    assert {state(cloud, name) for name in names} == {"running"}
    assert reap.reap([None], dry_run=False, only="abcdef") == 0
    assert [state(cloud, name) for name in names] == ["running", "running", "terminated"]
    cloud.ec2().terminate_instances(InstanceIds=names[:2])


def test_an_instance_that_cannot_be_terminated(cloud, capsys):
    """A protected instance is named; the others of its run, and other runs, are ended."""
    old = "2020-01-01T00:00:00+00:00"
    names = [launch(cloud, run, expires=old) for run in ("protected", "protected", "protected2")]
    cloud.ec2().modify_instance_attribute(InstanceId=names[0], DisableApiTermination={"Value": True})
    assert reap.reap([None], dry_run=False) == 1
    assert names[0] in capsys.readouterr().err
    assert [state(cloud, name) for name in names] == ["running", "terminated", "terminated"]
    cloud.ec2().modify_instance_attribute(InstanceId=names[0], DisableApiTermination={"Value": False})
    assert reap.reap([None], dry_run=False) == 0


def test_what_cannot_be_listed(cloud, capsys):
    """If the credentials may not list volumes, `reap` prints why, and ends the instances."""
    name = launch(cloud, "a-run-that-is-over", expires="2020-01-01T00:00:00+00:00")
    cloud.fail("DescribeVolumes", "UnauthorizedOperation")
    assert reap.reap([None], dry_run=False) == 1
    assert "DescribeVolumes" in capsys.readouterr().err
    assert state(cloud, name) == "terminated"


def test_requests_that_cannot_be_cancelled(cloud):
    """If spot requests cannot be cancelled, the instances of their run are ended, and then the error is raised."""
    name = launch(cloud, "a-run-with-a-request", expires="2020-01-01T00:00:00+00:00")
    cloud.fail("CancelSpotInstanceRequests", "UnauthorizedOperation")
    with pytest.raises(sky.NodeStartError, match="CancelSpotInstanceRequests"):
        resources = [Resource("spot request", "sir-1", {}), Resource("instance", name, {})]
        reap.end(_clients(None), resources, time.monotonic() + 20)
    assert state(cloud, name) == "terminated"


@pytest.mark.parametrize(
    ("profile", "region", "why"),
    [("none", "eu-west-1", "(none)"), ("odd", "eu west", "eu west"), ("odd", "eu-west-1", "CRITICAL")],
    ids=["profile", "region", "credentials"],
)
def test_a_configuration_that_cannot_be_used(tmp_path, monkeypatch, capsys, profile, region, why):
    """Why AWS's configuration cannot be used is printed harmlessly, even if a program for credentials wrote it."""
    printed = tmp_path / "printed"
    printed.write_text(HOSTILE)
    (tmp_path / "config").write_text(f"[profile odd]\ncredential_process = sh -c 'cat {printed} >&2; exit 1'\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    if why != "CRITICAL":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", profile)
    assert reap.reap([region], dry_run=True) == 1
    shown = capsys.readouterr().err
    assert why in shown
    assert all(is_harmless(line) for line in shown.splitlines())


def test_an_address_that_cannot_be_found_out(monkeypatch):
    """The answer of the server that was asked for our address is harmless in the error."""

    def answer(one: socket.socket) -> None:
        one.recv(1 << 16)
        one.sendall(b"HTTP/1.0 500 \x1b[2J CRITICAL\x9b31m\r\n\r\n")

    with serving(answer) as server:
        monkeypatch.setattr(launching, "CHECK_IP", "http://{}:{}".format(*server.getsockname()))
        with pytest.raises(sky.NodeStartError, match="CRITICAL") as caught:
            launching.own_address()
    assert is_harmless("".join(traceback.format_exception(caught.value)))


def test_texts_of_aws(cloud):
    """The code and the message of an error, and why EC2 ended an instance, are harmless in what a pool raises."""
    text = HOSTILE.translate(dict.fromkeys(map(ord, "\x00\x07\x1b")))
    cloud.fail("DescribeSubnets", "Odd\x85Code", text)
    cloud.sshd = False
    cloud.ends = {0: ("Client.Odd", text)}
    for _ in range(2):
        with pytest.raises(sky.NodeStartError) as caught, sky.pool(aws(), plugins=[], start_timeout=20.0):
            pass
        assert "CRITICAL" in str(caught.value)
        assert is_harmless("".join(traceback.format_exception(caught.value)))
