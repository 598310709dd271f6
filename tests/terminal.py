"""A terminal for tests: what programs write to it, and what a person would see."""

import contextlib
import fcntl
import os
import pty
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator


class Terminal:
    """`slave` is the descriptor that a program is given."""

    def __init__(self, columns: int, rows: int = 24) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.output = ""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def screen(self) -> list[str]:
        """The lines that a person sees, however often each was written over, without their trailing spaces."""
        return screen(self.output)

    def wait_for(self, what: str, seen: Callable[[str], bool], deadline_s: float) -> None:
        """Waits until the output so far is as wished."""
        deadline = time.monotonic() + deadline_s
        while not seen(self.output):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no {what} within {deadline_s:g} s; the terminal shows\n" + "\n".join(self.screen())
                )
            time.sleep(0.05)

    def close(self) -> None:
        """Reads what is left."""
        os.close(self.slave)
        self.thread.join()
        os.close(self.master)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the last program has closed it
            while data := os.read(self.master, 1 << 16):
                self.output += data.decode(errors="replace")


@contextlib.contextmanager
def terminal(columns: int, rows: int = 24) -> Iterator[Terminal]:
    """A terminal that is closed at the end; its output stays to be looked at."""
    opened = Terminal(columns, rows)
    try:
        yield opened
    finally:
        opened.close()


def screen(output: str) -> list[str]:
    """Applies carriage returns, as a terminal does."""
    lines, column = [""], 0
    for character in output:
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
