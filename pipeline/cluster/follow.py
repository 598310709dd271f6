"""What the driver shows of a training on a cluster: its folder's log as it grows, and why workers were restarted."""

import json
import threading
from types import TracebackType
from typing import Any

from ray.train.v2.api.callback import UserCallback

from pipeline.storage import MissingError, StorageConfig, StorageError, is_remote, join, read_bytes, write_bytes
from pipeline.training.observers import Tick, read_log

POLL_S, POLL_REMOTE_S = 1.0, 5.0


class Follower:
    """Prints each new status line and restart of a run while it is entered.

    It reads the run's folder, so it works from any machine that reaches it, and a run goes on unseen as well.
    """

    def __init__(self, folder: str, storage: StorageConfig) -> None:
        self.folder, self.storage = folder, storage
        self.shown = read_log(folder, storage)
        self.shown_restarts = len(read_restarts(folder, storage))
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> "Follower":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done.set()
        self.thread.join()
        self._show()

    def _follow(self) -> None:
        while not self.done.wait(POLL_REMOTE_S if is_remote(self.folder) else POLL_S):
            self._show()

    def _show(self) -> None:
        try:
            restarts, log = read_restarts(self.folder, self.storage), read_log(self.folder, self.storage)
        except (OSError, StorageError, ValueError):
            return  # the store hiccups; the next look shows what this one missed
        for restart in restarts[self.shown_restarts :]:
            print(f"workers failed: {restart['cause']}", flush=True)
        self.shown_restarts = len(restarts)
        same = 0  # a restart goes back and writes the end of the log anew
        while same < min(len(log), len(self.shown)) and log[same] == self.shown[same]:
            same += 1
        for line in log[same:]:
            print(Tick(**line).line(), flush=True)
        self.shown = log


class RestartNotes(UserCallback):
    """Writes down why workers failed, beside the log; runs in Ray Train's controller."""

    def __init__(self, folder: str, storage: StorageConfig) -> None:
        self.folder, self.storage = folder, storage

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        cause = "; ".join(f"worker {rank}: {one_line(error)}" for rank, error in sorted(worker_exceptions.items()))
        try:  # an error that left this method would end the run, which is to be saved
            notes = [*read_restarts(self.folder, self.storage), {"cause": cause}]
            write_bytes(join(self.folder, "restarts.json"), json.dumps(notes, indent=1).encode(), self.storage)
        except (OSError, ValueError, StorageError) as error:
            print(f"could not note a failure: {error}", flush=True)


def read_restarts(folder: str, storage: StorageConfig) -> list[dict[str, Any]]:
    """The restarts of a run, oldest first."""
    try:
        return list(json.loads(read_bytes(join(folder, "restarts.json"), storage)))
    except MissingError:
        return []


def one_line(error: Exception) -> str:
    """The last line of an error, which in Ray's is the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
