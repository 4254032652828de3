"""The command `skyward`, which is `python -m skyward_lite` as well: its help, its parameters, its exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import platform
import sys
import textwrap
from typing import TYPE_CHECKING, Any, NoReturn

from .. import _core
from .._version import __version__

if TYPE_CHECKING:
    from ..providers import Provider

DESCRIPTION = """\
Look after the machines that skyward_lite uses.

  check  tests whether your hosts can be used, and says what to mend
  clean  removes what skyward_lite keeps on hosts and no longer uses
  reap   ends what is left on EC2 of runs that are over

`skyward COMMAND --help` explains a command, with examples."""
EPILOG = """\
examples:
  skyward check me@lab1 lab2
  skyward clean --dry-run me@lab1 lab2
  skyward reap --dry-run

`python -m skyward_lite` is the same command, also where `skyward` is not on the PATH.

Exit status: 0 if all is well, 1 if something is to be done, 2 for wrong usage, 130 after Ctrl-C."""

HELP_COLUMNS = 79
"""Characters of the longest line of a help text."""
COMMANDS = ("check", "clean", "reap")


class _Parser(argparse.ArgumentParser):
    """A parser whose texts are wrapped paragraph by paragraph, and which answers wrong usage with the reason."""

    def __init__(self, *, description: str, epilog: str, **options: Any) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(description=_wrapped(description), epilog=_wrapped(epilog), formatter_class=shape, **options)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\nTry `{self.prog} --help`.\n")


def _wrapped(text: str) -> str:
    """Return a help text with its long lines wrapped; lines of examples stay as they are."""
    return "\n".join(line if line.startswith(" ") else textwrap.fill(line, HELP_COLUMNS) for line in text.split("\n"))


def run() -> NoReturn:
    """Run the command that this process was started as, and end the process with its exit status."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # Not `sys.exit`, which would wait for the threads that wait for hosts.
        os._exit(130)
    except BrokenPipeError:
        # The reader of the output has gone, as `head` does; what was to be printed has no place to go.
        os._exit(141)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, which each command's help explains."""
    for stream in (sys.stdout, sys.stderr):
        # The messages of hosts may have characters that the encoding of this terminal lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    if not given:
        parser.print_help(sys.stderr)
        return 2
    if not given[0].startswith("-") and given[0] not in COMMANDS:
        parser.error(_unknown(given[0]))
    args, unknown = parser.parse_known_args(given)
    if unknown:
        for_slurm = getattr(args, "slurm", None) is not None
        remedy = ": sbatch's options follow as NAME=VALUE, as in --slurm partition=short time=10" if for_slurm else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{remedy}")
    status: int = args.command(parser, args)
    return status


def _unknown(name: str) -> str:
    """Return what is said to a first word that is no command."""
    from difflib import get_close_matches

    close = get_close_matches(name.lower(), COMMANDS, 1)
    if close:
        return f"there is no command {name!r}: did you mean `{close[0]}`?"
    if "@" in name or "." in name:
        return f"there is no command {name!r}: to test a host, write `check {name}`"
    return f"there is no command {name!r}: the commands are {', '.join(COMMANDS)}"


def _parser() -> argparse.ArgumentParser:
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    prog = "skyward" if name.startswith("skyward") else "python -m skyward_lite"
    parser = _Parser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--version", action=_Version, help="print the versions that a report of a problem needs")
    commands = parser.add_subparsers(metavar="COMMAND", prog=parser.prog, help=argparse.SUPPRESS, parser_class=_Parser)
    _add_check(commands)
    _add_clean(commands)
    _add_reap(commands)
    return parser


def _add_check(commands: argparse._SubParsersAction[_Parser]) -> None:
    check = commands.add_parser(
        "check",
        description="Connect to each machine as a pool does, and report what works, what does not, and what to do. "
        "Nothing is installed and nothing is changed there. The machines are hosts, as of sky.SSH(); with --exec nodes "
        "behind a command, as of sky.Exec(). With --slurm a job of one node is submitted, inspected and ended; within "
        "a job, without options, it is the job's own nodes that are inspected.",
        epilog="examples:\n  skyward check me@lab1 lab2:2222\n  skyward check --json lab1 > report.json\n"
        '  skyward check --exec "docker exec -i {node} sh -c" a b\n'
        "  skyward check --slurm partition=short time=10 cpus_per_task=4\n\n"
        "Exit status: 0 if all machines can be used, 1 if some cannot, 2 for wrong usage.",
    )
    _add_hosts(check, "*")
    check.add_argument("--accept-new", action="store_true", help="trust hosts that are not known yet, and record them")
    check.add_argument("--python", metavar="PATH", help="an interpreter there that is to be used as it is")
    check.add_argument("--exec", metavar="COMMAND", help="the command that leads to the nodes HOST ..., with {node}")
    check.add_argument("--slurm", nargs="*", metavar="NAME=VALUE", help="sbatch's options, with underscores, or none")
    check.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    check.set_defaults(command=_check)


def _add_clean(commands: argparse._SubParsersAction[_Parser]) -> None:
    clean = commands.add_parser(
        "clean",
        description="Remove the Python environments that pools made on the hosts, and the files sent for them, if no "
        "pool has used them for 30 days. A host does the same by itself whenever it builds an environment.",
        epilog="examples:\n  skyward clean --dry-run me@lab1 lab2\n  skyward clean --all lab1\n\n"
        "Exit status: 0 if nothing is left that should be removed, 1 if something is left or a host could not be "
        "examined, 2 for wrong usage.",
    )
    _add_hosts(clean, "+")
    clean.add_argument("--all", action="store_true", help="also what was used lately, but not within the last hour")
    clean.add_argument("--dry-run", action="store_true", help="list what would be removed, and remove nothing")
    clean.set_defaults(command=_clean)


