"""The commands.

`python -m skyward_lite check me@lab1 lab2`: what works with these hosts, what does not, and what to do.
`python -m skyward_lite clean me@lab1 lab2`: remove the environments there that nothing uses.
`python -m skyward_lite reap`: end what EC2 still has of runs that are over.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, which each command's help explains."""
    parser = argparse.ArgumentParser(prog="python -m skyward_lite", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    check = commands.add_parser(
        "check",
        help="report what works with hosts and what does not",
        description="Connect to hosts as sky.SSH() does, and report what works and what to fix. Builds nothing.",
        epilog="Exit status: 0 if all hosts can be used, 1 if some cannot, 2 for wrong usage.",
    )
    check.add_argument("hosts", nargs="+", metavar="host", help="name, user@name, name:port or [address]:port")
    check.add_argument("--config", metavar="FILE", help="an ssh configuration instead of your own, as by ssh -F")
    check.add_argument("--accept-new", action="store_true", help="trust hosts that are not known, and record them")
    check.add_argument("--python", metavar="PATH", help="an interpreter on the hosts that is used as it is")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    clean = commands.add_parser(
        "clean",
        help="remove the environments on hosts that nothing uses",
        description="Remove environments, and files that were sent for them, that no pool has used for 30 days. A host "
        "does the same by itself whenever it builds an environment.",
        epilog="Exit status: 0 if none of these is left, 1 if any is left or a host could not be examined.",
    )
    clean.add_argument("hosts", nargs="+", metavar="host", help="name, user@name, name:port or [address]:port")
    clean.add_argument("--config", metavar="FILE", help="an ssh configuration instead of your own, as by ssh -F")
    clean.add_argument("--all", action="store_true", help="also environments used lately, but not within the last hour")
    clean.add_argument("--dry-run", action="store_true", help="list only")
    reap = commands.add_parser(
        "reap",
        help="end what EC2 still has of runs that are over",
        description="List what sky.AWS() made, and end what has expired or belongs to a process of this machine that "
        "has ended. Resources of a living process are left alone. So are those whose tags do not tell whether their "
        "process lives: they are listed with the reason and the command that ends them.",
        epilog="Exit status: 0 if nothing is left but resources of living processes (with --dry-run: and those that "
        "would be ended), 1 if anything else is left or could not be examined, 2 for wrong usage.",
    )
    reap.add_argument("--region", action="append", metavar="NAME", help="instead of the default one; may be repeated")
    reap.add_argument("--dry-run", action="store_true", help="list only")
    reap.add_argument("--run", metavar="ID", help="end only the run whose id begins with ID, even if it lives")
    check.set_defaults(command=_check)
    clean.set_defaults(command=_clean)
    reap.set_defaults(command=_reap)
    for stream in (sys.stdout, sys.stderr):
        # The messages of hosts may have characters that the encoding of this terminal lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(arguments)
    status: int = args.command(parser, args)
    return status


def _reap(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from .cli.reap import LEAST_ID, reap

    if args.run is not None and len(args.run) < LEAST_ID:
        parser.error(f"--run: at least {LEAST_ID} characters of the run's id, as listed by --dry-run")
    return reap(args.region or [None], dry_run=args.dry_run, only=args.run)


def _clean(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from .cli.clean import clean
    from .providers.ssh import SSH

    try:
        provider = SSH(*args.hosts, config=args.config)
    except ValueError as error:
        parser.error(str(error))
    return clean(provider, everything=args.all, dry_run=args.dry_run)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from .cli.check import check
    from .providers.ssh import SSH

    try:
        provider = SSH(*args.hosts, accept_new=args.accept_new, python=args.python, config=args.config)
    except ValueError as error:
        parser.error(str(error))
    logging.getLogger("skyward_lite").setLevel(logging.ERROR)  # the report has everything else
    return check(provider, as_json=args.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # Not `sys.exit`, which would wait for the threads that wait for hosts.
        os._exit(130)
