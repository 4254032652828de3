"""The job that this process is in: its nodes, and the CPUs that it has on each of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from ...errors import NodeStartError
from . import commands


class OwnNode(NamedTuple):
    """A node of the job."""

    name: str
    cpus: int | None
    """None if Slurm does not say how many."""
    memory_bytes: int | None = None
    """What the job has of its memory; None if Slurm does not say."""


def job(variables: Mapping[str, str] = os.environ) -> str | None:
    """Return the number of the job that this process is in; None outside of one."""
    number = variables.get("SLURM_JOB_ID") or variables.get("SLURM_JOBID") or ""
    return number if number.isdecimal() else None


def count(variables: Mapping[str, str] = os.environ) -> int:
    """Return the number of nodes of the job."""
    number = variables.get("SLURM_JOB_NUM_NODES") or variables.get("SLURM_NNODES") or ""
    return int(number) if number.isdecimal() and int(number) else len(cpus(variables)) or 1


def cpus(variables: Mapping[str, str] = os.environ) -> list[int]:
    """Return the job's CPUs on each of its nodes, which Slurm writes as "4(x2),8"; empty if it does not say."""
    # There also in `salloc` on a login node, where SLURM_CPUS_ON_NODE is not.
    text = variables.get("SLURM_JOB_CPUS_PER_NODE", "")
    found: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            return []
        found += [int(match[1])] * int(match[2] or 1)
    return found


def nodes(variables: Mapping[str, str] = os.environ) -> list[OwnNode]:
    """Return the nodes of the job. Raises `NodeStartError`."""
    listed = variables.get("SLURM_JOB_NODELIST") or variables.get("SLURM_NODELIST") or ""
    if not listed:
        raise NodeStartError(
            f"this process is in Slurm's job {job(variables)}, but SLURM_JOB_NODELIST does not name the job's nodes"
        )
    answer = commands.run(["scontrol", "show", "hostnames", listed])
    names = answer.stdout.split()
    if answer.status or not names:
        raise commands.failure("scontrol", answer)
    each: list[int] | list[None] = cpus(variables)
    if len(each) != len(names):
        each = [None] * len(names)
    return [OwnNode(name, number, memory_bytes(number, variables)) for name, number in zip(names, each, strict=True)]


def memory_bytes(cpus: int | None, variables: Mapping[str, str] = os.environ) -> int | None:
    """Return the job's memory on a node where it has so many CPUs; None if Slurm does not say."""
    # Both in units of 2^20 bytes. All the memory of a node is no number, or 0.
    whole, each = (variables.get(f"SLURM_MEM_PER_{unit}", "") for unit in ("NODE", "CPU"))
    if whole.isdecimal():
        return int(whole) * 2**20 or None
    return int(each) * cpus * 2**20 or None if each.isdecimal() and cpus else None
