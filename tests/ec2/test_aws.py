"""EC2 pools, from nothing to results and back to nothing: real boto3, and a real `sshd` for every instance."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import skyward_lite as sky
import snippets
from cloud import HERE, PAGE, Call, Cloud, actions, allowed, aws, pool
from joblib import Parallel, delayed
from original_page import BASIC, LEARNED, TUNED
from processes import eventually
from skyward_lite.providers import Machine, NodeRequest
from skyward_lite.providers.aws import boot, launch

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("unshare"), reason="instances are containers, which need root"
)
TAGS = {"skyward-lite:run", "skyward-lite:owner", "skyward-lite:process", "skyward-lite:expires"}


# ---------------------------------------------------------------------------------------------------- the whole way


def test_from_nothing_to_results_and_back(cloud, caplog):
    """2,000 tasks and a grid search run on two instances, the pool reports their cost, and leaves nothing at EC2."""
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    def slow_task(i):
        time.sleep(0.001)
        return 2 * i

    x, y = load_iris(return_X_y=True)
    serial = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=3).fit(x, y)
    with (
        caplog.at_level(logging.INFO, "skyward_lite"),
        sky.pool(aws(), nodes=2, vcpus=2, worker=sky.Worker(concurrency=10), plugins=[sky.plugins.sklearn()]) as opened,
    ):
        names = {node.name for node in opened.nodes()}
        assert names == {instance.id for instance in cloud.instances()}
        assert Parallel(n_jobs=-1)(delayed(slow_task)(i) for i in range(2000)) == [2 * i for i in range(2000)]
        grid = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=3, n_jobs=-1).fit(x, y)
        assert list(grid.cv_results_["mean_test_score"]) == list(serial.cv_results_["mean_test_score"])
        status = opened.status()
        assert status.slots == 20
        assert status.cost is not None
        assert status.cost.hourly > 0
        assert 0 < status.cost.total < status.cost.hourly
        assert cloud.untagged(TAGS) == {}
    assert "EC2 plan: 2 × " in caplog.text
    assert "/h" in caplog.text
    assert re.search(r"this pool's nodes cost about \$\d", caplog.text)
    assert [action for action in actions(cloud) if action == "RunInstances"] == ["RunInstances"]


def test_boto3_is_not_missed_on_the_nodes(cloud):
    """A client that has not imported boto3 itself is not warned that the nodes lack it: only the provider needs it."""
    with client(cloud, "sys.exit(0)", stderr=subprocess.PIPE) as one:
        assert one.stderr is not None
        errors = one.stderr.read()
    assert one.returncode == 0
    assert "joblib" not in errors
    assert "boto" not in errors


def test_what_is_asked_of_an_instance(cloud):
    """An instance terminates when it shuts down, its IMDS is version 2, its volume is encrypted, and it has no role."""
    with pool(provider=aws(tags={"team": "lab"}, ttl=3600)):
        (instance,) = cloud.instances()
        group = cloud.ec2().describe_security_groups(
            GroupIds=[instance.request["NetworkInterface.1.SecurityGroupId.1"]]
        )
    asked = instance.request
    assert asked["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert asked["MetadataOptions.HttpTokens"] == "required"
    assert asked["MetadataOptions.HttpPutResponseHopLimit"] == "1"
    assert asked["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
    assert asked["BlockDeviceMapping.1.Ebs.DeleteOnTermination"] == "true"
    assert asked["ClientToken"]
    assert not [name for name in asked if name.startswith(("IamInstanceProfile", "KeyName"))]
    tagged = {asked[name] for name in asked if re.fullmatch(r"TagSpecification\.\d+\.ResourceType", name)}
    assert tagged == {"instance", "volume", "network-interface", "spot-instances-request"}
    assert "team" in asked.values()
    (rules,) = [g["IpPermissions"] for g in group["SecurityGroups"]]
    assert [(r["FromPort"], r["ToPort"], [i["CidrIp"] for i in r["IpRanges"]]) for r in rules] == [(22, 22, [HERE])]
    # Whoever may describe the instance can read the user-data: no private key of the user's is in it.
    config = json.loads(instance.user_data.partition("\n")[2])
    assert set(config) == {"ssh_deletekeys", "ssh_keys", "users", "write_files", "bootcmd", "runcmd"}


def test_the_host_key_is_rotated(cloud):
    """The host key in the user-data is replaced by another one, and sessions are made with that other key."""
    with pool() as opened:
        (instance,) = cloud.instances()
        throwaway = json.loads(instance.user_data.partition("\n")[2])["ssh_keys"]["ed25519_public"].split()[1]
        there = instance.run("cat /etc/ssh/ssh_host_ed25519_key.pub").split()[1]
        assert there != throwaway
        machine = opened._nodes.machines[0]
        assert machine.host_key.split()[1] == there  # type: ignore[attr-defined]


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The service that tells our public address answers with 127.0.0.1."""
    answer = tmp_path / "address"
    answer.write_text("127.0.0.1\n")
    monkeypatch.setattr(launch, "CHECK_IP", answer.as_uri())


