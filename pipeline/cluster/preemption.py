"""Notices that a machine will be taken away, as Ray Train's workers hear of them.

A cloud's agent, Kubernetes' SIGTERM or a person drains a Ray node (`ray drain-node`). Ray Train looks for drained
nodes each `cluster.health_check_interval_s`, tells all workers, lets them go on until the machine is gone, and starts
them again from the latest checkpoint; that counts as no failure.
"""

from ray.train.v2._internal.execution.context import get_train_context


def leaving() -> bool:
    """Whether a node of this worker group will be taken away; only looks at what this worker was told.

    `ray.train.get_preemption_info` gives what rank 0 was told to all workers, but is a barrier: too dear for each
    update, and not needed, since rank 0 alone writes checkpoints.
    """
    return get_train_context().preemption_context.preemption_info is not None
