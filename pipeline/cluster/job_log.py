"""The log of a job on a cluster, followed from here: across lost connections, with progress bars as bars."""

import asyncio
import re
import shutil
import sys
import time
from typing import TextIO

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from pipeline.cluster.session import ClusterError

RETRY_S = 2.0
SILENT_S = 60.0
"""A connection that was silent for so long is made anew: it may be dead without either side knowing."""
LOST_S = 600.0
"""How long to go on trying where nothing answers: longer than a tunnel or a dashboard takes to come back."""
# How tqdm ends a frame: [elapsed<remaining, rate] or, where the total is not known, [elapsed, rate].
_FRAME = re.compile(r"\[(\d+:)?\d\d:\d\d(<|, ).*\]\s*$")
_ERASE = "\r\x1b[K"


class Screen:
    """Where the text of a log goes.

    Ray hands logs out in lines, also those that ended in a carriage return: a progress bar comes as one line for each
    of its frames. On a terminal they replace each other again; elsewhere they stay lines.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.terminal = self.out.isatty()
        self.frame = False  # the cursor stands behind a frame
        self.blank = False  # an empty line is held back: a bar's own carriage return makes one before its first frame
        self.rest = ""  # of a line that has not ended yet

    def write(self, text: str) -> None:
        """Shows the next piece of the log, cut anywhere."""
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self.terminal:
            *lines, self.rest = (self.rest + text).split("\n")
            text = "".join(map(self._line, lines))
        self.out.write(text)
        self.out.flush()

    def end_line(self) -> None:
        """Before something else is shown: what was held back comes out, and the cursor goes to a new line."""
        if self.terminal and (self.rest or self.frame or self.blank):
            rest = self._line(self.rest) if self.rest else ""
            self.out.write(rest + ("\n" if self.frame or self.blank else ""))
            self.out.flush()
            self.rest, self.frame, self.blank = "", False, False

    def _line(self, line: str) -> str:
        """What to write for a whole line of a terminal's log."""
        if _FRAME.search(line):
            self.frame, self.blank = True, False
            return _ERASE + line[: shutil.get_terminal_size().columns - 1]
        if not line.strip() and self.frame:  # a bar that takes itself away, or ends
            self.frame, self.blank = False, False
            return "\n" if not line else _ERASE
        before = ("\n" if self.frame else "") + ("\n" if self.blank else "")
        self.frame, self.blank = False, not line
        return before + (line + "\n" if line else "")


class JobLog:
    """The log of one job. `follow` may be interrupted and called again: it goes on where it was."""

    def __init__(self, client: JobSubmissionClient, submission: str, screen: Screen) -> None:
        self.client, self.submission, self.screen = client, submission, screen
        self.shown = 0  # characters
        self.lost_at: float | None = None

    def follow(self, lost_s: float = LOST_S) -> JobDetails:
        """Shows what is new until the job has ended, and returns how.

        Args:
            lost_s: seconds for which a lost connection is tried again.

        Raises:
            ClusterError: nothing answered for so long, the cluster does not know the job, or it wants another token.
        """
        while True:
            try:
                whole = asyncio.run(self._tail())
                details = self.client.get_job_info(self.submission)
            except AuthenticationError as cause:
                raise ClusterError(f"the cluster does not let this shell see {self.submission}: {cause}") from cause
            except (OSError, RuntimeError, aiohttp.ClientError) as cause:  # requests' errors are OSErrors
                self._lost(cause, lost_s)
            else:
                self._found()
                if whole and details.status.is_terminal():
                    self.screen.end_line()
                    return details
            time.sleep(RETRY_S)

    async def _tail(self) -> bool:
        """Shows the log from where it was left, over one connection; whether the cluster had no more to say."""
        seen = 0
        pieces = self.client.tail_job_logs(self.submission)
        while True:
            piece = asyncio.ensure_future(anext(pieces, None))
            await asyncio.wait({piece}, timeout=SILENT_S)
            if not piece.done():
                piece.cancel()
                return False
            text = piece.result()
            if text is None:
                return True
            self._found()
            self.screen.write(text[max(0, self.shown - seen) :])
            seen += len(text)
            self.shown = max(self.shown, seen)

    def _lost(self, cause: Exception, lost_s: float) -> None:
        status = getattr(cause, "status", None)  # of a connection that was refused
        if status in (401, 403):
            raise ClusterError(f"the cluster does not let this shell see {self.submission}: {cause}") from cause
        if status == 404 or "status code 404" in str(cause):
            raise ClusterError(
                f"the cluster knows no job {self.submission} any more: it was started anew. The same command submits "
                "it again"
            ) from cause
        now = time.monotonic()
        if self.lost_at is None:
            self.lost_at = now
            self._note(f"connection lost, the job goes on; trying again for {lost_s:g} s ({_short(cause)})")
        elif now - self.lost_at > lost_s:
            raise ClusterError(
                f"nothing has answered for {lost_s:g} s ({_short(cause)}). The job may go on: see its log with "
                f"--logs {self.submission} when the cluster can be reached"
            ) from cause

    def _found(self) -> None:
        if self.lost_at is not None:
            self._note(f"connected again after {time.monotonic() - self.lost_at:.0f} s")
            self.lost_at = None

    def _note(self, text: str) -> None:
        """Beside the log, which alone is on standard output."""
        self.screen.end_line()
        print(text, file=sys.stderr, flush=True)


def _short(cause: Exception) -> str:
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(cause).__name__
