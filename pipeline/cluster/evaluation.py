"""The distance of one generator, its pictures dealt to the cluster's workers as tasks."""

from typing import Any

import ray
import torch
from tqdm import tqdm

from pipeline.cluster.resources import await_room, one_worker
from pipeline.cluster.session import ray_session
from pipeline.config import Config
from pipeline.evaluation.distance import DistanceMeter
from pipeline.evaluation.frechet import measure
from pipeline.evaluation.metrics import Moments
from pipeline.evaluation.protocol import Result
from pipeline.models.cips import Generator

PARTS_PER_WORKER = 4  # so that the progress bar moves, and a slow worker holds nobody up


def evaluate_on_ray(config: Config, generator: Generator) -> Result:
    """Measures a generator on all workers of the cluster, with a progress bar over the pictures."""
    cluster = config.cluster
    with ray_session(cluster):
        await_room(one_worker(cluster))
        meter = meter_of(config, torch.device("cpu"))
        kept = meter.kept()
        parts = min(cluster.workers * PARTS_PER_WORKER, meter.protocol.images, meter.protocol.real_images)
        task = ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=int(cluster.use_gpu))(_moments)
        settings, weights = ray.put(config.anchored().model_dump(mode="json")), ray.put(generator)
        waiting = [task.remote(settings, weights, part, parts) for part in range(parts)]
        if kept is None:
            waiting += [task.remote(settings, None, part, parts) for part in range(parts)]
        generated, real = _gathered(waiting)
        if real is not None:
            meter.keep(real)
        return measure(meter.real(), generated, meter.protocol)


def meter_of(config: Config, device: torch.device, part: int = 0, parts: int = 1) -> DistanceMeter:
    """The meter of a configuration, for one of several parts of the pictures."""
    return DistanceMeter(
        config.evaluate, config.data, config.model.size, config.storage, config.statistics_uri, device, part, parts
    )


def _moments(settings: dict[str, Any], generator: Generator | None, part: int, parts: int) -> tuple[bool, Moments]:
    """One task: moments of a part of the generated pictures, or of the real ones where there is no generator.

    They leave the GPU here, for the machine that they go to may have none.
    """
    config = Config.model_validate(settings)
    torch.set_num_threads(config.cluster.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = meter_of(config, device, part, parts)
    moments = meter.real_part() if generator is None else meter.generated_part(generator.to(device))
    return generator is not None, Moments.from_arrays(moments.to_arrays())


def _gathered(waiting: list[ray.ObjectRef]) -> tuple[Moments, Moments | None]:
    """Sums the parts as they come; integer counts make the order matter to the last bits of the sums only."""
    totals: dict[bool, Moments] = {}
    done: dict[ray.ObjectRef, tuple[bool, Moments]] = {}
    bar = tqdm(total=len(waiting), desc="evaluate", unit="part")
    pending = list(waiting)
    while pending:
        ready, pending = ray.wait(pending)
        for reference in ready:
            done[reference] = ray.get(reference)
            bar.update()
    bar.close()
    for reference in waiting:  # in the order of the parts, whatever the order of arrival
        generated, part = done[reference]
        totals[generated] = totals[generated].merge(part) if generated in totals else part
    return totals[True], totals.get(False)
