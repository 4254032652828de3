"""EC2 for the tests: a real boto3 talks through `Cloud`'s proxy to moto, and every instance is a real `sshd`.

An instance is a container on an address of its own, 127.x.y.z, with its own mounts, processes, users and host keys. It
applies its user-data as cloud-init does. What needs systemd there is played by small programs of the same name.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gzip
import http.client
import http.server
import itertools
import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import boto3
import botocore.config
import skyward_lite as sky
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.ec2.models.instances import StateReason
from moto.server import ThreadedMotoServer

REGION = "us-east-1"
UID = 4242
SSHD = "/usr/sbin/sshd"
_places = itertools.count(2)

PROGRAMS = {
    # With --on-active a timer, without it a service; both leave with the machine.
    "systemd-run": r"""#!/bin/sh
delay=
while [ $# -gt 0 ]; do
  case $1 in
    --unit=*) unit=${1#*=} ;;
    --on-active=*) delay=${1#*=}; delay=${delay%s} ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
mkdir -p /run/units
if [ -e "/run/units/$unit" ] && kill -0 "$(cat "/run/units/$unit")" 2>/dev/null; then
  echo "Failed to start transient unit: Unit $unit was already loaded or has a fragment file." >&2; exit 1
fi
setsid sh -c 'echo $$ >"/run/units/$0"; [ -z "$1" ] || sleep "$1"; shift; exec "$@"' "$unit" "$delay" "$@" \
  </dev/null >"/run/units/$unit.log" 2>&1 &
until [ -s "/run/units/$unit" ]; do sleep 0.01; done
""",
    "systemctl": r"""#!/bin/sh
case $1 in
  poweroff) touch /run/poweroff; kill -TERM 1 ;;
  restart)
    [ "$2" = ssh.service ] || { echo "Failed to restart $2: Unit $2 not found." >&2; exit 5; }
    kill -HUP "$(cat /run/sshd.pid)" ;;
  stop)
    unit=${2%.timer}
    kill -- "-$(cat "/run/units/$unit")"; rm -f "/run/units/$unit" ;;
  *) echo "Unknown command verb $1." >&2; exit 1 ;;
esac
""",
    "shutdown": "#!/bin/sh\nexec systemctl poweroff\n",
}

# Programs of an image without the client's Python. One of them installs it.
BRINGS = {
    "dnf": r"""#!/bin/sh
printf '%s' "${0##*/}" >>/run/installed
printf ' %s' "$@" >>/run/installed
echo >>/run/installed
case " $* " in
  *" install "*" python@MINOR@"*) ;;
  *) exit 0 ;;
esac
while read -r file; do umount "$file"; done </run/hidden
ln -s @BASE@/bin/python@MINOR@ /run/bin
""",
    # uv's installer, and what uv downloads then.
    "curl": r"""#!/bin/sh
cat <<'INSTALLER_ENDS_HERE'
mkdir -p ~/.local/bin && cp /run/uv ~/.local/bin
to=~/.local/share/uv/python/cpython-@VERSION@-linux-$(uname -m)-gnu
mkdir -p $to && ln -s @BASE@/bin @BASE@/lib @BASE@/include $to
INSTALLER_ENDS_HERE
""",
}
BRINGS["apt-get"] = BRINGS["dnf"]

BOOT = r"""set -e
mount --bind @D@/etc /etc
mount --bind @D@/run /run
mount -t tmpfs -o mode=755 tmpfs /home
mount --bind @SHARED@ /var/tmp
@ROOT@
@HIDE@
hostname @NAME@
echo 127.0.0.1 @NAME@ >>/etc/hosts
cd /
export PATH=/run/bin:/usr/sbin:/usr/bin:/sbin:/bin
set +e
sh /run/cloud/bootcmd
sh /run/cloud/files
sh /run/cloud/users
trap 'exit 0' TERM
@BEFORE_SSHD@
@SSHD@ -D -e -f /etc/ssh/lab_config </dev/null 2>>/run/sshd.log &
sh /run/cloud/runcmd </dev/null
while :; do sleep 1 & wait; done
"""


@dataclasses.dataclass
class Call:
    """One call of AWS's API, as it came."""

    service: str
    action: str
    parameters: dict[str, Any]

    @property
    def name(self) -> str:
        """As policies have it."""
        return f"{self.service}:{self.action}"


