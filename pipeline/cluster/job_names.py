"""What jobs on a cluster are called, and which of them a name means.

A job's id is `<job>-<run.name>-<attempt>`. Ray takes no id twice, not even of a job that has ended, so each time that
a run goes on is an attempt of its own; the run and its folder stay the same.
"""

import difflib
import re
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ray.job_submission import JobDetails, JobType

from pipeline.cluster.session import ClusterError
from pipeline.training.observers import duration


class Name(NamedTuple):
    """What an id says."""

    job: str
    run: str
    attempt: int
    """From 1."""

    @property
    def id(self) -> str:
        """The submission id."""
        return f"{self.job}-{self.run}-{self.attempt}"


def fit(text: str) -> str:
    """The text with what a URL or a file's name would not take replaced; 128 characters at most, never empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:128] or "unnamed"


def parse_id(submission: str) -> Name | None:
    """What an id says; None for ids of others."""
    found = re.fullmatch(r"([A-Za-z0-9_]+)-(.+)-([1-9][0-9]*)", submission)
    return Name(found[1], found[2], int(found[3])) if found else None


def next_name(job: str, run: str, taken: Iterable[str]) -> Name:
    """The name of the next attempt, given the ids that the cluster has seen."""
    names = [name for name in map(parse_id, taken) if name is not None and (name.job, name.run) == (job, run)]
    return Name(job, run, 1 + max((name.attempt for name in names), default=0))


def submitted(jobs: Iterable[JobDetails]) -> list[JobDetails]:
    """Those handed in through the Jobs API, oldest first; drivers that connected by themselves have no id to use."""
    found = [job for job in jobs if job.type == JobType.SUBMISSION and job.submission_id]
    return sorted(found, key=lambda job: (job.start_time or 0, job.submission_id))


def running(jobs: Iterable[JobDetails], job: str, run: str, entrypoint: str) -> JobDetails | None:
    """The job that goes on under the same name, or was handed in by other means with the same command line."""
    for other in submitted(jobs):
        name = parse_id(other.submission_id)
        same = name is not None and (name.job, name.run) == (job, run)
        if not other.status.is_terminal() and (same or other.entrypoint == entrypoint):
            return other
    return None


def find(jobs: Iterable[JobDetails], asked: str) -> JobDetails:
    """The job that an id or a run's name means: of several with one run the one that goes on, else the newest.

    Raises:
        ClusterError: there is none, or several of the run go on at once.
    """
    known = submitted(jobs)
    for job in known:
        if job.submission_id == asked:
            return job
    named = [job for job in known if asked in _names(job)]
    live = [job for job in named if not job.status.is_terminal()]
    if len(live) > 1:
        ids = ", ".join(job.submission_id for job in live)
        raise ClusterError(f"{asked} means {len(live)} jobs that go on: give the id of one, of {ids}")
    if named:
        return (live or named)[-1]
    names = sorted({name for job in known for name in (job.submission_id, *_names(job))})
    near = difflib.get_close_matches(asked, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ClusterError(f"the cluster knows no job or run {asked}: {hint}--list shows those it has seen since its start")


def _names(job: JobDetails) -> set[str]:
    """What a job may be called beside its id: `ffhq256`, `train-ffhq256`."""
    name = parse_id(job.submission_id)
    return {name.run, f"{name.job}-{name.run}"} if name is not None else set()


def table(jobs: Sequence[JobDetails], now: float | None = None) -> str:
    """A line per job, oldest first: id, status, run, start in local time, duration.

    now: seconds since 1970; None is this moment.
    """
    now = time.time() if now is None else now
    rows = [("id", "status", "run", "started", "duration")]
    for job in jobs:
        name = parse_id(job.submission_id)
        start, end = (job.start_time or 0) / 1000, (job.end_time or 0) / 1000 or now
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start)) if start else "-"
        lasted = duration(max(0.0, end - start)) if start else "-"
        rows.append((job.submission_id, str(job.status), name.run if name else "-", began, lasted))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in padded)
