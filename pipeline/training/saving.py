"""When checkpoints are begun, told of and tried again: the loop's side of `CheckpointWriter` (promise 8)."""

import time
from collections.abc import Sequence
from typing import Any

from pipeline.storage import RETRY_S, StorageError
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.observers import Observer
from pipeline.training.state import TrainState
from pipeline.training.world import World

LONGEST_WAIT_S = 60.0
"""Training waits at most so long for a checkpoint that is being written when the next one is due."""


class Saving:
    """Keeps a run's checkpoints coming, whatever the store does; on workers other than rank 0 it never begins one.

    Args:
        observers: told of each checkpoint that stands.
        patience_s: how long the last checkpoint is tried again.
    """

    def __init__(self, writer: CheckpointWriter, observers: Sequence[Observer], patience_s: float) -> None:
        self.writer, self.observers, self.patience_s = writer, observers, patience_s
        self.unsaved = False
        """A checkpoint that was due does not stand and is not being written: the next tick begins one."""

    def begin(self, state: TrainState, results: list[dict[str, Any]]) -> float:
        """Has a copy of the state written; returns the seconds that training stood still.

        Training goes on as soon as the copy is made. A checkpoint before that is still not through after
        LONGEST_WAIT_S leaves this one to the next tick.
        """
        began = time.perf_counter()
        self.look(wait_s=LONGEST_WAIT_S)
        self.unsaved = self.writer.busy
        if self.unsaved:
            print(f"no checkpoint at {state.images_seen} images yet: the one before is still being written", flush=True)
        else:
            self.writer.begin(state, results)
        return time.perf_counter() - began

    def look(self, *, wait_s: float | None = 0.0) -> None:
        """Tells of a checkpoint that stands by now. One that failed is tried again at the next tick.

        Args:
            wait_s: how long to wait for one that is being written; None: to its end.
        """
        cause = self._take_back(wait_s)
        if cause is not None:
            if not isinstance(cause, StorageError):
                raise cause
            self.unsaved = True

    def wait(self) -> bool:
        """Waits until nothing is being written; whether the checkpoint that was begun last stands."""
        self.look(wait_s=None)
        return not self.unsaved

    def finish(self, state: TrainState, results: list[dict[str, Any]], world: World) -> None:
        """Returns when the last checkpoint stands. Where it cannot be written the run fails, on every worker."""
        cause = self._write_last(state, results)
        stands = world.agree(int(cause is None))
        if cause is not None:
            raise cause
        if not stands:
            raise StorageError("rank 0 could not write the last checkpoint; its own error says why")

    def leave(self) -> None:
        """However training ended: what is being written is written, and told if it stands."""
        self._take_back(None)

    def _write_last(self, state: TrainState, results: list[dict[str, Any]]) -> BaseException | None:
        """Tries until the last checkpoint stands or `patience_s` is over: the whole training hangs on it."""
        deadline = time.monotonic() + self.patience_s
        while True:
            cause = self._take_back(None)
            if cause is None and not self.unsaved:
                return None
            if cause is not None:
                left = deadline - time.monotonic()
                if left <= 0 or not isinstance(cause, StorageError):
                    return cause
                print(f"the last checkpoint is tried again, for {left:.0f} s at most", flush=True)
                time.sleep(min(RETRY_S, left))
            self.unsaved = False
            self.writer.begin(state, results)

    def _take_back(self, wait_s: float | None) -> BaseException | None:
        """Takes back the checkpoint that was being written and tells of it if it stands; returns what failed."""
        attempt = self.writer.take_back(wait=True, timeout_s=wait_s)
        if attempt is None:
            return None
        if attempt.error is not None:
            print(f"no checkpoint at {attempt.images_seen} images: {attempt.error}", flush=True)
            return attempt.error
        for observer in self.observers:
            observer.checkpoint(attempt.folder, attempt.images_seen, attempt.results)
        return None