class Instance:
    """One simulated instance."""

    def __init__(self, cloud: Cloud, name: str, request: dict[str, str], number: int) -> None:
        self.cloud = cloud
        self.id = name
        self.request = request
        self.number = number
        place = next(_places)
        self.address = f"127.{os.getpid() % 200 + 2}.{place // 250 + 100}.{place % 250 + 2}"
        self.directory = cloud.directory / name
        self.notice: str | None = None
        self.times_pending = self.times_ending = 0
        assert len(request.get("UserData", "")) <= 16 * 1024 * 4 / 3
        data = base64.b64decode(request.get("UserData", ""))
        self.user_data = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
        self.process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self._timer: threading.Timer | None = None

    @property
    def log(self) -> str:
        """Return what its sshd has logged."""
        file = self.directory / "run" / "sshd.log"
        return file.read_text() if file.exists() else ""

    def start(self) -> None:
        """Boot it."""
        run, etc = self.directory / "run", self.directory / "etc"
        (run / "cloud").mkdir(parents=True)
        (run / "bin").mkdir()
        (run / "sshd").mkdir(mode=0o755)
        shutil.copytree("/etc", etc, symlinks=True, ignore=shutil.ignore_patterns("ssh_host_*", "alternatives"))
        for path in (self.directory, run, run / "bin"):
            path.chmod(0o755)
        programs = dict(PROGRAMS)
        if self.cloud.machine is not None:
            programs["uname"] = (
                f'#!/bin/sh\n[ "$1" = -m ] && {{ echo {self.cloud.machine}; exit; }}\nexec /usr/bin/uname "$@"\n'
            )
        brings = self.cloud.brings_python
        hidden = []
        if brings is not None:
            # The programs of this machine must not be run.
            programs.update(dict.fromkeys(("apt-get", "curl"), "#!/bin/sh\necho nothing here >&2\nexit 1\n"))
            if brings in BRINGS:
                programs[brings] = BRINGS[brings]
            hidden = [path for where in ("/usr", "/usr/local") for path in Path(where, "bin").glob("python3*")]
            (run / "hidden").write_text("".join(f"{path}\n" for path in hidden))
            uv = shutil.which("uv", path=str(Path(sys.executable).parent))
            if brings == "curl" and uv is not None:
                shutil.copy(uv, run)
        for program, text in programs.items():
            for key, value in {
                "MINOR": f"{sys.version_info[0]}.{sys.version_info[1]}",
                "VERSION": platform.python_version(),
                "BASE": sys.base_prefix,
            }.items():
                text = text.replace(f"@{key}@", value)
            (run / "bin" / program).write_text(text)
            (run / "bin" / program).chmod(0o755)
        self._apply(etc, run)
        base = Path(sys.base_prefix)
        root = ""
        if base.is_relative_to("/root"):
            # Other users may not enter it: here they may, and find the interpreter there.
            where = self.directory / "root"
            (where / base.relative_to("/root")).mkdir(parents=True)
            inner = shlex.quote(str(where / base.relative_to("/root")))
            root = f"mount --bind {shlex.quote(str(base))} {inner}\nmount --rbind {shlex.quote(str(where))} /root"
        never = self.number in self.cloud.never_boots
        script = BOOT
        for key, value in {
            "D": shlex.quote(str(self.directory)),
            "SHARED": shlex.quote(str(self.cloud.shared)),
            "ROOT": root,
            "HIDE": "\n".join(f"mount --bind /dev/null {path}" for path in hidden),
            "NAME": self.id,
            "BEFORE_SSHD": "while :; do sleep 1 & wait; done" if never else f"sleep {self.cloud.slow_boot}",
            "SSHD": SSHD,
        }.items():
            script = script.replace(f"@{key}@", value)
        unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        with (self.directory / "boot.log").open("w") as log:
            self.process = subprocess.Popen(
                [*unshare, "--propagation", "private", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"LANG": "C.UTF-8"},
                process_group=0,
            )
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _apply(self, etc: Path, run: Path) -> None:
        """Write the files and scripts for what cloud-init would do."""
        head, _, text = self.user_data.partition("\n")
        assert head == "#cloud-config", head
        config = json.loads(text)
        unknown = set(config) - {"ssh_keys", "ssh_deletekeys", "users", "write_files", "bootcmd", "runcmd"}
        assert not unknown, unknown
        key = etc / "ssh" / "ssh_host_ed25519_key"
        if self.cloud.wrong_host_key or "ssh_keys" not in config:
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        else:
            key.write_text(config["ssh_keys"]["ed25519_private"])
            key.with_suffix(".pub").write_text(config["ssh_keys"]["ed25519_public"] + "\n")
        key.chmod(0o600)

        def commands(items: list[Any]) -> str:
            return "".join((item if isinstance(item, str) else shlex.join(item)) + "\n" for item in items)

        files = []
        for number, file in enumerate(config.get("write_files", [])):
            (run / "cloud" / f"file{number}").write_text(file["content"])
            mode = file.get("permissions", "0644")
            files.append(f"install -D -m {mode} /run/cloud/file{number} {shlex.quote(file['path'])}")
        users = []
        for number, user in enumerate(config.get("users", [])):
            name, keys = user["name"], "\n".join(user.get("ssh_authorized_keys", []))
            users += [
                f"useradd -M -d /home/{name} -u {UID + number} -s {user['shell']} -p '*' {name}",
                f"install -d -o {name} -g {name} /home/{name} && install -d -m 700 -o {name} /home/{name}/.ssh",
                f"printf '%s\\n' {shlex.quote(keys)} >/home/{name}/.ssh/authorized_keys",
                f"chown {name} /home/{name}/.ssh/authorized_keys",
            ]
            if user.get("sudo"):
                (etc / "sudoers.d" / "lab").write_text(
                    f'Defaults secure_path="/run/bin:/usr/sbin:/usr/bin:/sbin:/bin"\n{name} {user["sudo"]}\n'
                )
        for part, lines in (
            *(("bootcmd", commands(config.get("bootcmd", []))), ("runcmd", commands(config.get("runcmd", [])))),
            *(("files", "\n".join(files)), ("users", "\n".join(users))),
        ):
            (run / "cloud" / part).write_text(lines + "\n")
        kept = {k: v for k, v in os.environ.items() if k.startswith(("SKYWARD_TEST", "PIP_"))}
        python = f"{sys.base_prefix}/bin:" if self.cloud.brings_python is None else ""
        settings = {
            **kept,
            "PIP_TRUSTED_HOST": "127.0.0.1",  # where pip has settings it installs, and no uv of ours is sent
            "PATH": f"/run/bin:{python}/usr/local/bin:/usr/bin:/bin",
            "XDG_CACHE_HOME": f"/var/tmp/cache-{self.cloud.machine}-{self.cloud.brings_python}",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{self.cloud.url}/metadata/{self.id}",
        }
        assignments = " ".join(f'"{k}={v}"' for k, v in settings.items())
        (etc / "ssh" / "lab_config").write_text(
            f"ListenAddress {self.address}\nPort 22\nHostKey /etc/ssh/ssh_host_ed25519_key\nPidFile /run/sshd.pid\n"
            f"UsePAM no\nPasswordAuthentication no\nPermitRootLogin no\nSetEnv {assignments}\n"
        )

    def _watch(self) -> None:
        """Wait for its end. If it powered itself off, stop or terminate it at EC2, as its launch asked."""
        assert self.process is not None
        self.process.wait()
        if (self.directory / "run" / "poweroff").exists():
            terminates = self.request.get("InstanceInitiatedShutdownBehavior") == "terminate"
            with contextlib.suppress(Exception):
                ec2 = self.cloud.ec2()
                (ec2.terminate_instances if terminates else ec2.stop_instances)(InstanceIds=[self.id])

    def alive(self) -> bool:
        """Return whether it runs, or has ended and EC2 was not told so yet."""
        return self._watcher is not None and self._watcher.is_alive()

    def kill(self) -> None:
        """Kill it, without telling EC2."""
        if self._timer is not None:
            self._timer.cancel()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            assert self._watcher is not None
            self._watcher.join(10)

    def interrupt(self, seconds: float) -> None:
        """Take it back as spot does: first the notice, and its end after so many seconds."""
        self.notice = json.dumps({"action": "terminate", "time": "2030-01-01T00:00:00Z"})
        self._timer = threading.Timer(seconds, self.take)
        self._timer.start()

    def take(self) -> None:
        """End it as spot does, without a notice."""
        self.end("Server.SpotInstanceTermination", "Spot instance termination")
        self.kill()

    def end(self, code: str, message: str) -> None:
        """Set the state that EC2 reports to terminated, with this reason."""
        its = ec2_backends[DEFAULT_ACCOUNT_ID][REGION].get_instance(self.id)
        its.terminate()
        its.state_reason = StateReason(f"{code}: {message}", code)

    def run(self, command: str) -> str:
        """Run a command in it, as root, and return what it printed."""
        assert self.process is not None
        child = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0]
        enter = ["nsenter", "--target", child, "--mount", "--pid", "sh", "-c", command]
        return subprocess.run(enter, capture_output=True, text=True, timeout=20, check=True).stdout

    def state(self) -> str:
        """Return the state that EC2 reports."""
        described = self.cloud.ec2().describe_instances(InstanceIds=[self.id])
        name: str = described["Reservations"][0]["Instances"][0]["State"]["Name"]
        return name


