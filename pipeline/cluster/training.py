"""Training on Ray Train: one process per worker, DDP between them, restarted from the last checkpoint.

Checkpoints are the loop's own (`pipeline.training.checkpoint`), so a run goes on the same way with and without
Ray; Ray Train starts the workers, wires them up, watches them and starts them again.
"""

from dataclasses import asdict
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from pipeline.cluster.follow import Follower
from pipeline.cluster.interfaces import NodeTorchConfig
from pipeline.cluster.metrics import RayMetrics
from pipeline.cluster.preemption import leaving
from pipeline.cluster.resources import await_room, worker_resources
from pipeline.cluster.session import ClusterError, ray_session, set_timeouts
from pipeline.cluster.watch import Watch
from pipeline.config import ClusterConfig, Config, absolute
from pipeline.evaluation.distance import DistanceMeter
from pipeline.evaluation.features import FeatureError
from pipeline.evaluation.protocol import ProtocolError
from pipeline.models.cips import Generator
from pipeline.ops.allocation import ENVIRONMENT
from pipeline.storage import is_remote, join
from pipeline.training.checkpoint import CheckpointError
from pipeline.training.graphs import GraphError
from pipeline.training.loop import Evaluate, Outcome, PlanError, TrainingDiverged, train
from pipeline.training.notes import kept_words
from pipeline.training.observers import Observer
from pipeline.training.world import World


def train_on_ray(config: Config, run_id: str | None) -> Outcome:
    """Runs the whole training on the cluster and returns what rank 0 came to.

    Args:
        run_id: the MLflow run that rank 0 logs to; None logs nowhere.

    Raises:
        ClusterError: the workers failed more often than `cluster.max_failures`, or found no room for longer than
            `cluster.worker_start_timeout_s`; names the cause and the fix.
    """
    start_timeout_s = config.cluster.worker_start_timeout_s
    with ray_session(config.cluster), Follower(config.run_uri, config.storage, start_timeout_s):
        return fit(config, run_id)


def fit(config: Config, run_id: str | None, callbacks: tuple[UserCallback, ...] = ()) -> Outcome:
    """Trains on the cluster that this process is connected to."""
    await_room(config.cluster)
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
        scaling_config=scaling_of(cluster),
        torch_config=NodeTorchConfig(timeout_s=cluster.collective_timeout_s),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=notes_folder(config),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                # Without end: preemptions cost time only, and `Watch` ends the search for room.
                max_preemption_failures=-1,
                controller_failure_limit=-1,
            ),
            callbacks=[Watch(cluster, config.run_uri, config.storage), *callbacks],
            worker_runtime_env={} if cluster.use_gpu else {"env_vars": ENVIRONMENT},
        ),
    )


def scaling_of(cluster: ClusterConfig) -> ScalingConfig:
    """How many workers, with what, and where: on as few machines as hold them, so that few gradients travel.

    Ray's controller of the run needs no resources and stays on the driver's machine.
    """
    elastic = cluster.fewest_workers < cluster.workers
    return ScalingConfig(
        num_workers=(cluster.fewest_workers, cluster.workers) if elastic else cluster.workers,
        elastic_resize_monitor_interval_s=cluster.resize_interval_s,
        use_gpu=cluster.use_gpu,
        resources_per_worker=worker_resources(cluster),
        placement_strategy="PACK",
    )


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker of the group runs; returns the `Outcome` as a dict.

    What all workers find wrong together would be found again after a restart: it is returned, not raised, so that
    Ray does not train the same pictures to the same end `cluster.max_failures` times.
    """
    config = Config.model_validate(settings["config"])
    with kept_words(config.run_uri, config.storage, ray.train.get_context().get_world_rank()):
        try:
            return asdict(_train(config, settings["run_id"]))
        except (TrainingDiverged, CheckpointError, PlanError, GraphError, ProtocolError, FeatureError) as error:
            return {"refused": str(error)}


def _train(config: Config, run_id: str | None) -> Outcome:
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    device = get_device()
    torch.set_num_threads(config.cluster.threads)
    say_where(world)
    observers: list[Observer] = []
    if world.rank == 0:
        observers.append(RayMetrics(config.run.name, world.size))
        if run_id:
            from pipeline.tracking.observer import RunObserver

            observers.append(RunObserver(config, run_id))
    evaluate = reported(config, device, world) if config.train.evaluate_kimg is not None else None
    return train(config.plan(), world, device, observers, evaluate, leaving)


def say_where(world: World) -> None:
    """Rank 0 says on which machines the workers run; a collective call."""
    addresses = [ray.util.get_node_ip_address()]
    if world.size > 1:
        every: list[Any] = [None] * world.size
        dist.all_gather_object(every, addresses[0])
        addresses = every
    if world.rank == 0:
        run = "1 worker runs" if world.size == 1 else f"{world.size} workers run"
        places = ", ".join(f"rank {rank} on {address}" for rank, address in enumerate(addresses))
        print(f"{run}: {places}", flush=True)


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


def notes_folder(config: Config) -> str | None:
    """Where Ray keeps its own notes about runs. On S3 they would need Ray's filesystem; nothing here reads them."""
    return None if is_remote(config.run.dir) else join(absolute(config.run.dir), ".ray")


def root_cause(failure: TrainingFailedError) -> str:
    """The first worker's own error where there is one, in one line, else the controller's, else Ray's."""
    failures = getattr(failure, "worker_failures", None) or {}
    for rank, cause in sorted(failures.items()):
        original = getattr(cause, "_base_exc", None) or cause
        return f"worker {rank}: {type(original).__name__}: {original}"
    if isinstance(failure, ControllerError):
        cause = failure.controller_failure
        return str(cause) if isinstance(cause, ClusterError) else f"{type(cause).__name__}: {cause}"
    return str(failure)
