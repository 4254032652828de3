"""Data that a node loses, or has no place for: tasks get it all the same."""

from __future__ import annotations

import operator
import os
import signal

import numpy as np
import skyward_lite as sky
from joblib import Parallel, delayed
from processes import eventually

MB = 1_000_000


def sent(pool):
    """Return the bytes that were sent to each node."""
    return [sent for sent, _ in pool._core.traffic()]


def test_a_node_that_is_killed_in_the_middle_of_a_blob():
    """Its task runs on the other node, which is sent the whole blob once, as the node was that died."""
    data = np.random.default_rng(1).random(25 * MB)
    size = data.nbytes
    with sky.pool(sky.Local(nodes=2), worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = pool.submit(np.sum, data)
        assert eventually(lambda: max(sent(pool)) > size // 10, 20)
        counts = sent(pool)
        node = counts.index(max(counts))
        os.kill(pool.nodes()[node].pid, signal.SIGKILL)
        assert future.result(30) == data.sum()
        before = sent(pool)
        assert before[node] < size, "the blob had arrived"
        assert size <= before[1 - node] < 1.01 * size
        assert pool.submit(np.max, data).result(30) == data.max()
        assert sum(sent(pool)) - sum(before) < MB


def test_a_budget_of_1_mb():
    """With less room than the data takes, each task gets its data; what fits and was used last is not sent again."""
    random = np.random.default_rng(1)
    arrays = [np.frombuffer(random.bytes(n), "u1") for n in (200_000, 3 * MB, 400_000, 2 * MB, 500_000, 600_000)]
    expected = [int(array.sum()) for array in arrays]
    with sky.pool(worker=sky.Worker(concurrency=2, cache_gb=0.001)) as pool:
        assert pool.submit(operator.getitem, arrays[0], 0).result() == arrays[0][0]
        before = sum(sent(pool))
        assert pool.submit(operator.getitem, arrays[0], 1).result() == arrays[0][1]
        assert sum(sent(pool)) - before < len(arrays[0])
        for batch_size in (1, 4, "auto"):
            parallel = Parallel(n_jobs=-1, batch_size=batch_size)
            assert parallel(delayed(np.sum)(array, dtype=int) for array in 4 * arrays) == 4 * expected

        def is_sent_again():
            """Use what is over the budget. It is sent again once the node was told to forget it."""
            before = sum(sent(pool))
            assert pool.submit(np.sum, arrays[1], dtype=int).result() == expected[1]
            return sum(sent(pool)) - before > len(arrays[1])

        assert eventually(is_sent_again, 20)
