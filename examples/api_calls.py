"""Call a web service many times: far more calls at once than cores, a limit on their
rate, and another try for calls that fail.

    python api_calls.py         # 600 calls
    python api_calls.py 60      # fewer

The service is part of this script: a small HTTP server that answers after 0.2 s, and at
times with "503: try again".
"""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import skyward_lite as sky
from joblib import Parallel, delayed

count = int(sys.argv[1]) if len(sys.argv) > 1 else 600
CALLS_PER_SECOND = 200  # what the service allows from all nodes together


def fetch(url, attempts=5):
    """Return the answer. While the service is overloaded, ask again after a pause."""
    attempt = 1
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return {**json.load(answer), "attempts": attempt}
        except urllib.error.HTTPError as error:
            # Any other error, and that of the last attempt, is raised by Parallel, with
            # a note that names the call.
            if error.code != 503 or attempt == attempts:
                raise
        time.sleep(0.1 * 2**attempt)
        attempt += 1


def paced(items, per_second):
    """Yield the items no faster than this.

    `Parallel` reads its input on a thread of its own, so the input may take its time:
    one limit for all nodes, in one place.
    """
    begin = time.monotonic()
    for number, item in enumerate(items):
        time.sleep(max(0, begin + number / per_second - time.monotonic()))
        yield item


refused = set()  # the numbers that the service has refused once


class Service(BaseHTTPRequestHandler):
    """Answers `/square/7` with `{"square": 49}`; refuses every tenth number once."""

    def do_GET(self):
        time.sleep(0.2)
        number = int(self.path.removeprefix("/square/"))
        if number % 10 == 0 and number not in refused:
            refused.add(number)
            self.send_error(503)
            return
        body = json.dumps({"square": number**2}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Print nothing."""


class Server(ThreadingHTTPServer):
    request_queue_size = 200  # callers that may wait to be let in


with Server(("127.0.0.1", 0), Service) as server:
    threading.Thread(target=server.serve_forever).start()
    urls = (
        f"http://127.0.0.1:{server.server_port}/square/{number}"
        for number in range(count)
    )

    # 100 calls at once, on however few cores: each is a thread that waits. The default
    # of concurrency=, the number of cores, is for tasks that compute. A real service is
    # called from other machines just the same: provider=sky.SSH("me@lab1", "me@lab2"),
    # or provider=sky.AWS(), nodes=2.
    with sky.pool(provider=sky.Local(nodes=2), worker=sky.Worker(concurrency=50)):
        begin = time.perf_counter()
        answers = Parallel(n_jobs=-1)(
            delayed(fetch)(url) for url in paced(urls, CALLS_PER_SECOND)
        )
        took = time.perf_counter() - begin
    server.shutdown()

again = sum(answer["attempts"] > 1 for answer in answers)
print(f"{count:,} calls of 0.2 s in {took:.1f} s; {again} of them took a second attempt")
print(f"one after the other they would take {count * 0.2:.0f} s")
print(f"the rate that is allowed makes it {count / CALLS_PER_SECOND:.1f} s at least")
assert [answer["square"] for answer in answers] == [n**2 for n in range(count)]
