"""A contestant on a Slurm cluster: `queues.py skyward_lite`, or `dask-jobqueue`, `parsl`, `submitit`.

It is run by the contestant's own interpreter, where `sbatch` is, with a partition that has two idle nodes of four CPUs:
each contestant has two jobs of that size. Without an option it prints how fast small tasks are. `--limit` gives each
job a minute and the contestant 240 tasks of 3 s, which take 90 s, and prints what became of them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CPUS = 4
TASKS, ROUNDS = 2000, 3
LONG_TASKS, LONG_SECONDS = 240, 3.0
WAIT_SECONDS = 300.0
"""After so long, a contestant's tasks under a limit are no longer waited for."""

Run = Callable[[Callable[..., int], Sequence[tuple[Any, ...]]], list[int]]
"""Calls a function with each of the arguments as a task of its own, and returns the results."""


def double(x: int) -> int:
    """Take no time."""
    return 2 * x


def double_slowly(x: int, seconds: float, notes: str) -> int:
    """Take some time, and note the beginning and the end in a file that all nodes share."""
    import os
    import time

    file = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"begins {x}\n".encode())
    time.sleep(seconds)
    os.write(file, f"ends {x}\n".encode())
    os.close(file)
    return 2 * x


# ------------------------------------------------------------------------------------------------ contestants


@contextlib.contextmanager
def skyward_lite(limit: str, directory: str, tuned: bool) -> Iterator[Run]:
    """Yield joblib's `Parallel` in a pool of two jobs."""
    import skyward_lite as sky
    from joblib import Parallel, delayed

    grace = {"grace": 20} if tuned else {}
    slurm = sky.Slurm(time=limit, cpus_per_task=CPUS, **grace)
    # Said, because a cluster on one machine may claim more CPUs than there are.
    with sky.pool(slurm, nodes=2, worker=sky.Worker(concurrency=CPUS)):
        yield lambda function, arguments: Parallel(n_jobs=-1)(delayed(function)(*a) for a in arguments)


@contextlib.contextmanager
def dask_jobqueue(limit: str, directory: str, tuned: bool) -> Iterator[Run]:
    """Yield dask's own way; tuned as its page about limits says, results taken as they come."""
    from dask.distributed import Client, as_completed, wait
    from dask_jobqueue import SLURMCluster

    lifetime = ["--lifetime", "40s", "--lifetime-stagger", "4s"] if tuned else []
    size = {"cores": CPUS, "processes": 1, "memory": "1GB"}
    with SLURMCluster(
        **size, walltime=f"00:{limit}", log_directory=directory, interface="lo", worker_extra_args=lifetime
    ) as cluster:
        _ = cluster.adapt(minimum=0, maximum=2) if tuned else cluster.scale(jobs=2)
        with Client(cluster) as client:

            def run(function: Callable[..., int], arguments: Sequence[tuple[Any, ...]]) -> list[int]:
                futures = client.map(function, *zip(*arguments, strict=True), pure=False)
                if not tuned:
                    wait(futures, timeout=WAIT_SECONDS)
                    return list(client.gather(futures))
                places, results = {f.key: n for n, f in enumerate(futures)}, [0] * len(futures)
                arriving = as_completed(futures, timeout=WAIT_SECONDS)
                del futures
                for future in arriving:
                    results[places[future.key]] = future.result()
                    future.release()
                return results

            yield run


@contextlib.contextmanager
def parsl(limit: str, directory: str, tuned: bool) -> Iterator[Run]:
    """Yield parsl's apps on its `HighThroughputExecutor`; tuned by `drain_period`."""
    import parsl as library
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import SlurmProvider

    blocks = {"init_blocks": 2, "min_blocks": 2, "max_blocks": 2}
    environment = f"export PATH={Path(sys.executable).parent}:$PATH"
    provider = SlurmProvider(
        **blocks, cores_per_node=CPUS, exclusive=False, walltime=f"00:{limit}", worker_init=environment
    )
    drain = {"drain_period": 40} if tuned else {}
    executor = HighThroughputExecutor(label="queue", max_workers_per_node=CPUS, provider=provider, **drain)
    with library.load(Config(executors=[executor], run_dir=directory)):

        def run(function: Callable[..., int], arguments: Sequence[tuple[Any, ...]]) -> list[int]:
            app = library.python_app(function)
            futures = [app(*a) for a in arguments]
            deadline = time.monotonic() + WAIT_SECONDS
            return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]

        yield run


@contextlib.contextmanager
def submitit(limit: str, directory: str, tuned: bool) -> Iterator[Run]:
    """Yield arrays of jobs, one for each task, as many at once as the others have slots."""
    import submitit as library

    executor = library.AutoExecutor(folder=directory, cluster="slurm")
    minutes = max(1, int(limit.partition(":")[0]))
    executor.update_parameters(timeout_min=minutes, cpus_per_task=1, slurm_array_parallelism=2 * CPUS)
    yield lambda function, arguments: [
        job.result() for job in executor.map_array(function, *zip(*arguments, strict=True))
    ]


CONTESTANTS = {"skyward_lite": skyward_lite, "dask-jobqueue": dask_jobqueue, "parsl": parsl, "submitit": submitit}


# ------------------------------------------------------------------------------------------------ contests


def small_tasks(start: Callable[[], Any], tasks: int) -> None:
    """Print how long the first result takes, and how many small tasks a second."""
    begin = time.perf_counter()
    with start() as run:
        assert run(double, [(1,)]) == [2]
        print(f"  first result after {time.perf_counter() - begin:.1f} s")
        seconds = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            assert run(double, [(x,) for x in range(tasks)]) == [2 * x for x in range(tasks)]
            seconds.append(time.perf_counter() - begin)
        took = statistics.median(seconds)
        print(f"  {tasks:,} tasks in {took:.2f} s: {tasks / took:,.0f} a second")


def under_a_limit(start: Callable[[], Any], notes: Path) -> None:
    """Print what became of tasks that take longer than their jobs may."""
    begin, fate = time.perf_counter(), "right"
    try:
        with start() as run:
            arguments = [(x, LONG_SECONDS, str(notes)) for x in range(LONG_TASKS)]
            if run(double_slowly, arguments) != [2 * x for x in range(LONG_TASKS)]:
                fate = "WRONG"
    except BaseException as error:
        fate = f"{type(error).__name__}: {error}"
    print(f"  after {time.perf_counter() - begin:.0f} s: {fate}"[:300])
    begun = collections.Counter(line for line in notes.read_text().splitlines() if line.startswith("begins"))
    ended = sum(line.startswith("ends") for line in notes.read_text().splitlines())
    print(f"  {sum(begun.values())} begun, {ended} ended, {sum(n > 1 for n in begun.values())} begun more than once")


def main() -> None:
    """Run one contestant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--limit", action="store_true", help="jobs of a minute, and tasks that take longer")
    parser.add_argument("--tuned", action="store_true", help="with what the contestant's documentation says of limits")
    parser.add_argument("--tasks", type=int, default=TASKS, help="small tasks in each round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        limit = "1:00" if arguments.limit else "10:00"
        print(arguments.contestant, "tuned" if arguments.tuned else "")

        def start() -> Any:
            return CONTESTANTS[arguments.contestant](limit, directory, arguments.tuned)

        if arguments.limit:
            under_a_limit(start, Path(directory) / "notes")
        else:
            small_tasks(start, arguments.tasks)


if __name__ == "__main__":
    main()
