"""Any collective work in Ray Train's workers, for a comparison with plain processes."""

import tempfile
from collections.abc import Callable
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from pipeline.cluster.interfaces import NodeTorchConfig
from pipeline.cluster.session import ray_session, set_timeouts
from pipeline.config import ClusterConfig
from pipeline.ops.allocation import ENVIRONMENT
from pipeline.training.world import World

Work = Callable[[Any, World, torch.device, Callable[[], None]], Any]


def run_on_ray(work: Work, argument: Any, cluster: ClusterConfig, workers: int, threads: int) -> list[Any]:
    """The results of `work(argument, world, device, report)` in the workers of a TorchTrainer, by rank.

    Ray is started for it and ended after it, unless this process is connected to a cluster already.

    work: a function of a module; `report` tells Ray Train of progress and must be called equally often by all.
    threads: of each worker's tensor operations, and cores that it reserves.
    """
    asked = cluster.model_copy(update={"workers": workers, "cpus_per_worker": threads, "threads_per_worker": threads})
    set_timeouts(asked)
    with ray_session(asked), tempfile.TemporaryDirectory(prefix="benchmark-ray-") as folder:
        trainer = TorchTrainer(
            worker,
            train_loop_config={"work": work, "argument": argument, "threads": threads},
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=torch.cuda.is_available(), resources_per_worker={"CPU": threads}
            ),
            torch_config=NodeTorchConfig(timeout_s=asked.collective_timeout_s),
            run_config=RunConfig(
                name="benchmark",
                storage_path=folder,
                worker_runtime_env={} if torch.cuda.is_available() else {"env_vars": ENVIRONMENT},
            ),
        )
        found: list[Any] = trainer.fit().return_value
        return found


def worker(settings: dict[str, Any]) -> list[Any]:
    """What each worker runs; rank 0 gives Ray the results of all."""
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(settings["threads"])
    result = settings["work"](settings["argument"], world, get_device(), lambda: ray.train.report({"done": 1}))
    results: list[Any] = [result]
    if world.size > 1:
        results = [None] * world.size
        dist.all_gather_object(results, result)
    return results
