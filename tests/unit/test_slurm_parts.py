"""What `Slurm()` makes of its options, of a job's variables, and of what Slurm's programs print."""

from __future__ import annotations

import datetime
import math

import pytest
import skyward_lite as sky
from skyward_lite.providers import NodeRequest
from skyward_lite.providers.slurm import commands, options, own_job, queue


def wanted(vcpus=None, memory_gb=None):
    return NodeRequest(2, 1, sky.Image(), vcpus, memory_gb, 20.0)


def words(**given):
    return options.words(options.checked(given))


# ------------------------------------------------------------------------------------------------ options


def test_options_are_spelled_as_sbatch_does():
    """A true value is a flag, a false one and None are left out, lists are joined, and all else is passed as it is."""
    assert words(partition="cpu", time=30, cpus_per_task=16, exclusive=True, contiguous=False, qos=None) == [
        *("--partition=cpu", "--time=30", "--cpus-per-task=16", "--exclusive")
    ]
    assert words(gres=["gpu:1", "ssd"], nodelist=("a", "b"), comment="a b; rm -rf *") == [
        *("--gres=gpu:1,ssd", "--nodelist=a,b", "--comment=a b; rm -rf *")
    ]


@pytest.mark.parametrize("name", [*options.OURS, "outpu", "arra", "wra"])
def test_options_that_the_pool_decides_are_refused(name):
    """What the pool decides is refused with what to write instead, also where sbatch would take a name's beginning."""
    with pytest.raises(ValueError, match=rf"Slurm\({name}='1'\): ."):
        sky.Slurm(**{name: "1"})


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("time", datetime.timedelta(hours=2), 'write time="2:00:00"'),
        ("gres", {"gpu": 1}, "a text, a number"),
        ("cores", 16, "cpus_per_task=16"),
        ("walltime", "1:00:00", "time="),
        ("memory", "32G", "mem="),
    ],
)
def test_values_and_names_that_sbatch_does_not_have(name, value, remedy):
    """A value of a wrong type, and a name that other tools have, are refused with the right ones."""
    with pytest.raises(TypeError) as caught:
        sky.Slurm(partition="cpu", **{name: value})
    assert name in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("value", ["", " ", "a\nb", "a\0b"])
def test_texts_that_no_command_line_can_have(value):
    """An empty text and control characters are refused."""
    with pytest.raises(ValueError, match=r"Slurm\(partition="):
        sky.Slurm(partition=value)


@pytest.mark.parametrize(("name", "value"), [("grace", -1), ("grace", math.nan), ("orphan_timeout", 1)])
def test_seconds_are_in_a_range(name, value):
    """Seconds that cannot be meant are refused by name."""
    with pytest.raises(ValueError, match=f"{name}="):
        sky.Slurm(partition="cpu", **{name: value})


def test_what_the_pool_asks_for_becomes_options():
    """`pool(vcpus=, memory_gb=)` become options, unless there are such; those that say less are named."""
    assert options.with_request({}, wanted(4, 2)) == {"cpus_per_task": "4", "mem": "1908M"}
    both = {"cpus_per_task": "8", "mem": "32G"}
    assert options.with_request(both, wanted(4, 2)) == both
    assert options.with_request({"mem": "0"}, wanted(None, 2)) == {"mem": "0"}
    assert options.with_request({"mem_per_cpu": "1G"}, wanted(4, 4)) == {"mem_per_cpu": "1G", "cpus_per_task": "4"}
    for given, request, named in (
        ({"cpus_per_task": "2"}, wanted(4), "cpus_per_task=2"),
        ({"mem": "1G"}, wanted(None, 2), "mem='1G'"),
        ({"mem_per_cpu": "1G", "cpus_per_task": "1"}, wanted(1, 2), "mem_per_cpu='1G'"),
    ):
        with pytest.raises(sky.NodeStartError) as caught:
            options.with_request(given, request)
        assert named in str(caught.value)


# ------------------------------------------------------------------------------------------------ a job's variables


def test_the_cpus_of_a_jobs_nodes():
    """Slurm writes CPUs as "4(x2),8"; what cannot be read is unknown, and not an error."""
    for text, found in (("4", [4]), ("4(x2),8", [4, 4, 8]), ("", []), ("many", []), ("4(x2", [])):
        assert own_job.cpus({"SLURM_JOB_CPUS_PER_NODE": text}) == found
    assert own_job.job({"SLURM_JOB_ID": "58"}) == "58"
    assert own_job.job({"SLURM_JOB_ID": "x"}) is None
    assert own_job.job({}) is None
    assert own_job.count({"SLURM_JOB_NUM_NODES": "3"}) == 3
    assert own_job.count({"SLURM_JOB_CPUS_PER_NODE": "4(x2),8"}) == 3


