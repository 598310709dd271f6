"""What a person sees of a run: on a terminal one line that is renewed, elsewhere a plain line for each tick."""

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TextIO, cast

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from pipeline.training.observers import Observer, Tick, duration

RENEW_S = 0.5
USUAL_COLUMNS = 80  # where the terminal does not say


@dataclass(frozen=True)
class View:
    """What the live line is made of."""

    waiting: str = ""
    """For what, until the next tick comes; empty while training goes on."""
    since: float = 0.0
    """Seconds since the last tick came, or since the wait began."""
    tick: Tick | None = None
    measured: str = ""
    """The last distance."""
    restarts: int = 0


def live_line(view: View, columns: int) -> str:
    """The line, at most so wide: where it does not fit, whole parts are left out, the least needed first."""
    parts = _parts(view)
    while len(parts) > 1 and len(_joined(parts)) > columns:
        parts.remove(max(parts))
    return _joined(parts)[:columns]


def _parts(view: View) -> list[tuple[int, str]]:
    """The parts in order, each with its rank: the higher, the sooner it is left out."""
    tick = view.tick
    now = f"waiting {duration(view.since)} for {view.waiting}" if view.waiting else f"{duration(view.since)} ago"
    if tick is None:
        return [(0, now)]
    parts = [(0, f"kimg {tick.images_seen / 1000:.1f}/{tick.total_images / 1000:g}"), (1, now)]
    if tick.images_per_second > 0 and not view.waiting:
        left = (tick.total_images - tick.images_seen) / tick.images_per_second - view.since
        parts += [(2, f"left {duration(max(0.0, left))}"), (7, f"sec/kimg {1000 / tick.images_per_second:.2f}")]
        parts += [(5, f"img/s {tick.images_per_second:.1f}"), (8, f"wait {100 * tick.wait_share:.1f}%")]
    shown = [name for name in ("D", "G", "r1") if f"loss/{name}" in tick.scalars]
    if losses := [f"{name} {tick.scalars[f'loss/{name}']:.3f}" for name in shown]:
        parts.append((6, " ".join(losses)))
    if view.measured:
        parts.append((4, view.measured))
    if view.restarts:
        parts.append((3, f"restarts {view.restarts}"))
    return parts


def _joined(parts: list[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in parts)


class Display(Observer):
    """Shows a run while it is entered, on standard output; any thread may tell it something.

    What other code prints meanwhile appears above the live line and stays there. Distances stay as well: of each
    tick that brings one, the whole line. Plain lines carry the last distance and the restarts, as the live one does.

    Args:
        waiting: for what, until the first tick.
        tick: the last one of an earlier process.
        restarts: of earlier processes.
    """

    def __init__(self, waiting: str, tick: Tick | None = None, measured: str = "", restarts: int = 0) -> None:
        self.view = View(waiting, 0.0, tick, measured, restarts)
        self.began = time.monotonic()
        self.ticked = False
        self.out = sys.stdout
        self.bar: tqdm[Any] | None = None  # the live line, on a terminal
        self.changing, self.done = threading.RLock(), threading.Event()
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Display":
        if self.out.isatty():
            # Sizes are given, for tqdm draws nothing on a terminal that does not know its own.
            self.bar = self.stack.enter_context(
                tqdm(bar_format="{desc}", file=self.out, leave=False, mininterval=0, ncols=0, nrows=20)
            )
            self.stack.enter_context(contextlib.redirect_stdout(cast(TextIO, DummyTqdmFile(self.out))))
            thread = threading.Thread(target=self._renew, name="live-line", daemon=True)
            thread.start()
            self.stack.callback(thread.join)
            self.stack.callback(self.done.set)
            self._draw()
        else:
            print(f"waiting for {self.view.waiting}", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()
        if self.bar is not None and self.ticked and self.view.tick is not None and not self.view.tick.results:
            print(self.plain_line(self.view.tick), flush=True)  # what was last true stays

    def tick(self, tick: Tick) -> None:
        measured = "  ".join(f"{result['metric']} {result['value']:.1f}" for result in tick.results)
        with self.changing:
            self.ticked, self.began = True, time.monotonic()
            self.view = replace(self.view, waiting="", tick=tick, measured=measured or self.view.measured)
        if tick.results or self.bar is None:
            print(self.plain_line(tick), flush=True)
        self._draw()

    def wait_for(self, what: str) -> None:
        """Says for what the run waits until its next tick."""
        with self.changing:
            if what == self.view.waiting:
                return
            self.began, self.view = time.monotonic(), replace(self.view, waiting=what)
        self._draw()
        if self.bar is None:
            print(f"waiting for {what}", flush=True)

    def restarted(self, cause: str, waiting: str) -> None:
        """Says why the run was interrupted, and for what it waits now."""
        with self.changing:
            self.view = replace(self.view, restarts=self.view.restarts + 1)
        print(f"restart {self.view.restarts}: {cause}", flush=True)
        self.wait_for(waiting)

    def plain_line(self, tick: Tick) -> str:
        """The tick's own line, with what the run has seen besides."""
        extra = [] if tick.results or not self.view.measured else [f"last {self.view.measured}"]
        extra += [f"restarts {self.view.restarts}"] if self.view.restarts else []
        return "  ".join([tick.line(), *extra])

    def _renew(self) -> None:
        while not self.done.wait(RENEW_S):
            self._draw()

    def _draw(self) -> None:
        if self.bar is None:
            return
        with self.changing:
            view = replace(self.view, since=time.monotonic() - self.began)
        self.bar.set_description_str(live_line(view, self._columns()))

    def _columns(self) -> int:
        """One fewer than the terminal has: a full line would wrap, and then be two."""
        try:
            columns = os.get_terminal_size(self.out.fileno()).columns
        except OSError:
            columns = 0
        return (columns or USUAL_COLUMNS) - 1


def last_measured(log: list[dict[str, Any]]) -> str:
    """The last distances of a log, as the line shows them."""
    for line in reversed(log):
        if line["results"]:
            return "  ".join(f"{result['metric']} {result['value']:.1f}" for result in line["results"])
    return ""
