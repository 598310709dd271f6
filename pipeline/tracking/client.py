"""One way to reach MLflow: quiet, with bounded calls, and with errors that say what to do."""

import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

REACH_TIMEOUT_S = 5.0
DEFAULT_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


class TrackingError(RuntimeError):
    """The tracking server or database cannot be used; the message names it, the cause and the fix."""


def connect(
    uri: str,
    environment: Mapping[str, str] | None = None,
    *,
    request_timeout_s: int = 30,
    retries: int = 2,
) -> MlflowClient:
    """A client of a server (http://HOST:PORT) or of a database (sqlite:///PATH, postgresql://...).

    MLflow takes the limits of a call from the process's environment, so the latest caller's limits hold for
    all clients of a process. Nothing is contacted for a server; `require_reachable` does that.

    Args:
        environment: variables for the artifact store, as `storage.mlflow_environment` gives them.
        request_timeout_s: longest silence of the server within one request.
        retries: of a request that failed or was answered with a server's error.
    """
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(request_timeout_s)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(retries)
    os.environ.update(environment or {})
    if uri.startswith("sqlite:///"):
        database_folder(uri).mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def database_folder(uri: str) -> Path:
    """The folder that a SQLite database lies in."""
    return Path(uri.removeprefix("sqlite:///").split("?")[0]).absolute().parent


def require_reachable(uri: str, timeout_s: float = REACH_TIMEOUT_S) -> None:
    """Raises TrackingError within a few seconds where no MLflow server, or no database, answers."""
    parts = urlsplit(uri)
    scheme = parts.scheme.split("+")[0]
    if scheme == "sqlite":
        return
    if scheme not in DEFAULT_PORTS:
        raise TrackingError(
            f"tracking.uri is {uri!r}: expected a server (http://HOST:5000) or a database "
            "(sqlite:///PATH/mlflow.db, postgresql://USER@HOST/NAME)"
        )
    try:
        if scheme in ("http", "https"):
            _require_health(uri, timeout_s)
        else:
            address = (parts.hostname or "localhost", parts.port or DEFAULT_PORTS[scheme])
            socket.create_connection(address, timeout=timeout_s).close()
    except (OSError, ValueError) as cause:
        raise TrackingError(_unreachable(uri, cause)) from cause


def wait_until_reachable(uri: str, patience_s: float) -> None:
    """`require_reachable` for the end of a run: a server that is away is waited for, and that is said."""
    deadline = time.monotonic() + patience_s
    told = False
    while True:
        try:
            return require_reachable(uri)
        except TrackingError as cause:
            if time.monotonic() >= deadline:
                raise
            if not told:
                print(f"waiting for the tracking server, {patience_s:g} s at most: {cause}", flush=True)
            told = True
            time.sleep(1)


@contextmanager
def explained(uri: str, doing: str) -> Iterator[None]:
    """Turns MLflow's and the database's errors inside the block into TrackingErrors."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as cause:
        text = " ".join(str(cause).split())
        raise TrackingError(f"{doing} at {without_password(uri)} failed: {text[:500]}{_advice(text)}") from cause


def without_password(uri: str) -> str:
    """The URI as it may be printed."""
    parts = urlsplit(uri)
    if not parts.password:
        return uri
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")).geturl()


def _require_health(uri: str, timeout_s: float) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s) as response:
            text = response.read(64)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # something guards the server; the first real call will say more
            return
        raise
    if text.strip() != b"OK":
        raise ValueError(f"the answer to /health is {text[:40]!r}, which is not MLflow's")


def _unreachable(uri: str, cause: Exception) -> str:
    return (
        f"no tracking server answers at {without_password(uri)} ({cause}); start it (mlflow server "
        "--host 0.0.0.0 --port 5000), correct tracking.uri, or train without it: tracking.enabled=false"
    )


def _advice(text: str) -> str:
    if re.search(r"error code 40[13]\b|UNAUTHENTICATED|PERMISSION_DENIED", text):
        return (
            "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), or "
            "start the server with --allowed-hosts if it refuses this host name"
        )
    return ""
