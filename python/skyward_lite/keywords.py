"""What a call says that names a parameter which does not exist: the parameter that was meant, and where it stands.

sky.Worker(n_jobs=4)           TypeError: Worker() has no parameter n_jobs: … write Worker(concurrency=4)
sky.pool(concurrency=4)        TypeError: … it is one of Worker: write pool(worker=sky.Worker(concurrency=4))
sky.pool(start_timout=60)      TypeError: … did you mean start_timeout?
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_VARARGS = 0x04
"""The bit of `co_flags` of a function that takes any number of positional arguments: `inspect.CO_VARARGS`."""

_VARKEYWORDS = 0x08
"""The bit of `co_flags` of a function that takes any names: `inspect.CO_VARKEYWORDS`."""

_COUNTS = (
    *("n_jobs", "jobs", "workers", "n_workers", "num_workers", "max_workers", "nprocs", "slots", "cores", "n_cores"),
    *("cpus", "n_cpus", "num_cpus", "parallelism"),
)
"""Names that other libraries have for the number of tasks that run at once."""
_THREADS = ("threads", "n_threads", "num_threads", "nthreads")
_PROCESSES = ("processes", "n_processes", "num_processes", "n_procs")
_NODES = ("n_nodes", "num_nodes", "machines", "instances", "n_instances", "count", "n")
_HOSTS = ("hosts", "host", "hostname", "hostnames", "ssh", "servers")
_REQUIREMENTS = ("packages", "requirements", "dependencies", "pip_packages", "install", "pip_install")
_VARIABLES = ("environment", "environ", "env_vars", "environment_variables", "variables")

_ON_EACH_NODE = "the number of tasks that a node runs at once is concurrency"
_LOGIN = (
    "SSH() reads users, ports and keys from your ssh configuration (~/.ssh/config), and a host may be written "
    '"user@name:port"'
)

MEANT: dict[str, dict[tuple[str, ...], str]] = {
    "Worker": {
        _COUNTS: _ON_EACH_NODE + ": write Worker(concurrency={value})",
        _THREADS: _ON_EACH_NODE + ': write Worker(concurrency={value}, executor="thread")',
        _PROCESSES: _ON_EACH_NODE + ': write Worker(concurrency={value}, executor="process")',
        (
            "timeout",
            "time_limit",
        ): "the limit of a task, in seconds, is task_timeout: write Worker(task_timeout={value})",
        ("backend", "prefer", "kind", "type", "mode"): 'write Worker(executor="thread") or Worker(executor="process")',
        ("retry", "max_retries", "attempts"): "write Worker(retries={value})",
    },
    "pool": {
        _COUNTS: _ON_EACH_NODE + ": write pool(worker=sky.Worker(concurrency={value}))",
        _THREADS: _ON_EACH_NODE + ': write pool(worker=sky.Worker(concurrency={value}, executor="thread"))',
        _PROCESSES: _ON_EACH_NODE + ': write pool(worker=sky.Worker(concurrency={value}, executor="process"))',
        _NODES: "the number of nodes is nodes: write pool(nodes={value})",
        _HOSTS: 'hosts are a provider: write pool(provider=sky.SSH("me@lab1", "lab2"))',
        (
            "backend",
            "cluster",
            "cloud",
            "where",
        ): 'write pool(provider=...), with sky.Local(), sky.SSH("me@lab1") or sky.AWS()',
        ("timeout",): "write pool(start_timeout={value}) for the nodes' start, or "
        "pool(worker=sky.Worker(task_timeout={value})) for each task",
        ("memory", "ram", "ram_gb", "mem"): "the memory of a node is memory_gb, in GB: write pool(memory_gb={value})",
        ("verbose", "show_progress", "progress_bar"): "write pool(progress=True)",
        ("plugin",): "plugins are a list: write pool(plugins=[sky.plugins.joblib()])",
        ("executor",): 'write pool(worker=sky.Worker(executor="process")), or "thread"',
        _REQUIREMENTS: "write pool(image=sky.Image(pip=[...]))",
        _VARIABLES: "write pool(image=sky.Image(env={{...}}))",
    },
    "Host": {
        (*_COUNTS, *_THREADS, *_PROCESSES): "the number of tasks that run on this host at once is concurrency: "
        "write Host(..., concurrency={value})",
        ("host", "hostname", "name"): 'write the address first: Host("me@lab1")',
        ("user", "username", "port", "key", "password", "identity_file", "key_filename"): _LOGIN,
    },
    "SSH": {
        (*_HOSTS, "nodes"): 'write the hosts first: SSH("me@lab1", "lab2")',
        ("user", "username", "port", "key", "password", "identity_file", "key_filename"): _LOGIN,
        (*_COUNTS, *_THREADS, *_PROCESSES): "write pool(worker=sky.Worker(concurrency={value})) for all hosts, or "
        "sky.Host(..., concurrency={value}) for one of them",
        ("interpreter", "python_path"): "write SSH(..., python={value})",
        ("config_file", "ssh_config"): "write SSH(..., config={value})",
    },
    "Exec": {
        (*_HOSTS, "node", "names", "containers", "pods"): 'write the nodes after the command: Exec("docker exec -i '
        '{{node}} sh -c", nodes=["a", "b"])',
        ("cmd", "args", "argv", "exec", "program"): "write the command first, as one text: "
        'Exec("docker exec -i {{node}} sh -c", nodes=["a", "b"])',
        (*_COUNTS, *_THREADS, *_PROCESSES): _ON_EACH_NODE + ": write pool(worker=sky.Worker(concurrency={value}))",
        ("interpreter", "python_path"): "write Exec(..., python={value})",
    },
    "Local": {
        _NODES: "write Local(nodes={value})",
        (*_COUNTS, *_THREADS, *_PROCESSES): _ON_EACH_NODE + ": write pool(worker=sky.Worker(concurrency={value}))",
    },
    "AWS": {
        ("instance", "instance_types", "type", "types", "machine_type"): "write AWS(instance_type={value})",
        ("spot",): 'write AWS(allocation="spot"), "spot-if-available" or "on-demand"',
        ("region_name", "zone"): "write AWS(region={value})",
        ("image", "ami_id", "image_id"): "write AWS(ami={value})",
        ("disk", "volume_gb", "disk_size"): "write AWS(disk_gb={value})",
        ("max_cost", "budget", "max_price"): "write AWS(max_hourly_cost={value})",
        (*_NODES, "nodes"): "the number of instances is the pool's: write pool(nodes={value}, provider=sky.AWS(...))",
        _COUNTS: "write pool(vcpus={value}, provider=sky.AWS(...)) for the size of a node, or "
        "pool(worker=sky.Worker(concurrency={value})) for the tasks that it runs at once",
        ("profile", "aws_profile"): "set AWS_PROFILE for your own credentials; iam_profile is what the nodes may do",
    },
    "Slurm": {
        (*_COUNTS, *_THREADS, *_PROCESSES): "the CPUs of a node's job are cpus_per_task: write "
        "Slurm(cpus_per_task={value}), or pool(worker=sky.Worker(concurrency=...)) for the tasks at once",
        _NODES: "the number of nodes is the pool's: write pool(nodes={value}, provider=sky.Slurm(...))",
        ("queue",): "write Slurm(partition={value})",
        ("walltime", "time_limit", "timeout"): 'write Slurm(time="2:00:00")',
        ("memory", "ram", "mem_gb"): 'write Slurm(mem="32G")',
        ("project",): "write Slurm(account={value})",
        ("interpreter", "python_path"): "write Slurm(python={value})",
    },
    "Image": {
        _REQUIREMENTS: "write Image(pip=[...])",
        _VARIABLES: "write Image(env={{...}})",
        ("python_version", "version"): "write Image(python={value})",
        ("index", "extra_index_url", "pypi"): "write Image(index_url=...)",
        ("include", "paths", "modules"): "write Image(includes=[...])",
        ("wheels",): "write Image(wheelhouse=...)",
    },
    "map": {
        ("chunk_size", "batch_size", "chunks"): "write map(..., chunksize={value})",
        ("buffer_size",): "write map(..., buffersize={value})",
    },
}
"""For each class or function: names that users may take for one of its parameters → what to write.

