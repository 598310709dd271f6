"""Faults in runs on Ray: what befalls which process, at a moment that is made sure of, and what it cost."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray

from pipeline.cluster.training import train_on_ray
from pipeline.cluster.watch import read_workers
from pipeline.config import Config
from pipeline.tracking.recording import recorded
from pipeline.training.checkpoint import GENERATOR, INDEX, checkpoint_folder, checkpoints_folder, read_info
from pipeline.training.loop import Outcome
from pipeline.training.observers import read_log

T = TypeVar("T")


def wait_until(what: str, seconds: float, condition: Callable[[], T], pause: float = 0.02) -> T:
    """Looks until the condition gives something true, and returns that; an AssertionError says what never happened."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(pause)
    raise AssertionError(f"{what}: not within {seconds:g} s")


def train_during(config: Config, story: Callable[[], Any]) -> Outcome:
    """Trains, in a thread (nodes can be added by the main thread only), while a story happens to the run."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(_train, config)
        try:
            story()
            return run.result()
        except BaseException as error:
            ray.shutdown()  # ends the run if the story failed: it may stand still and wait for its next chapter
            if run.exception() is not None and run.exception() is not error:
                raise AssertionError(f"the run ended: {run.exception()}") from error
            raise


def _train(config: Config) -> Outcome:
    """As `jobs.train`, but nothing is registered."""
    if not config.tracking.enabled:
        return train_on_ray(config, None)
    with recorded(config) as run_id:
        return train_on_ray(config, run_id)


def images_seen(config: Config) -> int:
    """How far the run's log has come; -1 before its first line."""
    log = read_log(config.run_uri, config.storage)
    return int(log[-1]["images_seen"]) if log else -1


def wait_for_images(config: Config, images: int, seconds: float = 180.0) -> None:
    wait_until(f"{images} images in the log of {config.run.name}", seconds, lambda: images_seen(config) >= images)


def starts(config: Config) -> list[list[dict[str, Any]]]:
    """Workers by rank, of each start of the run's workers."""
    return [start["workers"] for start in read_workers(config.run_uri, config.storage)]


def wait_for_start(config: Config, number: int, seconds: float = 240.0) -> list[dict[str, Any]]:
    """The workers of a start of the run, counted from 1."""
    wait_until(f"start {number} of {config.run.name}'s workers", seconds, lambda: len(starts(config)) >= number)
    return starts(config)[number - 1]


def recovery(config: Config, number: int, since: float) -> float:
    """Waits for the first tick after a start of the workers; returns the seconds since the fault, and prints them."""
    wait_for_start(config, number)
    began = read_workers(config.run_uri, config.storage)[number - 1]["time"]
    log = Path(config.run_uri, "log.jsonl")
    wait_until(f"a tick after start {number}", 180.0, lambda: log.stat().st_mtime > began)
    seconds = log.stat().st_mtime - since
    print(f"RECOVERED {config.run.name}: {seconds:.1f} s from the fault to the first new tick", flush=True)
    return seconds


def kill_between(pid: int, what: str, begun: Callable[[], Any], ended: Callable[[], Any], seconds: float) -> None:
    """Kills a process while something lasts: stops it when that has begun, and looks whether it has ended by then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if begun():
            os.kill(pid, signal.SIGSTOP)
            if not ended():
                os.kill(pid, signal.SIGKILL)
                return
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.0005)
    raise AssertionError(f"{what}: process {pid} was not caught in it within {seconds:g} s")


def half_written(config: Config) -> Path | None:
    """The folder of the latest checkpoint, where it has its first file but not the one that makes it count."""
    try:
        latest = max(Path(checkpoints_folder(config.run_uri)).iterdir(), default=None)
        names = {path.name for path in latest.iterdir()} if latest else set()
    except FileNotFoundError:  # it was deleted meanwhile
        return None
    return latest if GENERATOR in names and INDEX not in names else None


def alive(pid: int) -> bool:
    """Whether the process runs, or stands still; one that has ended and waits for its parent does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def last_checkpoint(config: Config) -> dict[str, Any]:
    """Sizes and hashes of the files of the checkpoint at the end: equal ones hold the same bits."""
    folder = checkpoint_folder(config.run_uri, config.plan().train.total_images)
    return read_info(folder, config.storage).files
