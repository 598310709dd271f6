"""Room for workers: what a run asks for, what there is, and how long it waits for the cluster to grow."""

import time
from collections.abc import Mapping, Sequence

import ray
from ray.autoscaler.sdk import request_resources

from pipeline.cluster.session import ClusterError, is_local
from pipeline.config import ClusterConfig

Resources = Mapping[str, float]
"""Amounts by kind, such as {"CPU": 4, "GPU": 1}."""

LOOK_S = 1.0  # between two looks at the cluster
SAY_S = 30.0  # between two lines about it


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker reserves: its cores, and a whole GPU where it uses one."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.use_gpu else {})


def room(cluster: ClusterConfig, nodes: Sequence[Resources]) -> int:
    """How many workers fit on these nodes, each whole on one of them."""
    asked = worker_resources(cluster)
    return sum(int(min(node.get(kind, 0.0) // amount for kind, amount in asked.items())) for node in nodes)


def nodes_alive() -> list[Resources]:
    """What each node has in all, whoever uses it."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def shortage(cluster: ClusterConfig, nodes: Sequence[Resources]) -> str:
    """What is asked for and what there is, in words."""
    asked = worker_resources(cluster)
    there = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in asked}
    return (
        f"asked for {_workers(cluster.fewest_workers)} with {_amounts(asked)} each; there is room for "
        f"{room(cluster, nodes)}, with {_amounts(there)} on {len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    )


def remedy(cluster: ClusterConfig) -> str:
    """What a user can do about a shortage."""
    fewer = "" if cluster.min_workers else ", set cluster.min_workers to start with fewer"
    gpu = ", set cluster.use_gpu=false" if cluster.use_gpu else ""
    return (
        f"add machines, lower cluster.workers or cluster.cpus_per_worker{gpu}{fewer}, or wait longer "
        f"(cluster.worker_start_timeout_s={cluster.worker_start_timeout_s:g})"
    )


def await_room(cluster: ClusterConfig) -> None:
    """Returns when the cluster is large enough for the fewest workers of a run, whoever uses it at the moment.

    An autoscaling cluster is asked for all of them meanwhile. Ray Train waits for what others use.

    Raises:
        ClusterError: it is not, after `cluster.worker_start_timeout_s`, or at once on this machine alone.
    """
    if room(cluster, nodes_alive()) >= cluster.fewest_workers:
        return
    if is_local(cluster):
        raise ClusterError(
            f"no room for the workers on this machine: {shortage(cluster, nodes_alive())}; lower cluster.workers, set "
            "cluster.use_gpu=false, or join a larger cluster with cluster.address"
        )
    began, said = time.monotonic(), -SAY_S
    try:
        while room(cluster, nodes_alive()) < cluster.fewest_workers:
            waited = time.monotonic() - began
            if waited >= cluster.worker_start_timeout_s:
                raise ClusterError(
                    f"no room for the workers after {waited:.0f} s: {shortage(cluster, nodes_alive())}; "
                    f"{remedy(cluster)}"
                )
            if waited - said >= SAY_S:
                # Again each time: the request of another run takes the place of this one.
                request_resources(bundles=[worker_resources(cluster)] * cluster.workers)
                left = cluster.worker_start_timeout_s - waited
                print(f"waiting for machines, {left:.0f} s at most: {shortage(cluster, nodes_alive())}", flush=True)
                said = waited
            time.sleep(min(LOOK_S, cluster.worker_start_timeout_s))
    finally:
        request_resources(bundles=[])  # Ray Train asks for its workers itself


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count != 1 else ''}"


def _amounts(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
