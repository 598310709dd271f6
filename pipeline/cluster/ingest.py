"""The parts of an ingest as Ray tasks: the same bytes as in processes of one machine."""

import functools
from collections.abc import Callable, Generator, Iterable

import ray

from pipeline.cluster.resources import await_room, one_worker
from pipeline.cluster.session import ClusterError, ray_session
from pipeline.config import ClusterConfig
from pipeline.ingest.making import Job, Runner, make_part
from pipeline.ingest.parts import Part
from pipeline.ingest.records import PartRecord
from pipeline.ingest.sources import Kind, Pictures, open_pictures
from pipeline.storage import StorageConfig

TASKS_PER_CORE = 2  # one that runs and one that waits, so that no core is idle and no queue grows
RETRIES = 5  # of a part whose node is lost


def ray_runner(cluster: ClusterConfig) -> Runner:
    """Makes the parts on all cores of the cluster at `cluster.address`, however many it has at the moment."""
    return functools.partial(_run, cluster)


def _run(
    cluster: ClusterConfig, job: Job, parts: Iterable[Part], tick: Callable[[int], object]
) -> Generator[PartRecord]:
    with ray_session(cluster):
        await_room(one_worker(cluster).model_copy(update={"cpus_per_worker": 1, "use_gpu": False}))
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_part)
        shared = ray.put(job)
        waiting = iter(parts)
        running: list[ray.ObjectRef] = []
        try:
            while True:
                room = TASKS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
                running += [task.remote(shared, part) for _, part in zip(range(room), waiting, strict=False)]
                if not running:
                    return
                done, running = ray.wait(running, num_returns=1)
                for record in _results(done):
                    tick(record.places)
                    yield record
        finally:
            for reference in running:
                ray.cancel(reference)


def _results(done: list[ray.ObjectRef]) -> list[PartRecord]:
    """Raises what a task raised, as it raised it."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a part of the ingest was lost {RETRIES + 1} times: {error}\nIf its worker ran out of memory, give the "
            f"cluster more of it for each core. The same command goes on with the parts that are not done"
        ) from error


def _part(job: Job, part: Part) -> PartRecord:
    """One task."""
    return make_part(job, part, _pictures(job.source, job.kind, job.storage.model_dump_json()), lambda count: None)


@functools.lru_cache(maxsize=1)
def _pictures(source: str, kind: Kind, storage: str) -> Pictures:
    """The source, opened once in each of Ray's worker processes: they run many tasks."""
    return open_pictures(source, kind, StorageConfig.model_validate_json(storage))
