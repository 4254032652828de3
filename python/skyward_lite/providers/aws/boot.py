"""What an EC2 instance does at its first boot: let this run's key in, and end itself when nobody needs it.

Its user-data is cloud-init's cloud-config, as JSON, which is YAML too. Whoever may describe the instance can read it:
the host key in it serves for the first connection only, over which the instance makes its own.
"""

from __future__ import annotations

import json
import shlex

USER = "skyward"
DIRECTORY = "/run/skyward_lite"
"""On the instance: where the agent leaves its sign of life."""
GUARD_PATH = f"{DIRECTORY}/guard"
TTL_UNIT = "skyward-lite-ttl"
GUARD_UNIT = "skyward-lite-guard"

# The signs are counted, not compared with a clock, which may jump.
GUARD = r"""#!/bin/sh
# Ends this machine when no client has been heard of for @ORPHAN@ s. Its life of @TTL@ s begins anew while one lives.
mkdir -p @DIRECTORY@
chown @USER@ @DIRECTORY@
left=@ORPHAN@ since=0
while [ "$left" -gt 0 ]; do
  sleep @TICK@
  since=$((since + @TICK@))
  if rm @DIRECTORY@/alive 2>/dev/null; then
    left=@ORPHAN@
    if [ "$since" -ge @RENEW@ ]; then
      systemctl stop @UNIT@.timer
      # Until it is armed again it is tried at every sign of life.
      systemd-run --unit=@UNIT@ --on-active=@TTL@s systemctl poweroff && since=0
    fi
  else
    left=$((left - @TICK@))
  fi
done
systemctl poweroff || shutdown -h now
"""

ALIVE = f"""
( n=0
  while kill -0 $$ && kill -0 $PPID && [ $((n += 1)) -lt 3600 ]; do touch {DIRECTORY}/alive; sleep 1; done
) >/dev/null 2>&1 </dev/null &
"""
"""At the head of a script that runs there: while it runs, and its session lives, the client is not gone."""

ROTATE = r"""
echo '@MARK@'
sudo -n sh -s <<'ROOT_ENDS_HERE' || exit
umask 077
cd /etc/ssh || exit
rm -f .skyward .skyward.pub
ssh-keygen -q -t ed25519 -N '' -C '' -f .skyward || exit
chmod 644 .skyward.pub
mv -f .skyward ssh_host_ed25519_key && mv -f .skyward.pub ssh_host_ed25519_key.pub || exit
# Sessions live on: a restart ends the listener only.
systemctl restart ssh.service 2>/dev/null || systemctl restart sshd.service || exit
ROOT_ENDS_HERE
printf 'key=%s\n' "$(cat /etc/ssh/ssh_host_ed25519_key.pub)"
"""
"""Make a host key that nobody else has seen, and let the server use it."""

# A Python that makes environments: the distribution's, else one from uv.
FURNISH = r"""
minor=@PYTHON@
echo '@MARK@'
can() { "python$minor" -I -c 'import venv, ensurepip' </dev/null 2>/dev/null; }
if command -v dnf >/dev/null; then
  sudo -n dnf install -q -y "python$minor" "python$minor-pip" </dev/null >&2
elif command -v apt-get >/dev/null; then
  sudo -n apt-get -o DPkg::Lock::Timeout=300 update -qq </dev/null >&2
  sudo -n env DEBIAN_FRONTEND=noninteractive \
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq "python$minor-venv" </dev/null >&2
fi
can && exit 0
curl -LsSf https://astral.sh/uv/install.sh | env UV_NO_MODIFY_PATH=1 sh >&2
"""


def user_data(host_key: tuple[str, str], user_key: str, ttl: float, orphan_timeout: float) -> str:
    """Give the user-data. `host_key` is private and public, `user_key` public; times in seconds, whole ones there."""
    ttl_s, orphan_s = max(1, round(ttl)), max(1, round(orphan_timeout))
    # Where this is part of what the system waits for before it has come up (Ubuntu), it must not wait for that.
    early = ["--no-block", "--timer-property=DefaultDependencies=no"]
    poweroff = ["systemd-run", f"--unit={TTL_UNIT}", f"--on-active={ttl_s}s", *early, "systemctl", "poweroff"]
    guard = GUARD
    values = {"ORPHAN": orphan_s, "TTL": ttl_s, "TICK": max(1, min(5, orphan_s // 4)), "RENEW": max(1, ttl_s // 8)}
    for key, value in {**values, "DIRECTORY": DIRECTORY, "USER": USER, "UNIT": TTL_UNIT}.items():
        guard = guard.replace(f"@{key}@", str(value))
    config = {
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": host_key[0], "ed25519_public": host_key[1]},
        "users": [
            {
                "name": USER,
                "shell": "/bin/bash",
                "lock_passwd": True,
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "ssh_authorized_keys": [user_key],
            }
        ],
        "write_files": [{"path": GUARD_PATH, "permissions": "0755", "content": guard}],
        # The first thing that it does: whatever fails afterwards, it ends.
        "bootcmd": [poweroff],
        "runcmd": [
            ["systemd-run", f"--unit={GUARD_UNIT}", "--property=Restart=on-failure", "/bin/sh", GUARD_PATH],
        ],
    }
    return f"#cloud-config\n{json.dumps(config, indent=1)}\n"


def agent_arguments(spot: bool) -> str:
    """Give the agent's arguments: it leaves the guard its sign of life, and looks for spot's notice."""
    return f"stdio --alive {shlex.quote(DIRECTORY)}/alive{' --spot' if spot else ''}"
