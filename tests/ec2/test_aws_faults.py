"""What EC2 does: takes instances back, lets them not come up, throttles, loses answers, refuses; and bare images."""

from __future__ import annotations

import logging
import operator
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import skyward_lite as sky
from cloud import aws, launches, pool
from environments import own_wheel
from processes import eventually
from skyward_lite import _core
from skyward_lite._version import PYTHON
from skyward_lite.providers import NodeRequest
from skyward_lite.providers.aws import api, launch, run, tags
from skyward_lite.providers.aws.instance import Instance

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("unshare"), reason="instances are containers, which need root"
)


@pytest.fixture
def on_log(caplog) -> Iterator[Callable[[str, Callable[[], object]], None]]:
    """Return a function that lets `do()` be called for each log message with a text, on the thread that logs it."""
    filters = []
    logger = logging.getLogger("skyward_lite")

    def on(text: str, do: Callable[[], object]) -> None:
        def call(record: logging.LogRecord) -> bool:
            if text in record.getMessage():
                do()
            return True

        filters.append(call)
        logger.addFilter(call)

    with caplog.at_level(logging.INFO, "skyward_lite"):
        yield on
    for call in filters:
        logger.removeFilter(call)


def test_an_interruption_in_mid_run(cloud, caplog):
    """When spot takes an instance back, its tasks run on the other one, and a third instance is launched."""
    begun = cloud.shared / "begun"
    begun.mkdir()
    begun.chmod(0o777)

    def nap_and_square(i):
        open(f"/var/tmp/begun/{i}", "w").close()
        time.sleep(0.5)
        return i * i

    # The limit pays for two instances: the one that leaves makes room for the third.
    cloud.spot_prices.update({("c5.large", f"us-east-1{zone}"): 0.01 for zone in "abcdf"})
    provider = aws(instance_type="c5.large", max_hourly_cost=0.02)
    worker = sky.Worker(concurrency=2, retries=0)
    with caplog.at_level(logging.INFO, "skyward_lite"), pool(2, provider, worker=worker) as opened:
        first = cloud.instances()[0]
        futures = [opened.submit(nap_and_square, i) for i in range(60)]
        assert eventually(lambda: len(list(begun.iterdir())) > 4, 20)
        first.interrupt(7)
        assert [future.result(40) for future in futures] == [i * i for i in range(60)]
        assert eventually(lambda: len(cloud.instances()) == 3, 20)
        assert eventually(lambda: opened.slots() == 4, 30)
    assert "EC2 takes this spot instance back" in caplog.text
    assert f"{first.id} is replaced by {cloud.instances()[2].id}" in caplog.text


def test_a_lost_instance_is_replaced(cloud):
    """The tasks of a lost instance run on the other one. It is terminated, and another instance is launched."""
    with pool(2) as opened:
        first = cloud.instances()[0]
        futures = [opened.submit(pow, i, 2) for i in range(50)]
        first.kill()
        assert [future.result(40) for future in futures] == [i * i for i in range(50)]
        assert eventually(lambda: len(cloud.instances()) == 3, 20)
        assert eventually(lambda: opened.slots() == 4, 30)
        assert first.state() in ("shutting-down", "terminated")


def test_a_cut_connection_is_made_anew_unless_ec2_has_ended_the_instance(cloud):
    """An instance is known again by its own host key. One that EC2 has ended is not waited for until its lease ends."""
    with pool(1, lease=100) as opened:
        instance, agent = cloud.instances()[0], opened.nodes()[0].pid
        future = opened.submit(time.sleep, 2)
        instance.run("pkill -9 -f '[s]shd.*: skyward'")
        assert eventually(lambda: opened.nodes()[0].state == "reconnecting", 10)
        assert future.result(20) is None
        assert (opened.nodes()[0].state, opened.nodes()[0].pid) == ("ready", agent)
        future = opened.submit(time.sleep, 0.5)
        instance.take()
        assert future.result(40) is None
        assert [node.state for node in opened.nodes()] == ["lost", "ready"]
        assert "EC2 has ended it" in opened.nodes()[0].reason


def test_an_instance_lost_as_soon_as_it_is_ready_is_replaced(cloud, on_log):
    """An instance that was ready only while the pool's watcher was busy is replaced when it is lost."""
    lost, go_on = threading.Event(), threading.Event()

    def busy():
        lost.set()
        assert go_on.wait(30)

    on_log("is lost", busy)
    with pool(1) as opened:
        try:
            cloud.instances()[0].kill()
            assert eventually(lambda: opened.slots() and lost.is_set() and len(cloud.instances()) == 2, 30)
            cloud.instances()[1].kill()
            assert eventually(lambda: [n.state for n in opened.nodes()] == ["lost", "lost"], 30)
        finally:
            go_on.set()
        assert eventually(lambda: len(cloud.instances()) == 3 and opened.slots(), 30)


