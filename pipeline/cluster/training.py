"""Training on Ray Train: one process per worker, DDP between them, restarted from the last checkpoint.

Checkpoints are the loop's own (`pipeline.training.checkpoint`), so a run goes on the same way with and without
Ray; Ray Train starts the workers, wires them up, watches them and starts them again.
"""

import os
from dataclasses import asdict
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from pipeline.cluster.follow import Follower, RestartNotes
from pipeline.cluster.session import ClusterError, ray_session
from pipeline.config import Config
from pipeline.evaluation.distance import DistanceMeter
from pipeline.models.cips import Generator
from pipeline.storage import is_remote, join
from pipeline.training.loop import Evaluate, Outcome, train
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
        try:
            result = build_trainer(config, run_id).fit()
        except TrainingFailedError as failure:
            raise ClusterError(f"training {config.run.name} ended: {root_cause(failure)}") from failure
    return Outcome(**result.return_value)


def build_trainer(config: Config, run_id: str | None, callbacks: tuple[UserCallback, ...] = ()) -> TorchTrainer:
    """The TorchTrainer of a configuration; `callbacks` are Ray Train's own kind, such as Tune's."""
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    # Ray's own notes about the run. On S3 they would need Ray's filesystem, and nothing here reads them.
    notes = None if is_remote(config.run.dir) else os.path.abspath(join(config.run.dir, ".ray"))
    return TorchTrainer(
        worker,
        train_loop_config={"config": config.anchored().model_dump(mode="json"), "run_id": run_id},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(timeout_s=cluster.collective_timeout_s),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=notes,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[RestartNotes(config.run_uri, config.storage), *callbacks],
        ),
    )


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker of the group runs; returns the `Outcome` as a dict."""
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
    return asdict(train(config.plan(), world, device, observers, evaluate))


def reported(config: Config, device: torch.device, world: World) -> Evaluate:
    """An evaluation by all workers that also tells Ray (and through it Tune) its result."""
    meter = DistanceMeter(
        config.evaluate,
        config.data,
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


def root_cause(failure: TrainingFailedError) -> str:
    """The first worker's own error where there is one, in one line, else Ray's."""
    failures = getattr(failure, "worker_failures", None) or {}
    for rank, cause in sorted(failures.items()):
        original = getattr(cause, "_base_exc", None) or cause
        return f"worker {rank}: {type(original).__name__}: {original}"
    return str(failure)
