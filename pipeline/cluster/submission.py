"""Jobs handed to a running cluster through Ray's Jobs API, and their logs followed."""

import asyncio
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.cluster.session import ClusterError

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
# Passed on by name where this shell has them; a cluster with an instance role needs none.
PASSED_ON = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)


def submit(job: str, arguments: Sequence[str], address: str) -> int:
    """Runs `python -m jobs.JOB ARGUMENTS` on the cluster, prints its log as it grows, and returns its exit code.

    Args:
        address: of the cluster's dashboard, such as http://HOST:8265.

    Raises:
        ClusterError: nothing answers there, or the token is missing or wrong.
    """
    client = connect(address)
    entrypoint = shlex.join(["python", "-m", f"jobs.{job}", *arguments])
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    submission = client.submit_job(
        entrypoint=entrypoint,
        runtime_env={"working_dir": str(ROOT), "excludes": EXCLUDED, "env_vars": environment},
        metadata={"job": job},
    )
    print(f"submitted {submission} to {address}: {entrypoint}", flush=True)
    asyncio.run(_follow(client, submission))
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
    async for lines in client.tail_job_logs(submission):
        print(lines, end="", flush=True)
