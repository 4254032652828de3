"""What `Slurm()` does without a cluster: options, and what it reads in Slurm's answers and in a job's variables."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import signal
import subprocess
import threading

import pytest
import skyward_lite as sky
from processes import eventually, has_ended
from skyward_lite.errors import NodeStartError
from skyward_lite.providers import NodeRequest
from skyward_lite.providers.slurm import commands, options, own_job, queue, submission


def request(vcpus: int | None = None, memory_gb: float | None = None) -> NodeRequest:
    return NodeRequest(1, 1, sky.Image(), vcpus, memory_gb, 20.0)


def row(**fields: str) -> str:
    """Return one line of squeue's, each field padded as squeue does it."""
    said = {
        "ArrayJobID": "58",
        "ArrayTaskID": "N/A",
        "JobID": "58",
        "State": "RUNNING",
        "Reason": "None",
        "TimeLeft": "1:00",
        "TimeLimit": "1:00",
        "NumCPUs": "4",
        "NodeList": "node1",
        "tres-alloc": "cpu=4,mem=500M,node=1,billing=4",
        "PreemptTime": "N/A",
        **fields,
    }
    names = [column.rstrip("|").partition(":") for column in queue.COLUMNS.split(",")]
    return "".join(f"{said[name]:<{width}}|" for name, _, width in names) + "\n"


def test_options_are_spelled_as_sbatchs():
    """True is a flag, None and False are left out, a list is joined, anything else is a text."""
    given = {
        "cpus_per_task": 16,
        "exclusive": True,
        "gres": ["gpu:1", "tmp:5G"],
        "overcommit": False,
        "qos": None,
        "chdir": pathlib.Path("/scratch"),
        "time": "2:00:00",
    }
    assert options.words(options.checked(given)) == [
        "--cpus-per-task=16",
        "--exclusive",
        "--gres=gpu:1,tmp:5G",
        "--chdir=/scratch",
        "--time=2:00:00",
    ]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        *(({name: "1"}, ValueError, rf"Slurm\({name}='1'\): \w") for name in (*options.OURS, "outp", "arra", "wra")),
        ({"n_nodes": 2}, TypeError, r"no parameter n_nodes: the number of nodes is the pool's: write pool\(nodes=2"),
        ({"queue": "short"}, TypeError, r"write Slurm\(partition='short'\)"),
        ({"walltime": 5}, TypeError, 'write Slurm\\(time="2:00:00"\\)'),
        ({"time": object()}, TypeError, "a text, a number, a list of them, or True"),
        ({"gres": [object()]}, TypeError, "a text, a number, a list of them, or True"),
        ({"partition": " "}, ValueError, "a text that is not empty"),
        ({"partition": "a\nb"}, ValueError, "has no control characters"),
        ({"grace": 0, "time": 1}, ValueError, r"Slurm\(grace=0\)"),
        ({"orphan_timeout": 1, "time": 1}, ValueError, r"Slurm\(orphan_timeout=1\): at least 10"),
        ({"python": "-c", "time": 1}, ValueError, r"Slurm\(python='-c'\)"),
    ],
)
def test_options_that_cannot_be_used(given, error, text):
    """The error names the option, and says what to write instead."""
    with pytest.raises(error, match=text):
        sky.Slurm(**given)


