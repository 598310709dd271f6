"""What the driver shows of a training on a cluster, from the run's folder: ticks, restarts, what workers say."""

import threading
from types import TracebackType
from typing import Any

from pipeline.storage import StorageConfig, StorageError, is_remote, patiently
from pipeline.training.live import Display, last_measured
from pipeline.training.notes import Word, read_restarts, read_words
from pipeline.training.observers import Tick, read_log

POLL_S, POLL_REMOTE_S = 1.0, 5.0
FIRST_TICK = "the first tick: reading the data, the first batches"


class Follower:
    """Shows the ticks, the restarts and the workers' words of a run while it is entered.

    It reads the run's folder, so it works from any machine that reaches it, and a run goes on unseen as well.
    """

    def __init__(self, folder: str, storage: StorageConfig, start_timeout_s: float) -> None:
        self.folder, self.storage = folder, storage
        self.start = f"the workers to start (cluster.worker_start_timeout_s={start_timeout_s:g})"
        self.shown, restarts, words = patiently(self._look, "reading the run's folder", storage)
        self.shown_restarts, self.heard = len(restarts), _latest(words)
        last = Tick(**self.shown[-1]) if self.shown else None
        self.display = Display(self.start, last, last_measured(self.shown), self.shown_restarts)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> "Follower":
        self.display.__enter__()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done.set()
        self.thread.join()
        self._show()
        self.display.__exit__(kind, error, trace)

    def _follow(self) -> None:
        while not self.done.wait(POLL_REMOTE_S if is_remote(self.folder) else POLL_S):
            self._show()

    def _look(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Word]]:
        """Log, restarts and words."""
        # In this order, so that what is shown last happened last, at most a moment later.
        restarts, words = read_restarts(self.folder, self.storage), read_words(self.folder, self.storage)
        return read_log(self.folder, self.storage), restarts, words

    def _show(self) -> None:
        try:
            log, restarts, words = self._look()
        except (OSError, StorageError, ValueError):
            return  # the store hiccups; the next look shows what this one missed
        for restart in restarts[self.shown_restarts :]:
            self.display.restarted(restart["cause"], self.start)
        self.shown_restarts = len(restarts)
        for word in words:
            if word.number > self.heard.get(word.rank, 0):
                self._say(word)
        self.heard |= _latest(words)
        same = 0  # a restart goes back and writes the end of the log anew
        while same < min(len(log), len(self.shown)) and log[same] == self.shown[same]:
            same += 1
        for line in log[same:]:
            self.display.tick(Tick(**line))
        self.shown = log

    def _say(self, word: Word) -> None:
        print(f"worker {word.rank}: {word.text}", flush=True)
        if word.rank == 0 and self.display.view.waiting == self.start:
            self.display.wait_for(FIRST_TICK)


def _latest(words: list[Word]) -> dict[int, int]:
    """The number of each rank's latest line."""
    return {word.rank: word.number for word in words}