def _add_hosts(parser: argparse.ArgumentParser, nargs: str) -> None:
    parser.add_argument("hosts", nargs=nargs, metavar="HOST", help="name, user@name, name:port or [address]:port")
    parser.add_argument("--config", metavar="FILE", help="an ssh configuration instead of your own, as by ssh -F")


def _add_reap(commands: argparse._SubParsersAction[_Parser]) -> None:
    reap = commands.add_parser(
        "reap",
        description="List what sky.AWS() made on EC2, and end what has expired or belongs to a process of this machine "
        "that has ended. What belongs to a living process is left alone. So is anything whose tags do not tell whether "
        "its process lives: it is listed with the reason and the command that ends it.",
        epilog="examples:\n  skyward reap --dry-run\n  skyward reap --region eu-west-1 --region us-east-1\n"
        "  skyward reap --run 3f2a9c71\n\n"
        "Exit status: 0 if nothing is left but what belongs to living processes (with --dry-run: and what would be "
        "ended), 1 if anything else is left or could not be examined, 2 for wrong usage.",
    )
    reap.add_argument(
        "--region",
        action="append",
        metavar="NAME",
        help="look there instead of in your default region; may be repeated",
    )
    reap.add_argument("--dry-run", action="store_true", help="list what would be ended, and end nothing")
    reap.add_argument("--run", metavar="ID", help="end only the run whose id begins with ID, even if it lives")
    reap.set_defaults(command=_reap)


class _Version(argparse.Action):
    """Prints the versions and ends the command."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:  # noqa: A002 (argparse names it)
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(versions())
        parser.exit(0)


def versions() -> str:
    """Return the versions of what takes part in running tasks, one in each line."""
    from ..distributions import installed

    packages = [("joblib", installed("joblib")), ("cloudpickle", installed("cloudpickle"))]
    interpreter = _core.printable(sys.executable or "embedded")
    lines = [
        f"skyward_lite {__version__}",
        f"{platform.python_implementation()} {platform.python_version()} ({interpreter})",
        *(f"{name} {version or '(not installed)'}" for name, version in packages),
        platform.platform(),
    ]
    return "\n".join(lines)


def _reap(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from .reap import LEAST_ID, reap

    if args.run is not None and len(args.run) < LEAST_ID:
        parser.error(f"--run: at least {LEAST_ID} characters of the run's id, as listed by --dry-run")
    return reap(args.region or [None], dry_run=args.dry_run, only=args.run)


def _clean(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from ..providers.ssh import SSH
    from .clean import clean

    try:
        provider = SSH(*args.hosts, config=args.config)
    except ValueError as error:
        parser.error(str(error))
    return clean(provider, everything=args.all, dry_run=args.dry_run)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from .check import check

    try:
        provider = _provider(parser, args)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    logging.getLogger("skyward_lite").setLevel(logging.ERROR)  # the report has everything else
    return check(provider, as_json=args.json)


def _provider(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Provider:
    """Return the provider of the machines that the command names. Raises `ValueError` for values that it refuses."""
    from ..providers.command import Exec
    from ..providers.ssh import SSH

    if args.exec is not None and args.slurm is not None:
        parser.error("--exec and --slurm name two kinds of machines: check one after the other")
    if args.slurm is None and not args.hosts:
        if args.exec is None:
            parser.error("name at least one HOST")
        parser.error(
            '--exec: name at least one node behind the command, as in --exec "docker exec -i {node} sh -c" a b'
        )
    if args.exec is None and args.slurm is None:
        return SSH(*args.hosts, accept_new=args.accept_new, python=args.python, config=args.config)
    if args.accept_new or args.config is not None:
        parser.error("--accept-new and --config are for hosts that SSH reaches")
    if args.exec is not None:
        return Exec(args.exec, nodes=args.hosts, python=args.python)
    if args.hosts:
        parser.error(f"--slurm: Slurm chooses the nodes itself, {args.hosts[0]!r} cannot be one of them")
    from ..providers.slurm import Slurm, own_job

    options: dict[str, Any] = dict(_option(parser, word) for word in args.slurm)
    if not options and not own_job.job():
        parser.error(
            "--slurm: write the options of a job, as in --slurm partition=short time=10, or run this within a job, "
            "whose own nodes are looked at then"
        )
    return Slurm(python=args.python, **options)


def _option(parser: argparse.ArgumentParser, word: str) -> tuple[str, str | float | bool | None]:
    """Return an option of sbatch, or one of ours, that is written as NAME=VALUE, or as NAME if it has no value."""
    name, equals, value = word.partition("=")
    name = name.replace("-", "_")
    if not name.isidentifier():
        parser.error(f"--slurm: {word!r} is no option: write NAME=VALUE, as in partition=short")
    if name == "python":
        parser.error("--slurm: write --python PATH for the interpreter")
    if name in ("grace", "orphan_timeout"):
        with contextlib.suppress(ValueError):
            return name, float(value)
    # As they are written in Python, where sbatch has an option without a value.
    constants = {"True": True, "False": False, "None": None}
    return name, constants.get(value, value) if equals else True
