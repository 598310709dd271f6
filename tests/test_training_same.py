"""The same training whatever the workers and the accumulation: 1 to 4 workers, 1 to 4 parts (promise 4).

All that could tell workers apart is on: R1, minibatch stddev, noise, flips, patches with strides, and shares that
three workers cannot divide evenly. In float64 only the order of sums differs, so parameters agree to 1e-8.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.data.manifest import read_manifest
from pipeline.data.stream import DataConfig, DataStream
from pipeline.models.build import DiscriminatorConfig
from pipeline.models.layers import ModulatedLinear
from pipeline.storage import StorageConfig
from pipeline.training.settings import TrainConfig
from pipeline.training.state import TrainState, build_state
from pipeline.training.step import Updates
from pipeline.training.world import World, parts_of, share_of
from tests.ddp import default_dtype, on_workers, one_thread
from tests.small import SMALL_MODEL, small_data, small_train

CPU = torch.device("cpu")
SEED, BATCH, UPDATES = 3, 32, 20
MODEL = SMALL_MODEL.model_copy(update={"discriminator": DiscriminatorConfig(channel_base=128, channel_max=8)})
WORKERS, ACCUMULATIONS = (1, 2, 3, 4), (1, 2, 4)
PATCHES: dict[str, Any] = {"patch": {"size": 8, "strides": [1, 2]}}
RATES = {torch.float64: 0.002, torch.float32: 0.0005}
"""Adam's. Once in a while a float32 sum falls on the other side of a leaky ReLU's kink, and Adam without momentum makes
a full step of it: at the paper's rate losses may be 1e-2 apart ten updates later. float64 has no such moments."""

Tensors = dict[str, Tensor]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # ten processes' work; minutes where the machine is shared


def settings(**changes: Any) -> TrainConfig:
    """Eight groups of four pictures, R1 in every fourth update, a half-life that grows with the images seen."""
    return small_train(**{"batch_size": BATCH, "r1_interval": 4, "ema_rampup": 0.5} | changes)


def fresh_state(train: TrainConfig) -> TrainState:
    """The state before the first image, with noise so strong that a wrong draw shows."""
    state = build_state(MODEL, train, SEED, CPU)
    with torch.no_grad():
        for module in state.generator.modules():
            if isinstance(module, ModulatedLinear):
                module.noise_strength.fill_(0.3)
    return state


def stream_of(data: DataConfig, share: range) -> DataStream:
    """This worker's part of each global batch, mirrored by the place in it."""
    return DataStream(
        read_manifest(data.uri, StorageConfig()),
        data.model_copy(update={"threads": 1}),
        StorageConfig(),
        seed=SEED,
        batch_size=BATCH,
        positions=share,
        size=MODEL.size,
    )


def trained(world: World, data: DataConfig, dtype: torch.dtype, **train: Any) -> dict[str, Any]:
    """The whole state after `UPDATES` updates, and the losses of each."""
    with default_dtype(dtype):
        state = fresh_state(settings(**train))
        run = Updates(settings(**train), MODEL, SEED, state, world, CPU)
        losses = []
        with stream_of(data, run.share) as stream:
            for _ in range(UPDATES):
                run(next(stream))
                losses.append(run.scalars())
    return {"tensors": {name: value.detach() for name, value in state.tensors().items()}, "losses": losses}


def gradients(world: World, data: DataConfig) -> dict[str, Tensors]:
    """What the optimisers of one update were given: D's main gradients, R1's and G's, all at the first weights."""
    with default_dtype(torch.float64):
        train = settings(r1_interval=1, learning_rate=1e-30)  # weights stay where they are
        state, found = fresh_state(train), dict[str, Tensors]()
        run = Updates(train, MODEL, SEED, state, world, CPU)

        def note(module: torch.nn.Module) -> None:
            names = iter(("main", "R1") if module is state.discriminator else ("G",))
            optimizer = state.optimizer_discriminator if module is state.discriminator else state.optimizer_generator

            def before_step(*_: Any) -> None:
                found[next(names)] = {
                    name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None
                }

            optimizer.register_step_pre_hook(before_step)

        note(state.discriminator)
        note(state.generator)
        with stream_of(data, run.share) as stream:
            run(next(stream))
    return found


