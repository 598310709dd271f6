"""Who computes what: this worker's place among the workers, and its share of the global batch (promise 4)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among the workers; with one worker no process group is needed."""

    rank: int = 0
    size: int = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the workers in place, the same on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: int) -> int:
        """Rank 0's value, on every worker."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64)
        if dist.get_backend() == "nccl":
            box = box.cuda()
        dist.broadcast(box, src=0)
        return int(box.item())


def share_of(world: World, batch_size: int, group: int) -> range:
    """Positions of the global batch that this worker computes: whole minibatch-stddev groups, contiguous.

    Workers may hold unequal numbers of groups; every worker holds at least one.

    Raises:
        ValueError: if the batch is no multiple of the group, or there are fewer groups than workers.
    """
    if batch_size % group:
        raise ValueError(
            f"train.batch_size is {batch_size}, no multiple of the minibatch-stddev group of {group}; "
            f"use {batch_size // group * group or group} or {(batch_size // group + 1) * group}"
        )
    groups = batch_size // group
    if groups < world.size:
        raise ValueError(
            f"train.batch_size {batch_size} has {groups} minibatch-stddev groups of {group} for {world.size} workers; "
            f"use at most {groups} workers or a batch of at least {world.size * group}"
        )
    first, last = groups * world.rank // world.size, groups * (world.rank + 1) // world.size
    return range(first * group, last * group)


def parts_of(share: range, group: int, accumulation: int) -> list[slice]:
    """Cuts a worker's share into `accumulation` parts of whole groups (fewer where it has fewer groups).

    Slices index the worker's own share, 0 .. len(share) - 1.
    """
    groups = len(share) // group
    parts = min(accumulation, groups)
    edges = [groups * number // parts * group for number in range(parts + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