@dataclasses.dataclass
class Fault:
    """An error with which the next calls of an action are answered."""

    action: str
    code: str
    message: str
    times: int
    where: Callable[[dict[str, Any]], bool]
    status: int


class Cloud:
    """A region of EC2. A test sets its attributes before its calls; `reset` sets them back."""

    env: dict[str, str]
    """For clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.chmod(0o755)
        self.shared = directory / "shared"
        self.shared.mkdir()
        self.shared.chmod(0o1777)
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self._behind = self._moto.get_host_and_port()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.cloud = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.env = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "AKIALAB",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(directory / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(directory / "no-credentials"),
        }
        self.seen: set[str] = set()
        """The names of all calls before the last reset."""
        self._ec2: Any = None
        self._instances: list[Instance] = []
        self._begin()

    def _begin(self) -> None:
        self.lock = threading.RLock()
        self.calls: list[Call] = []
        self.on_call: Callable[[Call], object] | None = None
        """Called when a call was handled, before its answer is sent."""
        self.capacity: dict[tuple[str, str, str], int] = {}
        """(type or *, zone or *, "spot", "on-demand" or *) → instances that are left."""
        self.spot_prices: dict[tuple[str, str], float] = {}
        self.prices: dict[str, float] = {}
        self.never_boots: set[int] = set()
        """The numbers of the launches whose instances never start their SSH server."""
        self.ends: dict[int, tuple[str, str]] = {}
        """The launches whose instances EC2 ends while they start: number → code and message."""
        self.wrong_host_key = False
        self.slow_boot = 0.0
        self.unknown = 0
        """For how many calls EC2 does not know new instances, as it is consistent in the end only."""
        self.slow_start = 0
        """How often an instance is reported as pending, without an address, before it runs."""
        self.slow_end = 0
        """How often an instance is reported as shutting down before it is terminated."""
        self.machine: str | None = None
        """What `uname -m` says there."""
        self.brings_python: str | None = None
        """What installs Python: "dnf", "apt-get", "curl" (uv's installer), "nothing". None if the image has it."""
        self.sshd = True
        """Whether instances are started as containers, or only reported."""
        self._faults: list[Fault] = []
        self._lost: dict[str, int] = {}
        self._answers: dict[str, bytes] = {}
        self._instances = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.reset()
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()
        self._moto.stop()
        if self._ec2 is not None:
            self._ec2.close()

    def reset(self) -> None:
        """End all instances, and forget everything."""
        for instance in self._instances:
            instance.kill()
        _ask(self._behind, "POST", "/moto-api/reset", {}, b"")
        self.seen.update(call.name for call in self.calls)
        self._begin()

    def ec2(self) -> Any:
        """Return a client whose calls are not recorded."""
        if self._ec2 is None:
            self._ec2 = boto3.client(
                "ec2",
                region_name=REGION,
                endpoint_url=f"http://{self._behind[0]}:{self._behind[1]}",
                aws_access_key_id="AKIALAB",
                aws_secret_access_key="secret",
                config=botocore.config.Config(max_pool_connections=50),
            )
        return self._ec2

    def instances(self) -> list[Instance]:
        """Return all instances in the order of their launches."""
        with self.lock:
            return list(self._instances)

    def fail(
        self,
        action: str,
        code: str,
        message: str = "so it is",
        times: int = 1,
        where: Callable[[dict[str, Any]], bool] = lambda parameters: True,
        status: int = 400,
    ) -> None:
        """Answer the next calls of an action with an error."""
        self._faults.append(Fault(action, code, message, times, where, status))

    def lose_response(self, action: str, times: int = 1) -> None:
        """Carry out the next calls of an action, and lose their answers."""
        self._lost[action] = times

    def leftovers(self) -> dict[str, list[str]]:
        """Return what there still is, by kind."""
        ec2 = self.ec2()
        instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        requests = ec2.describe_spot_instance_requests()["SpotInstanceRequests"]
        found = {
            "instances": [i["InstanceId"] for i in instances if i["State"]["Name"] != "terminated"],
            "groups": [
                g["GroupId"] for g in ec2.describe_security_groups()["SecurityGroups"] if g["GroupName"] != "default"
            ],
            "volumes": [v["VolumeId"] for v in ec2.describe_volumes()["Volumes"]],
            "templates": [t["LaunchTemplateId"] for t in ec2.describe_launch_templates()["LaunchTemplates"]],
            "keys": [k["KeyName"] for k in ec2.describe_key_pairs()["KeyPairs"]],
            "requests": [r["SpotInstanceRequestId"] for r in requests if r["State"] in ("open", "active")],
            "interfaces": [n["NetworkInterfaceId"] for n in ec2.describe_network_interfaces()["NetworkInterfaces"]],
            "processes": [i.id for i in self.instances() if i.alive()],
        }
        return {kind: names for kind, names in found.items() if names}

    def untagged(self, keys: set[str]) -> dict[str, list[str]]:
        """Return what lacks one of these tags, by kind."""
        ec2 = self.ec2()
        instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        groups = [g for g in ec2.describe_security_groups()["SecurityGroups"] if g["GroupName"] != "default"]
        made = [
            *(("instance", i["InstanceId"], i.get("Tags", [])) for i in instances),
            *(("group", g["GroupId"], g.get("Tags", [])) for g in groups),
            *(("volume", v["VolumeId"], v.get("Tags", [])) for v in ec2.describe_volumes()["Volumes"]),
        ]
        bad: dict[str, list[str]] = {}
        for kind, name, tags in made:
            if not keys <= {tag["Key"] for tag in tags}:
                bad.setdefault(kind, []).append(name)
        return bad

    # ------------------------------------------------------------------------------------------------ the proxy

    def handle(self, call: Call, headers: dict[str, str], body: bytes) -> tuple[int, bytes] | None:
        """Carry out a call, and return its answer; None if the answer is to be lost."""
        with self.lock:
            self.calls.append(call)
            fault = next(
                (f for f in self._faults if f.action == call.action and f.times and f.where(call.parameters)), None
            )
            if fault is not None:
                fault.times -= 1
                return fault.status, _error(call.service, fault.code, fault.message)
            answer = self._answer(call, headers, body)
        if self.on_call is not None:
            self.on_call(call)
        with self.lock:
            if self._lost.get(call.action, 0):
                self._lost[call.action] -= 1
                return None
        return answer

    def _answer(self, call: Call, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        if call.action == "GetProducts":
            return 200, self._products(call.parameters)
        if call.action == "DescribeSpotPriceHistory":
            return 200, self._spot_history(call.parameters)
        if call.action == "RunInstances":
            return self._launch(call, headers, body)
        if call.action == "GetParameter" and "/canonical/" in call.parameters["Name"]:
            arch = "arm64" if "/arm64/" in call.parameters["Name"] else "x86_64"
            name = f"/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-{arch}"
            body = json.dumps({"Name": name}).encode()
        if self.unknown and call.action in ("DescribeInstances", "TerminateInstances"):
            self.unknown -= 1
            if call.action == "TerminateInstances":
                return 400, _error("ec2", "InvalidInstanceID.NotFound", "The instance ID does not exist")
            return 200, b'<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"/>'
        if call.action == "TerminateInstances":
            # EC2 lets a terminated instance be terminated again; moto does not.
            backend = ec2_backends[DEFAULT_ACCOUNT_ID][REGION]
            ids = [v for k, v in call.parameters.items() if k.startswith("InstanceId.")]
            ids = [i for i in ids if backend.get_instance(i).state != "terminated"]
            if not ids:
                return 200, b'<TerminateInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"/>'
            asked = {k: v for k, v in call.parameters.items() if not k.startswith("InstanceId.")}
            body = urllib.parse.urlencode({**asked, **{f"InstanceId.{n}": i for n, i in enumerate(ids, 1)}}).encode()
        if call.action == "DescribeInstances":
            for instance in self._instances:
                self._slow_down(instance)
        status, answer = _ask(self._behind, "POST", "/", headers, body)
        if call.action == "TerminateInstances" and status == 200:
            ended = set(re.findall(r"<instanceId>(i-\w+)</instanceId>", answer.decode()))
            for instance in self._instances:
                if instance.id in ended:
                    instance.kill()
        return status, answer

    def _slow_down(self, instance: Instance) -> None:
        """Report an instance as pending, and as shutting down, for a while: moto skips both states."""
        its = ec2_backends[DEFAULT_ACCOUNT_ID][REGION].get_instance(instance.id)
        state = its._state
        if state.name in ("pending", "running") and instance.times_pending <= self.slow_start:
            instance.times_pending += 1
            runs = instance.times_pending > self.slow_start
            state.name, state.code = ("running", 16) if runs else ("pending", 0)
            its.nics[0].public_ip = instance.address if runs else None
        if state.name in ("terminated", "shutting-down") and instance.times_ending <= self.slow_end:
            instance.times_ending += 1
            over = instance.times_ending > self.slow_end
            state.name, state.code = ("terminated", 48) if over else ("shutting-down", 32)

    def _launch(self, call: Call, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        asked = call.parameters
        token = asked.get("ClientToken", "")
        if token in self._answers:
            return 200, self._answers[token]
        subnet = asked.get("NetworkInterface.1.SubnetId") or asked["SubnetId"]
        zone = ec2_backends[DEFAULT_ACCOUNT_ID][REGION].get_subnet(subnet).availability_zone
        market = "spot" if asked.get("InstanceMarketOptions.MarketType") == "spot" else "on-demand"
        offers = itertools.product((asked["InstanceType"], "*"), (zone, "*"), (market, "*"))
        limits = [offer for offer in offers if offer in self.capacity]
        number = min([int(asked["MaxCount"]), *(self.capacity[limit] for limit in limits)])
        if number < int(asked["MinCount"]):
            what = f"We currently do not have sufficient {asked['InstanceType']} capacity in {zone}."
            return 500, _error("ec2", "InsufficientInstanceCapacity", what)
        for limit in limits:
            self.capacity[limit] -= number
        cut = {**asked, "MaxCount": str(number), "MinCount": str(number)}
        status, answer = _ask(self._behind, "POST", "/", headers, urllib.parse.urlencode(cut).encode())
        if status == 200:
            backend = ec2_backends[DEFAULT_ACCOUNT_ID][REGION]
            for name in dict.fromkeys(re.findall(r"<instanceId>(i-\w+)</instanceId>", answer.decode())):
                instance = Instance(self, name, asked, len(self._instances))
                backend.get_instance(name).nics[0].public_ip = instance.address
                self._instances.append(instance)
                if instance.number in self.ends:
                    instance.end(*self.ends[instance.number])
                elif self.sshd:
                    instance.start()
            self._answers[token] = answer
        return status, answer

    def on_demand(self, kind: str) -> float:
        """Return the on-demand price of a type."""
        size = {"nano": 0.5, "micro": 0.5, "small": 0.6, "medium": 0.7, "large": 1, "xlarge": 2, "metal": 99}
        end = kind.partition(".")[2]
        many = re.match(r"(\d+)xlarge", end)
        return self.prices.get(kind, 0.04 * (2 * int(many[1]) if many else size.get(end, 1)) + len(kind) * 1e-4)

    def _products(self, asked: dict[str, Any]) -> bytes:
        wanted = {f["Field"]: f["Value"] for f in asked["Filters"]}
        plain = {"operatingSystem": "Linux", "tenancy": "Shared", "preInstalledSw": "NA", "capacitystatus": "Used"}
        assert plain.items() <= wanted.items()  # else each type has many prices
        names = next(f["Value"] for f in asked["Filters"] if f["Field"] == "instanceType").split(",")
        products = [
            {
                "product": {"attributes": {"instanceType": name}},
                "terms": {
                    "OnDemand": {
                        "x": {"priceDimensions": {"y": {"pricePerUnit": {"USD": f"{self.on_demand(name):.10f}"}}}}
                    }
                },
            }
            for name in names
        ]
        # In two pages, as the price list answers in many.
        begin = int(asked.get("NextToken") or 0)
        half = (len(products) + 1) // 2
        page: dict[str, Any] = {"PriceList": [json.dumps(p) for p in products[begin : begin + half]]}
        if begin + half < len(products):
            page["NextToken"] = str(begin + half)
        return json.dumps(page).encode()

    def _spot_history(self, asked: dict[str, Any]) -> bytes:
        assert asked["ProductDescription.1"] == "Linux/UNIX"
        kinds = [value for name, value in asked.items() if name.startswith("InstanceType.")]
        zones = [f"{REGION}{letter}" for letter in "abcdf"]
        items = "".join(
            f"<item><instanceType>{kind}</instanceType><availabilityZone>{zone}</availabilityZone>"
            f"<spotPrice>{self.spot_prices.get((kind, zone), 0.3 * self.on_demand(kind)):.6f}</spotPrice>"
            f"<productDescription>Linux/UNIX</productDescription><timestamp>2030-01-01T00:00:00.000Z</timestamp></item>"
            for kind in kinds
            for zone in zones
        )
        return (
            '<DescribeSpotPriceHistoryResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>x</requestId>'
            f"<spotPriceHistorySet>{items}</spotPriceHistorySet></DescribeSpotPriceHistoryResponse>"
        ).encode()


def _error(service: str, code: str, message: str) -> bytes:
    if not code:
        return b"<html>Service Unavailable</html>"
    if service != "ec2":
        return json.dumps({"__type": code, "message": message}).encode()
    return (
        f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
        f"<RequestID>{uuid.uuid4()}</RequestID></Response>"
    ).encode()


def _ask(where: tuple[str, int], method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*where, timeout=30)
    try:
        connection.request(method, path, body, {**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    cloud: Cloud

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        target = self.headers.get("X-Amz-Target")
        service = re.search(r"Credential=[^/]+/\d+/[^/]+/(\w+)/", self.headers.get("Authorization", ""))
        if target is None:
            parameters: dict[str, Any] = dict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True))
            action = parameters["Action"]
        else:
            parameters, action = json.loads(body), target.rpartition(".")[2]
        call = Call(service[1] if service else "?", action, parameters)
        kept = ("Authorization", "Content-Type", "X-Amz-Target", "X-Amz-Date", "Host")
        headers = {name: self.headers[name] for name in kept if name in self.headers}
        answer = self.server.cloud.handle(call, headers, body)
        if answer is None:
            self.close_connection = True
            return
        self._send(*answer)

    def do_PUT(self) -> None:
        ok = self.path.endswith("/latest/api/token") and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._send(200 if ok else 400, b"token" if ok else b"")

    def do_GET(self) -> None:
        _, _, name, path = self.path.split("/", 3)
        instance = next((i for i in self.server.cloud.instances() if i.id == name), None)
        if self.headers.get("X-aws-ec2-metadata-token") != "token":
            self._send(401, b"")
        elif path == "latest/meta-data/spot/instance-action" and instance is not None and instance.notice is not None:
            self._send(200, instance.notice.encode())
        else:
            self._send(404, b"")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# ---------------------------------------------------------------------------------------------------- clients

HERE = "127.0.0.1/32"
PAGE = Path(__file__).parent.parent.parent / "docs/ec2.md"


def aws(**options: object) -> sky.AWS:
    """Return a provider for the cloud that the environment names."""
    return sky.AWS(**{"ssh_from": HERE, "orphan_timeout": 20.0, "boot_timeout": 20.0, **options})  # type: ignore[arg-type]


def pool(nodes: int | tuple[int, int] = 1, provider: sky.AWS | None = None, **options: object) -> sky.ComputePool:
    """Return a small pool that is not joblib's backend. It waits for the lease before it loses a killed instance."""
    options = {"worker": sky.Worker(concurrency=2), "plugins": [], "lease": 3, **options}
    return sky.pool(provider or aws(), nodes, **options)  # type: ignore[arg-type]


def actions(cloud: Cloud) -> list[str]:
    """Return the actions of all calls."""
    return [call.action for call in cloud.calls]


def launches(cloud: Cloud) -> list[Call]:
    """Return the calls that launch."""
    return [call for call in cloud.calls if call.action == "RunInstances"]


def allowed() -> set[str]:
    """Return the actions that the policy of docs/ec2.md allows."""
    policy = json.loads(re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)[0])
    actions = [statement["Action"] for statement in policy["Statement"]]
    return {action for some in actions for action in ([some] if isinstance(some, str) else some)}
