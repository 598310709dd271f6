"""What MLflow says of a run, asked within seconds: for jobs.status."""

from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from pipeline.tracking.client import TrackingError, connect, explained, require_reachable, without_password

ANSWER_S = 5


@dataclass(frozen=True)
class TrackedRun:
    """A run as its tracking server knows it."""

    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    url: str
    """Its page, or for a database the command that shows it."""
    versions: list[str]
    """Registered versions that came from it, oldest first, such as `cips version 3 (champion)`."""


def look_up(uri: str, run_id: str) -> TrackedRun:
    """Asks the server or database once.

    Raises:
        TrackingError: nothing answers within a few seconds, or there is no such run.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///").split("?")[0]).exists():
        raise TrackingError(f"{uri} is not there: a database is seen only on the machine that it lies on")
    require_reachable(uri, ANSWER_S)
    client = connect(uri, request_timeout_s=ANSWER_S, retries=0)
    with explained(uri, f"looking for run {run_id}"):
        info = client.get_run(run_id).info
        versions = _versions(client, run_id)
    page = f"{uri.rstrip('/')}/#/experiments/{info.experiment_id}/runs/{run_id}"
    shown = page if uri.startswith("http") else f"mlflow ui --backend-store-uri {without_password(uri)} (run {run_id})"
    return TrackedRun(info.status, shown, versions)


def _versions(client: MlflowClient, run_id: str) -> list[str]:
    found = sorted(
        client.search_model_versions(f"run_id = '{run_id}'"), key=lambda version: (version.name, int(version.version))
    )
    aliases = {name: client.get_registered_model(name).aliases for name in {version.name for version in found}}
    shown = []
    for version in found:
        held = sorted(alias for alias, holder in aliases[version.name].items() if str(holder) == str(version.version))
        shown.append(f"{version.name} version {version.version}" + (f" ({', '.join(held)})" if held else ""))
    return shown
