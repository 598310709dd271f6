"""Tells what a run is doing, from its storage and MLflow alone: no Ray, from any machine that reaches them.

    python -m jobs.status runs/demo                                        # a run's folder, local or s3://
    python -m jobs.status --config my-run.yaml run.name=second             # the run of a training's command line
    python -m jobs.status s3://bucket/runs/ffhq256 --watch                 # again and again, until it has ended
    python -m jobs.status runs/demo --json                                 # for programs

A run is starting, running, restarting, stalled (its last tick is much older than one takes), ended, stopped (MLflow was
told of an end before its time) or unknown (an old log without times). Ages trust the clocks of both machines.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from jobs.cli import failing_clearly, parse
from pipeline.config import ConfigError, absolute
from pipeline.evaluation.protocol import Result
from pipeline.storage import StorageConfig, StorageError
from pipeline.training.observers import duration
from pipeline.training.status import RunStatus, read_status

WATCH_S = 5.0
HOME_AND_CLEAR = "\x1b[H\x1b[J"


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    named = any(word == "--config" or word.startswith("--config=") for word in words)
    config, args = parse(__doc__, words, _options if named else _options_with_folder, default="")
    if not named and args.run is None:
        raise ConfigError(
            "which run? Expected its folder (run.dir/run.name, local or s3://), or --config and the rest of its "
            "training's command line"
        )
    folder = config.run_uri if named else absolute(args.run)
    if args.dry_run:
        return
    if args.watch:
        watch(folder, config.storage, args.json)
    else:
        print(shown(look(folder, config.storage), args.json))


def look(folder: str, storage: StorageConfig) -> dict[str, Any]:
    """All that is known of a run, as plain data: what its folder says, and under `mlflow` what MLflow says."""
    status = read_status(folder, storage)
    return asdict(status) | {"mlflow": ask_mlflow(status)}


def ask_mlflow(status: RunStatus) -> dict[str, Any] | None:
    """MLflow's `status`, `url` and `versions` of the run, or `error`; None where the run is not recorded there."""
    if status.tracking_uri is None or status.tracking_run is None:
        return None
    from pipeline.tracking.client import TrackingError
    from pipeline.tracking.lookup import look_up

    try:
        return asdict(look_up(status.tracking_uri, status.tracking_run))
    except TrackingError as error:
        return {"error": str(error)}


def watch(folder: str, storage: StorageConfig, as_json: bool, seconds: float = WATCH_S) -> None:
    """Shows it again and again until it has ended; on a terminal in its place. A store that is away is said."""
    place = HOME_AND_CLEAR if sys.stdout.isatty() and not as_json else ""
    while True:
        ended = False
        try:
            found = look(folder, storage)
            text, ended = shown(found, as_json), state(found) in ("ended", "stopped")
        except StorageError as error:
            text = json.dumps({"error": str(error)}) if as_json else f"not known now: {error}"
        print(place + text, flush=True)
        if ended:
            return
        time.sleep(seconds)


def state(found: dict[str, Any]) -> str:
    """The state in a word. MLflow knows of a run that ended before its time: its driver told."""
    told: str = found["state"]
    closed = (found["mlflow"] or {}).get("status") in ("FAILED", "KILLED", "FINISHED")
    return "stopped" if closed and told != "ended" else told


def shown(found: dict[str, Any], as_json: bool) -> str:
    """For people, or one line of JSON."""
    if as_json:
        return json.dumps(found | {"state": state(found)})
    rows = [*_progress(found), *_checkpoint(found), *_distances(found), *_restarts(found), *_places(found)]
    return "\n".join([f"{state(found)}: {found['folder']}", *(f"  {name:12}{text}" for name, text in rows)])


Rows = list[tuple[str, str]]


def _progress(found: dict[str, Any]) -> Rows:
    if found["total_images"] is None:
        return [("images", "no tick yet")]
    seen, total, rate = found["images_seen"], found["total_images"], found["images_per_second"]
    going = state(found) not in ("ended", "stopped")
    parts = [f"{seen / 1000:g} of {total / 1000:g} kimg ({100 * seen / total:.1f}%)"]
    parts += [f"{rate:.1f} img/s"] if rate else []
    parts += [f"{duration(found['seconds_left'])} left"] if going and found["seconds_left"] else []
    rows = [("images", ", ".join(parts))]
    if found["tick_age_s"] is not None:
        usual = f", usually each {duration(found['tick_period_s'])} or sooner" if found["tick_period_s"] else ""
        rows.append(("last tick", f"{duration(found['tick_age_s'])} ago{usual}"))
    return rows


def _checkpoint(found: dict[str, Any]) -> Rows:
    if found["checkpoint"] is None:
        return [("checkpoint", "none yet")]
    age = "" if found["checkpoint_age_s"] is None else f", {duration(found['checkpoint_age_s'])} ago"
    return [("checkpoint", f"{found['checkpoint_images'] / 1000:g} kimg{age}: {found['checkpoint']}")]


def _distances(found: dict[str, Any]) -> Rows:
    best, last = found["best"], found["last"]
    if best is None:
        return [("distance", "none measured")]
    text = f"best {best['value']:.2f} at {best['images_seen'] / 1000:g} kimg"
    text += f", last {last['value']:.2f} at {last['images_seen'] / 1000:g} kimg"
    return [("distance", text), ("", Result.from_dict(best).protocol.describe())]


def _restarts(found: dict[str, Any]) -> Rows:
    restarts = found["restarts"]
    rows = [("restarts", str(len(restarts)))]
    for restart in restarts[-5:]:
        stamp = (
            datetime.fromtimestamp(restart["time"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC ") if "time" in restart else ""
        )
        rows.append(("", f"{stamp}{restart['cause']}"))
    return rows


def _places(found: dict[str, Any]) -> Rows:
    rows = [("samples", found["samples"] or "none yet")]
    mlflow = found["mlflow"]
    if mlflow is None:
        rows.append(("MLflow", "not recorded there"))
    elif "error" in mlflow:
        rows.append(("MLflow", f"not known now: {mlflow['error']}"))
    else:
        rows.append(("MLflow", f"{mlflow['status']}: {mlflow['url']}"))
        rows.append(("registered", "; ".join(mlflow["versions"]) or "nothing yet"))
    return rows + [("said", word) for word in found["words"]]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help=f"renewed each {WATCH_S:g} s, until the run has ended")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def _options_with_folder(parser: argparse.ArgumentParser) -> None:
    _options(parser)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the run's folder; not with --config")


if __name__ == "__main__":
    main()
