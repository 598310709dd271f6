"""A stretch of training's updates in this process, measured: time by phase, peak memory, the matrix product's rate."""

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.benchmark.clock import Clock, finish
from pipeline.benchmark.matmul import measured_rate
from pipeline.benchmark.memory import current_bytes, peak_bytes, reset_peak
from pipeline.data.manifest import read_manifest
from pipeline.data.stream import DataConfig, DataStream
from pipeline.models.build import ModelConfig
from pipeline.ops.allocation import keep_freed_memory
from pipeline.storage import StorageConfig
from pipeline.training import phases as phase
from pipeline.training.phases import Phases, unwatched
from pipeline.training.settings import TrainConfig
from pipeline.training.state import TrainState, adam, build_state
from pipeline.training.step import Updates
from pipeline.training.world import World

OTHER = "other"
"""Reading the uint8 pictures, the losses, and what lies between the phases."""
DATA_WAIT = "data wait"
WARM_UPDATES = 3
"""Before the measured ones: libraries choose kernels, Adam makes its moments, DDP its buckets."""


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long."""

    model: ModelConfig
    train: TrainConfig
    seed: int
    updates: int
    data: DataConfig | None = None
    """Where pictures come from; None makes some up, and nobody waits for them."""
    storage: StorageConfig = StorageConfig()
    reference: bool = False
    """The published form of the generator, the whole step in fp32 (TF32 on CUDA)."""
    rate_seconds: float = 1.0
    """How long the matrix product is measured, for each dtype."""


@dataclass(frozen=True)
class Measured:
    """What came of one stretch. Seconds are those of one update."""

    seconds: dict[str, float]
    """By phase, with R1 spread over its interval, and with OTHER; DATA_WAIT where there is data."""
    peak_bytes: int
    """Most memory at once while training, the process (CPU) or the device (CUDA)."""
    above_bytes: int
    """Of that, what came on top of the weights, Adam's moments and (CPU) the program itself."""
    rates: dict[str, float]
    """FLOP/s of the matrix product in the dtypes of this run, by name."""
    precision: str

    @property
    def total(self) -> float:
        """Seconds of one update."""
        return sum(self.seconds.values())


def measure_updates(case: Case, world: World, device: torch.device) -> Measured:
    """Trains `case.updates` updates, of which the first has R1, after some that are not measured."""
    clock = Clock(device)
    updates = quiet_updates(case, world, device, clock)
    rates = {name: measured_rate(dtype, device, seconds=case.rate_seconds) for name, dtype in _dtypes(updates).items()}
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_stream(case, updates, device)) if case.data is not None else None
        next_pictures = pictures(updates, device) if stream is None else stream.__next__
        for _ in range(WARM_UPDATES):
            updates(next_pictures())
        clock.reset()
        updates.state.optimizer_discriminator.zero_grad(set_to_none=True)
        updates.state.optimizer_generator.zero_grad(set_to_none=True)
        finish(device)
        reset_peak(device)
        base = current_bytes(device)
        updates.state.images_seen, waited = 0, stream.wait_seconds if stream else 0.0
        began = time.perf_counter()
        for _ in range(case.updates):
            updates(next_pictures())
        finish(device)
        wall = time.perf_counter() - began
        waited = stream.wait_seconds - waited if stream else 0.0
    phases, visits = clock.seconds(), clock.visits()
    seconds = per_update(phases, visits[phase.D_R1], case.updates, case.train.r1_interval)
    rest = max(0.0, wall - sum(phases.values()))
    waited = min(waited, rest)  # what CUDA computed while this process waited for data is no wait
    seconds[OTHER] = (rest - waited) / case.updates
    if stream is not None:
        seconds[DATA_WAIT] = waited / case.updates
    precision = "bf16" if updates.precision == torch.bfloat16 else "fp32"
    peak = peak_bytes(device)
    return Measured(seconds, peak, max(0, peak - base), rates, precision)


def per_update(totals: dict[str, float], r1_visits: int, updates: int, r1_interval: int) -> dict[str, float]:
    """Totals of a stretch to seconds of one update; R1's own cost is divided by its interval, not by chance."""
    found = {name: total / updates for name, total in totals.items() if name != phase.D_R1}
    if r1_visits:
        found[phase.D_R1] = totals[phase.D_R1] / r1_visits / r1_interval
    return {name: found[name] for name in phase.MEANING if name in found}


def quiet_updates(case: Case, world: World, device: torch.device, phases: Phases = unwatched) -> Updates:
    """The updates of a case, which here do not print which precision they chose."""
    if device.type == "cpu":
        keep_freed_memory()  # as jobs.train does
    published = {"precision": "fp32", "cuda_graphs": False}
    train = case.train.model_copy(update=published) if case.reference else case.train
    state = build_state(case.model, train, case.seed, device)
    if case.reference:
        use_generator(state, reference_of(case.model), train, device)
    with contextlib.redirect_stdout(io.StringIO()):
        updates = Updates(train, case.model, case.seed, state, world, device, phases)
    if case.reference:  # published code leaves TF32 on
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return updates


def reference_of(model: ModelConfig) -> nn.Module:
    """The published form of the generator."""
    from pipeline.benchmark.reference import reference_generator

    return reference_generator(model)


def use_generator(state: TrainState, generator: nn.Module, train: TrainConfig, device: torch.device) -> None:
    """Puts another form of the generator, with the same parameters, in the place of the state's own."""
    generator.load_state_dict(state.generator.state_dict())
    state.generator = generator.to(device)  # type: ignore[assignment]
    state.optimizer_generator = adam(state.generator, train, 4 / 5)


def pictures(updates: Updates, device: torch.device) -> Callable[[], Tensor]:
    """Gives the same made-up uint8 pictures (B, H, W, 3) of this worker's share again and again."""
    generator = torch.Generator().manual_seed(updates.seed)
    shape = (len(updates.share), updates.size, updates.size, 3)
    pictures_BHWC = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    return lambda: pictures_BHWC


@contextlib.contextmanager
def _stream(case: Case, updates: Updates, device: torch.device) -> Iterator[DataStream]:
    assert case.data is not None
    with DataStream(
        read_manifest(case.data.uri, case.storage),
        case.data,
        case.storage,
        seed=case.seed,
        batch_size=case.train.batch_size,
        positions=updates.share,
        size=case.model.size,
        device=device,
    ) as stream:
        yield stream


def _dtypes(updates: Updates) -> dict[str, torch.dtype]:
    """R1 is fp32 always."""
    found = {"fp32": torch.float32}
    if updates.precision == torch.bfloat16:
        found["bf16"] = torch.bfloat16
    return found