@pytest.mark.parametrize("snippet", ["basic", "tuned", "learned"])
def test_the_original_pages_snippets_run(cloud, here, short_sleep, snippet):
    """A snippet of the original page runs with only its import line changed."""
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    x, y = load_iris(return_X_y=True)
    head = BASIC[: BASIC.index("with sky")]
    text = {"basic": BASIC, "tuned": head + TUNED, "learned": head + LEARNED}[snippet]
    names = {"GridSearchCV": GridSearchCV, "SVC": SVC, "X": x, "y": y, "param_grid": {"C": [0.1, 1, 10]}}
    names["__name__"] = "__main__"
    exec(compile(text.replace("import skyward as sky", "import skyward_lite as sky"), "<the page>", "exec"), names)
    if snippet == "learned":
        serial = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=5, n_jobs=1).fit(x, y)
        assert list(names["grid"].cv_results_["mean_test_score"]) == list(serial.cv_results_["mean_test_score"])
    else:
        assert names["results"] == [2 * i for i in range(2000 if snippet == "basic" else 20000)]
    assert len(cloud.instances()) == {"basic": 10, "tuned": 2, "learned": 4}[snippet]


def test_the_pages_snippet_runs(cloud, here):
    """The snippet of docs/ec2.md runs at the prices of the simulated cloud."""
    (block,) = [block.text for block in snippets.snippets(PAGE, "python", "ec2")]
    names = {"sky": sky, "Parallel": Parallel, "delayed": delayed, "slow_task": lambda x: x, "__name__": "__main__"}
    exec(compile(block, PAGE.name, "exec"), names)
    assert names["results"] == list(range(2000))


# ---------------------------------------------------------------------------------------------------- capacity


def test_partial_capacity_is_enough_for_a_range(cloud, caplog):
    """`nodes=(1, 3)` begins with two instances where EC2 has no third one."""
    cloud.capacity[("*", "*", "*")] = 2
    with caplog.at_level(logging.WARNING, "skyward_lite"), pool((1, 3)) as opened:
        assert eventually(lambda: opened.slots() == 4, 30)
        assert opened.submit(sum, [1, 2]).result(20) == 3
    assert "EC2 has 2 of 3 instances" in caplog.text


def test_too_little_capacity_launches_nothing_for_long(cloud):
    """`nodes=3` fails where EC2 has two instances: the error has both numbers, and the two are terminated."""
    cloud.capacity[("*", "*", "*")] = 2
    with pytest.raises(sky.NodeStartError, match="EC2 has 2 of the 3 instances that are needed in us-east-1"):
        pool(3).__enter__()


def test_launches_go_over_types_and_zones(cloud):
    """Where one zone has too few instances the next cheapest zone is asked for the rest."""
    cloud.spot_prices.update({("c5.large", "us-east-1b"): 0.01, ("c5.large", "us-east-1c"): 0.02})
    cloud.spot_prices.update({("c5.large", zone): 0.03 for zone in ("us-east-1a", "us-east-1d", "us-east-1f")})
    cloud.capacity[("c5.large", "us-east-1b", "spot")] = 1
    with pool(2, aws(instance_type="c5.large", allocation="spot")) as opened:
        places = [machine.launched.offer.zone for machine in opened._nodes.machines]  # type: ignore[attr-defined]
    assert places == ["us-east-1b", "us-east-1c"]


def test_spot_falls_back_to_on_demand(cloud):
    """Without spot capacity an on-demand instance is launched."""
    cloud.capacity[("*", "*", "spot")] = 0
    with pool(provider=aws(instance_type="c5.large")) as opened:
        assert not opened._nodes.machines[0].launched.offer.spot  # type: ignore[attr-defined]
    assert "InstanceMarketOptions.MarketType" not in cloud.instances()[0].request