def test_an_instance_that_never_boots(cloud, caplog):
    """An instance that never boots is terminated after `boot_timeout`, and replaced if another one came up."""
    cloud.never_boots = {0}
    with caplog.at_level(logging.WARNING, "skyward_lite"), pool((1, 2), aws(boot_timeout=6.0)) as opened:
        assert opened.submit(sum, [1, 2]).result(20) == 3
        dead = cloud.instances()[0]
        assert eventually(lambda: dead.state() in ("shutting-down", "terminated"), 20)
        assert eventually(lambda: "is left out" in caplog.text, 10)
        assert eventually(lambda: opened.slots() == 4, 30)
    assert "it did not let us in within 6 s" in caplog.text
    assert len(cloud.instances()) == 3


def test_an_instance_that_ec2_ends_while_it_starts_is_replaced(cloud):
    """The pool waits for the replacements of instances that EC2 ends while they start."""
    cloud.ends = {
        0: ("Server.InternalError", "Internal error on launch"),
        2: ("Server.SpotInstanceTermination", "gone"),
    }
    with pool(2) as opened:
        assert [node.state for node in opened.nodes()] == ["lost", "ready", "lost", "ready"]
        assert opened.nodes()[0].reason == (
            "EC2 ended it while it started: Server.InternalError: Internal error on launch"
        )
        assert list(opened.map(abs, [-1, -2])) == [1, 2]
    assert len(cloud.instances()) == 4


def test_an_instance_that_ec2_takes_while_it_is_prepared_is_replaced(cloud, on_log, tmp_path):
    """An instance that spot takes back while its environment is made is replaced, and its node has EC2's reason."""
    (tmp_path / "made_here.py").write_text("")
    on_log("making its environment", lambda: len(cloud.instances()) > 1 or cloud.instances()[0].take())
    with pool(image=sky.Image(includes=[tmp_path / "made_here.py"])) as opened:
        assert [node.state for node in opened.nodes()] == ["lost", "ready"]
        assert "Spot instance termination" in opened.nodes()[0].reason


def test_an_instance_that_ec2_takes_before_its_agent_is_ready_is_replaced(cloud, on_log):
    """An instance that spot takes back between the environment and the agent is replaced."""
    on_log("the environment is there", lambda: len(cloud.instances()) > 1 or cloud.instances()[0].take())
    with pool():
        pass  # makes the environment that the next instance finds
    cloud.reset()
    with pool() as opened:
        assert [node.state for node in opened.nodes()] == ["lost", "ready"]


def test_a_pool_that_starts_waits_for_the_replacement_of_a_ready_node(cloud, on_log):
    """A pool that starts waits for the replacement of a node that was ready, also if it is asked for late."""
    opened = pool(2, aws(boot_timeout=6.0))

    def take_back():
        if len(cloud.instances()) == 2:
            cloud.instances()[0].interrupt(60)
            # It has no task, so it is left at once.
            assert eventually(lambda: opened.nodes()[0].state == "lost", 20)
            time.sleep(0.3)  # the pool looks meanwhile

    cloud.never_boots = {1}
    on_log("is ready with", take_back)
    with opened:
        assert sorted(node.state for node in opened.nodes()) == ["lost", "lost", "ready", "ready"]


def test_what_is_left_to_do_gets_a_replacement(cloud):
    """A block that waits for its tasks while it is left gets another instance for the one that spot takes back."""
    with pool() as opened:
        naps = [opened.submit(time.sleep, 0.5) for _ in range(40)]
        cloud.instances()[0].interrupt(8)
    assert [nap.exception() for nap in naps] == [None] * 40
    assert len(cloud.instances()) == 2


def test_all_that_are_taken_back_at_once_are_replaced(cloud):
    """Instances that were given notice do not count for `max_hourly_cost`: both of two are replaced."""
    cloud.spot_prices = {("c5.large", f"us-east-1{zone}"): 0.01 for zone in "abcdf"}
    with pool(2, aws(instance_type="c5.large", max_hourly_cost=0.02)) as opened:
        for instance in cloud.instances():
            instance.interrupt(8)
        assert eventually(lambda: [n.state for n in opened.nodes()] == ["lost", "lost", "ready", "ready"], 30)


