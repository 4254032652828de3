"""`python -m skyward_lite check me@lab1 lab2`: what works with these hosts, what does not, and what to do."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from . import doctor
from .providers.ssh import SSH


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says: 0 if all hosts can be used, 1 if some cannot, 2 for what cannot be understood."""
    parser = argparse.ArgumentParser(prog="python -m skyward_lite", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    check = commands.add_parser(
        "check",
        help="say what works with hosts and what does not",
        description="Connect to hosts as sky.SSH() does, and say of each what works and what to fix. Builds nothing.",
        epilog="Exit status: 0 if all hosts can be used, 1 if some cannot, 2 for wrong usage.",
    )
    check.add_argument("hosts", nargs="+", metavar="host", help="name, user@name, name:port or [address]:port")
    check.add_argument("--config", metavar="FILE", help="an ssh configuration instead of your own, as by ssh -F")
    check.add_argument("--accept-new", action="store_true", help="trust hosts that are not known, and record them")
    check.add_argument("--python", metavar="PATH", help="an interpreter on the hosts that is used as it is")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    said = parser.parse_args(arguments)
    try:
        provider = SSH(*said.hosts, accept_new=said.accept_new, python=said.python, config=said.config)
    except ValueError as error:
        parser.error(str(error))
    logging.getLogger("skyward_lite").setLevel(logging.ERROR)  # the report says the rest
    return doctor.check(provider, as_json=said.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # Not `sys.exit`, which would wait for the threads that wait for hosts.
        os._exit(130)