def test_all_of_spot_is_not_all_there_is(cloud):
    """On-demand is asked for in the end, however many types and zones have a spot market without capacity."""
    cloud.capacity[("*", "*", "spot")] = 0
    with pool() as opened:
        assert not opened._nodes.machines[0].launched.offer.spot  # type: ignore[attr-defined]


def test_enough_is_enough(cloud, caplog):
    """A launch that EC2 refuses after the least number of nodes is there does not end the pool."""
    cloud.capacity[("*", "*", "*")] = 1
    cloud.fail("RunInstances", "VcpuLimitExceeded", times=100, where=lambda asked: asked["MaxCount"] == "2")
    with pool((1, 3), aws(instance_type="c5.large", allocation="on-demand")) as opened:
        assert opened.submit(sum, [1, 2]).result(20) == 3
    assert "EC2 has 1 of 3 instances" in caplog.text


def test_a_full_subnet_is_passed_over(cloud):
    """Where a subnet has no free address the next zone is asked."""
    full = []

    def first(asked):
        full.append(asked["NetworkInterface.1.SubnetId"])
        return full[-1] == full[0]

    cloud.fail("RunInstances", "InsufficientFreeAddressesInSubnet", times=100, where=first)
    with pool(provider=aws(instance_type="c5.large")):
        assert len(set(full)) == 2


def test_spot_alone_does_not_fall_back(cloud):
    """`allocation="spot"` fails without spot capacity, and launches no on-demand instance."""
    cloud.capacity[("*", "*", "spot")] = 0
    with pytest.raises(sky.NodeStartError, match="no capacity"):
        pool(provider=aws(instance_type="c5.large", allocation="spot")).__enter__()


def test_on_demand_alone(cloud):
    """`allocation="on-demand"` asks for no spot prices."""
    with pool(provider=aws(allocation="on-demand")) as opened:
        assert opened.status().cost is not None
    assert "DescribeSpotPriceHistory" not in actions(cloud)


def test_a_limit_of_cost_refuses_before_the_launch(cloud):
    """If the least nodes cost more than `max_hourly_cost`, nothing is launched; else as many as the limit pays for."""
    cloud.prices["c5.large"] = 0.1
    dear = aws(instance_type="c5.large", allocation="on-demand", max_hourly_cost=0.25)
    with pytest.raises(sky.NodeStartError, match=r"3 nodes cost at least \$0\.30/h .*nothing was launched"):
        pool(3, dear).__enter__()
    assert not {"RunInstances", "CreateSecurityGroup"} & set(actions(cloud))
    with pool((1, 3), dear):
        assert len(cloud.instances()) == 2


def test_a_limit_of_cost_needs_prices(cloud):
    """Without the price list on-demand instances are launched only if there is no `max_hourly_cost`."""
    cloud.fail("GetProducts", "AccessDeniedException", times=10)
    with pytest.raises(sky.NodeStartError, match="price of c5.large is unknown"):
        pool(provider=aws(instance_type="c5.large", allocation="on-demand", max_hourly_cost=9.0)).__enter__()
    with pool(provider=aws(instance_type="c5.large", allocation="on-demand")) as opened:
        assert opened.status().cost is None


# ---------------------------------------------------------------------------------------------------- never leaked


CLIENT = """
import sys, time
import skyward_lite as sky
def main():
    provider = sky.AWS(**{options})
    with sky.pool(provider, 2, worker=sky.Worker(concurrency=1), plugins=[], lease=3) as pool:
        assert pool.submit(sum, [1, 2]).result(20) == 3
        print("ready", flush=True)
        {then}
main()
"""


def client(
    cloud: Cloud, then: str = "time.sleep(60)", stderr: int | None = None, **options: object
) -> subprocess.Popen[str]:
    """Start another process that opens a pool of two."""
    options = {"ssh_from": HERE, "orphan_timeout": 4.0, "boot_timeout": 20.0, **options}
    script = CLIENT.replace("{then}", then).replace("{options}", repr(options))
    env = {**os.environ, **cloud.env}
    return subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)


def command(cloud: Cloud, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "skyward_lite", *arguments],
        env={**os.environ, **cloud.env},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


LAUNCH = ["DescribeSubnets", "DescribeInstanceTypes", "GetParameter", "DescribeImages", "DescribeSpotPriceHistory"]
LAUNCH += ["CreateSecurityGroup", "AuthorizeSecurityGroupIngress", "RunInstances", "DescribeInstances"]