def test_an_instance_that_the_account_lets_end_is_not_replaced(cloud):
    """An instance that ended for a reason of the account is not replaced: another one would end, too."""
    cloud.ends = {0: ("Client.InternalError", "Client error on launch")}
    with pytest.raises(sky.NodeStartError, match="Client.InternalError: Client error on launch"):
        pool().__enter__()
    assert len(cloud.instances()) == 1


def test_no_more_than_a_few_are_replaced(cloud):
    """A pool whose instances all end launches no more than a few."""
    cloud.ends = dict.fromkeys(range(99), ("Server.InternalError", "Internal error on launch"))
    with pytest.raises(sky.NodeStartError, match="Internal error on launch"):
        pool().__enter__()
    assert len(cloud.instances()) == 4


def test_no_instance_boots(cloud):
    """If no instance boots, the pool fails with the reason and launches no other."""
    cloud.never_boots = {0, 1}
    with pytest.raises(sky.NodeStartError, match="it did not let us in within 2 s of its launch"):
        pool(2, aws(boot_timeout=2.0)).__enter__()
    assert len(cloud.instances()) == 2


def test_a_wrong_host_key_is_refused(cloud):
    """Without a login the pool gives up a host key that is not the user-data's, and terminates the instance."""
    cloud.wrong_host_key = True
    with pytest.raises(sky.NodeStartError, match="the host key .* is not known for this host"):
        pool().__enter__()
    (instance,) = cloud.instances()
    assert "Accepted" not in instance.log
    assert instance.state() in ("shutting-down", "terminated")


@pytest.mark.parametrize(
    "action", ["DescribeInstanceTypes", "CreateSecurityGroup", "RunInstances", "TerminateInstances"]
)
def test_bursts_of_throttling_pass(cloud, action):
    """Calls that EC2 throttles are repeated."""
    cloud.fail(action, "RequestLimitExceeded", times=2, status=503)
    with pool() as opened:
        assert opened.submit(sum, [1, 2]).result(20) == 3
    assert len(cloud.instances()) == 1


def test_a_server_fault_is_no_answer(cloud):
    """A launch that EC2 answers with a bare 503 may have happened: it is repeated with the same client token."""
    cloud.fail("RunInstances", "", times=2, status=503)
    with pool() as opened:
        assert opened.submit(sum, [1, 2]).result(20) == 3
    assert len({call.parameters["ClientToken"] for call in launches(cloud)}) == 1


def test_what_is_not_known_yet_is_ended_too(cloud):
    """A first instance that EC2 does not know yet is terminated when the launch of the second one fails."""
    cloud.unknown = 3
    cloud.capacity[("*", "us-east-1a", "*")] = 1
    cloud.spot_prices[("c5.large", "us-east-1a")] = 0.001
    cloud.fail("RunInstances", "UnauthorizedOperation", times=9, where=lambda asked: asked["MaxCount"] == "1")
    with pytest.raises(sky.NodeStartError, match="may not do ec2:RunInstances"):
        pool(2, aws(instance_type="c5.large")).__enter__()
    assert [i.state() for i in cloud.instances()] == ["terminated"]


def test_a_launch_that_was_not_heard_of_is_ended_with_the_next(cloud, monkeypatch):
    """A launch whose outcome is unknown may have made an instance: the next launch terminates it."""
    monkeypatch.setattr(api, "LAUNCH_ATTEMPTS", 2)
    with pool(2) as opened:
        first, second = cloud.instances()
        cloud.lose_response("RunInstances", 2)
        first.kill()
        assert eventually(lambda: len(cloud.instances()) == 3 and not opened._nodes._expected, 30)
        assert cloud.instances()[2].state() == "running"
        second.kill()
        assert eventually(lambda: len(cloud.instances()) == 4 and opened.slots() == 2, 30)
        assert cloud.instances()[2].state() == "terminated"


def test_a_failed_termination_is_tried_again(cloud, monkeypatch):
    """A lost instance that cannot be terminated is asked for again while the pool lives."""
    monkeypatch.setattr(run, "TERMINATION_RETRY_SECONDS", 0.2)
    with pool() as opened:
        first = cloud.instances()[0]
        cloud.fail("TerminateInstances", "UnauthorizedOperation", times=2)
        first.kill()
        assert eventually(lambda: first.state() == "terminated", 20)
        assert eventually(opened.slots, 20)


