"""Rank 0's voice: nothing it says waits for the tracking server, and no failure of it reaches training.

Scalars and files travel in lanes of their own: a broken artifact store does not hold up the curves.
"""

import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from pipeline.pictures import encode_png
from pipeline.tracking.client import connect, without_password
from pipeline.training.delivery import Entry, Lane, RefusedError, say

# Error codes of answers that would be the same at the next try.
REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")


class Point(NamedTuple):
    """Scalars of an earlier moment."""

    step: int
    """Images seen."""
    time: float
    """Unix time in seconds; 0 where it is not known."""
    values: Mapping[str, float]


class RunLogger:
    """Logs to one run from one process: every call returns at once and none raises.

    While the server is down entries wait; when it is back all are sent, in the order of the calls and with
    their times.
    Logging a step again, as a restarted run does, adds the same point again.

    Args:
        uri: tracking server or database.
        run_id: from `open_run`.
        environment: variables for the artifact store (`storage.mlflow_environment`).
        request_timeout_s: longest silence of the server within one request.
        memory_mb: waiting pictures and texts hold at most this; the oldest are left out. Scalars always stay.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        *,
        environment: Mapping[str, str] | None = None,
        request_timeout_s: int = 10,
        memory_mb: float = 256,
    ) -> None:
        self.uri, self.run_id = uri, run_id
        self._environment, self._request_timeout_s = environment, request_timeout_s
        self._client: MlflowClient | None = None
        self._connecting = threading.Lock()
        self._closed = False
        receiver = f"the tracking server {without_password(uri)}"
        self._scalars = Lane("scalars", receiver, self._send_scalars, most_together=MAX_METRICS_PER_BATCH)
        self._files = Lane("pictures", receiver, self._send_file, most_bytes=int(memory_mb * 1e6))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Scalars at a step (images seen)."""
        numbers = []
        for name, value in values.items():
            try:
                numbers.append((name, float(value)))
            except (TypeError, ValueError) as cause:
                self._scalars.leave_out(name, cause)
        for start in range(0, len(numbers), MAX_METRICS_PER_BATCH):
            part = numbers[start : start + MAX_METRICS_PER_BATCH]
            names = ", ".join(name for name, _ in part)
            self._put(self._scalars, "metrics", names, part, step, weight=len(part))

    def catch_up(self, points: Sequence[Point], clock: str) -> None:
        """Sends those of earlier points that the run lacks: at whose step it does not know the metric `clock`.

        What waited in the memory of a process that died is made good this way, from the log that it kept.
        """
        if points:
            self._put(self._scalars, "catch up", "earlier scalars", (list(points), clock))

    def image(self, name: str, image_HWC: np.ndarray, step: int = 0) -> None:
        """A uint8 picture (H, W, 3), kept as the artifact `name`, such as samples/0000012800.png."""
        copy = np.array(image_HWC, copy=True)
        self._put(self._files, "image", name, copy, step, size=copy.nbytes)

    def text(self, name: str, text: str) -> None:
        """A text, kept as the artifact `name`, a path such as notes/summary.md."""
        self._put(self._files, "text", name, text, size=len(text))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A local file, kept in `folder`. It is read when it is sent: leave it where it is."""
        self._put(self._files, "file", str(path), folder)

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything is delivered, at most so long; whether nothing waits any more."""
        deadline = time.monotonic() + timeout_s
        lanes = (self._files, self._scalars)
        return all([lane.wait_until_empty(max(0.0, deadline - time.monotonic())) for lane in lanes])

    def close(self, timeout_s: float, status: str | None = "FINISHED") -> int:
        """Ends the run with a status (None leaves it running), waits at most `timeout_s` for everything.

        Returns how many entries were not delivered, and prints so if there are any. Later calls do nothing.
        """
        if not self._closed:
            if status is not None:
                self._put(self._scalars, "status", f"status {status}", status)
            self._closed = True
            self.flush(timeout_s)
            self._scalars.stop()
            self._files.stop()
            if self.undelivered:
                say(
                    f"{self.undelivered} log entries of run {self.run_id} were not delivered to "
                    f"{without_password(self.uri)}; log.jsonl and the pictures in the run's folder have them"
                )
        return self.undelivered

    @property
    def undelivered(self) -> int:
        """Entries that wait, are being sent, or had to be left out."""
        return self._scalars.undelivered + self._files.undelivered

    def _put(
        self, lane: Lane, kind: str, name: str, content: Any, step: int = 0, *, size: int = 0, weight: int = 0
    ) -> None:
        if not self._closed:
            lane.put(Entry(kind, name, content, step, time.time_ns() // 1_000_000, size, weight))

    # ---- in the lanes' threads -----------------------------------------------------------------------------

    def _connected(self) -> MlflowClient:
        with self._connecting:
            if self._client is None:
                seconds = self._request_timeout_s
                self._client = connect(self.uri, self._environment, request_timeout_s=seconds, retries=0)
            return self._client

    def _send_scalars(self, entries: Sequence[Entry]) -> None:
        client = self._connected()
        try:
            if entries[0].kind == "status":
                client.set_terminated(self.run_id, entries[0].content)
            elif entries[0].kind == "catch up":
                self._send_missing(client, *entries[0].content)
            else:
                points = [
                    Metric(name, value, entry.time_ms, entry.step) for entry in entries for name, value in entry.content
                ]
                client.log_batch(self.run_id, metrics=points, synchronous=True)
        except MlflowException as cause:
            raise _sorted_out(cause) from cause

    def _send_missing(self, client: MlflowClient, points: Sequence[Point], clock: str) -> None:
        known = {metric.step for metric in client.get_metric_history(self.run_id, clock)}
        missing = [point for point in points if point.step not in known]
        request: list[Metric] = []
        for number, point in enumerate(missing, 1):
            time_ms = round((point.time or time.time()) * 1000)
            request += [Metric(name, value, time_ms, point.step) for name, value in point.values.items()]
            # Points are never cut apart: the next try, if there is one, sees by the clock what still lacks.
            if number == len(missing) or len(request) + len(missing[number].values) > MAX_METRICS_PER_BATCH:
                client.log_batch(self.run_id, metrics=request, synchronous=True)
                request = []
        if missing:
            say(f"{len(missing)} ticks that run {self.run_id} lacked were sent to it from the run's log")

    def _send_file(self, entries: Sequence[Entry]) -> None:
        (entry,) = entries
        client = self._connected()
        try:
            if entry.kind == "text":
                client.log_text(self.run_id, entry.content, entry.name)
            elif entry.kind == "file":
                if not Path(entry.name).exists():
                    raise RefusedError("there is no such file any more")
                client.log_artifact(self.run_id, entry.name, entry.content)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, Path(entry.name).name)
                    path.write_bytes(_png(entry.content))
                    parent = Path(entry.name).parent.as_posix()
                    client.log_artifact(self.run_id, str(path), None if parent == "." else parent)
        except MlflowException as cause:
            raise _sorted_out(cause) from cause


def _png(image_HWC: np.ndarray) -> bytes:
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3:
        raise RefusedError(f"a uint8 picture (H, W, 3) expected, got {image_HWC.dtype} {image_HWC.shape}")
    return encode_png(image_HWC)


def _sorted_out(cause: MlflowException) -> Exception:
    """The error as the lane understands it: to be tried again, or not."""
    return RefusedError(str(cause)) if cause.error_code in REFUSALS else cause
