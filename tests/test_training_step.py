"""One update of D and G: the same whatever the parts and workers, on patches as on whole pictures."""

import math
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.coordinates import full_grid
from pipeline.randomness import Purpose, latents, noise_keys
from pipeline.training.state import TrainState, build_state
from pipeline.training.step import SCALARS, Updates
from pipeline.training.world import World
from tests.small import SMALL_MODEL, small_train

CPU = torch.device("cpu")
PATCHES = {"patch": {"size": 8, "strides": [1, 2]}}


def pictures(count: int, seed: int = 0) -> Tensor:
    """Smooth random colour fields, uint8 (count, 16, 16, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return (fine.permute(0, 2, 3, 1) * 255).to(torch.uint8)


def trained(world: World, updates: int, dtype: torch.dtype, **train: Any) -> tuple[TrainState, dict[str, float]]:
    """The state and the mean scalars after some updates on this worker's share."""
    settings = small_train(batch_size=16, **train)
    state = build_state(SMALL_MODEL, settings, 3, CPU)
    for module in (state.generator, state.discriminator, state.average):
        module.to(dtype)
    with torch.no_grad():  # noise that matters, so that a wrong draw shows
        for name, parameter in state.generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
    run = Updates(settings, SMALL_MODEL, 3, state, world, CPU)
    for number in range(updates):
        run(pictures(16, seed=number)[run.share.start : run.share.stop])
    return state, run.scalars()


def worker(rank: int, size: int, port: int, folder: str, updates: int, train: dict[str, Any]) -> None:
    """One of several processes: trains, and once more with a restart in the middle."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world = World(rank, size)
    state, scalars = trained(world, updates, torch.float64, **train)
    half, _ = trained(world, updates // 2, torch.float64, **train)
    resumed = resumed_state(half, world, updates - updates // 2, **train)
    torch.save((state.tensors(), scalars, resumed.tensors()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def resumed_state(half: TrainState, world: World, updates: int, **train: Any) -> TrainState:
    """A new process's state, loaded from another and trained further."""
    settings = small_train(batch_size=16, **train)
    state = build_state(SMALL_MODEL, settings, 99, CPU)
    for module in (state.generator, state.discriminator, state.average):
        module.to(torch.float64)
    state.load({name: value.clone().contiguous() for name, value in half.tensors().items()}, half.images_seen)
    run = Updates(settings, SMALL_MODEL, 3, state, world, CPU)
    first = half.images_seen // 16
    for number in range(first, first + updates):
        run(pictures(16, seed=number)[run.share.start : run.share.stop])
    return state


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest relative difference of any tensor, by its own largest value."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp_min(1e-12)) for name in one)


