"""Jobs handed to a running cluster through Ray's Jobs API, and their logs followed."""

import asyncio
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.cluster.session import ClusterError

RECONNECT_S = 2.0
ROOT = Path(__file__).parents[2]
# Data, environments and history stay here: the upload is limited to 100 MB and goes to every node.
EXCLUDED = [
    ".git",
    ".venv",
    "runs",
    "mlruns",
    "build",
    "dist",
    "**/__pycache__",
    ".pytest_cache",
    ".hypothesis",
    ".mypy_cache",
]
# Where the store is goes along. Credentials do not: the cluster keeps a job's environment for all to read.
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


def submit(job: str, arguments: Sequence[str], address: str, pass_env: Sequence[str] = ()) -> int:
    """Runs `python -m jobs.JOB ARGUMENTS` on the cluster, prints its log as it grows, and returns its exit code.

    Args:
        address: of the cluster's dashboard, such as http://HOST:8265.
        pass_env: names of further variables of this shell that the job gets.

    Raises:
        ClusterError: nothing answers there, the token is missing or wrong, or the same job is running already.
    """
    client = connect(address)
    entrypoint = shlex.join(["python", "-m", f"jobs.{job}", *arguments])
    for other in client.list_jobs():
        if other.entrypoint == entrypoint and not other.status.is_terminal():
            raise ClusterError(f"the same job is {other.status} as {other.submission_id}; see `ray job logs`")
    missing = [name for name in pass_env if name not in os.environ]
    if missing:
        raise ClusterError(f"--pass-env {missing[0]}: this shell has no such variable")
    environment = {name: os.environ[name] for name in (*PASSED_ON, *pass_env) if name in os.environ}
    submission = client.submit_job(
        entrypoint=entrypoint,
        runtime_env={"working_dir": str(ROOT), "excludes": EXCLUDED, "env_vars": environment},
        metadata={"job": job},
    )
    print(f"submitted {submission} to {address}: {entrypoint}", flush=True)
    try:
        asyncio.run(_follow(client, submission))
    except KeyboardInterrupt:
        print(f"\nleft the log; the job goes on. Stop it: ray job stop {submission} --address {address}", flush=True)
        return 130
    details = client.get_job_info(submission)
    print(f"{submission} {details.status}: {details.message}", flush=True)
    if details.driver_exit_code is not None:
        return details.driver_exit_code
    return 0 if details.status == JobStatus.SUCCEEDED else 1


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's Jobs API."""
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as cause:
        raise ClusterError(
            f"no Ray dashboard answers at {address}: {cause}\nThe address is the head's http://HOST:8265; a cluster "
            "with token authentication needs RAY_AUTH_TOKEN or ~/.ray/auth_token here as well"
        ) from cause


async def _follow(client: JobSubmissionClient, submission: str) -> None:
    """Prints the log until the job has ended; a connection that breaks is made anew, what was shown is skipped."""
    shown = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(submission):
                print(text[max(0, shown - seen) :], end="", flush=True)
                seen += len(text)
                shown = max(shown, seen)
        except (ConnectionError, OSError, RuntimeError):
            pass
        if client.get_job_status(submission).is_terminal():
            return
        await asyncio.sleep(RECONNECT_S)
