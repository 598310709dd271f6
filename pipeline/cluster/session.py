"""This process's connection to a Ray cluster: a running one, or a new one on this machine."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from pipeline.config import ClusterConfig
from pipeline.config_cluster import LOCAL, address_of

ELASTIC_TRY_S = 10.0


class ClusterError(RuntimeError):
    """The cluster could not be reached, or a job on it failed."""


def is_local(cluster: ClusterConfig) -> bool:
    """Whether the cluster is this machine alone, started by this process."""
    return address_of(cluster) == LOCAL


def set_timeouts(cluster: ClusterConfig) -> None:
    """Ray Train reads these in the process that calls `fit`, and hands them to its controller and workers."""
    # Ray chooses the size of an elastic group from a list of machines that is up to 20 s old. A size that has no room
    # any more is tried for this long; `pipeline.cluster.watch` ends the tries.
    elastic = cluster.fewest_workers < cluster.workers
    start_s = min(ELASTIC_TRY_S, cluster.worker_start_timeout_s) if elastic else cluster.worker_start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_s)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(cluster.health_check_interval_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.health_check_timeout_s)
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = str(cluster.health_check_interval_s)
    # Reports of evaluations wait for all workers too, but not in torch.
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(cluster.collective_timeout_s)


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """Connects to `cluster.address`, else to RAY_ADDRESS, else starts head and workers here; ends what it began.

    Inside a process that is connected already (a Tune trial, a test) nothing is started or ended.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address_of(cluster)
    try:
        if address == LOCAL:
            # Two workers fit a machine of one core too, only slower.
            needed = cluster.workers * cluster.cpus_per_worker
            print(f"starting Ray on this machine for {cluster.workers} workers", flush=True)
            ray.init(
                address=LOCAL,
                num_cpus=max(os.cpu_count() or 1, needed),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            print(f"connecting to the Ray cluster at {address}", flush=True)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as cause:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {cause}\nStart one with `ray up ray_cluster.yaml` or "
            "`ray start --head`, or leave cluster.address empty for one on this machine"
        ) from cause
    try:
        yield
    finally:
        ray.shutdown()
