"""Looks for EC2's notice that it takes a spot instance back, on a thread of the agent's process."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request

from .. import _core

SPOT_POLL_SECONDS = 5.0
"""Between two looks for a spot notice, as EC2's documentation recommends."""
TOKEN_SECONDS = 21_600
"""How long a token for the metadata service is valid: the longest that the service gives."""
REQUEST_SECONDS = 2.0
"""Bound on each request. The service is on the instance's own link."""
ENDPOINT = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")


def begin() -> None:
    """Begin to look, and return."""
    threading.Thread(target=_watch_for_notice, name="notices", daemon=True).start()


def _watch_for_notice() -> None:
    """Tell the client that the node will be gone, as soon as EC2 announces that it takes the spot instance back."""
    token, valid_until = "", 0.0
    while True:
        try:
            if time.monotonic() >= valid_until:
                token = _request(
                    "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                )
                valid_until = time.monotonic() + TOKEN_SECONDS / 2
            notice = json.loads(
                _request("GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
            )
            if _core.drain(f"EC2 takes this spot instance back: {notice.get('action')} at {notice.get('time')}"):
                return
        except urllib.error.HTTPError as error:
            error.close()
            # 404 means that there is no notice, 401 that the token is no longer valid.
            if error.code == 401:
                valid_until = 0.0
        except (OSError, ValueError):
            pass  # the notice is best effort; without it the node is lost like any other
        time.sleep(SPOT_POLL_SECONDS)


def _request(method: str, path: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(ENDPOINT + path, method=method, headers=headers)
    # No proxy: the address is the instance's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=REQUEST_SECONDS) as answer:
        text: str = answer.read(65536).decode()
        return text
