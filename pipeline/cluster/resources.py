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


def shortage(cluster: ClusterConfig, nodes: Sequence[Resources], free: Resources) -> str:
    """What is asked for, what there is, and how much of it nobody uses, in words."""
    asked = worker_resources(cluster)
    there = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in asked}
    unused = {kind: free.get(kind, 0.0) for kind in asked}
    return (
        f"asked for {_workers(cluster.fewest_workers)} with {_amounts(asked)} each; there is room for "
        f"{room(cluster, nodes)}, with {_amounts(there)} on {len(nodes)} node{'s' if len(nodes) != 1 else ''}, "
        f"of which {_amounts(unused)} are free"
    )


def shortage_now(cluster: ClusterConfig) -> str:
    """`shortage` of the cluster that this process is connected to."""
    return shortage(cluster, nodes_alive(), ray.available_resources())


def one_worker(cluster: ClusterConfig) -> ClusterConfig:
    """The same asking for a single worker: what tasks need, of which each finds its own place."""
    return cluster.model_copy(update={"workers": 1, "min_workers": None})


def is_busy(cluster: ClusterConfig, free: Resources) -> bool:
    """Whether what nobody uses cannot hold the fewest workers of a run."""
    return any(free.get(kind, 0.0) < cluster.fewest_workers * each for kind, each in worker_resources(cluster).items())


def remedy(cluster: ClusterConfig) -> str:
    """What a user can do about a shortage."""
    ways = ["add machines"]
    if cluster.fewest_workers > 1:
        ways.append("lower cluster.workers")
    if cluster.cpus_per_worker > 1:
        ways.append("lower cluster.cpus_per_worker")
    if cluster.use_gpu:
        ways.append("set cluster.use_gpu=false")
    if cluster.fewest_workers > 1 and not cluster.min_workers:
        ways.append("set cluster.min_workers to start with fewer")
    return f"{', '.join(ways)}, or wait longer (cluster.worker_start_timeout_s={cluster.worker_start_timeout_s:g})"


def await_room(cluster: ClusterConfig) -> None:
    """Returns when the cluster is large enough for the fewest workers of a run, whoever uses it at the moment.

    An autoscaling cluster is asked for all of them meanwhile. For what others use Ray itself waits; this only says so.

    Raises:
        ClusterError: it is not, after `cluster.worker_start_timeout_s`, or at once on this machine alone.
    """
    if room(cluster, nodes_alive()) >= cluster.fewest_workers:
        if is_busy(cluster, ray.available_resources()):
            print(f"waiting for others to give back what they use: {shortage_now(cluster)}", flush=True)
        return
    if is_local(cluster):
        raise ClusterError(
            f"no room for the workers on this machine: {shortage_now(cluster)}; lower cluster.workers, set "
            "cluster.use_gpu=false, or join a larger cluster with cluster.address"
        )
    began, said = time.monotonic(), -SAY_S
    try:
        while room(cluster, nodes_alive()) < cluster.fewest_workers:
            waited = time.monotonic() - began
            if waited >= cluster.worker_start_timeout_s:
                raise ClusterError(
                    f"no room for the workers after {waited:.0f} s: {shortage_now(cluster)}; {remedy(cluster)}"
                )
            if waited - said >= SAY_S:
                # Again each time: the request of another run takes the place of this one.
                request_resources(bundles=[worker_resources(cluster)] * cluster.workers)
                left = cluster.worker_start_timeout_s - waited
                print(f"waiting for machines, {left:.0f} s at most: {shortage_now(cluster)}", flush=True)
                said = waited
            time.sleep(min(LOOK_S, cluster.worker_start_timeout_s))
    finally:
        request_resources(bundles=[])  # Ray Train asks for its workers itself


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count != 1 else ''}"


def _amounts(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
