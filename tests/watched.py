"""Processes whose output is read while they run, in a pipe or in a terminal of their own."""

import contextlib
import fcntl
import os
import pty
import re
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120.0
"""For anything that a busy machine does slowly."""


def until(what: str, condition: Callable[[], bool]) -> None:
    """Waits for something that another process does; fails with its name."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S:g} s"
        time.sleep(0.1)


class Watched:
    """A process whose output is read as it comes, through a pipe or as a terminal that it is started in."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], terminal: bool) -> None:
        self.said = ""
        if terminal:
            self.here, inside = pty.openpty()

            def own_terminal() -> None:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C goes to the processes of this terminal

            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=inside, stdout=inside, stderr=inside,
                start_new_session=True, preexec_fn=own_terminal,
            )  # fmt: skip
            os.close(inside)
        else:
            self.here, inside = os.pipe()
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=inside, stderr=inside,
                start_new_session=True,
            )  # fmt: skip
            os.close(inside)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # a terminal whose last process has ended
            while text := os.read(self.here, 65536):
                self.said += text.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.here, text.encode())

    def wait_for(self, pattern: str, after: int = 0) -> int:
        """Until it has said this; where in its output that ends."""
        found = None

        def said() -> bool:
            nonlocal found
            found = re.compile(pattern).search(self.said, after)
            return found is not None or self.process.poll() is not None

        until(f"{pattern!r} in the output", said)
        assert found is not None, f"ended without {pattern!r}:\n{self.said}"
        return found.end()

    def ended(self) -> int:
        """Its exit code, with all output read."""
        code = self.process.wait(PATIENCE_S)
        self.reader.join(10)
        return code