`{value}` stands for the value that was given, or for dots: a value may be long, or a password."""

HOMES = {
    "pool": (
        *("provider", "nodes", "vcpus", "memory_gb", "worker", "image", "plugins", "lease", "connect_timeout"),
        *("start_timeout", "strict_env", "ship_modules", "progress"),
    ),
    "pool(worker=sky.Worker": ("concurrency", "executor", "retries", "max_payload", "task_timeout", "cache_gb"),
    "pool(image=sky.Image": ("python", "pip", "apt", "env", "index_url", "wheelhouse", "includes", "wheel"),
    "pool(provider=sky.SSH": ("accept_new", "config"),
    "pool(provider=sky.Exec": ("command",),
    "pool(provider=sky.AWS": (
        *("region", "instance_type", "ami", "allocation", "subnet", "security_group", "iam_profile", "ssh_from", "ttl"),
        *("orphan_timeout", "tags", "max_hourly_cost", "architecture", "disk_gb", "boot_timeout"),
    ),
    "pool(provider=sky.Slurm": ("grace", "orphan_timeout"),
}
"""Where each parameter stands: a call that has it, up to its bracket → names."""


def explained(owner: str) -> Callable[[F], F]:
    """Return a decorator for a public class, which `owner` names, or a method: it explains names that do not exist.

    Signature, docstring and types stay as they are.
    """

    def decorate(thing: F) -> F:
        if isinstance(thing, type):
            # Not `thing.__init__ = …`, which type checkers refuse: to them the class is as it was.
            type.__setattr__(thing, "__init__", _guarded(owner, thing.__init__))  # type: ignore[misc]
            return thing
        return _guarded(owner, thing)  # type: ignore[return-value]

    return decorate


def _guarded(owner: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that checks the names in a call before it calls `function`."""
    code = function.__code__
    # Without `self`.
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    known = frozenset(names)
    takes_all = bool(code.co_flags & _VARKEYWORDS)
    positional = float("inf") if code.co_flags & _VARARGS else code.co_argcount

    own = (f"{owner}(", f"{owner}:", "SSH(", "Host(")

    @functools.wraps(function)
    def guarded(*args: Any, **given: Any) -> Any:
        __tracebackhide__ = True
        if not takes_all and not known.issuperset(given):
            name = next(name for name in given if name not in known)
            raise TypeError(unknown(owner, names, name, given[name]))
        if len(args) > positional:
            raise TypeError(_too_many(owner, names, code.co_argcount - 1, len(args) - 1))
        try:
            return function(*args, **given)
        except (TypeError, ValueError, OSError) as error:
            # A check found a wrong value: the traceback ends near the line that has it.
            if str(error).startswith(own):
                raise error.with_traceback(None) from error.__cause__
            raise

    return guarded


