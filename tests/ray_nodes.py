"""Ray clusters for tests: several real nodes on this machine, without tokens, ended with the test."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster


@contextlib.contextmanager
def ray_nodes(count: int, cpus: int, **head: Any) -> Iterator[str]:
    """A cluster whose head runs no work and whose `count` nodes have `cpus` each; yields its address."""
    with ray_cluster(count, cpus, **head) as cluster:
        yield cluster.address


@contextlib.contextmanager
def ray_cluster(count: int, cpus: int, **head: Any) -> Iterator[Cluster]:
    """The same cluster, to which nodes can be added and from which they can be removed.

    Its nodes have this process's environment, so that S3 credentials reach the workers.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.getcwd())
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **head})
        try:
            for _ in range(count):
                cluster.add_node(num_cpus=cpus)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
