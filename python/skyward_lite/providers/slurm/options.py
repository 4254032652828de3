"""The options of `Slurm(...)`: sbatch's own long names, checked, and spelled as on its command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from ... import checks, keywords
from ...errors import NodeStartError
from .. import NodeRequest

_POOL_NODES = "the number of nodes is the pool's, and each has a job of its own: write pool(nodes=...)"
_ONE_TASK = "a node's job is one process, whose workers use all CPUs of the job: write cpus_per_task=..."
_NO_OUTPUT = "what tasks print is shown by the client, and the job itself prints nothing"
_LIMIT = "a node stops to take tasks some time before its limit, and another job takes its place: write grace=..."
_OWN_SCRIPT = "a node's job runs a script of ours"
_AT_ONCE = "the jobs are watched by the pool, which needs their numbers at once: leave it out"
_ONE_CLUSTER = "nodes are reached by srun: run this on a login node of that cluster"

OURS = {
    "array": _POOL_NODES,
    "nodes": _POOL_NODES,
    "ntasks": _ONE_TASK,
    "ntasks_per_node": _ONE_TASK,
    "ntasks_per_core": _ONE_TASK,
    "ntasks_per_socket": _ONE_TASK,
    "ntasks_per_gpu": _ONE_TASK,
    "output": _NO_OUTPUT,
    "error": _NO_OUTPUT,
    "open_mode": _NO_OUTPUT,
    "input": "the job reads nothing: leave it out",
    "wrap": _OWN_SCRIPT,
    "script": _OWN_SCRIPT,
    "requeue": "a job that is lost gets another one in its place: leave it out",
    "no_requeue": "no job of ours is requeued: leave it out",
    "signal": _LIMIT,
    "kill_on_invalid_dep": "write dependency= alone, and cancel a job that can never start",
    "parsable": _AT_ONCE,
    "quiet": _AT_ONCE,
    "wait": _AT_ONCE,
    "test_only": _AT_ONCE,
    "help": _AT_ONCE,
    "usage": _AT_ONCE,
    "version": _AT_ONCE,
    "hold": "a job that is held never starts by itself: leave it out",
    "clusters": _ONE_CLUSTER,
    "cluster": _ONE_CLUSTER,
    "lease": "it is the pool's: write pool(lease=...)",
    "vcpus": "it is the pool's: write pool(vcpus=...), or cpus_per_task=... here",
    "memory_gb": 'it is the pool\'s: write pool(memory_gb=...), or mem="32G" here',
}
"""Options that the provider itself decides → what to do instead."""

_BEGINNINGS = frozenset(
    name[:length] for name in OURS if name not in ("lease", "vcpus", "memory_gb") for length in range(3, len(name))
)
"""What sbatch would take for one of them."""

_PARTS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40, "P": 2.0**50}


def checked(given: Mapping[str, object]) -> dict[str, str | None]:
    """Return the options as sbatch takes them: name → value, None for a flag. Raise `TypeError` or `ValueError`."""
    options: dict[str, str | None] = {}
    for name, value in given.items():
        shown = f"Slurm({name}={checks.shown(value)})"
        # sbatch also takes an option by the beginning of its name.
        own = next((own for own in OURS if own == name or (name in _BEGINNINGS and own.startswith(name))), None)
        if own is not None:
            raise ValueError(f"{shown}: {OURS[own]}")
        for others, remedy in keywords.MEANT["Slurm"].items():
            if name in others:
                raise TypeError(f"Slurm() has no parameter {name}: {remedy.format(value=checks.shown(value))}")
        if value is None or value is False:
            continue
        if value is True:
            options[name] = None
        elif isinstance(value, str | int | float):
            options[name] = str(value)
        elif isinstance(value, Sequence) and all(isinstance(item, str | int) for item in value):
            options[name] = ",".join(map(str, value))
        elif hasattr(value, "total_seconds"):
            raise TypeError(f'{shown}: Slurm\'s own notation is needed: write {name}="2:00:00"')
        elif hasattr(value, "__index__") or hasattr(value, "__fspath__"):
            options[name] = str(value)
        else:
            raise TypeError(f"{shown}: a text, a number, a list of them, or True for an option without a value")
        text = options[name]
        if text is not None and (not text.strip() or not text.isprintable()):
            raise ValueError(f"{shown}: an option's value is a text that is not empty and has no control characters")
    return options


def words(options: Mapping[str, str | None]) -> list[str]:
    """Return the options as words of a command line."""
    return [f"--{name.replace('_', '-')}" + ("" if value is None else f"={value}") for name, value in options.items()]


def with_request(options: Mapping[str, str | None], wanted: NodeRequest) -> dict[str, str | None]:
    """Return the options with what `pool(vcpus=, memory_gb=)` asks for, unless they say it themselves.

    Raises `NodeStartError` if they say less.
    """
    merged = dict(options)
    cpus = merged.get("cpus_per_task")
    if wanted.vcpus is not None:
        if cpus is None:
            merged["cpus_per_task"] = cpus = str(wanted.vcpus)
        elif cpus.isdecimal() and int(cpus) < wanted.vcpus:
            raise NodeStartError(
                f"pool(vcpus={wanted.vcpus}) and Slurm(cpus_per_task={cpus}) do not go together: leave one of them out"
            )
    if wanted.memory_gb is None:
        return merged
    needed = wanted.memory_gb * 1e9
    if "mem" in merged:
        said, name, per = merged["mem"], "mem", 1
    elif "mem_per_cpu" in merged:
        said, name, per = merged["mem_per_cpu"], "mem_per_cpu", int(cpus) if cpus and cpus.isdecimal() else 1
    elif "mem_per_gpu" in merged:
        return merged
    else:
        merged["mem"] = f"{math.ceil(needed / 2**20)}M"
        return merged
    has = memory_bytes(said)
    # 0 stands for all the memory of a node.
    if has and has * per < needed * 0.999:
        raise NodeStartError(
            f"pool(memory_gb={wanted.memory_gb:g}) and Slurm({name}={said!r}) do not go together, as that is "
            f"{has * per / 1e9:.3g} GB: leave one of them out"
        )
    return merged


def memory_bytes(text: str | None) -> float | None:
    """Return the bytes of "32G", "500M" or "4000", Slurm's megabytes; None for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)B?", text or "", re.IGNORECASE)
    return None if match is None else float(match[1]) * _PARTS[match[2].upper() or "M"]
