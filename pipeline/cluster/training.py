"""Training on Ray Train: one process per worker, DDP between them, restarted from the last checkpoint.

Checkpoints are the loop's own (`pipeline.training.checkpoint`), so a run goes on the same way with and without
Ray; Ray Train starts the workers, wires them up, watches them and starts them again.
"""

from dataclasses import asdict
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from pipeline.cluster.follow import Follower, RestartNotes
from pipeline.cluster.session import ClusterError, is_local, ray_session, set_timeouts
from pipeline.config import ClusterConfig, Config, absolute
from pipeline.evaluation.distance import DistanceMeter
from pipeline.evaluation.features import FeatureError
from pipeline.evaluation.protocol import ProtocolError
from pipeline.models.cips import Generator
from pipeline.storage import is_remote, join
from pipeline.training.checkpoint import CheckpointError
from pipeline.training.loop import Evaluate, Outcome, PlanError, TrainingDiverged, train
from pipeline.training.observers import Observer
from pipeline.training.world import World


def train_on_ray(config: Config, run_id: str | None) -> Outcome:
    """Runs the whole training on the cluster and returns what rank 0 came to.

    Args:
        run_id: the MLflow run that rank 0 logs to; None logs nowhere.

    Raises:
        ClusterError: the workers failed more often than `cluster.max_failures`; names the cause and the folder.
    """
    with ray_session(config.cluster), Follower(config.run_uri, config.storage):
        return fit(config, run_id)


def fit(config: Config, run_id: str | None, callbacks: tuple[UserCallback, ...] = ()) -> Outcome:
    """Trains on the cluster that this process is connected to."""
    require_resources(config.cluster)
    try:
        result = build_trainer(config, run_id, callbacks).fit()
    except TrainingFailedError as failure:
        raise ClusterError(f"training {config.run.name} ended: {root_cause(failure)}") from failure
    if "refused" in result.return_value:
        raise ClusterError(f"training {config.run.name} ended: {result.return_value['refused']}")
    return Outcome(**result.return_value)


def build_trainer(config: Config, run_id: str | None, callbacks: tuple[UserCallback, ...] = ()) -> TorchTrainer:
    """The TorchTrainer of a configuration; `callbacks` are Ray Train's own kind, such as Tune's."""
    cluster = config.cluster
    set_timeouts(cluster)
    return TorchTrainer(
        worker,
        train_loop_config={"config": config.anchored().model_dump(mode="json"), "run_id": run_id},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.use_gpu, resources_per_worker=worker_resources(cluster)
        ),
        torch_config=TorchConfig(timeout_s=cluster.collective_timeout_s),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=notes_folder(config),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[RestartNotes(config.run_uri, config.storage), *callbacks],
        ),
    )


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker of the group runs; returns the `Outcome` as a dict.

    What all workers find wrong together would be found again after a restart: it is returned, not raised, so that
    Ray does not train the same pictures to the same end `cluster.max_failures` times.
    """
    try:
        return asdict(_train(settings))
    except (TrainingDiverged, CheckpointError, PlanError, ProtocolError, FeatureError) as error:
        return {"refused": str(error)}


def _train(settings: dict[str, Any]) -> Outcome:
    config = Config.model_validate(settings["config"])
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    device = get_device()
    torch.set_num_threads(config.cluster.threads)
    observers: list[Observer] = []
    if world.rank == 0 and settings["run_id"]:
        from pipeline.tracking.observer import RunObserver

        observers.append(RunObserver(config, settings["run_id"]))
    evaluate = reported(config, device, world) if config.train.evaluate_kimg is not None else None
    return train(config.plan(), world, device, observers, evaluate)


def reported(config: Config, device: torch.device, world: World) -> Evaluate:
    """An evaluation by all workers that also tells Ray (and through it Tune) its result."""
    meter = DistanceMeter(
        config.evaluate,
        config.data,
        config.model.size,
        config.storage,
        config.statistics_uri,
        device,
        world.rank,
        world.size,
        world.sum_,
    )

    def evaluate(generator: Generator, images_seen: int) -> dict[str, Any]:
        result = meter(generator, images_seen)
        ray.train.report({result["metric"]: result["value"], "images_seen": images_seen})
        return result

    return evaluate


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker reserves."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.use_gpu else {})


def require_resources(cluster: ClusterConfig) -> None:
    """Says what is waited for where the cluster does not have it yet, and refuses what one machine will never have."""
    needed = {kind: amount * cluster.workers for kind, amount in worker_resources(cluster).items()}
    there = ray.cluster_resources()
    missing = {kind: amount for kind, amount in needed.items() if there.get(kind, 0) < amount}
    if not missing:
        return
    text = ", ".join(f"{amount:g} {kind} ({there.get(kind, 0):g} there)" for kind, amount in missing.items())
    if is_local(cluster):
        raise ClusterError(
            f"{cluster.workers} workers need {text} on this machine; lower cluster.workers, set cluster.use_gpu=false, "
            "or join a larger cluster with cluster.address"
        )
    print(f"waiting for the cluster to grow: {cluster.workers} workers need {text}", flush=True)


def notes_folder(config: Config) -> str | None:
    """Where Ray keeps its own notes about runs. On S3 they would need Ray's filesystem; nothing here reads them."""
    return None if is_remote(config.run.dir) else join(absolute(config.run.dir), ".ray")


def root_cause(failure: TrainingFailedError) -> str:
    """The first worker's own error where there is one, in one line, else Ray's."""
    failures = getattr(failure, "worker_failures", None) or {}
    for rank, cause in sorted(failures.items()):
        original = getattr(cause, "_base_exc", None) or cause
        return f"worker {rank}: {type(original).__name__}: {original}"
    return str(failure)
