"""Those who watch a training. Rank 0 tells them what happens; watching is cheap and never stops it (promise 8)."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.pictures import encode_png
from pipeline.storage import MissingError, StorageConfig, StorageError, join, read_bytes, write_bytes


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

    def tick(self, tick: Tick) -> None:
        """Numbers since the last tick."""

    def sheet(self, name: str, images_seen: int, image_HWC: np.ndarray) -> None:
        """A sheet of pictures: `reals` once, `samples` at each tick."""

    def checkpoint(self, folder: str, images_seen: int, results: list[dict[str, Any]]) -> None:
        """A checkpoint stands: written while training went on, and told at the next tick or at the end."""

    def close(self) -> None:
        """The training ended, well or not."""


class Printer(Observer):
    """Prints each status line."""

    def tick(self, tick: Tick) -> None:
        print(tick.line(), flush=True)


class RunFolder(Observer):
    """Keeps `log.jsonl` and the sheets in the run's folder; lines of images that a restart repeats are replaced."""

    def __init__(self, folder: str, storage: StorageConfig, images_seen: int) -> None:
        self.folder, self.storage = folder, storage
        self.lines = [line for line in read_log(folder, storage) if line["images_seen"] <= images_seen]

    def tick(self, tick: Tick) -> None:
        self.lines = [line for line in self.lines if line["images_seen"] < tick.images_seen] + [asdict(tick)]
        self._write("log.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def sheet(self, name: str, images_seen: int, image_HWC: np.ndarray) -> None:
        path = f"{name}.png" if name == "reals" else join(name, f"{images_seen:010d}.png")
        self._write(path, encode_png(image_HWC))

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_bytes(join(self.folder, name), data, self.storage)
        except (OSError, StorageError) as cause:
            print(f"could not write {join(self.folder, name)}, training goes on: {cause}", flush=True)


def read_log(folder: str, storage: StorageConfig) -> list[dict[str, Any]]:
    """The ticks of a run so far, oldest first; empty where there is no log yet."""
    try:
        data = read_bytes(join(folder, "log.jsonl"), storage)
    except MissingError:
        return []
    return [json.loads(line) for line in data.decode().splitlines()]
