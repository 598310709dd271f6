"""Runs a function in fresh processes: one alone, or several that form a process group, each on cores of its own."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from pipeline.training.world import World

A = TypeVar("A")
R = TypeVar("R")
Work = Callable[[A, World, torch.device], R]
DEADLINE_S = 600.0
"""For the slowest of a team to come to a sum."""


def run_team(work: Work[A, R], argument: A, *, size: int = 1, threads: int = 1, apart: bool = False) -> list[R]:
    """The results of `work(argument, world, device)` in `size` new processes, by rank.

    work: a function of a module; the argument and the result are pickled.
    threads: of each process's tensor operations; a process has as many cores of its own where there are enough.
    apart: each process is a world of its own; they only run at the same time.
    """
    cores = cores_for(sorted(os.sched_getaffinity(0)), size, threads)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        meeting = Path(folder, "meeting")
        with ProcessPoolExecutor(size, mp_context=context) as pool:
            results: list[Future[R]] = [
                pool.submit(_member, work, argument, World(rank, size), meeting, cores[rank], threads, apart)
                for rank in range(size)
            ]
            return [result.result() for result in results]


def cores_for(there: Sequence[int], size: int, threads: int) -> list[list[int]]:
    """Cores of each of `size` processes: its own where there are enough for all, else all of them."""
    if size * threads > len(there):
        return [list(there)] * size
    return [list(there[rank * threads : (rank + 1) * threads]) for rank in range(size)]


def device_of(rank: int) -> torch.device:
    """The worker's GPU where there are any, else the CPU."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def pin(cores: Sequence[int], threads: int) -> None:
    """Keeps this thread, and those that it will start, on some cores."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def _member(
    work: Work[A, R], argument: A, world: World, meeting: Path, cores: list[int], threads: int, apart: bool
) -> R:
    pin(cores, threads)
    device = device_of(world.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _meet(world, meeting, device)
    try:
        return work(argument, World() if apart else world, device)
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def _meet(world: World, meeting: Path, device: torch.device) -> None:
    """All are up before any begins, also those that work apart."""
    if world.size == 1:
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting}",
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=DEADLINE_S),
    )
    world.agree(0)
