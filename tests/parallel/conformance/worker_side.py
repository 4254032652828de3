"""Preloaded by the workers of the conformance run: lets their tasks use the client's `multiprocessing.Manager`."""

from __future__ import annotations

import multiprocessing
import os

KEY = "SKYWARD_CONFORMANCE_AUTHKEY"

if KEY in os.environ:
    multiprocessing.current_process().authkey = bytes.fromhex(os.environ[KEY])
