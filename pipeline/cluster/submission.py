"""Jobs handed to a running cluster through Ray's Jobs API: submitted, listed, followed, stopped."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from pipeline.cluster.job_names import Name, next_name, running, submitted
from pipeline.cluster.packing import ROOT, excluded
from pipeline.cluster.session import ClusterError
from pipeline.training.observers import duration

CONNECT_S, ANSWER_S = 10.0, 60.0
STOP_S = 60.0
"""How long a job may take to end after it was asked to: Ray itself kills it after 3 seconds."""
INTERRUPTED, NOT_FOUND = 130, 127
# Where the store is goes along. Credentials do not: the cluster keeps a job's environment for all to read.
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


@dataclass(frozen=True)
class Request:
    """What is asked of a cluster."""

    name: Name
    arguments: tuple[str, ...]
    """Of the job's own command line."""
    environment: Mapping[str, str]
    """What the job gets beside the cluster's own environment."""

    @property
    def entrypoint(self) -> str:
        """The shell command; `python` is looked up where the cluster was started."""
        return command_line(self.name.job, self.arguments)


class Client(JobSubmissionClient):
    """Ray's client with clear errors and an end to its patience: a stalled tunnel would hold this process for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        try:
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **options)
        except OSError as cause:  # all errors of HTTP are
            raise ClusterError(f"{self.get_address()} does not answer: {_root(cause)}") from cause

    def _raise_error(self, answer: Any) -> NoReturn:
        said = f"{self.get_address()} answered with status code {answer.status_code}"
        raise ClusterError(f"{said}: {answer.text.strip()}")


def connect(address: str) -> Client:
    """A client of the cluster's Jobs API.

    Args:
        address: of the dashboard, http://HOST:8265.

    Raises:
        ClusterError: it is no such address, nothing answers there, or the token is missing or wrong.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise ClusterError(f"--address {address}: expected the cluster's dashboard, http://HOST:8265")
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)  # Ray would go there and not to the address that it is given
    try:
        client = Client(address)
    except AuthenticationError as cause:
        raise ClusterError(_about_tokens(address, cause)) from cause
    except (OSError, RuntimeError, ValueError, KeyError) as cause:  # the last two: what answers is no dashboard
        raise ClusterError(
            f"no Ray dashboard answers at {address}: {_root(cause)}\nThe address is that of the cluster's head, "
            "http://HOST:8265; for a cluster on AWS, `ray dashboard ray_cluster.yaml` makes a tunnel to it"
        ) from cause
    if theirs := different_version(client):
        print(
            f"warning: the cluster at {address} runs Ray {theirs} and this machine {ray.__version__}: the job was "
            f"written for {ray.__version__}. Install the same on both: pip install 'ray[default,train,tune]=="
            f"{ray.__version__}'",
            file=sys.stderr,
            flush=True,
        )
    return client


def different_version(client: Client) -> str | None:
    """The cluster's version of Ray where its first two numbers are not those of this machine's."""
    theirs: str | None = client._server_ray_version  # the client has asked for it when it was made
    return theirs if theirs and theirs.split(".")[:2] != ray.__version__.split(".")[:2] else None


def _root(error: BaseException) -> BaseException:
    """What an error began with: `Connection refused`, not the four libraries that it passed through."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _about_tokens(address: str, cause: AuthenticationError) -> str:
    how = "RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN, or in ~/.ray/auth_token"
    if cause.message.startswith("Authentication failed"):
        return f"the cluster at {address} has another token than this shell: expected {how}"
    return f"the cluster at {address} wants a token and this shell has none: set {how}"


def nodes(address: str) -> list[str]:
    """The IP addresses of the cluster's live nodes."""
    try:
        found = list_nodes(address=address, filters=[("state", "=", "ALIVE")], raise_on_missing_output=False)
    except (RayStateApiException, OSError) as cause:
        raise ClusterError(f"the cluster at {address} does not tell its nodes: {cause}") from cause
    return [node.node_ip for node in found]


