"""Run a million tasks that take microseconds each.

python million_tasks.py             # a million
python million_tasks.py 20_000      # fewer
"""

import sys
import time

import skyward_lite as sky
from joblib import Parallel, delayed

count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000


def collatz(n):
    """Return how many steps of n → n / 2 or 3n + 1 lead from n to 1."""
    steps = 0
    while n > 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


# This is pure Python, which holds the GIL while it computes: only one thread of a
# process runs at a time. So each slot is a process of its own. The default,
# executor="thread", is for tasks that wait, or that compute in NumPy and the like.
#
# For your own machines: provider=sky.SSH("me@lab1", "me@lab2"), for EC2:
# provider=sky.AWS(), nodes=10.
with sky.pool(provider=sky.Local(), worker=sky.Worker(executor="process")):
    begin = time.perf_counter()
    # joblib sends small tasks in batches, and finds their size out while it runs. The
    # results come as a generator: this process never has a list of a million of them.
    lengths = Parallel(n_jobs=-1, return_as="generator")(
        delayed(collatz)(n) for n in range(1, count + 1)
    )
    longest, start = max((steps, n) for n, steps in enumerate(lengths, 1))
    took = time.perf_counter() - begin

print(f"{count:,} tasks in {took:.1f} s: {count / took:,.0f} per second")
print(f"the longest way to 1 starts at {start:,} and has {longest} steps")