def parts_in(workers: int) -> list[int]:
    """The accumulations that differ: a worker with two groups computes them in two parts at most."""
    most = -(-BATCH // MODEL.discriminator.group // workers)
    return sorted({min(parts, most) for parts in ACCUMULATIONS})


def worker(world: World, data: DataConfig) -> dict[str, Any]:
    """All that the tests compare."""
    found: dict[str, Any] = {"gradients": gradients(world, data)}
    for dtype, rate in RATES.items():
        for parts in parts_in(world.size):
            found[f"{dtype} {parts}"] = trained(world, data, dtype, accumulation=parts, learning_rate=rate, **PATCHES)
    return found


CELLS = [(workers, parts) for workers in WORKERS for parts in parts_in(workers)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return small_data(tmp_path_factory.mktemp("data"), 72, row_group_rows=9)


@pytest.fixture(scope="module")
def alone(data: DataConfig) -> Iterator[dict[str, Any]]:
    """One process without a process group."""
    with one_thread():
        yield worker(World(), data)


@pytest.fixture(scope="module")
def found(alone: dict[str, Any], data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """By number of workers, what each of them came to; the processes of the largest world form the smaller ones."""
    several = [size for size in WORKERS if size > 1]
    return {1: [alone]} | on_workers(worker, several, tmp_path_factory.mktemp("workers"), data)


def differences(one: Tensors, other: Tensors) -> dict[str, float]:
    """Largest difference of each tensor, relative to its own largest value."""
    assert one.keys() == other.keys()
    return {
        name: float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp_min(1e-12)) for name in one
    }


def above(found: dict[str, float], tolerance: float) -> dict[str, float]:
    """Those that differ by more; not-a-number counts as more."""
    return {name: value for name, value in found.items() if not value <= tolerance}


def test_three_workers_hold_unequal_shares_and_parts() -> None:
    shares = [share_of(World(rank, 3), BATCH, 4) for rank in range(3)]
    assert [len(share) for share in shares] == [8, 12, 12]
    assert [len(parts_of(share, 4, 4)) for share in shares] == [2, 3, 3]
    assert [parts_in(workers) for workers in WORKERS] == [[1, 2, 4], [1, 2, 4], [1, 2, 3], [1, 2]]


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("update", ["R1", "main", "G"])
def test_gradients_under_ddp_are_one_processes(found: dict[int, list[Any]], update: str, workers: int) -> None:
    expected = found[1][0]["gradients"][update]
    assert sum(float(value.abs().max()) > 1e-6 for value in expected.values()) > len(expected) / 2, "nothing to compare"
    for rank in found[workers]:
        assert above(differences(rank["gradients"][update], expected), 1e-10) == {}


@pytest.mark.parametrize(("workers", "parts"), CELLS)
def test_the_parameters_are_the_same_in_float64(
    found: dict[int, list[Any]], alone: dict[str, Any], workers: int, parts: int
) -> None:
    """Weights, averages, the mean style and both Adams."""
    expected = alone["torch.float64 1"]["tensors"]
    assert all(value.dtype == torch.float64 for name, value in expected.items() if ".step." not in name)
    for rank in found[workers]:
        assert above(differences(rank[f"torch.float64 {parts}"]["tensors"], expected), 1e-8) == {}


@pytest.mark.parametrize(("workers", "parts"), CELLS)
def test_the_losses_are_the_same_in_float32(
    found: dict[int, list[Any]], alone: dict[str, Any], workers: int, parts: int
) -> None:
    expected = alone["torch.float32 1"]["losses"]
    assert [number for number, losses in enumerate(expected) if "loss/r1" in losses] == [0, 4, 8, 12, 16]
    for rank in found[workers]:
        for update, losses in enumerate(rank[f"torch.float32 {parts}"]["losses"]):
            assert losses == pytest.approx(expected[update], rel=1e-3), f"update {update}"


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_all_workers_hold_the_same_bits(found: dict[int, list[Any]], dtype: torch.dtype, workers: int) -> None:
    first, *others = [rank[f"{dtype} 2"]["tensors"] for rank in found[workers]]
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize(
    "change", [{"r1_gamma": 1.0 + 1e-4}, {"ema_kimg": 0.1001}, {"patch": {"size": 8, "strides": [2, 1]}}], ids=str
)
def test_another_training_is_told_apart(alone: dict[str, Any], data: DataConfig, change: dict[str, Any]) -> None:
    """The comparison sees a small change of a constant or of a draw."""
    with one_thread():
        other = trained(World(), data, torch.float64, **PATCHES | change)
    assert above(differences(other["tensors"], alone["torch.float64 1"]["tensors"]), 1e-8)
