"""Trains a CIPS generator, on a Ray cluster or in this process; started again, it goes on where it was.

    python -m jobs.train --config demo
    python -m jobs.train --config ffhq256 data.uri=s3://bucket/ffhq256 run.dir=s3://bucket/runs cluster.address=auto \
        tracking.uri=http://HOST:5000 evaluate.weights=s3://bucket/inception-2015-12-05.pt
    python -m jobs.train --config demo cluster.backend=local tracking.enabled=false    # no Ray, no MLflow
    python -m jobs.train --config ffhq256 --dry-run                                    # what it would be

On a terminal one line shows how far it is, and what it waits for; elsewhere there is a line a tick. `python -m
jobs.status RUN` tells the same from any machine.

The run's folder, run.dir/run.name, holds config.yaml, log.jsonl, sample sheets, checkpoints, why it was restarted
(restarts.json), and on Ray what workers printed (workers/). The best generator becomes a version of
tracking.model_name; jobs.promote decides whether it becomes the champion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.cli import failing_clearly, going_on, parse
from pipeline.config import Config, to_yaml
from pipeline.models.summary import summary_table
from pipeline.storage import StorageConfig, join, patiently, write_bytes
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.loop import Outcome, check_plan
from pipeline.training.notes import note_restart
from pipeline.training.observers import read_log
from pipeline.training.status import has_ended


@dataclass(frozen=True)
class Trained:
    """What a training left behind."""

    outcome: Outcome
    tracking_run: str | None
    """Id of the MLflow run; None without tracking."""
    version: str | None
    """The registered version of `tracking.model_name`; None without tracking."""


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse(__doc__, argv)
    if args.dry_run:
        print(summary_table(config.model, config.train.patch.size))
        return
    with going_on():
        done = run(config)
    print(f"trained {done.outcome.images_seen / 1000:g} kimg; checkpoint {done.outcome.checkpoint}")
    for result in done.outcome.results:
        print(f"{result['metric']} {result['value']:.2f}")
    if done.version:
        print(f"registered {config.tracking.model_name} version {done.version} (MLflow run {done.tracking_run})")
        if done.outcome.results:
            print(f"make it the champion: python -m jobs.promote --config {args.config} {' '.join(args.overrides)}")
        else:
            print("it carries no distance, so jobs.promote cannot compare it: set train.evaluate_kimg for one")


def run(config: Config) -> Trained:
    """Trains; records the run and registers its best generator where tracking is enabled."""
    storage = config.storage
    # What cannot be trained is refused before anything is written or recorded.
    patiently(lambda: check_plan(config.plan()), "looking at data and checkpoints", storage)
    text = to_yaml(config).encode()
    patiently(lambda: write_bytes(join(config.run_uri, "config.yaml"), text, storage), "writing config.yaml", storage)
    patiently(lambda: note_return(config.run_uri, storage), "reading the run's folder", storage)
    if not config.tracking.enabled:
        return Trained(train(config, None), None, None)
    from pipeline.tracking.recording import recorded, register_best

    with recorded(config) as tracking_run:
        outcome = train(config, tracking_run)
        version = register_best(config, tracking_run)
    return Trained(outcome, tracking_run, version)


def note_return(folder: str, storage: StorageConfig) -> None:
    """Notes among a run's restarts that its command was given again before the run had ended (its driver died, say)."""
    log, saved = read_log(folder, storage), list_checkpoints(folder, storage)
    if log and not has_ended(log, saved[-1] if saved else None):
        where = f"the checkpoint at {saved[-1] / 1000:g} kimg" if saved else "the beginning: there was no checkpoint"
        note_restart(folder, storage, f"jobs.train was started again, from {where}")


def train(config: Config, tracking_run: str | None) -> Outcome:
    """The training alone, where `cluster.backend` says."""
    if config.cluster.backend == "ray":
        from pipeline.cluster.training import train_on_ray

        return train_on_ray(config, tracking_run)
    return train_locally(config, tracking_run)


def train_locally(config: Config, tracking_run: str | None) -> Outcome:
    """The same loop in this process."""
    from pipeline.ops.allocation import keep_freed_memory
    from pipeline.training.local import local_device, train_here

    if local_device().type == "cpu":
        keep_freed_memory()
    observers, evaluate = [], None
    if tracking_run is not None:
        from pipeline.tracking.observer import RunObserver

        observers.append(RunObserver(config, tracking_run))
    if config.train.evaluate_kimg is not None:
        from pipeline.evaluation.distance import DistanceMeter

        evaluate = DistanceMeter(
            config.evaluate, config.data, config.model.size, config.storage, config.statistics_uri, local_device()
        )
    return train_here(config.plan(), observers, evaluate)


if __name__ == "__main__":
    main()