def test_without_options_a_job_is_needed(monkeypatch):
    """Outside of a job the error says what to write; inside the number of its nodes is known before the pool starts."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_JOBID", raising=False)
    with pytest.raises(ValueError, match=r'as in Slurm\(partition="cpu", .*or run this within sbatch or salloc'):
        sky.Slurm()
    monkeypatch.setenv("SLURM_JOB_ID", "58")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert (sky.Slurm().nodes, repr(sky.Slurm())) == (3, "Slurm(): job 58")
    assert sky.Slurm(time="1").nodes is None


def test_what_the_pool_asks_for_becomes_options():
    """vcpus and memory_gb are said to sbatch, unless the options say as much or more."""
    assert options.with_request({}, request(4, 16)) == {"cpus_per_task": "4", "mem": "15259M"}
    for given in ({"cpus_per_task": "8", "mem": "16G"}, {"cpus_per_task": "4", "mem": "0"}):
        assert options.with_request(given, request(4, 16)) == given
    given = {"cpus_per_task": "4", "mem_per_cpu": "4G"}
    assert options.with_request(given, request(4, 16)) == given


@pytest.mark.parametrize(
    ("given", "wanted", "text"),
    [
        ({"cpus_per_task": "2"}, request(4), r"pool\(vcpus=4\) and Slurm\(cpus_per_task=2\)"),
        ({"mem": "8G"}, request(None, 16), r"pool\(memory_gb=16\) and Slurm\(mem='8G'\).* 8.59 GB"),
        ({"mem": "8000"}, request(None, 16), r"pool\(memory_gb=16\) and Slurm\(mem='8000'\)"),
        ({"mem_per_cpu": "2G"}, request(4, 16), r"pool\(memory_gb=16\) and Slurm\(mem_per_cpu='2G'\)"),
    ],
)
def test_options_below_what_the_pool_asks_for(given, wanted, text):
    """A contradiction is an error that names both sides of it."""
    with pytest.raises(NodeStartError, match=text):
        options.with_request(given, wanted)


def test_rows_of_the_queue():
    """Elements of arrays have their own number for srun; banners and cut lines are left out."""
    element = row(ArrayTaskID="0", JobID="61")
    waits = row(ArrayJobID="9", JobID="9", State="PENDING", Reason="Resources", NodeList="", TimeLeft="UNLIMITED")
    rows = queue.parse(f"Welcome | to | the cluster\n{element}{waits}{element[:100]}")
    assert [*rows] == ["58_0", "9"]
    assert rows["58_0"] == queue.Row("58_0", "61", "RUNNING", "", 60.0, 4, "node1", 500 * 2**20, preempted=False)
    assert (rows["9"].described(), rows["9"].seconds_left, rows["9"].nodes) == ("PENDING (Resources)", None, "")


@pytest.mark.parametrize(
    ("left", "limit", "seconds"),
    [
        ("0:08", "1:00", 8),
        ("2:03:04", "1-00:00:00", 7384),
        ("1-02:03:04", "2-00:00:00", 93784),
        ("UNLIMITED", "UNLIMITED", None),
        ("NOT_SET", "NOT_SET", None),
        ("INVALID", "1:00", 0),
        ("INVALID", "INVALID", None),
    ],
)
def test_times_that_are_left(left, limit, seconds):
    """A time that is over is 0; Slurm writes the same for limits of more than a year, which are none."""
    assert queue.seconds_left(left, limit) == seconds


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, {"goes_on"}),
        ({"State": "SUSPENDED"}, {"goes_on"}),
        ({"State": "PENDING"}, {"goes_on"}),
        ({"State": "COMPLETING", "Reason": "TimeLimit"}, {"as_planned", "is_certain"}),
        ({"State": "COMPLETING", "PreemptTime": "2026-11-26T15:37:06"}, {"as_planned", "is_certain"}),
        ({"State": "COMPLETING"}, {"by_hand"}),
        ({"State": "CANCELLED"}, {"by_hand", "is_certain"}),
        ({"State": "TIMEOUT"}, {"as_planned", "is_certain"}),
        ({"State": "NODE_FAIL"}, {"by_cluster", "is_certain"}),
        ({"State": "OUT_OF_MEMORY"}, {"is_certain"}),
        ({"State": "FAILED", "Reason": "NonZeroExitCode"}, {"by_cluster", "is_certain"}),
        ({"State": "FAILED", "Reason": "BadConstraints"}, {"is_certain"}),
    ],
)
def test_what_becomes_of_a_job(fields, what):
    """Its state, its reason and a preemption tell whether it goes on, and if not, who has ended it."""
    found = queue.fate(queue.parse(row(**fields))["58"])
    flags = ("goes_on", "by_hand", "as_planned", "by_cluster")
    assert {name for name in flags if getattr(found, name)} == what - {"is_certain"}
    assert found.goes_on or found.is_certain == ("is_certain" in what)
    assert found.goes_on or found.text


def test_a_preempted_job_still_has_its_node():
    """In its GraceTime it is neither taken for one that goes on, nor for one that is over."""
    found = queue.fate(queue.parse(row(PreemptTime="2026-11-26T15:37:06"))["58"])
    assert (found.goes_on, found.is_over, found.as_planned) == (False, False, True)


def test_a_job_that_slurm_does_not_know():
    """A job that the queue does not name counts as ended by the cluster, and is cancelled nevertheless."""
    found = queue.fate(None)
    assert (found.goes_on, found.is_over, found.by_cluster) == (False, False, True)


def test_threads_that_wait_for_the_queue_share_its_failure(monkeypatch):
    """Without a controller squeue takes 9 s to fail: that is the answer for all threads that wait for it meanwhile."""
    calls: list[int] = []
    all_wait = threading.Event()

    def run(words, bound=0.0, stdin=b""):
        calls.append(len(calls))
        assert all_wait.wait(10)
        return commands.Answer(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")

    monkeypatch.setattr(commands, "run", run)
    asked = queue.Queue(lambda: ["58"])
    with concurrent.futures.ThreadPoolExecutor(9) as threads:
        answers = [threads.submit(asked.rows) for _ in range(9)]
        # Eight of them are at the lock, or, a few at most, on their way to it: these ask once more.
        assert eventually(lambda: len(calls) == 1 and sum(answer.running() for answer in answers) == 9, 10)
        all_wait.set()
        errors = [answer.exception(10) for answer in answers]
    assert {type(error) for error in errors} == {commands.PassingError}
    assert len(calls) < 9


def test_a_guard_leaves_nothing_in_tmp():
    """It removes its directory, and old ones of guards that were killed; those of other jobs that run stay."""
    key = os.urandom(6).hex()
    old, recent, own = (pathlib.Path(submission.guard_directory(key, number)) for number in ("1", "2", "3"))
    old.mkdir()
    recent.mkdir()
    os.utime(old, (0, 0))
    try:
        script = submission.guard(key, 60)
        with subprocess.Popen(["sh", "-s"], stdin=subprocess.PIPE, env={**os.environ, "SLURM_JOB_ID": "3"}) as guard:
            assert guard.stdin is not None
            guard.stdin.write(script)
            guard.stdin.close()
            assert eventually(lambda: own.exists() and not old.exists(), 10)
            assert eventually(lambda: b"sleep" in children(guard.pid), 10)
            guard.send_signal(signal.SIGUSR1)
            assert guard.wait(10) == 0
        assert (own.exists(), recent.exists()) == (False, True)
    finally:
        recent.rmdir()


def children(pid: int) -> bytes:
    """Return the command lines of a process's children."""
    return subprocess.run(["ps", "-o", "args=", "--ppid", str(pid)], capture_output=True, check=False).stdout


