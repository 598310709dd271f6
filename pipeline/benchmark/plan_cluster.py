"""A cluster of any size: how fast it trains, what that costs, and which resource binds it."""

from dataclasses import dataclass
from typing import Literal

from pipeline.benchmark.plan_cards import Card
from pipeline.benchmark.plan_memory import Memory, busiest_share, largest_part
from pipeline.benchmark.plan_worker import Planned

Binding = Literal["compute", "memory", "network", "storage", "groups"]

LINK_SHARE = 0.8
"""Part of a link's bytes per second that an all-reduce reaches."""
HASH_RATE = 1.5e9
"""Bytes per second of SHA-256 on one core."""


@dataclass(frozen=True)
class Row:
    """What a number of GPUs gives."""

    gpus: int
    batch: int
    """Global batch; the configured one, or the least with a minibatch-stddev group for each GPU."""
    share: int
    """Pictures of an update on the busiest GPU."""
    accumulation: int
    """In so many parts; the configured number where it fits, else the least that does."""
    memory: Memory
    fits: bool
    """With `accumulation`."""
    fits_as_configured: bool
    compute_seconds: float
    """Of an update, on the busiest GPU."""
    reduce_seconds: float
    """All-reduce of an update, whether hidden or not."""
    exposed_seconds: float
    """The part of it that no backward pass hides."""
    images_per_second: float
    total_images: int
    bytes_per_second: float
    gets_per_second: float
    usd_per_hour: float
    """Of all GPUs."""
    binds: Binding

    @property
    def hidden_share(self) -> float:
        """Of the all-reduce; 1 where there is none."""
        return 1 - self.exposed_seconds / self.reduce_seconds if self.reduce_seconds else 1.0

    @property
    def hours(self) -> float:
        """For the whole schedule."""
        return self.total_images / self.images_per_second / 3600

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.hours

    @property
    def usd(self) -> float:
        return self.usd_per_hour * self.hours


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's size and times."""

    bytes: int
    copy_seconds: float
    """From the card to the machine's memory: training waits for this."""
    write_seconds: float
    """Hashing and writing, in the background."""
    tick_seconds: float
    interval_seconds: float
    """Between checkpoints."""

    @property
    def pause(self) -> float:
        """Share of a tick in which training waits for the copy."""
        return self.copy_seconds / self.tick_seconds


def row(planned: Planned, gpus: int) -> Row:
    """What so many GPUs give; with too few minibatch-stddev groups for them, by the least batch that has enough."""
    model, train, card, assumed = planned.model, planned.train, planned.card, planned.assumed
    group = model.discriminator.group
    batch = max(train.batch_size, gpus * group)
    share = busiest_share(batch, group, gpus)
    found = planned.fitting(share)
    configured = min(train.accumulation, share // group)
    accumulation = share // group if found is None else found
    compute = planned.compute_seconds(share)
    reduce, exposed = reduce_seconds(planned, gpus, share / accumulation)
    nodes = -(-gpus // card.per_node)
    trained = batch / (compute + exposed)
    stored = nodes * assumed.storage_gbps * 1e9 / 8 / assumed.picture_bytes
    rate = min(trained, stored)
    binds: Binding = "compute"
    if batch > train.batch_size:
        binds = "groups"
    elif found != configured:
        binds = "memory"
    elif stored < trained:
        binds = "storage"
    elif exposed > compute:
        binds = "network"
    return Row(
        gpus=gpus,
        batch=batch,
        share=share,
        accumulation=accumulation,
        memory=planned.memory(largest_part(share, group, accumulation)),
        fits=found is not None,
        fits_as_configured=found == configured,
        compute_seconds=compute,
        reduce_seconds=reduce,
        exposed_seconds=exposed,
        images_per_second=rate,
        total_images=train.model_copy(update={"batch_size": batch}).total_images,
        bytes_per_second=rate * assumed.picture_bytes,
        gets_per_second=rate / assumed.rows_per_get,
        usd_per_hour=gpus * assumed.usd_per_hour,
        binds=binds,
    )


# ---- network -------------------------------------------------------------------------------------


def link_bytes(card: Card, network_gbps: float, gpus: int) -> float:
    """Bytes per second of a ring over so many GPUs, where it is narrowest."""
    within = 1e9 * card.link_gb
    across = 1e9 / 8 * network_gbps
    if gpus <= card.per_node:
        return LINK_SHARE * within
    return LINK_SHARE * min(within, across)


def ring_seconds(size: float, gpus: int, bytes_per_second: float) -> float:
    """All-reduce of so many bytes: each GPU sends and receives 2 (n - 1) / n of them."""
    return 2 * (gpus - 1) / gpus * size / bytes_per_second


def reduce_seconds(planned: Planned, gpus: int, part: float) -> tuple[float, float]:
    """All-reduce of one update, and what of it is not hidden; part: pictures of the last part of an update.

    Only the last part's backward pass hides anything. The gradient of the coordinate table, three quarters of G's, is
    whole at the very end of that pass, when there is nothing left to hide behind.
    """
    count, flops = planned.count, planned.flops
    speed = link_bytes(planned.card, planned.assumed.network_gbps, gpus)
    scale = part * planned.scale
    table = ring_seconds(4 * count.table, gpus, speed)
    rest = ring_seconds(4 * (count.generator - count.table), gpus, speed)
    of_d = ring_seconds(4 * count.discriminator, gpus, speed)
    behind_g = scale * flops.generator_backward / planned.generator_rate
    behind_d = scale * flops.discriminator_backward / planned.discriminator_rate
    every = planned.train.r1_interval
    r1 = of_d / every if flops.r1 else 0.0
    behind_r1 = scale * flops.r1 / planned.r1_rate / 3  # its last third: backward through all; per update already
    exposed = table + max(0.0, rest - behind_g) + max(0.0, of_d - behind_d) + max(0.0, r1 - behind_r1)
    return table + rest + of_d + r1, exposed


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint_of(planned: Planned, one: Row) -> Checkpoint:
    """A checkpoint in a run of that speed: G, its average, D and both Adams in fp32, written by one worker."""
    count, train = planned.count, planned.train
    trained = count.generator + count.discriminator
    size = 4 * (trained + count.generator + 2 * count.mean_w) + 8 * trained
    return Checkpoint(
        bytes=size,
        copy_seconds=size / (1e9 * planned.card.host_gb),
        write_seconds=size / HASH_RATE + size / (1e9 / 8 * planned.assumed.storage_gbps),
        tick_seconds=train.period(train.tick_kimg) / one.images_per_second,
        interval_seconds=train.period(train.checkpoint_kimg) / one.images_per_second,
    )
