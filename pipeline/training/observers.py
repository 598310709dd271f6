"""Those who watch a training. Rank 0 tells them what happens; watching is cheap and never stops it (promise 8)."""

import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.pictures import encode_png
from pipeline.storage import MissingError, StorageConfig, join, read_bytes, write_bytes
from pipeline.training.delivery import Entry, Lane, say

LINE_WAIT_S, CLOSE_WAIT_S = 1.0, 10.0
SHEETS_BYTES = 64 << 20
"""Sheets that wait for the store hold at most this; the oldest are left out."""


@dataclass(frozen=True)
class Tick:
    """What a status line says."""

    images_seen: int
    total_images: int
    seconds: float
    """Since this process began to train."""
    images_per_second: float
    """Since the last tick, sample sheets, evaluations and pauses for checkpoints included."""
    wait_share: float
    """Share of that time spent waiting for data."""
    memory_gb: float
    """Peak of the process (CPU) or of the device (CUDA)."""
    scalars: dict[str, float]
    """Means over the images since the last tick; empty where nothing was trained."""
    results: list[dict[str, Any]]
    """Distances measured here, each with its protocol."""
    checkpoint_seconds: float = 0.0
    """Since the last tick, that training stood still for a checkpoint: to copy the state, and for the one before."""
    time: float = 0.0
    """Unix time on the clock of the machine that told; 0 in logs of before it was kept."""

    def metrics(self) -> dict[str, float]:
        """All numbers under the names that trackers show."""
        found = dict(self.scalars)
        found["progress/kimg"] = self.images_seen / 1000
        found["timing/data_wait_share"] = self.wait_share
        found["timing/checkpoint_seconds"] = self.checkpoint_seconds
        if self.images_per_second > 0:
            found["timing/sec_per_kimg"] = 1000 / self.images_per_second
        found |= {result["metric"]: result["value"] for result in self.results}
        return found

    def line(self) -> str:
        """The status line: kimg, time, sec/kimg, wait share, losses, pause for a checkpoint, memory, distances."""
        kimg, total = self.images_seen / 1000, self.total_images / 1000
        parts = [f"kimg {kimg:7.1f}/{total:g}", f"time {duration(self.seconds)}"]
        if self.images_per_second > 0:
            left = (self.total_images - self.images_seen) / self.images_per_second
            parts += [f"left {duration(left)}", f"sec/kimg {1000 / self.images_per_second:6.2f}"]
            parts += [f"img/s {self.images_per_second:6.1f}", f"wait {100 * self.wait_share:4.1f}%"]
        names = {"loss/D": "D", "loss/G": "G", "loss/r1": "r1"}
        parts += [f"{short} {self.scalars[name]:.3f}" for name, short in names.items() if name in self.scalars]
        if self.scalars.get("data/replaced"):
            parts.append(f"replaced {self.scalars['data/replaced']:g}")
        if self.checkpoint_seconds:
            parts.append(f"checkpoint {self.checkpoint_seconds:.2f} s")
        parts.append(f"mem {self.memory_gb:.1f} GB")
        parts += [f"{result['metric']} {result['value']:.1f}" for result in self.results]
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """75 to `1m15s`, 7500 to `2h05m`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"


class Observer:
    """Does nothing; each kind of watcher overrides what it wants to know."""

    def resumed(self, images_seen: int, log: list[dict[str, Any]]) -> None:
        """Training goes on from a checkpoint, of which `checkpoint` tells next; the log's lines up to it."""

    def tick(self, tick: Tick) -> None:
        """Numbers since the last tick."""

    def sheet(self, name: str, images_seen: int, image_HWC: np.ndarray) -> None:
        """A sheet of pictures: `reals` once, `samples` at each tick."""

    def checkpoint(self, folder: str, images_seen: int, results: list[dict[str, Any]]) -> None:
        """A checkpoint stands: written while training went on and told at the next tick or the end, or resumed from."""

    def close(self) -> None:
        """The training ended, well or not."""


class RunFolder(Observer):
    """Keeps `log.jsonl` and the sheets in the run's folder; lines of images that a restart repeats are replaced.

    Threads of its own write them: a store that is away delays them, and a tick waits LINE_WAIT_S at most for its line.
    """

    def __init__(self, folder: str, storage: StorageConfig, images_seen: int) -> None:
        self.folder, self.storage = folder, storage
        self.lines = [line for line in read_log(folder, storage) if line["images_seen"] <= images_seen]
        self._written, self._writing = self.lines, threading.Lock()
        receiver = f"the store of {folder}"
        self._log = Lane("log lines", receiver, self._send_lines, most_together=sys.maxsize)
        self._sheets = Lane("sheets", receiver, self._send_sheet, most_bytes=SHEETS_BYTES)

    def tick(self, tick: Tick) -> None:
        self.lines = [line for line in self.lines if line["images_seen"] < tick.images_seen] + [asdict(tick)]
        self._log.put(Entry("line", f"line of {tick.images_seen} images", None, tick.images_seen, 0, weight=1))
        self._log.settle(LINE_WAIT_S)

    def sheet(self, name: str, images_seen: int, image_HWC: np.ndarray) -> None:
        path = f"{name}.png" if name == "reals" else join(name, f"{images_seen:010d}.png")
        picture = encode_png(image_HWC)
        self._sheets.put(Entry("sheet", path, picture, images_seen, 0, size=len(picture)))

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_WAIT_S
        lanes = (self._log, self._sheets)
        for lane in lanes:
            lane.wait_until_empty(max(0.0, deadline - time.monotonic()))
            lane.stop()
        if left := sum(lane.undelivered for lane in lanes):
            say(f"{left} log lines and sheets were not written to {self.folder}")

    def write_log(self) -> None:
        """Writes the lines so far, unless they stand there. Raises StorageError; safe from any thread."""
        with self._writing:
            lines = self.lines
            if lines is not self._written:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                write_bytes(join(self.folder, "log.jsonl"), text.encode(), self.storage)
                self._written = lines

    def _send_lines(self, entries: Sequence[Entry]) -> None:
        self.write_log()  # whichever lines wait: the file holds all

    def _send_sheet(self, entries: Sequence[Entry]) -> None:
        (entry,) = entries
        write_bytes(join(self.folder, entry.name), entry.content, self.storage)


def read_log(folder: str, storage: StorageConfig) -> list[dict[str, Any]]:
    """The ticks of a run so far, oldest first; empty where there is no log yet."""
    try:
        data = read_bytes(join(folder, "log.jsonl"), storage)
    except MissingError:
        return []
    return [json.loads(line) for line in data.decode().splitlines()]