@pytest.mark.parametrize("action", LAUNCH)
def test_a_client_killed_after_any_call_leaves_nothing(cloud, action):
    """The instances of a killed client end themselves, `reap` removes the rest, and everything had its tags at once."""
    process = []
    untagged = []

    def kill(call: Call) -> None:
        if call.action == action and process:
            untagged.append(cloud.untagged(TAGS))
            process.pop().kill()

    cloud.on_call = kill
    with client(cloud) as one:
        process.append(one)
        assert one.wait(40) == -signal.SIGKILL
    assert untagged == [{}]
    cloud.on_call = None
    if action in ("RunInstances", "DescribeInstances"):
        assert len(cloud.instances()) == 2
        assert eventually(lambda: not any(i.alive() for i in cloud.instances()), 30)
        assert {i.state() for i in cloud.instances()} <= {"shutting-down", "terminated"}
    printed = command(cloud, "reap")
    assert "ended" in printed or "nothing of skyward_lite's" in printed


def test_the_launch_makes_those_calls(cloud):
    """A launch makes the calls of `LAUNCH` and no others: after each of them the test above kills the client."""
    with pool(2):
        made = set(actions(cloud))
    assert made == set(LAUNCH)


@pytest.mark.parametrize("how", ["exception", "exit", "SIGINT", "SIGTERM", "SIGHUP"])
def test_every_way_out_leaves_nothing(cloud, how):
    """A client that leaves the block in whatever way terminates everything before it ends."""
    then = {"exception": "raise ValueError('mine')", "exit": "sys.exit(3)"}.get(how, "time.sleep(60)")
    with client(cloud, then) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        if how.startswith("SIG"):
            one.send_signal(getattr(signal, how))
        one.wait(40)
    assert cloud.leftovers() == {}
    assert one.returncode not in (0, -signal.SIGKILL)