def test_the_expiry_moves_on_without_those_that_ec2_forgot(cloud):
    """An instance that EC2 has forgotten fails the call that tags all: the others are then tagged one by one."""
    with pool(2, aws(ttl=12.0)) as opened:
        gone, other = cloud.instances()
        cloud.fail("CreateTags", "InvalidInstanceID.NotFound", times=99, where=lambda asked: gone.id in asked.values())

        def tagged() -> set[str]:
            calls = [call.parameters for call in cloud.calls if call.action == "CreateTags"]
            return {call["ResourceId.1"] for call in calls if "ResourceId.2" not in call}

        group = cloud.ec2().describe_security_groups(Filters=[{"Name": "tag-key", "Values": [tags.RUN]}])
        assert eventually(lambda: {other.id, group["SecurityGroups"][0]["GroupId"]} <= tagged(), 20)
        assert opened.slots() == 4


@pytest.mark.parametrize("action", ["CreateSecurityGroup", "RunInstances"])
def test_a_lost_answer_makes_nothing_twice(cloud, action):
    """A call whose answer is lost makes nothing twice: it is repeated with its client token or its group name."""
    cloud.lose_response(action)
    with pool() as opened:
        assert opened.submit(sum, [1, 2]).result(20) == 3
    assert len(cloud.instances()) == 1
    assert len({call.parameters.get("ClientToken") for call in launches(cloud)}) == 1


@pytest.mark.parametrize(
    ("action", "code", "says"),
    [
        ("RunInstances", "UnauthorizedOperation", "may not do ec2:RunInstances in us-east-1"),
        ("DescribeInstanceTypes", "UnauthorizedOperation", "may not do ec2:DescribeInstanceTypes"),
        ("GetParameter", "AccessDeniedException", "may not do ssm:GetParameter"),
        ("RunInstances", "VcpuLimitExceeded", "--quota-code L-1216C47A"),
        ("RunInstances", "MaxSpotInstanceCountExceeded", "L-34B43A08"),
        ("DescribeSubnets", "OptInRequired", "the region us-east-1 is not enabled"),
        ("DescribeSubnets", "AuthFailure", "does not take these credentials"),
        ("DescribeSubnets", "ExpiredToken", "aws sso login"),
        ("RunInstances", "InsufficientInstanceCapacity", "no capacity"),
        ("RunInstances", "InvalidParameterValue", "ec2:RunInstances failed in us-east-1"),
    ],
)
def test_errors_are_in_words(cloud, action, code, says):
    """An error of AWS becomes a text that says what is wrong and what to do."""
    cloud.fail(action, code, message="AWS's own words", times=1000)
    allocation = "spot" if "Spot" in code else "on-demand"
    with pytest.raises(sky.NodeStartError) as caught:
        pool(provider=aws(instance_type="c5.large", allocation=allocation)).__enter__()
    assert says in str(caught.value)


def test_no_default_vpc(cloud):
    """Without a default VPC the error has the command that makes one."""
    for subnet in cloud.ec2().describe_subnets()["Subnets"]:
        cloud.ec2().delete_subnet(SubnetId=subnet["SubnetId"])
    with pytest.raises(sky.NodeStartError, match="aws ec2 create-default-vpc --region us-east-1"):
        pool().__enter__()


def test_no_credentials_no_region_no_boto3(cloud, monkeypatch):
    """The lack of a region, of credentials and of boto3 is named with its remedy."""
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(sky.NodeStartError, match="no AWS region"):
        pool().__enter__()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(sky.NodeStartError, match="no AWS credentials"):
        pool(provider=aws(region="us-east-1")).__enter__()
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(sky.NodeStartError, match=re.escape("pip install 'skyward_lite[aws]'")):
        pool().__enter__()


def test_nothing_fits(cloud):
    """If no instance type fits, the error has what was asked for."""
    with pytest.raises(sky.NodeStartError, match="no instance type in us-east-1 fits: vcpus=2, memory_gb=100000"):
        pool(vcpus=2, memory_gb=100_000).__enter__()


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": "cheap"},
        {"architecture": "mips"},
        {"ami": "debian"},
        {"ttl": 0},
        {"orphan_timeout": -1},
        {"max_hourly_cost": 0},
        {"ssh_from": "everywhere"},
        {"tags": {"skyward-lite:run": "mine"}},
    ],
)
def test_bad_arguments_are_refused_at_once(options):
    """`AWS()` refuses a bad argument, and names it."""
    with pytest.raises(ValueError, match=next(iter(options)) if "ssh_from" not in options else "everywhere"):
        sky.AWS(**options)