def chosen_environment(pass_env: Sequence[str]) -> dict[str, str]:
    """Variables of this shell that the job gets. Raises ClusterError for one that was named and is not set."""
    missing = [name for name in pass_env if name not in os.environ]
    if missing:
        raise ClusterError(f"--pass-env {missing[0]}: this shell has no such variable; set it, or leave it out")
    return {name: os.environ[name] for name in dict.fromkeys((*PASSED_ON, *pass_env)) if name in os.environ}


def command_line(job: str, arguments: Sequence[str]) -> str:
    """What the cluster's shell is given."""
    return shlex.join(["python", "-m", f"jobs.{job}", *arguments])


def free_name(client: Client, job: str, run: str, arguments: Sequence[str], address: str) -> Name:
    """The name of the run's next attempt.

    Raises:
        ClusterError: the same job goes on; names it and where to look.
    """
    known = client.list_jobs()
    other = running(known, job, run, command_line(job, arguments))
    if other is not None:
        raise ClusterError(
            f"{other.submission_id} is {other.status} at {address}, the same job: follow it with --logs "
            f"{other.submission_id}, end it with --stop {other.submission_id}, or give another run.name"
        )
    return next_name(job, run, (one.submission_id for one in submitted(known)))


def submit(client: Client, request: Request) -> str:
    """Packs the project's folder, hands the job in and returns its id.

    Raises:
        ClusterError: Ray refuses it, or somebody else was faster.
    """
    name = request.name
    logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)  # names every .gitignore, and .git, each time
    try:
        submission: str = client.submit_job(
            entrypoint=request.entrypoint,
            submission_id=name.id,
            runtime_env={
                "working_dir": str(ROOT),
                "excludes": excluded(ROOT),
                "env_vars": dict(request.environment),
            },
            metadata={"job": name.job, "run": name.run, "attempt": str(name.attempt)},
        )
    except RuntimeError as cause:
        if "already exists" in str(cause):
            raise ClusterError(f"{name.id} was submitted a moment ago by somebody else; --list shows it") from cause
        raise ClusterError(f"the cluster did not take {name.id}: {cause}") from cause
    return submission


def stop(client: Client, job: JobDetails) -> JobDetails:
    """Ends a job and waits until it has; one that has ended stays as it is.

    Raises:
        ClusterError: it goes on for more than `STOP_S`.
    """
    client.stop_job(job.submission_id)
    deadline = time.monotonic() + STOP_S
    while not (details := client.get_job_info(job.submission_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{job.submission_id} is still {details.status} {STOP_S:g} s after it was asked to stop; ask again "
                f"with --stop, or see what it does with --logs {job.submission_id}"
            )
        time.sleep(0.5)
    return details


def exit_code(job: JobDetails) -> int:
    """What an ended job's process ended with: 128 and the signal for a signal, 130 for a job that was stopped."""
    if job.status == JobStatus.STOPPED:
        return INTERRUPTED
    code: int | None = job.driver_exit_code
    if code is None:
        return 0 if job.status == JobStatus.SUCCEEDED else 1
    return code if code >= 0 else 128 - code


def outcome(job: JobDetails) -> str:
    """One line on how a job ended; more where its log cannot hold the cause."""
    lasted = f" after {duration((job.end_time - job.start_time) / 1000)}" if job.end_time and job.start_time else ""
    text = f"{job.submission_id} {job.status}{lasted}"
    if job.status != JobStatus.FAILED:
        return text
    if job.driver_exit_code is None:
        return f"{text}: {job.message}"  # it has not come so far as to have a log
    if job.driver_exit_code == NOT_FOUND:
        return (
            f"{text} with code {NOT_FOUND}: the cluster's shell found no `python`. Jobs take it from the PATH that the "
            "head was started with: start it in the environment of this package (source .../bin/activate; ray start)"
        )
    return f"{text} with code {job.driver_exit_code}"


def described(job: JobDetails, address: str) -> str:
    """What is known of a job, a line each."""
    variables = sorted((job.runtime_env or {}).get("env_vars") or {})
    lines = {
        "command": job.entrypoint,
        "environment": ", ".join(variables) or "nothing passed on",
        "node": job.driver_node_id or "none yet",
        "message": job.message or "-",
        "dashboard": f"{address.rstrip('/')}/#/jobs/{job.submission_id}",
    }
    return "\n".join(f"{name + ':':<13}{text}" for name, text in lines.items())