def test_cpus_of_a_job():
    """A node's CPUs and memory are read as Slurm writes them; what cannot be read limits nothing."""
    for text, cpus in (("4", [4]), ("4(x2),8", [4, 4, 8]), ("", []), ("4(x2", []), ("many", [])):
        assert own_job.cpus({"SLURM_JOB_CPUS_PER_NODE": text}) == cpus
    assert own_job.count({"SLURM_JOB_CPUS_PER_NODE": "4(x2),8"}) == 3
    assert own_job.job({"SLURM_JOB_ID": "58"}) == "58"
    assert own_job.job({"SLURM_JOBID": "x"}) is None
    for variables, cpus, megabytes in (
        ({"SLURM_MEM_PER_NODE": "500"}, None, 500),
        ({"SLURM_MEM_PER_CPU": "100"}, 4, 400),
        ({"SLURM_MEM_PER_CPU": "100"}, None, None),
        ({"SLURM_MEM_PER_NODE": "0"}, 4, None),
        ({}, 4, None),
    ):
        assert own_job.memory_bytes(cpus, variables) == (megabytes and megabytes * 2**20)


def test_slurms_programs_do_not_see_the_job_around_them():
    """What finds the cluster is kept, and so are a user's own defaults of sbatch."""
    variables = {
        "SLURM_CONF": "/etc/x",
        "SLURM_JWT": "token",
        "SBATCH_ACCOUNT": "ab12",
        "PATH": "/bin",
        "SLURM_JOB_ID": "1",
        "SLURM_CPU_BIND": "none",
        "SRUN_CPUS_PER_TASK": "3",
        "SQUEUE_USERS": "nobody",
        "SCANCEL_INTERACTIVE": "1",
        "SBATCH_ARRAY_INX": "0-9",
        "SBATCH_WAIT": "1",
    }
    assert [*commands.environment(variables)] == ["SLURM_CONF", "SLURM_JWT", "SBATCH_ACCOUNT", "PATH"]


