"""What runs on an EC2 instance before its agent does: its first boot, and the guard that ends it when nobody needs it.

user_data         read by cloud-init at the first boot: lets this run's key in, and starts two timers
guard.sh          powers the instance off without a sign of life from the client
sign_of_life.sh   gives the guard signs of life while a long script runs; afterwards the agent does (node/duties.py)
rotate.sh         a host key of the instance's own
install_python.sh  Python, where the image lacks the client's

The user-data is cloud-init's cloud-config, written as JSON, which YAML includes. Whoever may describe the instance can
read it. So the host key in it serves for the first connection only, over which the instance makes a key of its own.
"""

from __future__ import annotations

import json

from ...environment import scripts

USER = "skyward"
SSH_PORT = 22
DIRECTORY = "/run/skyward_lite"
"""On the instance: holds the guard, and the file `alive`, which is a sign of life."""
GUARD_PATH = f"{DIRECTORY}/guard"
TTL_UNIT = "skyward-lite-ttl"
GUARD_UNIT = "skyward-lite-guard"
MAX_TICK_SECONDS = 5
"""Longest pause between two checks of the guard for a sign of life."""


def user_data(host_key: tuple[str, str], user_key: str, ttl: float, orphan_timeout: float) -> str:
    """Return the user-data. `host_key` is a private and a public key, `user_key` a public one; times are in seconds."""
    # The instance counts whole seconds.
    ttl_seconds, orphan_seconds = max(1, round(ttl)), max(1, round(orphan_timeout))
    # On Ubuntu the system has not come up until this command is done, so the command must not wait for the system.
    early = ["--no-block", "--timer-property=DefaultDependencies=no"]
    poweroff = ["systemd-run", f"--unit={TTL_UNIT}", f"--on-active={ttl_seconds}s", *early, "systemctl", "poweroff"]
    guard = scripts.compose(
        scripts.read("guard.sh", __file__),
        ORPHAN=orphan_seconds,
        TTL=ttl_seconds,
        TICK=max(1, min(MAX_TICK_SECONDS, orphan_seconds // 4)),
        RENEW=max(1, ttl_seconds // 8),
        DIRECTORY=DIRECTORY,
        USER=USER,
        UNIT=TTL_UNIT,
    ).decode()
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
        # The first command of the boot: whatever fails after it, the instance ends.
        "bootcmd": [poweroff],
        "runcmd": [
            ["systemd-run", f"--unit={GUARD_UNIT}", "--property=Restart=on-failure", "/bin/sh", GUARD_PATH],
        ],
    }
    return f"#cloud-config\n{json.dumps(config, indent=1)}\n"


def agent_options(spot: bool) -> tuple[str, ...]:
    """Return the arguments with which the agent gives the guard signs of life, and looks for spot's notice."""
    return ("--alive", f"{DIRECTORY}/alive", *(["--spot"] if spot else []))


def sign_of_life(directory: str = DIRECTORY) -> bytes:
    """Return what stands at the head of a long script, so that the guard leaves the instance alone while it runs."""
    return scripts.compose(scripts.read("sign_of_life.sh"), DIRECTORY=directory)


def rotate() -> bytes:
    """Return the script that gives the instance a host key of its own, and reports its public half as `key`."""
    return scripts.compose(scripts.read("rotate.sh", __file__))


def install_python(minor: str, release: str) -> bytes:
    """Return the script that installs this minor version of Python; or uv, if the distribution lacks its `release`."""
    script = scripts.read("install_python.sh", __file__)
    return sign_of_life() + scripts.compose(script, PYTHON=minor, RELEASE=release)
