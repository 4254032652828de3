"""Use a pool from asyncio: the event loop stays free while the workers compute.

python asyncio_app.py           # primes below 2,000,000
python asyncio_app.py 50_000    # below a smaller number
"""

import asyncio
import sys

import skyward_lite as sky

limit = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000


def count_primes(begin, end):
    """Return how many of the numbers from `begin` to `end - 1` are primes."""
    return sum(
        n > 1 and all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(begin, end)
    )


async def serve():
    """Show that the event loop is free. A server would answer requests here."""
    rounds = 0
    try:
        while True:
            await asyncio.sleep(0.01)
            rounds += 1
    finally:
        print(f"meanwhile the event loop came round {rounds} times")


async def main(pool):
    """Count the primes in 40 pieces, and more."""
    serving = asyncio.create_task(serve())
    loop = asyncio.get_running_loop()

    # A pool is a concurrent.futures.Executor, so an event loop takes it as one: each
    # call is awaited like a coroutine.
    print(f"{await loop.run_in_executor(pool, count_primes, 0, 100):,} primes below 100")
    # `submit` returns a future of the pool's own, and `wrap_future` makes it awaitable.
    future = pool.submit(count_primes, 0, 1000)
    print(f"{await asyncio.wrap_future(future):,} primes below 1,000")

    # Many at once. Each result is used as soon as it is there.
    step = limit // 40
    pieces = [
        loop.run_in_executor(pool, count_primes, begin, begin + step)
        for begin in range(0, step * 40, step)
    ]
    total = 0
    for piece in asyncio.as_completed(pieces):
        total += await piece
    print(f"{total:,} primes below {step * 40:,}")

    # A time limit, as for any awaitable. A call that has not begun is dropped; one that
    # runs goes on to its end.
    try:
        await asyncio.wait_for(
            loop.run_in_executor(pool, count_primes, 10**9, 10**9 + step), timeout=0.01
        )
    except TimeoutError:
        print("the last call took too long, and was not waited for")

    serving.cancel()
    await asyncio.wait([serving])


# Starting a pool and leaving it take a moment, in which an event loop would stand
# still: so the pool is around it. For your own machines: provider=sky.SSH("me@lab1",
# "me@lab2"), for EC2: provider=sky.AWS(), nodes=10.
with sky.pool(provider=sky.Local(), worker=sky.Worker(executor="process")) as pool:
    asyncio.run(main(pool))