def unknown(owner: str, names: tuple[str, ...], name: str, value: object) -> str:
    """Return the error's text for a parameter `name` that `owner`, which has the parameters `names`, does not have."""
    return f"{owner}() has no parameter {name}: {_remedy(owner, names, name, value)}"


def _remedy(owner: str, names: tuple[str, ...], name: str, value: object) -> str:
    # Of a number nothing is secret, and nothing is long.
    shown = repr(value) if type(value) in (int, float) and abs(value) < 1e12 else "..."  # type: ignore[arg-type]
    for others, remedy in MEANT.get(owner, {}).items():
        if name.lower() in others:
            return remedy.format(value=shown)
    # Not at the module's head: agents and workers import this module and never need it.
    from difflib import get_close_matches

    close = get_close_matches(name.lower(), names, 1, 0.75)
    if close:
        return f"did you mean {close[0]}?"
    for home, theirs in HOMES.items():
        if name in theirs and owner != "map":
            return f"{name} is a parameter of {home.rpartition('.')[2]}: write {home}({name}={shown}" + ")" * (
                home.count("(") + 1
            )
    if not names:
        return "it takes none by name"
    return f"its parameters are {', '.join(names)}"


def _too_many(owner: str, names: tuple[str, ...], positional: int, given: int) -> str:
    first, later = names[:positional], names[positional:]
    if not first:
        return f"{owner}() takes no arguments without their names: write each as {owner}(NAME=VALUE)"
    rest = f"; write the others with their names, as in {owner}(..., {later[0]}=...)" if later else ""
    arguments = "1 argument without its name" if positional == 1 else f"{positional} arguments without their names"
    return f"{owner}() takes {arguments} ({', '.join(first)}), not {given}{rest}"
