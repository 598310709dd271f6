"""The driver's side of the record: one MLflow run a training, however often it restarts, and the model it leaves."""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.config import Config, to_yaml
from pipeline.data.manifest import read_manifest
from pipeline.evaluation.protocol import Result
from pipeline.storage import MissingError, join, mlflow_environment, patiently, read_bytes, write_bytes
from pipeline.tracking.client import wait_until_reachable
from pipeline.tracking.registry import LoggedGenerator, find_version, log_model, register
from pipeline.tracking.runs import TrainingData, end_run, open_run
from pipeline.training.checkpoint import (
    GENERATOR,
    CheckpointError,
    CheckpointInfo,
    checkpoint_folder,
    list_checkpoints,
    read_info,
)

Stored = TypeVar("Stored")

NOTE = "tracking.json"  # in the run's folder: which MLflow run belongs to it


@contextmanager
def recorded(config: Config, tags: Mapping[str, str] | None = None) -> Iterator[str]:
    """Opens the MLflow run of a training, the same one each time it is started again, and ends it.

    Yields its id. The run ends as FINISHED, FAILED or KILLED. A server that cannot be reached is an error here, at
    the start, where somebody looks; later it only delays log lines.
    """
    uri = config.tracking_uri
    known = _note(config)
    manifest = _patiently(config, lambda: read_manifest(config.data.uri, config.storage)) if config.data.uri else None
    run_id = open_run(
        uri,
        config.tracking.experiment,
        config.run.name,
        config.model_dump(mode="json"),
        tags,
        data=TrainingData("train", config.data.uri, manifest.digest) if manifest else None,
        config_yaml=to_yaml(config),
        run_id=known.get("run_id"),
        key=known.get("key"),
        environment=mlflow_environment(config.storage),
    )
    _write_note(config, {**known, "run_id": run_id})
    status = "FAILED"
    try:
        yield run_id
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        end_run(uri, run_id, status)


def _note(config: Config) -> dict[str, str]:
    """Which MLflow run belongs to the run's folder: `uri` of the server, and `run_id` or, before it is known, `key`.

    The key is written before the run is made: whoever dies in between leaves a run that is found again by it.
    """
    try:
        known = json.loads(_patiently(config, lambda: read_bytes(join(config.run_uri, NOTE), config.storage)))
    except MissingError:
        known = {}
    if known.get("uri") == config.tracking_uri:
        return dict(known)
    note = {"uri": config.tracking_uri, "key": uuid.uuid4().hex}
    _write_note(config, note)
    return note


def _write_note(config: Config, note: Mapping[str, str]) -> None:
    text = json.dumps(note).encode()
    _patiently(config, lambda: write_bytes(join(config.run_uri, NOTE), text, config.storage))


def _patiently(config: Config, action: Callable[[], Stored]) -> Stored:
    return patiently(action, "the record of the run", config.storage)


@dataclass
class Trials:
    """The child runs of a search: ids by run name, and the names of those that failed, filled in by the search."""

    run_ids: dict[str, str]
    failed: set[str] = field(default_factory=set)


@contextmanager
def recorded_trials(configs: Sequence[Config], parent: str) -> Iterator[Trials]:
    """Opens a child run for each trial of a search and ends each as it ended."""
    with ExitStack() as stack:
        trials = Trials(
            {
                config.run.name: stack.enter_context(recorded(config, {"mlflow.parentRunId": parent}))
                for config in configs
            }
        )
        yield trials
    for config in configs:
        if config.run.name in trials.failed:
            end_run(config.tracking_uri, trials.run_ids[config.run.name], "FAILED")


def register_best(config: Config, run_id: str) -> str:
    """Logs each kept checkpoint that was measured, as a model with its distance; registers the best one.

    The best has the smallest distance under the last checkpoint's protocol; without distances it is the last. One
    that is registered already is not registered again. Returns the version.
    """
    uri, name = config.tracking_uri, config.tracking.model_name
    wait_until_reachable(uri, config.tracking.flush_timeout_s)
    best, info = best_checkpoint(config)
    tags = {
        "run": config.run.name,
        "checkpoint": checkpoint_folder(config.run_uri, best),
        "dataset_digest": info.dataset_digest,
    }
    known = find_version(uri, name, run_id, tags)
    if known is not None:
        return known
    for images_seen, kept in measured_checkpoints(config):
        if images_seen not in (0, best):
            log_checkpoint(config, run_id, images_seen, kept)
    return register(uri, log_checkpoint(config, run_id, best, info), name, tags)


def log_checkpoint(config: Config, run_id: str, images_seen: int, info: CheckpointInfo) -> LoggedGenerator:
    """The averaged generator of a checkpoint as a logged model of the run."""
    folder = checkpoint_folder(config.run_uri, images_seen)
    return log_model(
        config.tracking_uri,
        run_id,
        _patiently(config, lambda: read_bytes(join(folder, GENERATOR), config.storage)),
        info.config["model"],
        [Result.from_dict(result) for result in info.results],
        images_seen,
        name=f"generator-{images_seen:010d}",
        environment=mlflow_environment(config.storage),
    )


def measured_checkpoints(config: Config) -> list[tuple[int, CheckpointInfo]]:
    """The run's checkpoints that carry a distance, oldest first."""
    return [(images_seen, info) for images_seen, info in _checkpoints(config) if info.results]


def _checkpoints(config: Config) -> list[tuple[int, CheckpointInfo]]:
    """Images seen and index of each of the run's checkpoints, oldest first."""
    folder, storage = config.run_uri, config.storage

    def read() -> list[tuple[int, CheckpointInfo]]:
        every = list_checkpoints(folder, storage)
        return [(images_seen, read_info(checkpoint_folder(folder, images_seen), storage)) for images_seen in every]

    return _patiently(config, read)


def best_checkpoint(config: Config) -> tuple[int, CheckpointInfo]:
    """Images seen and index of the run's best checkpoint."""
    found = _checkpoints(config)
    if not found:
        raise CheckpointError(f"{config.run_uri} holds no checkpoint to register")
    last = found[-1]
    if not last[1].results:
        return last
    protocol = last[1].results[-1]["protocol"]
    scored = [
        (result["value"], images_seen, info)
        for images_seen, info in found
        for result in info.results
        if result["protocol"] == protocol
    ]
    value, images_seen, info = min(scored, key=lambda row: row[:2])
    return images_seen, info
