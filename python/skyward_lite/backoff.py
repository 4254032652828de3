"""Pauses between attempts at the same thing: they grow, and end with a deadline, a number of attempts, or the pool."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable


class Backoff:
    """The pauses of one loop of attempts, which calls `pause()` before each further attempt.

    `first` is the first pause in seconds; each further one is `factor` times as long, up to `longest`. A pause is
    multiplied by a random number between the two of `jitter`, so that many clients do not come back at once.
    There are at most `most` pauses, and none after `deadline` (of `time.monotonic`): the last one is cut short by it.
    `sleep(seconds)` waits; if it returns something true, as an event's `wait` does, the loop is to end.
    """

    def __init__(
        self,
        first: float,
        *,
        factor: float = 1.5,
        longest: float = math.inf,
        jitter: tuple[float, float] = (1.0, 1.0),
        most: float = math.inf,
        deadline: float = math.inf,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._next, self._factor, self._longest = first, factor, longest
        self._jitter, self._left, self._deadline, self._sleep = jitter, most, deadline, sleep

    def pause(self, exactly: float | None = None) -> bool:
        """Wait. Return False if there is to be no further attempt.

        `exactly` is the pause in seconds where the loop has a reason for another one; further pauses grow from it.
        """
        pause = self._next if exactly is None else exactly
        seconds = pause * random.uniform(*self._jitter)
        remaining = self._deadline - time.monotonic()
        if self._left < 1 or remaining <= 0:
            return False
        self._left -= 1
        self._next = min(pause * self._factor, self._longest)
        return not self._sleep(min(seconds, remaining))
