"""What a run is doing, read from its folder alone: no Ray, no tracker, from any machine that reaches the storage."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.storage import MissingError, StorageConfig, join, list_names, read_bytes
from pipeline.training.checkpoint import checkpoint_folder, list_checkpoints
from pipeline.training.notes import Word, read_restarts, read_words
from pipeline.training.observers import read_log

LATELY = 20  # ticks whose time says how long one usually takes
PATIENCE, LEAST_PATIENCE_S, FIRST_PATIENCE_S = 4.0, 120.0, 1800.0
WORDS = 5  # the last lines of workers that are shown

Log = Sequence[dict[str, Any]]


class StatusError(RuntimeError):
    """There is no run at this place."""


@dataclass(frozen=True)
class RunStatus:
    """All times in seconds; None where it is not known."""

    folder: str
    state: str
    """starting, running, restarting, stalled, ended, or unknown (a log of before times were kept)."""
    images_seen: int
    total_images: int | None
    images_per_second: float | None
    seconds_left: float | None
    """If it goes on as it did at the last tick."""
    tick_age_s: float | None
    tick_period_s: float | None
    """The longest of the last ticks."""
    checkpoint: str | None
    """Folder of the last complete checkpoint."""
    checkpoint_images: int | None
    checkpoint_age_s: float | None
    """Since its images were seen."""
    restarts: list[dict[str, Any]]
    """`cause` of each and, in Unix time, when."""
    best: dict[str, Any] | None
    """The smallest distance under the last one's protocol, with `metric`, `value`, `protocol` and `images_seen`."""
    last: dict[str, Any] | None
    """The last distance."""
    samples: str | None
    """The last sheet of samples."""
    words: list[str]
    """The last lines that workers printed."""
    tracking_uri: str | None
    tracking_run: str | None


def read_status(folder: str, storage: StorageConfig, now: float | None = None) -> RunStatus:
    """Reads the folder of a run, `<run.dir>/<run.name>`.

    Args:
        now: Unix time that ages are counted to; None takes this machine's.

    Raises:
        StatusError: nothing is there; names the runs beside it.
        StorageError: the storage does not answer.
    """
    now = time.time() if now is None else now
    if not list_names(folder, storage):
        raise StatusError(_no_run(folder, storage))
    log, restarts, saved = read_log(folder, storage), read_restarts(folder, storage), list_checkpoints(folder, storage)
    tick = log[-1] if log else {}
    rate = tick.get("images_per_second") or None
    seen, total = tick.get("images_seen", 0), tick.get("total_images")
    told = {line["images_seen"]: line.get("time") or None for line in log}
    checkpoint = saved[-1] if saved else None
    best, last = distances(log)
    sheets = list_names(join(folder, "samples"), storage)
    tracking = _tracking(folder, storage)
    return RunStatus(
        folder=folder,
        state=state_of(log, restarts, checkpoint, now),
        images_seen=seen,
        total_images=total,
        images_per_second=rate,
        seconds_left=(total - seen) / rate if rate and total is not None else None,
        tick_age_s=_age(tick.get("time"), now),
        tick_period_s=tick_period(log),
        checkpoint=None if checkpoint is None else checkpoint_folder(folder, checkpoint),
        checkpoint_images=checkpoint,
        checkpoint_age_s=None if checkpoint is None else _age(told.get(checkpoint), now),
        restarts=restarts,
        best=best,
        last=last,
        samples=join(folder, "samples", sheets[-1]) if sheets else None,
        words=[f"worker {word.rank}: {word.text}" for word in latest_words(folder, storage)],
        tracking_uri=tracking.get("uri"),
        tracking_run=tracking.get("run_id"),
    )


def state_of(log: Log, restarts: Sequence[dict[str, Any]], checkpoint: int | None, now: float) -> str:
    """The state in a word, see `RunStatus.state`. Whether a process is alive somewhere, a folder cannot tell."""
    if not log:
        return "starting"
    tick = log[-1]
    if has_ended(log, checkpoint):
        return "ended"
    told = tick.get("time") or None
    if told is None:
        return "unknown"
    restarted = max((restart.get("time", 0.0) for restart in restarts), default=0.0)
    period = tick_period(log)
    patience = FIRST_PATIENCE_S if period is None else max(LEAST_PATIENCE_S, PATIENCE * period)
    if now - max(told, restarted) > patience:
        return "stalled"
    return "restarting" if restarted > told else "running"


def has_ended(log: Log, checkpoint: int | None) -> bool:
    """Whether the training came to its end, and its last checkpoint (images seen) stands."""
    if not log or checkpoint is None:
        return False
    return bool(checkpoint >= log[-1]["images_seen"] >= log[-1]["total_images"])


def tick_period(log: Log) -> float | None:
    """The longest time between two of the last ticks of one process; evaluations make some longer than others."""
    lately = [later["seconds"] - earlier["seconds"] for earlier, later in pairwise(log[-LATELY - 1 :])]
    return max((seconds for seconds in lately if seconds > 0), default=None)  # another process begins at 0


def distances(log: Log) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The best distance under the protocol of the last one, and the last, each with its `images_seen`."""
    found = [{**result, "images_seen": line["images_seen"]} for line in log for result in line["results"]]
    if not found:
        return None, None
    last = found[-1]
    same = [result for result in found if result["protocol"] == last["protocol"]]
    return min(same, key=lambda result: (result["value"], result["images_seen"])), last


def latest_words(folder: str, storage: StorageConfig) -> list[Word]:
    """The last lines that any worker printed, by their clocks."""
    return sorted(read_words(folder, storage), key=lambda word: word.time)[-WORDS:]


def _tracking(folder: str, storage: StorageConfig) -> dict[str, str]:
    """Which MLflow run belongs to the folder (`pipeline.tracking.recording` writes it down)."""
    try:
        return dict(json.loads(read_bytes(join(folder, "tracking.json"), storage)))
    except (MissingError, ValueError):
        return {}


def _age(told: float | None, now: float) -> float | None:
    return max(0.0, now - told) if told else None


def _no_run(folder: str, storage: StorageConfig) -> str:
    above = folder.rstrip("/").rpartition("/")[0]
    beside = [name for name in list_names(above, storage) if not name.startswith(".")] if above else []
    runs = f"; in {above} there are {', '.join(beside[:20])}" if beside else ""
    return f"no run at {folder}: expected the folder run.dir/run.name of jobs.train{runs}"