def test_the_callers_address_is_found(cloud, monkeypatch, tmp_path):
    """SSH is allowed from the address that AWS sees; if that cannot be found out, the error names `ssh_from`."""
    answer = tmp_path / "answer"
    answer.write_text("203.0.113.7\n")
    monkeypatch.setattr(launch, "CHECK_IP", answer.as_uri())
    with pool(provider=aws(ssh_from="203.0.113.9")):
        groups = cloud.ec2().describe_security_groups(Filters=[{"Name": "tag-key", "Values": ["skyward-lite:run"]}])
    assert groups["SecurityGroups"][0]["IpPermissions"][0]["IpRanges"][0]["CidrIp"] == "203.0.113.9/32"
    with pool(provider=aws(ssh_from=None)):
        groups = cloud.ec2().describe_security_groups(Filters=[{"Name": "tag-key", "Values": ["skyward-lite:run"]}])
    ranges = groups["SecurityGroups"][0]["IpPermissions"][0]["IpRanges"]
    assert [r["CidrIp"] for r in ranges] == ["203.0.113.7/32"]
    monkeypatch.setattr(launch, "CHECK_IP", "http://127.0.0.1:9/")
    with pytest.raises(sky.NodeStartError, match="ssh_from="):
        pool(provider=aws(ssh_from=None)).__enter__()


@pytest.mark.parametrize(
    ("brings", "installed"),
    [
        ("dnf", ["dnf install -q -y python{0} python{0}-pip"]),
        (
            "apt-get",
            [
                "apt-get -o DPkg::Lock::Timeout=300 update -qq",
                "apt-get -o DPkg::Lock::Timeout=300 install -y -qq python{0}-venv",
            ],
        ),
        ("curl", []),
    ],
)
def test_python_comes_to_an_image_without_it(cloud, brings, installed):
    """Python is installed from the distribution, else by uv."""
    cloud.brings_python = brings
    with pool() as opened:
        assert opened.submit(operator.mul, 6, 7).result(20) == 42
        installations = cloud.instances()[0].run("cat /run/installed 2>/dev/null || :")
        prefix = opened.submit(eval, "__import__('sys').base_prefix").result(20)
    assert installations.splitlines() == [line.format(PYTHON) for line in installed]
    assert ("/.local/share/uv/python/" in prefix) == (brings == "curl")


def test_an_image_for_which_there_is_no_python(cloud):
    """If Python cannot be installed, the error has what the last attempt printed."""
    cloud.brings_python = "nothing"
    with pytest.raises(sky.NodeStartError, match=f"Python {PYTHON} could not be installed .*nothing here"):
        pool().__enter__()


def test_nodes_of_another_architecture(cloud, tmp_path):
    """Nodes of another architecture get `Image(wheel=)`, as the client's own package does not run there."""
    cloud.machine = "aarch64"
    image = sky.Image(wheel=str(own_wheel(tmp_path)))
    with pool(provider=aws(instance_type="t4g.small"), image=image) as opened:
        assert opened.submit(sum, [1, 2]).result(20) == 3
    (instance,) = cloud.instances()
    found = cloud.ec2().describe_images(ImageIds=[instance.request["ImageId"]])["Images"][0]
    assert found["Architecture"] == "arm64"


def test_pauses_between_attempts_grow_from_a_refused_login():
    """A server that was asked for too many logins hangs up: it is not asked again at once."""
    errors = [
        *(_core.UnreachableError("no route"), _core.AuthenticationError("refused"), _core.HungUpError("hung up")),
        *(_core.ConnectTimeoutError("silent"), _core.AuthenticationError("refused"), _core.HostKeyError("another key")),
    ]
    slept: list[float] = []

    def connect(**parameters: object) -> _core.Connection:
        raise errors.pop(0)

    core: Any = SimpleNamespace(connect=connect)
    running = {"State": {"Name": "running"}, "PublicIpAddress": "192.0.2.1"}
    of_run: Any = SimpleNamespace(
        closing=SimpleNamespace(wait=slept.append),
        describe=lambda ids: dict.fromkeys(ids, running),
        settings=SimpleNamespace(boot_timeout=300.0),
        user_key="a key",
    )
    launched: Any = SimpleNamespace(name="i-1", offer=SimpleNamespace(spot=False))
    machine = Instance(launched, of_run, NodeRequest(1, 1, sky.Image(), None, None, 20.0), "a key", list.clear)
    with pytest.raises(sky.NodeStartError, match="another key: somebody may be between"):
        machine.connect(core)
    assert slept == [0.25, 3.0, 4.5, 5.0, 5.0]
