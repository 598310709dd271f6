"""How fast one worker of several trains, and how long it does nothing but wait for sums over the workers."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.benchmark.clock import Stamp, finish, seconds_between, stamp
from pipeline.benchmark.updates import WARM_UPDATES, Case, pictures, quiet_updates
from pipeline.training.step import Updates
from pipeline.training.world import World

TRANSFERS = 9
"""Sums of which the median is taken."""


@dataclass(frozen=True)
class Pace:
    """One worker's stretch. Seconds are those of one update."""

    seconds: float
    cpu: float
    """Processor time of all threads of the process."""
    waiting: float
    """From the worker's own last gradient to the last sum: slower workers, and what could not be hidden."""
    transfer: float
    """The same sums when nobody computes and all begin together: what only a faster network would shorten."""


class Waiting:
    """Time between a worker's last gradient of a backward and the end of that backward, which has all sums.

    Stands in for DDP's own summation (`hook`) and for the phases of an update (`__call__`).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._launched: Stamp | None = None
        self._spans: list[tuple[Stamp, Stamp]] = []

    def hook(self, group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """A communication hook of DDP that computes what DDP does without one."""
        self._launched = stamp(self.device)
        return allreduce_hook(group, bucket)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        yield
        if self._launched is not None:  # the phase was a backward that has just ended
            self.add(self._launched)
            self._launched = None

    def add(self, began: Stamp) -> None:
        """Counts the time from then to now."""
        self._spans.append((began, stamp(self.device)))

    def seconds(self) -> float:
        """In all so far."""
        finish(self.device)
        return sum(seconds_between(*span) for span in self._spans)

    def reset(self) -> None:
        """Forgets everything so far."""
        self._spans.clear()


@dataclass(frozen=True)
class TimedWorld(World):
    """A world whose sums are counted as waiting."""

    waiting: Waiting = field(default_factory=lambda: Waiting(torch.device("cpu")))

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor
        began = stamp(self.waiting.device)
        super().sum_(tensor)
        self.waiting.add(began)
        return tensor


@dataclass(frozen=True)
class Stretch:
    """What every worker does: a case whose batch grows with the workers."""

    case: Case
    pictures: int
    """Of each worker."""


def measure_pace(
    stretch: Stretch, world: World, device: torch.device, report: Callable[[], None] = lambda: None
) -> Pace:
    """This worker's pace over `case.updates` updates of its share; all workers call it together.

    report: called once at the end of the stretch, within the time that counts, as at a tick.
    """
    waiting = Waiting(device)
    train = stretch.case.train.model_copy(update={"batch_size": stretch.pictures * world.size})
    timed = TimedWorld(world.rank, world.size, waiting)
    updates = quiet_updates(replace(stretch.case, train=train), timed, device, waiting)
    for module in (updates.generator, updates.discriminator):
        if isinstance(module, DistributedDataParallel):
            module.register_comm_hook(None, waiting.hook)
    next_pictures = pictures(updates, device)
    for _ in range(WARM_UPDATES):
        updates(next_pictures())
    updates.state.images_seen = 0
    world.agree(0)
    finish(device)
    waiting.reset()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(stretch.case.updates):
        updates(next_pictures())
    report()
    finish(device)
    seconds = (time.perf_counter() - began) / stretch.case.updates
    cpu = (time.process_time() - cpu) / stretch.case.updates
    return Pace(seconds, cpu, waiting.seconds() / stretch.case.updates, transfer_seconds(updates, world, device))


def transfer_seconds(updates: Updates, world: World, device: torch.device) -> float:
    """Seconds that the sums of one update take by themselves: all gradients of G and of D, R1's share included."""
    if world.size == 1:
        return 0.0
    train = updates.train
    often = 1 + (1 / train.r1_interval if train.r1_gamma > 0 else 0)
    return _sum_seconds(updates.state.generator, world, device) + often * _sum_seconds(
        updates.state.discriminator, world, device
    )


def _sum_seconds(module: torch.nn.Module, world: World, device: torch.device) -> float:
    numbers = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    flat = torch.zeros(numbers, device=device)
    took = []
    for _ in range(TRANSFERS):
        world.agree(0)  # together
        began = time.perf_counter()
        world.sum_(flat)
        finish(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took)