def test_which_variables_slurms_programs_get():
    """Slurm's programs get the cluster's variables and a user's for sbatch, but none of a job around this process."""
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "x", "SBATCH_ACCOUNT": "ab12", "PATH": "/bin", "HOME": "/"}
    gone = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "3", "SRUN_CPUS_PER_TASK": "3", "SQUEUE_FORMAT": "%i"}
    assert commands.environment({**kept, **gone, "SBATCH_ARRAY_INX": "0-5", "SCANCEL_STATE": "PD"}) == kept


# ------------------------------------------------------------------------------------------------ what is printed


def line(base="58", index="N/A", state="RUNNING", reason="None", left="UNLIMITED", limit="UNLIMITED", **more):
    fields = {"cpus": "4", "node": "node1", "tres": "cpu=4,mem=500M,node=1,billing=4", "preempted": "N/A", **more}
    number = more.pop("number", "59")
    cells = [
        base,
        index,
        number,
        state,
        reason,
        left,
        limit,
        *(fields[n] for n in ("cpus", "node", "tres", "preempted")),
    ]
    return "".join(f"{cell:<24}|" for cell in cells) + "\n"


def row(**fields):
    (one,) = queue.parse(line(**fields)).values()
    return one


def test_the_queue_is_read_between_other_lines():
    """Each job is found by its id; a greeting, a warning and a line that is cut are no jobs."""
    text = f"Welcome | to || all\n\n{line()}{line(index='1', number='60')}{line(base='7')[:60]}\nbye|"
    found = queue.parse(text)
    assert {job: each.number for job, each in found.items()} == {"58": "59", "58_1": "60"}
    assert found["58"].described() == "RUNNING"
    assert found["58"].cpus == 4
    assert found["58"].nodes == "node1"
    assert found["58"].memory_bytes == 500 * 2**20
    waits = row(state="PENDING", reason="ReqNodeNotAvail, UnavailableNodes:node1", node="", tres="N/A")
    assert waits.described() == "PENDING (ReqNodeNotAvail, UnavailableNodes:node1)"
    assert waits.memory_bytes is None


@pytest.mark.parametrize(
    ("left", "limit", "seconds"),
    [
        *(("0:08", "1:00", 8), ("10:00:00", "10:00:00", 36_000), ("1-02:03:04", "2-00:00:00", 93_784)),
        *(("UNLIMITED", "UNLIMITED", None), ("NOT_SET", "NOT_SET", None), ("0:00", "1:00", 0)),
        *(("INVALID", "1:00", 0), ("INVALID", "INVALID", None)),
    ],
)
def test_the_time_that_is_left(left, limit, seconds):
    """A time is days, hours, minutes and seconds; one that is over is 0, and no limit is None."""
    assert row(left=left, limit=limit).seconds_left == seconds


@pytest.mark.parametrize(
    ("fields", "goes_on", "is_over", "kind"),
    [
        ({}, True, False, ""),
        ({"state": "PENDING", "reason": "Resources"}, True, False, ""),
        ({"state": "CONFIGURING"}, True, False, ""),
        ({"state": "SUSPENDED"}, True, False, ""),
        # In its GraceTime a job still has its node.
        ({"preempted": "2026-11-26T15:37:39"}, False, False, "as_planned"),
        ({"state": "COMPLETING", "preempted": "2026-11-26T15:37:39"}, False, True, "as_planned"),
        ({"state": "COMPLETING", "reason": "TimeLimit"}, False, True, "as_planned"),
        ({"state": "TIMEOUT", "reason": "TimeLimit"}, False, True, "as_planned"),
        ({"state": "COMPLETING"}, False, True, "by_hand"),
        ({"state": "CANCELLED"}, False, True, "by_hand"),
        ({"state": "NODE_FAIL"}, False, True, "by_cluster"),
        ({"state": "OUT_OF_MEMORY"}, False, True, ""),
        ({"state": "A_STATE_OF_2030"}, False, True, ""),
    ],
)
def test_what_becomes_of_a_job(fields, goes_on, is_over, kind):
    """What the queue says of a job tells whether it goes on, holds its node, and who has ended it."""
    fate = queue.fate(row(**fields))
    assert (fate.goes_on, fate.is_over) == (goes_on, is_over)
    assert {name for name in ("by_hand", "as_planned", "by_cluster") if getattr(fate, name)} == ({kind} - {""})
    assert fate.is_certain == (fields != {"state": "COMPLETING"})


def test_a_job_that_slurm_does_not_know():
    """A job that the queue does not name counts as ended by the cluster, and is cancelled nevertheless."""
    fate = queue.fate(None)
    assert fate.by_cluster
    assert not fate.goes_on
    assert not fate.is_over


def test_slurms_own_words():
    """An error has the program's own words once each, in one line, without its name before them."""
    answer = commands.Answer(
        1,
        "",
        "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid\n"
        'Try "sbatch --help" for more information\n',
    )
    assert answer.reason("sbatch") == "invalid partition specified: nope; Batch job submission failed: Invalid"
    assert commands.Answer(3, "", "").reason("sbatch") == "status 3, without a word"
    assert commands.is_passing(commands.Answer(1, "", "Unable to contact slurm controller (connect failure)"))
    assert not commands.is_passing(answer)