@pytest.mark.parametrize("more", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_during_the_launch_leaves_nothing(cloud, more):
    """Ctrl-C during RunInstances leaves nothing, even if one more signal comes during TerminateInstances."""
    signals = {"RunInstances": signal.SIGINT, "TerminateInstances": more}
    process = []

    def send(call: Call) -> None:
        if process and call.action in signals:
            process[0].send_signal(signals.pop(call.action))

    cloud.on_call = send
    with client(cloud) as one:
        process.append(one)
        one.wait(40)
    cloud.on_call = None
    assert cloud.leftovers() == {}


def test_an_instance_lives_as_long_as_its_client(cloud):
    """An instance outlives its `ttl` and `orphan_timeout` while its client lives."""
    with pool(provider=aws(orphan_timeout=4.0, ttl=4.0)) as opened:
        (instance,) = cloud.instances()
        began = time.monotonic()
        while time.monotonic() < began + 8:
            assert opened.submit(sum, [1, 2]).result(20) == 3
            assert instance.alive()
            time.sleep(0.2)
        first, later = instance.request, cloud.ec2().describe_instances(InstanceIds=[instance.id])
        tags = {tag["Key"]: tag["Value"] for tag in later["Reservations"][0]["Instances"][0]["Tags"]}
        assert tags["skyward-lite:expires"] not in first.values()


def test_a_script_is_no_sign_of_life_without_its_session(tmp_path):
    """A script that goes on without its session gives no more signs of life."""
    script = boot.sign_of_life(str(tmp_path)).decode() + "echo $!; exec sleep 60\n"
    with subprocess.Popen(
        ["sh", "-c", "sh -s; true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    ) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(script)
        session.stdin.flush()
        signs = Path("/proc") / session.stdout.readline().strip()
        assert eventually(lambda: (tmp_path / "alive").exists(), 10)
        assert signs.exists()
        session.kill()
        session.wait(10)
        # A zombie is enough: whichever process is its parent now need not reap it.
        assert eventually(lambda: "\nState:\tZ" in (signs / "status").read_text(), 10)
        os.killpg(session.pid, signal.SIGKILL)


def test_an_instance_ends_in_any_case(cloud):
    """The timer that the boot has set ends an instance whose guard is dead, even while the client lives."""
    with client(cloud, ttl=8.0, orphan_timeout=60.0) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        for instance in cloud.instances():
            instance.run("kill -9 $(cat /run/units/skyward-lite-guard)")
            assert instance.run("cat /run/units/skyward-lite-ttl").strip()
        first = cloud.instances()[:2]
        assert eventually(lambda: not any(i.alive() for i in first), 30)
        one.kill()
    assert {i.state() for i in first} <= {"shutting-down", "terminated"}
    for instance in cloud.instances()[2:]:
        cloud.ec2().terminate_instances(InstanceIds=[instance.id])
        instance.kill()
    command(cloud, "reap")


def test_the_start_is_waited_for(cloud):
    """The pool waits until an instance has an address, and until its SSH server answers."""
    cloud.slow_start = 2
    cloud.slow_boot = 1.5
    with pool() as opened:
        assert opened.submit(sum, [1, 2]).result(20) == 3
    assert actions(cloud).count("DescribeInstances") >= 3


def test_the_end_is_waited_for(cloud):
    """The pool waits until its instances are terminated, and until its security group is no longer used."""
    cloud.slow_end = 2
    cloud.fail("DeleteSecurityGroup", "DependencyViolation", times=1)
    with pool():
        pass
    assert [i.state() for i in cloud.instances()] == ["terminated"]
    assert actions(cloud)[-2:] == ["DeleteSecurityGroup", "DeleteSecurityGroup"]


def test_instances_that_cannot_be_terminated_are_logged(cloud, caplog):
    """If instances cannot be terminated, the log has the command for later, and the instances end themselves."""
    cloud.fail("TerminateInstances", "UnauthorizedOperation", times=100)
    with pool(provider=aws(orphan_timeout=4.0)):
        pass
    assert "may not be over: these credentials may not do ec2:TerminateInstances" in caplog.text
    assert re.search("python -m skyward_lite reap --region us-east-1 --run [0-9a-f]{32}` ends", caplog.text)
    assert eventually(lambda: not cloud.instances()[0].alive(), 20)
    assert cloud.instances()[0].state() == "terminated"
    group = cloud.leftovers().pop("groups")
    cloud.ec2().delete_security_group(GroupId=group[0])


def test_reap_leaves_the_living_alone(cloud):
    """`reap` leaves a living run alone even after its expiry, and ends a run that is named in any case."""
    with pool(2):
        assert "lives, and is left alone" in command(cloud, "reap")
        assert all(i.alive() for i in cloud.instances())
        ids = [i.id for i in cloud.instances()]
        tag = [{"Key": "skyward-lite:expires", "Value": "2020-01-01T00:00:00+00:00"}]
        groups = cloud.ec2().describe_security_groups(Filters=[{"Name": "tag-key", "Values": ["skyward-lite:run"]}])
        cloud.ec2().create_tags(Resources=[*ids, groups["SecurityGroups"][0]["GroupId"]], Tags=tag)
        listed = command(cloud, "reap", "--region", "us-east-1", status=1)
        assert "expired at 2020-01-01T00:00:00+00:00, but its client, a process of this machine, has" in listed
        assert all(i.alive() for i in cloud.instances())
        (run,) = set(re.findall(r"--run (\w+)`", listed))
        assert "ended" in command(cloud, "reap", "--region", "us-east-1", "--run", run)
        # The pool lives, and launches other instances in their place.
        assert {i.state() for i in cloud.instances()[:2]} == {"terminated"}


# ---------------------------------------------------------------------------------------------------- numbers, papers


def test_a_hundred_nodes_take_few_calls(cloud):
    """A pool of 100 nodes makes at most 20 calls from its first to its last."""
    cloud.sshd = False
    provider, machines = aws(), list[Machine]()
    wanted = NodeRequest(nodes=100, least=100, image=sky.Image(), vcpus=2, memory_gb=None, connect_timeout=1.0)
    provider.start(wanted, machines)
    assert len(machines) == 100
    one = machines[0].run  # type: ignore[attr-defined]
    assert eventually(lambda: len(one.describe([m.name for m in machines])) == 100, 20)
    provider.stop(machines, 60.0)
    assert len(cloud.calls) <= 20, actions(cloud)


def test_the_policy_is_what_is_needed(cloud):
    """The policy of docs/ec2.md allows the actions that the tests have used, and a few that are seldom needed."""
    with pool(provider=aws(ttl=8.0)):
        assert eventually(lambda: "CreateTags" in actions(cloud), 20)
    command(cloud, "reap")
    made = cloud.seen | {call.name for call in cloud.calls}
    seldom = {"ec2:CancelSpotInstanceRequests", "ec2:DeleteNetworkInterface", "ec2:DeleteVolume", "pricing:GetProducts"}
    assert allowed() - made <= seldom