@pytest.mark.parametrize(
    ("printed", "passing", "text"),
    [
        (
            "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid",
            False,
            "x;",
        ),
        ("sbatch: unrecognized option '--x=1'\nTry \"sbatch --help\" for more information", False, "'--x=1'"),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            True,
            "fa",
        ),
        ("", False, "status 1, without a word"),
    ],
)
def test_slurms_own_words(printed, passing, text):
    """An error has the program's words in one line, without its name; it may pass if the controller does not answer."""
    error = commands.failure("sbatch", commands.Answer(1, "", printed))
    assert isinstance(error, commands.PassingError) == passing
    assert text in str(error)
    assert "sbatch:" not in str(error)
    assert "\n" not in str(error)


def test_a_program_that_does_not_answer_is_ended_with_what_it_has_started(tmp_path, monkeypatch):
    """A site's sbatch may be a script around the real one, which must not submit a job later."""
    number = tmp_path / "number"
    wrapper = tmp_path / "sbatch"
    wrapper.write_text(f"#!/bin/sh\necho queue is full >&2\nsleep 60 &\necho $! >{number}\nwait\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(commands.PassingError, match="has not answered within 1 s: queue is full"):
        commands.run(["sbatch"], 1.0)
    assert eventually(lambda: has_ended(int(number.read_text())), 10)


def test_one_ctrl_c_ends_a_start_that_slurm_does_not_answer(monkeypatch):
    """While the controller is gone sbatch is tried again until `start_timeout`, but not after a Ctrl-C."""
    calls: list[str] = []

    def run(words, bound=0.0, stdin=b""):
        calls.append(words[0])
        if words[0] != "sbatch":
            return commands.Answer(0, "", "")
        signal.raise_signal(signal.SIGINT)
        return commands.Answer(1, "", "sbatch: error: Unable to contact slurm controller (connect failure)")

    monkeypatch.setattr(commands, "run", run)
    with pytest.raises(KeyboardInterrupt):
        sky.Slurm(time=1).start(request(), [])
    # The answer to the submission may have been lost.
    assert calls == ["sbatch", "scancel"]


def test_an_array_is_submitted_where_arrays_are_allowed(monkeypatch):
    """Several jobs are one array, one by one where Slurm refuses arrays; the words around a number are no ids."""
    calls: list[list[str]] = []
    numbers = iter(range(58, 99))

    def run(words, bound=0.0, stdin=b""):
        calls.append(words)
        if refused and any(word.startswith("--array") for word in words):
            return commands.Answer(1, "", "sbatch: error: Batch job submission failed: Invalid job array specification")
        return commands.Answer(0, f"Welcome\n{next(numbers)};cluster\n", "")

    monkeypatch.setattr(commands, "run", run)
    refused = False
    assert submission.submit(["--time=1"], b"", 2) == ["58_0", "58_1"]
    assert calls[-1] == ["sbatch", "--time=1", *submission.ONE_NODE, "--array=0-1"]
    assert submission.submit([], b"", 1) == ["59"]
    refused = True
    assert submission.submit([], b"", 3) == ["60", "61", "62"]
    assert [len(calls), calls[-1]] == [6, ["sbatch", *submission.ONE_NODE]]


def test_a_configuration_that_is_not_there_is_named_at_once(monkeypatch):
    """Slurm's programs would wait a minute for it, and a pool would try them again until `start_timeout`."""
    monkeypatch.setenv("SLURM_CONF", "/nope/slurm.conf")
    with pytest.raises(NodeStartError, match="SLURM_CONF is /nope/slurm.conf here, and there is no such file"):
        sky.Slurm(time=5).start(request(), [])


def test_a_controller_that_does_not_answer_until_the_end_is_told_as_a_start_that_failed(monkeypatch, tmp_path):
    """The error is of the kind that a program knows, and says what bound was over."""
    says = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    for name, script in (("sbatch", f"echo '{says}' >&2; exit 1"), ("scancel", "exit 0"), ("squeue", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    with pytest.raises(NodeStartError, match=r"Unable to contact .*start_timeout=\) is over") as caught:
        sky.Slurm(time=5).start(dataclasses.replace(request(), start_timeout=0.1), [])
    assert type(caught.value) is NodeStartError
