"""What an agent does on an EC2 instance beside its work: it leaves a sign of life, and looks for spot's notice.

On a thread of the agent's process, which ends when the client does.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import threading
import time
import urllib.error
import urllib.request

from .. import _core

SECONDS = 5.0
"""Between two looks, as EC2's documentation has it for the notice."""
SIGNS = 1.0
TOKEN_SECONDS = 21_600
BOUND = 2.0
"""On each request; the service is on the instance's own link."""
ENDPOINT = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")


def begin(alive: str, *, spot: bool) -> None:
    """Begin both duties, and return. `alive` is the file that the guard takes away."""
    threading.Thread(target=_signs, args=(pathlib.Path(alive),), name="signs", daemon=True).start()
    if spot:
        threading.Thread(target=_notices, name="notices", daemon=True).start()


def _signs(alive: pathlib.Path) -> None:
    while True:
        # It may not be possible before the guard has begun: the next one counts.
        with contextlib.suppress(OSError):
            alive.touch()
        time.sleep(SIGNS)


def _notices() -> None:
    token, until = "", 0.0
    while True:
        try:
            if time.monotonic() >= until:
                token = _ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)})
                until = time.monotonic() + TOKEN_SECONDS / 2
            said = json.loads(
                _ask("GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
            )
            if _core.drain(f"EC2 takes this spot instance back: {said.get('action')} at {said.get('time')}"):
                return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 401:
                until = 0.0
            # 404: nothing to notice.
        except (OSError, ValueError):
            pass  # the notice is best effort; without it the node is lost like any other
        time.sleep(SECONDS)


def _ask(method: str, path: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(ENDPOINT + path, method=method, headers=headers)
    # No proxy: the address is the instance's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=BOUND) as answer:
        text: str = answer.read(65536).decode()
        return text
