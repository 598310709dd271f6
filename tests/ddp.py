"""Data-parallel worker processes on this machine, for tests: gloo between them, one thread each."""

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from pipeline.training.world import World

PATIENCE = datetime.timedelta(seconds=240)
"""How long a worker waits for the others."""


def on_workers(
    function: Callable[..., Any], sizes: Sequence[int], folder: Path, *arguments: Any
) -> dict[int, list[Any]]:
    """Calls function(world, *arguments) in every worker of worlds of these sizes, one world after another.

    Starting a process takes seconds: those of the largest world are started once and form the smaller ones too.
    function: at the top of a module; what it returns goes through `torch.save` (tensors, numbers, lists, dicts).
    Returns the results of each size, by rank. Raises what a worker raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.spawn(_process, (tuple(sizes), str(folder), function, arguments), nprocs=max(sizes))
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in sizes}


def _process(
    rank: int, sizes: tuple[int, ...], folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    for size in sizes:
        if rank >= size:
            continue
        meeting = f"file://{folder}/meeting-{size}"  # a file, unlike a port, nobody else can take meanwhile
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=PATIENCE)
        result = function(World(rank, size), *arguments)
        dist.destroy_process_group()
        torch.save(result, f"{folder}/{size}-{rank}.pt")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules are made and computed in this dtype inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as a worker has, inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
