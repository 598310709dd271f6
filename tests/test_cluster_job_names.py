"""Ids of jobs, attempts of runs, and what a name means."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobDetails, JobStatus, JobType

from pipeline.cluster.job_names import Name, find, fit, next_name, parse_id, running, submitted, table
from pipeline.cluster.session import ClusterError
from pipeline.config import RunConfig

JOBS = st.sampled_from(["train", "tune", "ingest", "benchmark"])
RUNS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
NAMES = st.builds(Name, JOBS, RUNS, st.integers(1, 10**6))


def details(submission: str, status: JobStatus = JobStatus.SUCCEEDED, start: int = 0, **more: object) -> JobDetails:
    fields = {"type": JobType.SUBMISSION, "entrypoint": f"run {submission}", "start_time": 1000 * start} | more
    return JobDetails(submission_id=submission, status=status, **fields)


@given(NAMES)
def test_an_id_says_which_job_run_and_attempt_it_is(name: Name) -> None:
    assert parse_id(name.id) == name


@given(NAMES, NAMES)
def test_different_names_have_different_ids(a: Name, b: Name) -> None:
    assert (a.id == b.id) == (a == b)


@given(RUNS)
def test_a_runs_name_fits_as_it_is(run: str) -> None:
    assert RunConfig(name=run).name == run
    assert fit(run) == run


@given(st.text())
def test_any_text_is_made_to_fit(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", fit(text))
    assert fit(fit(text)) == fit(text)


@given(st.lists(NAMES), JOBS, RUNS)
def test_the_next_attempt_is_new_and_the_one_after_the_last(taken: list[Name], job: str, run: str) -> None:
    ids = [name.id for name in taken] + ["raysubmit_4LamXRuQpYdSMg7J", "train", "train-x", "train-x-0", "-1"]
    name = next_name(job, run, ids)
    assert name.id not in ids
    assert (name.job, name.run) == (job, run)
    before = [one.attempt for one in taken if (one.job, one.run) == (job, run)]
    assert name.attempt == max(before, default=0) + 1
    assert next_name(job, run, [*ids, name.id]).attempt == name.attempt + 1


def test_runs_that_look_like_attempts_are_told_apart() -> None:
    assert next_name("train", "a", ["train-a-1-1", "train-a-1-2", "tune-a-7"]).id == "train-a-1"
    assert next_name("train", "a-1", ["train-a-1", "train-a-1-4"]).id == "train-a-1-5"


def test_only_what_goes_on_stands_in_the_way() -> None:
    jobs = [details("train-a-1", JobStatus.FAILED), details("train-a-2", JobStatus.RUNNING), details("tune-b-1")]
    assert running(jobs, "train", "a", "new").submission_id == "train-a-2"  # type: ignore[union-attr]
    assert running(jobs, "train", "a-2", "new") is None
    assert running(jobs, "tune", "a", "new") is None
    assert running(jobs, "tune", "b", "new") is None
    plain = details("raysubmit_1", JobStatus.PENDING, entrypoint="python -m jobs.train --config a")
    assert running([plain], "train", "a", "python -m jobs.train --config a") is plain
    assert running([plain], "train", "a", "python -m jobs.train --config a run.seed=1") is None


def test_a_name_means_what_goes_on_else_the_newest() -> None:
    old, new = details("train-a-1", start=10), details("train-a-2", start=20)
    live = details("train-a-3", JobStatus.RUNNING, start=5)
    assert find([new, old], "a") is new
    assert find([new, old], "train-a") is new
    assert find([new, old], "train-a-1") is old
    assert find([live, new, old], "a") is live
    other = details("evaluate-a-1", JobStatus.PENDING, start=1)
    assert find([live, other], "evaluate-a") is other
    with pytest.raises(ClusterError, match="a means 2 jobs that go on: give the id of one, of evaluate-a-1, train-a-3"):
        find([live, other], "a")


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ClusterError, match=r"no job or run ffqh: did you mean ffhq\? --list shows"):
        find([details("train-ffhq-1")], "ffqh")
    with pytest.raises(ClusterError, match="no job or run x: --list shows"):
        find([], "x")


def test_drivers_that_connected_by_themselves_are_not_among_the_jobs() -> None:
    driver = JobDetails(type=JobType.DRIVER, job_id="01000000", status=JobStatus.RUNNING, entrypoint="python x.py")
    job = details("train-a-1")
    assert submitted([driver, job]) == [job]


def test_the_table_has_a_line_for_each() -> None:
    jobs = [
        details("train-a-1", JobStatus.FAILED, start=1000, end_time=1_075_000),
        details("raysubmit_1", JobStatus.RUNNING, start=2000),
    ]
    head, first, second = table(jobs, now=9500.0).splitlines()
    assert head.split() == ["id", "status", "run", "started", "duration"]
    assert first.split() == ["train-a-1", "FAILED", "a", *at(1000), "1m15s"]
    assert second.split() == ["raysubmit_1", "RUNNING", "-", *at(2000), "2h05m"]
    assert table([]).split() == head.split()


def at(seconds: int) -> list[str]:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)).split()
