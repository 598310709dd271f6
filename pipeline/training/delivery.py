"""A queue in memory with a thread that delivers its entries in order, however long the receiver is away (promise 8)."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class RefusedError(Exception):
    """The receiver will never take this, so trying again is useless."""


@dataclass(frozen=True)
class Entry:
    """Something to be delivered."""

    kind: str
    name: str
    content: Any
    step: int
    time_ms: int
    size: int = 0
    """Bytes that it holds in memory."""
    weight: int = 0
    """Entries with a weight may be sent together, up to the lane's `most_together`; 0 is sent alone."""


class Lane:
    """Entries go in without waiting and come out in order, each once.

    Args:
        label: what waits, in the lines that are printed.
        receiver: who is written to, in those lines.
        send: delivers some entries, or raises: after `RefusedError` the bad entry is left out, after anything
            else it is tried again.
        most_together: total weight of entries sent at once.
        most_bytes: when waiting entries hold more, the oldest of them are left out.
    """

    def __init__(
        self,
        label: str,
        receiver: str,
        send: Callable[[Sequence[Entry]], None],
        *,
        most_together: int = 1,
        most_bytes: int | None = None,
    ) -> None:
        self.label, self.receiver = label, receiver
        self._send, self._most_together, self._most_bytes = send, most_together, most_bytes
        self._waiting: deque[Entry] = deque()
        self._sending: list[Entry] = []
        self._bytes = self._left_out = self._hurried = 0
        self._stopped = False
        self._down_since: float | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._deliver, name=f"deliver-{label}", daemon=True).start()

    @property
    def undelivered(self) -> int:
        """Entries that wait, are being sent, or were left out."""
        with self._changed:
            return len(self._waiting) + len(self._sending) + self._left_out

    def put(self, entry: Entry) -> None:
        """Adds an entry at the end. Never waits for the receiver."""
        with self._changed:
            self._waiting.append(entry)
            self._bytes += entry.size
            while self._most_bytes is not None and self._bytes > self._most_bytes and self._waiting:
                oldest = self._waiting.popleft()
                self._bytes -= oldest.size
                self.leave_out(oldest.name, "too much waits")
            self._changed.notify_all()

    def leave_out(self, name: str, cause: object) -> None:
        """Counts and says what is not delivered."""
        with self._changed:
            self._left_out += 1
        say(f"not logged at {self.receiver}: {name} ({short(cause)})")

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Waits until nothing waits or is being sent, at most so long. Meanwhile it tries more often."""
        with self._changed:
            self._hurried += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._waiting and not self._sending, timeout_s)
            finally:
                self._hurried -= 1

    def settle(self, timeout_s: float) -> bool:
        """Waits until nothing waits, or the receiver is known to fail, at most so long. Whether nothing waits."""
        with self._changed:
            self._changed.wait_for(
                lambda: not (self._waiting or self._sending) or self._down_since is not None, timeout_s
            )
            return not (self._waiting or self._sending)

    def stop(self) -> None:
        """Ends the thread after the try that is under way; what waits stays undelivered."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    # ---- the thread ----------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        pause, together = FIRST_PAUSE_S, True
        while self._take(together):
            try:
                self._send(self._sending)
            except RefusedError as cause:
                together = len(self._sending) == 1  # one of several: send singly to find it
                self._put_back_or_leave_out(cause)
            except Exception as cause:  # whatever it is, training goes on
                self._pause(pause, cause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._done()
                pause = FIRST_PAUSE_S

    def _take(self, together: bool) -> bool:
        """Moves the next entries from waiting to sending; blocks while there are none. False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._sending or self._waiting or self._stopped)
            if self._stopped:
                return False
            if not self._sending:
                self._sending = [self._waiting.popleft()]
                weight = self._sending[0].weight
                while together and weight and self._waiting and self._waiting[0].weight:
                    weight += self._waiting[0].weight
                    if weight > self._most_together:
                        break
                    self._sending.append(self._waiting.popleft())
            return True

    def _put_back_or_leave_out(self, cause: Exception) -> None:
        with self._changed:
            if len(self._sending) > 1:
                self._waiting.extendleft(reversed(self._sending))
                self._sending = []
            else:
                self.leave_out(self._sending[0].name, cause)
                self._done()

    def _done(self) -> None:
        with self._changed:
            self._bytes -= sum(entry.size for entry in self._sending)
            self._sending = []
            self._changed.notify_all()
            if self._down_since is not None:
                seconds, self._down_since = time.monotonic() - self._down_since, None
                say(f"{self.receiver} works again after {seconds:.0f} s; {self.label} are sent on")

    def _pause(self, pause: float, cause: Exception) -> None:
        with self._changed:
            if self._down_since is None and not self._stopped:
                self._down_since = time.monotonic()
                say(f"{self.receiver} fails ({short(cause)}); training goes on, {self.label} wait")
                self._changed.notify_all()
            before = self._hurried
            seconds = FIRST_PAUSE_S if before else pause
            self._changed.wait_for(lambda: self._stopped or self._hurried > before, seconds)


def short(cause: object) -> str:
    """An error in one line of moderate length."""
    text = " ".join(str(cause).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)
