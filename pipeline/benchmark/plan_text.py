"""A plan as text of at most 120 columns, and as JSON."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import get_args

from pipeline.benchmark.order import REQUESTS_LIMIT, table
from pipeline.benchmark.plan_cards import PRICES_OF
from pipeline.benchmark.plan_cluster import HASH_RATE, LINK_SHARE, Checkpoint, Row
from pipeline.benchmark.plan_memory import FRAGMENTS, Memory, busiest_share, largest_part
from pipeline.benchmark.plan_worker import ADAM_BYTES, AVERAGE_BYTES, Planned
from pipeline.models.cips import Recompute

WIDTH = 120
GB = 1e9


def text(
    name: str, planned: Planned, rows: Sequence[Row], checkpoints: Mapping[int, Checkpoint], pictures_from: str
) -> str:
    """The whole plan. checkpoints: by the numbers of GPUs that are shown in detail."""
    parts = [
        heading(name, planned),
        f"FLOPs of training for one real {'patch' if planned.train.patch.size else 'picture'}, and its time on one GPU",
        table(FLOPS_HEADER, list(flops_rows(planned))),
        f"Memory of one GPU in GB, of {planned.card.memory_gb:g}; G, D, R1: activations of each phase, one at a time",
        table(MEMORY_HEADER, list(memory_rows(planned, list(checkpoints)))),
        f"Speed, cost and what binds, for {planned.train.total_kimg:,g} kimg",
        table(SPEED_HEADER, [speed_row(planned, one) for one in rows]),
        "\n".join(wrapped(notes(planned, rows, checkpoints))),
        "Assumed",
        "\n".join(wrapped(assumptions(planned, pictures_from))),
    ]
    return "\n\n".join(part for part in parts if part)


def heading(name: str, planned: Planned) -> str:
    """What is planned, on what."""
    model, train, card = planned.model, planned.train, planned.card
    patch = f"patches of {train.patch.size} of " if train.patch.size else ""
    return (
        f"{name} on {card.name} ({card.half_tflops:,g} TFLOP/s in {'bf16' if card.bf16 else 'fp16'}, "
        f"{card.memory_gb:g} GB at {card.bandwidth_gb:,g} GB/s)\n"
        f"{patch}{model.size}x{model.size}, G {planned.count.generator / 1e6:,.1f} M and D "
        f"{planned.count.discriminator / 1e6:,.1f} M parameters, batch {train.batch_size} in groups of "
        f"{model.discriminator.group}, products in {'bf16' if planned.half else 'fp32'}, "
        f"train.recompute={train.recompute}"
    )


# ---- tables --------------------------------------------------------------------------------------

FLOPS_HEADER = ("part", "GFLOP", "of all", "ms")


def flops_rows(planned: Planned) -> Iterator[Sequence[str]]:
    """Cells for each part of training, and their sum."""
    flops = planned.flops
    of_g, of_d, of_r1 = planned.generator_rate, planned.discriminator_rate, planned.r1_rate
    parts = (
        ("G forward, for D's update", flops.generator_for_discriminator, of_g),
        ("G forward, for its own", flops.generator_forward, of_g),
        ("G forward again (segments)", flops.generator_again, of_g),
        ("G backward", flops.generator_backward, of_g),
        ("D forward, real and fake", flops.discriminator_forward, of_d),
        ("D backward, real and fake", flops.discriminator_backward, of_d),
        ("D there and back, for G's update", flops.discriminator_for_generator, of_d),
        (f"R1 in fp32, each {planned.train.r1_interval} updates", flops.r1, of_r1),
        ("mapping", flops.mapping, of_g),
    )
    for name, count, rate in parts:
        if count:
            yield _flops_cells(name, count, count / flops.total, planned.scale * count / rate)
    yield _flops_cells("all", flops.total, 1.0, planned.scale * planned.image_seconds)


def _flops_cells(name: str, count: float, share: float, seconds: float) -> Sequence[str]:
    return (name.ljust(32), f"{count / 1e9:,.3f}", f"{share:.1%}", f"{1e3 * seconds:,.3f}")


MEMORY_HEADER = (
    "GPUs",
    "recompute",
    "pictures",
    "weights",
    "average",
    "Adam",
    "gradients",
    "G",
    "D",
    "R1",
    "peak",
    "fits",
)


def memory_rows(planned: Planned, asked: Sequence[int]) -> Iterator[Sequence[str]]:
    """Cells for each number of GPUs that was asked for and each way to recompute, with the configured accumulation."""
    train, group = planned.train, planned.model.discriminator.group
    ways = [
        (mode, replace(planned, train=train.model_copy(update={"recompute": mode}))) for mode in get_args(Recompute)
    ]
    for gpus in asked:
        share = busiest_share(max(train.batch_size, gpus * group), group, gpus)
        pictures = largest_part(share, group, train.accumulation)
        for mode, other in ways:
            memory, found = other.memory(pictures), other.fitting(share)
            fits = "no" if found is None else f"accumulation={found}"
            if found == min(train.accumulation, share // group):
                fits = "yes"
            sign = " *" if mode == train.recompute else ""
            yield (f"{gpus}", f"{mode}{sign}", f"{pictures}", *_memory_cells(memory), fits)


def _memory_cells(memory: Memory) -> Iterator[str]:
    kept = (memory.weights, memory.average, memory.adam, memory.gradients)
    for size in (*kept, memory.generator_update, memory.discriminator_update, memory.r1, memory.peak):
        yield f"{size / GB:,.2f}"


SPEED_HEADER = (
    "GPUs",
    "batch",
    "each",
    "GB",
    "img/s",
    "s/kimg",
    "days",
    "GPU hours",
    "USD",
    "reduce ms",
    "hidden",
    "MB/s",
    "GET/s",
    "binds",
)


def speed_row(planned: Planned, one: Row) -> Sequence[str]:
    """Cells for one number of GPUs."""
    grown = "*" if one.batch > planned.train.batch_size else ""
    return (
        f"{one.gpus}",
        f"{one.batch}{grown}",
        f"{one.share}",
        f"{one.memory.peak / GB:,.1f}" + ("" if one.fits else "!"),
        _figures(one.images_per_second),
        _figures(1000 / one.images_per_second),
        _figures(one.hours / 24),
        _figures(one.gpu_hours),
        _figures(one.usd),
        f"{1e3 * one.reduce_seconds:,.2f}" if one.gpus > 1 else "-",
        f"{one.hidden_share:.0%}" if one.gpus > 1 else "-",
        _figures(one.bytes_per_second / 1e6),
        _figures(one.gets_per_second),
        one.binds,
    )


def _figures(value: float) -> str:
    """Three digits or more."""
    if value < 0.001:
        return "<0.001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---- sentences -----------------------------------------------------------------------------------


def notes(planned: Planned, rows: Sequence[Row], checkpoints: Mapping[int, Checkpoint]) -> Iterator[str]:
    """What a reader of the tables should know."""
    train, group = planned.train, planned.model.discriminator.group
    groups = train.batch_size // group
    yield (
        "each: pictures of an update on the busiest GPU; GB: memory at its peak; reduce: all-reduce of an update, and "
        "the part that backward passes hide; MB/s and GET/s: from storage, by all GPUs"
    )
    if any(one.batch > train.batch_size for one in rows):
        yield (
            f"*: batch {train.batch_size} has {groups} minibatch-stddev groups of {group}, so at most {groups} GPUs "
            f"can share it; {2 * groups} need train.batch_size={2 * groups * group}. Rows with * have the least batch "
            f"for their GPUs: a training of its own, whose learning rate, R1 weight and number of updates are others"
        )
    for one in rows:
        if one.gpus in checkpoints and one.gpus <= groups and groups % one.gpus:
            yield (
                f"{_gpus(one.gpus)}: {groups} groups cannot be dealt evenly; the busiest has {one.share} pictures of "
                f"{one.batch} and sets the pace"
            )
        if not one.fits:
            yield (
                f"{_gpus(one.gpus)}: does not fit, not even {group} pictures at a time; train.recompute=segment, "
                f"train.patch.size or a card with more memory would help"
            )
        elif not one.fits_as_configured:
            yield (
                f"{_gpus(one.gpus)}: does not fit with train.accumulation={train.accumulation}; "
                f"train.accumulation={one.accumulation} does, and is what the row shows"
            )
        if one.gets_per_second > REQUESTS_LIMIT:
            yield f"{_gpus(one.gpus)}: {one.gets_per_second:,.0f} GETs a second; S3 has {REQUESTS_LIMIT:,} for a prefix"
    for gpus, checkpoint in checkpoints.items():
        yield checkpoint_note(planned, gpus, checkpoint)


def checkpoint_note(planned: Planned, gpus: int, one: Checkpoint) -> str:
    """Size, times and the pause of a checkpoint."""
    late = one.write_seconds > one.interval_seconds
    return (
        f"{_gpus(gpus)}: a checkpoint has {one.bytes / GB:,.3g} GB; copying it takes "
        f"{1e3 * one.copy_seconds:,.3g} ms, hashing and writing {one.write_seconds:,.3g} s in the background. A tick "
        f"of {planned.train.tick_kimg:g} kimg takes {one.tick_seconds:,.3g} s: a pause of {one.pause:.2%} where it has "
        f"a checkpoint, which is each {_figures(one.interval_seconds)} s"
        + (": sooner than it is written, train.checkpoint_kimg is too small" if late else "")
    )


def assumptions(planned: Planned, pictures_from: str) -> Iterator[str]:
    """Each with its value, and the option that replaces it."""
    card, assumed, train = planned.card, planned.assumed, planned.train
    yield rate_text(planned)
    if not card.bf16 and train.precision != "fp32":
        yield (
            f"precision: {card.name} multiplies fp16 ({card.half_tflops:g} TFLOP/s) and not bf16; nothing here trains "
            f"in fp16, so all products are in fp32"
        )
    yield "FLOPs: two for a multiply-add of a product or convolution; what else passes over the pixels is in the shares"
    if assumed.images_per_second is None:
        yield (
            f"Adam and the running average move {ADAM_BYTES} and {AVERAGE_BYTES} bytes a parameter at "
            f"{card.bandwidth_gb:,g} GB/s, once an update"
        )
    yield (
        "memory: weights, gradients (DDP's buckets are the same memory) and Adam in fp32; activations as "
        f"train.recompute keeps them; {FRAGMENTS - 1:.0%} for the allocator, {planned.context / GB:.0f} GB for a driver"
    )
    yield (
        f"all-reduce: a ring of fp32 gradients, at {LINK_SHARE:.0%} of {card.link_gb:,g} GB/s within a machine of "
        f"{card.per_node} and of {assumed.network_gbps:,g} Gbit/s for a machine between them (--network-gbps)"
    )
    yield (
        "hidden: behind the backward pass of an update's last part; not the gradient of the coordinate table, "
        f"{planned.count.table / planned.count.generator:.0%} of G's, which is whole only when that pass ends"
    )
    yield (
        f"storage: {assumed.storage_gbps:g} Gbit/s for a machine (--storage-gbps); a picture has "
        f"{assumed.picture_bytes / 1000:,.1f} kB (--picture-kb), from {pictures_from}; {assumed.rows_per_get:.0f} of "
        "them are one GET; nothing is cached"
    )
    yield (
        f"checkpoint: G, its average, D and both Adams in fp32; copied at {card.host_gb:g} GB/s while training waits, "
        f"hashed at {HASH_RATE / GB:g} GB/s, written by one worker at the rate of storage"
    )
    typical = "" if assumed.usd_per_hour != card.usd_per_hour else f", typical of clouds in {PRICES_OF}, rounded"
    yield f"price: {assumed.usd_per_hour:.2f} USD for one GPU for one hour{typical} (--price)"
    yield (
        f"schedule: train.total_kimg is {train.total_kimg:,g}; the authors' command has 1.2 million updates of 32 as "
        "its limit, 38,400 kimg. Evaluations, sample grids, start and restarts are left out"
    )


def rate_text(planned: Planned) -> str:
    """How the speed of one GPU is known."""
    card, assumed = planned.card, planned.assumed
    if assumed.images_per_second is not None:
        return f"speed: {assumed.images_per_second:g} img/s on one GPU, measured (--rate); parts are scaled to it"
    if assumed.product_tflops is not None:
        known = "measured (--matmul-tflops)"
    elif card.product_share == 1:
        known = "measured on two cores with AVX512-BF16 (--matmul-tflops)"
    else:
        known = f"{card.product_share:.0%} of the data sheet's peak (--matmul-tflops)"
    return (
        f"speed: matrix products in {'bf16' if planned.half else 'fp32'} reach {planned.product_rate / 1e12:,.4g} "
        f"TFLOP/s, {known}; G reaches {assumed.generator_share:.0%} of that (--share), D "
        f"{assumed.discriminator_share:.0%} (--share-discriminator), R1 {assumed.r1_share:.0%} of "
        f"{planned.exact_rate / 1e12:,.3g} TFLOP/s in fp32 (--share-r1); narrow models reach less"
    )


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' if number > 1 else ''}"


def wrapped(sentences: Iterator[str]) -> Iterator[str]:
    """A list, within the width of the page."""
    for sentence in sentences:
        yield textwrap.fill(
            sentence, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
        )


# ---- JSON ----------------------------------------------------------------------------------------


def as_json(
    name: str, planned: Planned, rows: Sequence[Row], checkpoints: Mapping[int, Checkpoint], pictures_from: str
) -> str:
    """Everything that was computed, in bytes, seconds and FLOPs."""
    content = {
        "config": name,
        "model": planned.model.model_dump(mode="json"),
        "train": planned.train.model_dump(mode="json"),
        "card": asdict(planned.card),
        "assumed": asdict(planned.assumed) | {"pictures_from": pictures_from},
        "parameters": asdict(planned.count),
        "flops_per_image": asdict(planned.flops) | {"total": planned.flops.total},
        "rows": [
            asdict(one)
            | {
                "memory": asdict(one.memory) | {"peak": one.memory.peak},
                "hidden_share": one.hidden_share,
                "hours": one.hours,
                "gpu_hours": one.gpu_hours,
                "usd": one.usd,
            }
            for one in rows
        ],
        "checkpoints": {gpus: asdict(one) | {"pause": one.pause} for gpus, one in checkpoints.items()},
    }
    return json.dumps(content, indent=1) + "\n"
