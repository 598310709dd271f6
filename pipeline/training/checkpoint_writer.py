"""Checkpoints that do not stop training: copied by its thread, then hashed and written by another, one at a time."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.storage import StorageConfig, StorageError
from pipeline.training.checkpoint import (
    checkpoint_folder,
    delete_unfinished,
    files_of,
    find_best,
    prune_checkpoints,
    write_checkpoint,
)
from pipeline.training.snapshot import Snapshot
from pipeline.training.state import TrainState


@dataclass
class Attempt:
    """A checkpoint that was handed over to be written, and what became of it."""

    folder: str
    images_seen: int
    results: list[dict[str, Any]]
    """Distances measured there, each with its protocol."""
    error: BaseException | None = None
    """What kept it from standing; None, once it was taken back from the writer: it stands."""


class CheckpointWriter:
    """Writes a run's checkpoints in the background and deletes old ones; its methods are for one thread.

    The memory is that of one checkpoint, so the next one begins when the last was taken back. The thread ends with
    each checkpoint, and does not keep a process alive that ends: what is not committed by then does not exist.

    Args:
        config: the whole resolved configuration, nested.
        keep: so many checkpoints stay, and the best one.
        before: called in the other thread before each checkpoint; a StorageError of it is left to whoever gave it.
    """

    def __init__(
        self,
        run_folder: str,
        config: dict[str, Any],
        dataset_digest: str,
        keep: int,
        storage: StorageConfig,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.run_folder, self.config, self.dataset_digest = run_folder, config, dataset_digest
        self.keep, self.storage, self.before = keep, storage, before
        self.snapshot = Snapshot()
        self._attempt: Attempt | None = None
        self._thread = threading.Thread()
        self._failed = False

    @property
    def writing(self) -> bool:
        """Whether the other thread is at work."""
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was begun and not taken back yet."""
        return self._attempt is not None

    def begin(self, state: TrainState, results: list[dict[str, Any]]) -> None:
        """Copies the state and has the copy written; the state may change as soon as this returns.

        Raises:
            RuntimeError: the last checkpoint was not taken back yet.
        """
        if self._attempt is not None:
            raise RuntimeError(f"{self._attempt.folder} is being written; take it back before the next one begins")
        contents = self.snapshot.take(files_of(state))
        attempt = Attempt(checkpoint_folder(self.run_folder, state.images_seen), state.images_seen, results)
        self._thread = threading.Thread(
            target=self._write, args=(attempt, contents), name=f"checkpoint-{state.images_seen}", daemon=True
        )
        self._thread.start()
        self._attempt = attempt

    def take_back(self, *, wait: bool, timeout_s: float | None = None) -> Attempt | None:
        """The checkpoint that was begun last, once its writing has ended; None where none was, or it goes on.

        Args:
            wait: until it has ended, or until `timeout_s` is over; the store's own limits of time bound it anyhow.
        """
        if self._attempt is None:
            return None
        if wait:
            self._thread.join(timeout_s)
        if self.writing:
            return None
        attempt, self._attempt = self._attempt, None
        return attempt

    # ---- in the other thread -------------------------------------------------------------------------------

    def _write(self, attempt: Attempt, contents: Mapping[str, memoryview]) -> None:
        try:
            if self.before is not None:
                with contextlib.suppress(StorageError):
                    self.before()
            if self._failed:  # what the last one left takes room that this one may need
                delete_unfinished(self.run_folder, attempt.images_seen, self.storage)
            write_checkpoint(
                self.run_folder,
                attempt.images_seen,
                contents,
                config=self.config,
                dataset_digest=self.dataset_digest,
                results=attempt.results,
                storage=self.storage,
            )
        except BaseException as error:  # raised or told where it is taken back
            attempt.error, self._failed = error, True
        else:
            self._failed = False
            self._tidy(attempt.images_seen)

    def _tidy(self, images_seen: int) -> None:
        """Deletes old checkpoints, and what failed before this one; a failure only leaves more of them."""
        try:
            best = find_best(self.run_folder, self.storage)
        except StorageError as cause:
            print(f"could not look for old checkpoints: {cause}", flush=True)
        else:
            prune_checkpoints(self.run_folder, self.keep, best, self.storage)
            delete_unfinished(self.run_folder, images_seen, self.storage)