@pytest.fixture
def double_precision() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("train", [{}, PATCHES], ids=["whole", "patches"])
def test_accumulation_changes_nothing(double_precision: None, accumulation: int, train: dict[str, Any]) -> None:
    whole, scalars = trained(World(), 5, torch.float64, **train)
    parts, parts_scalars = trained(World(), 5, torch.float64, accumulation=accumulation, **train)
    assert difference(whole.tensors(), parts.tensors()) < 1e-8
    assert scalars == pytest.approx(parts_scalars, rel=1e-9)
    assert set(scalars) == set(SCALARS)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(double_precision: None, tmp_path: Path, workers: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = PATCHES | {"accumulation": 2}  # three workers hold 1, 1 and 2 groups: parts differ as well
    multiprocessing.spawn(worker, (workers, port, str(tmp_path), 4, settings), nprocs=workers)
    alone, scalars = trained(World(), 4, torch.float64, **PATCHES)
    for rank in range(workers):
        tensors, rank_scalars, resumed = torch.load(tmp_path / f"{rank}.pt")
        assert difference(alone.tensors(), tensors) < 1e-8
        assert rank_scalars == pytest.approx(scalars, rel=1e-9)
        # A restart of as many workers changes no bit, also where DDP has more than two to sum.
        assert all(torch.equal(tensors[name], resumed[name]) for name in tensors)


def test_each_part_of_the_update_moves_its_own_weights() -> None:
    before = {name: value.clone() for name, value in build_state(SMALL_MODEL, small_train(), 3, CPU).tensors().items()}
    after = trained(World(), 1, torch.float32)[0].tensors()
    for part in ("generator.", "discriminator.", "average.mean_w"):
        moved = [name for name in before if name.startswith(part) and not torch.equal(before[name], after[name])]
        assert moved, part
    assert all(after[name].isfinite().all() for name in after)


def test_one_update_is_the_papers(double_precision: None) -> None:
    """Two updates against a literal transcription: which latents, signs, weights and rates are used where."""
    settings = small_train(batch_size=8, r1_interval=2, r1_gamma=3.0, lazy_rescale=True, learning_rate=0.01)
    state, literal = (build_state(SMALL_MODEL, settings, 3, CPU) for _ in range(2))
    for module in (state.generator, state.discriminator, state.average, literal.generator, literal.discriminator):
        module.double()
    run = Updates(settings, SMALL_MODEL, 3, state, World(), CPU)
    generator, discriminator = literal.generator, literal.discriminator
    adam_g = torch.optim.Adam(generator.parameters(), lr=0.01 * 4 / 5, betas=(0.0, 0.99**0.8), eps=1e-8)
    adam_d = torch.optim.Adam(discriminator.parameters(), lr=0.01 * 2 / 3, betas=(0.0, 0.99 ** (2 / 3)), eps=1e-8)
    positions, grid = torch.arange(8), full_grid(16)

    def fake(seen: int, latent: Purpose, noise: Purpose) -> Tensor:
        z = latents(3, latent, seen, positions, 8).double()
        return generator(z, grid, noise_keys(3, noise, seen, positions)).transpose(1, 2).reshape(8, 3, 16, 16)

    for number in range(2):
        real_u8, seen = pictures(8, seed=number), 8 * number
        run(real_u8)
        real = (real_u8.permute(0, 3, 1, 2).float() / 127.5 - 1).double()
        with torch.no_grad():
            drawn = fake(seen, Purpose.LATENT_DISCRIMINATOR, Purpose.NOISE_DISCRIMINATOR)
        adam_d.zero_grad()
        (softplus(-discriminator(real)).mean() + softplus(discriminator(drawn)).mean()).backward()
        adam_d.step()
        if number % 2 == 0:
            adam_d.zero_grad()
            real.requires_grad_(True)
            logits = discriminator(real)
            (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            # Adam counts a step of the last bias too, which has no part in the slope.
            (3.0 / 2 * slope.square().sum() / 8 * 2 + 0 * logits.sum()).backward()
            adam_d.step()
        adam_g.zero_grad()
        drawn = fake(seen, Purpose.LATENT_GENERATOR, Purpose.NOISE_GENERATOR)
        softplus(-discriminator(drawn)).mean().backward()
        adam_g.step()
    assert state.images_seen == 16
    for mine, theirs in ((state.generator, generator), (state.discriminator, discriminator)):
        assert difference(mine.state_dict(), theirs.state_dict()) < 1e-7


def test_the_average_follows_its_formula() -> None:
    settings = small_train(batch_size=16)
    state = build_state(SMALL_MODEL, settings, 3, CPU)
    start = {name: value.clone() for name, value in state.average.named_parameters()}
    Updates(settings, SMALL_MODEL, 3, state, World(), CPU)(pictures(16))
    decay = 0.5 ** (16 / 100)
    for name, value in state.generator.named_parameters():
        expected = decay * start[name] + (1 - decay) * value
        assert torch.allclose(dict(state.average.named_parameters())[name], expected, atol=1e-6)


def test_the_mean_style_is_tracked() -> None:
    state, _ = trained(World(), 3, torch.float32)
    assert state.average.mean_w.abs().sum() > 0
    assert torch.equal(state.generator.mean_w, torch.zeros_like(state.generator.mean_w))


def test_real_and_generated_patches_share_their_coordinates() -> None:
    settings = small_train(batch_size=16, **PATCHES)
    run = Updates(settings, SMALL_MODEL, 3, build_state(SMALL_MODEL, settings, 3, CPU), World(), CPU)
    seen = [run._coordinates(images_seen) for images_seen in range(0, 16 * 40, 16)]
    assert all(coordinates.shape == (16, 64, 2) for coordinates in seen)
    assert all(0 <= int(coordinates.min()) and int(coordinates.max()) < 16 for coordinates in seen)
    strides = {int(coordinates[0, 1, 0] - coordinates[0, 0, 0]) for coordinates in seen}
    assert strides == {1, 2}
    whole = Updates(
        small_train(batch_size=16), SMALL_MODEL, 3, build_state(SMALL_MODEL, small_train(), 3, CPU), World(), CPU
    )
    assert torch.equal(whole._coordinates(0), full_grid(16))


def test_bf16_trains_close_to_fp32() -> None:
    fp32, bf16 = (trained(World(), 3, torch.float32, precision=precision)[1] for precision in ("fp32", "bf16"))
    for name in ("loss/D", "loss/G"):
        assert bf16[name] == pytest.approx(fp32[name], rel=0.05)


class Blind(TorchDispatchMode):
    """Refuses what would wait for a CUDA device: reading a value, and shapes that depend on values."""

    REFUSED = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
    ALLOWED = {"words", "check_pixels", "stride"}  # they look at tensors of the CPU only, where nothing waits

    def refuse(self, name: str) -> None:
        if not any(frame.f_code.co_name in self.ALLOWED for frame, _ in traceback.walk_stack(None)):
            raise AssertionError(f"{name} waits for the device")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if function in self.REFUSED or masked:
            self.refuse(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("train", [{}, PATCHES], ids=["whole", "patches"])
def test_an_update_looks_at_no_value(train: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small_train(batch_size=16, **train)
    run = Updates(settings, SMALL_MODEL, 3, build_state(SMALL_MODEL, settings, 3, CPU), World(), CPU)
    batches = [pictures(16, seed=number) for number in range(2)]
    tolist = Tensor.tolist
    with Blind() as blind:
        monkeypatch.setattr(Tensor, "tolist", lambda tensor: (blind.refuse("tolist"), tolist(tensor))[1])
        for batch in batches:  # with R1 and without
            run(batch)
        with pytest.raises(AssertionError, match="waits for the device"):
            run.scalars()  # once a tick


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")
@pytest.mark.parametrize("train", [{}, PATCHES, {"cuda_graphs": True}], ids=["whole", "patches", "graphs"])
def test_an_update_never_waits_for_the_device(train: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    settings = small_train(batch_size=16, precision="bf16", **train)
    run = Updates(settings, SMALL_MODEL, 3, build_state(SMALL_MODEL, settings, 3, device), World(), device)
    batches = [pictures(16, seed=number).to(device) for number in range(6)]
    for batch in batches[:2]:  # libraries are loaded, Adam makes its moments
        run(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[2:]:
            run(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(value) for value in run.scalars().values())
