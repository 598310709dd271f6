"""Bytes from shapes, against what real modules and real backward passes hold."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipeline.benchmark.checkpoint import whole_state
from pipeline.benchmark.plan_flops import layers
from pipeline.benchmark.plan_memory import (
    busiest_share,
    discriminator_kept,
    fitting_accumulation,
    generator_kept,
    largest_part,
    memory_of,
    parameters_of,
    r1_kept,
)
from pipeline.coordinates import full_grid, patch_grid
from pipeline.models.build import DiscriminatorConfig, ModelConfig, build_discriminator, build_generator
from pipeline.models.cips import Recompute
from pipeline.training.losses import r1_penalty
from pipeline.training.settings import PatchConfig, TrainConfig
from pipeline.training.state import build_state
from pipeline.training.world import World, share_of

MODEL = ModelConfig(
    size=32,
    width=64,
    latent=32,
    mapping_layers=2,
    discriminator=DiscriminatorConfig(channel_base=2048, channel_max=96),
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
BATCH = 8


class Kept:
    """Bytes of the distinct tensors that autograd keeps while this is entered, without parameters."""

    def __init__(self, *modules: nn.Module) -> None:
        own = {tensor.untyped_storage().data_ptr() for module in modules for tensor in module.parameters()}
        self.sizes = dict.fromkeys(own, 0)
        self.alive: list[Tensor] = []
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.sizes.setdefault(storage.data_ptr(), storage.nbytes())
        self.alive.append(tensor)  # so that no address is used twice
        return tensor

    def __enter__(self) -> "Kept":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


@pytest.mark.parametrize("recompute", ["none", "layer", "segment"])
@pytest.mark.parametrize("patch", [None, 16])
@pytest.mark.parametrize("half", [False, True])
def test_what_the_generator_keeps(recompute: Recompute, patch: int | None, half: bool) -> None:
    train = TrainConfig(recompute=recompute, patch=PatchConfig(size=patch))
    generator = build_generator(MODEL)
    generator.recompute = recompute
    coordinates = full_grid(32) if patch is None else patch_grid(torch.zeros(BATCH, 2, dtype=torch.int64), patch, 2)
    w_BZ, keys_B2 = torch.randn(BATCH, MODEL.latent), torch.zeros(BATCH, 2, dtype=torch.int64)
    with Kept(generator) as kept, torch.autocast("cpu", torch.bfloat16, enabled=half):
        generator.synthesis(w_BZ, coordinates, keys_B2)
    element_bytes = 2 if half else 4
    expected = generator_kept(MODEL, train, BATCH, element_bytes)
    if recompute == "segment":  # the inside of a segment comes and goes in the backward pass
        widest = max(layer.outputs for layer in layers(MODEL))
        expected -= 2 * widest * BATCH * (patch or 32) ** 2 * element_bytes
    assert kept.bytes == pytest.approx(expected, rel=0.1)


def in_channels_last() -> tuple[nn.Module, Tensor]:
    """A discriminator and pictures in the layout of training."""
    discriminator = build_discriminator(MODEL.discriminator, 32)
    discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return discriminator, torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("half", [False, True])
def test_what_the_discriminator_keeps(half: bool) -> None:
    discriminator, images = in_channels_last()
    with Kept(discriminator) as kept, torch.autocast("cpu", torch.bfloat16, enabled=half):
        discriminator(images)
    weights = sum(parameter.numel() for parameter in discriminator.parameters())
    expected = (2 if half else 4) * (BATCH * discriminator_kept(MODEL.discriminator, 32) + weights)
    assert kept.bytes == pytest.approx(expected, rel=0.1)


def test_what_r1_keeps() -> None:
    discriminator, images = in_channels_last()
    with Kept(discriminator) as kept:
        r1_penalty(discriminator, images)
    weights = sum(parameter.numel() for parameter in discriminator.parameters())
    kept_of_one = discriminator_kept(MODEL.discriminator, 32) + r1_kept(MODEL.discriminator, 32)
    assert kept.bytes == pytest.approx(4 * (BATCH * kept_of_one + weights), rel=0.1)


def test_what_stays_is_what_a_real_state_holds() -> None:
    train = TrainConfig()
    state = whole_state(build_state(MODEL, train, 0, CPU))
    memory = memory_of(MODEL, train, parameters_of(MODEL, train), BATCH, 4)
    sizes = {name: value.nbytes for name, value in state.tensors().items()}

    def held(prefix: str) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(prefix))

    assert memory.average == held("average.")
    assert memory.weights == pytest.approx(held("generator.") + held("discriminator."), rel=1e-3)  # and mean_w
    assert memory.adam == pytest.approx(held("adam."), rel=1e-2)  # and its counts of steps
    assert memory.gradients == memory.weights


def test_the_papers_numbers_of_parameters() -> None:
    count = parameters_of(ModelConfig(), TrainConfig())
    assert (count.generator, count.discriminator, count.table) == (45_911_076, 28_864_129, 33_554_432)


def test_less_is_kept_the_more_is_computed_again() -> None:
    none, layer, segment = (
        generator_kept(ModelConfig(), TrainConfig(recompute=mode), 4, 2) for mode in get_args(Recompute)
    )
    assert none > layer > 1.5 * segment


@given(st.integers(1, 64), st.integers(1, 8), st.data())
def test_the_busiest_share_is_the_largest_that_is_dealt(groups: int, group: int, data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, groups))
    dealt = [len(share_of(World(rank, workers), groups * group, group)) for rank in range(workers)]
    assert busiest_share(groups * group, group, workers) == max(dealt)


@given(st.integers(1, 12), st.floats(0.5, 40))
def test_the_accumulation_that_fits_is_the_least(groups: int, limit_gb: float) -> None:
    model, train = ModelConfig(), TrainConfig()
    count, share = parameters_of(SMALLEST, train), 4 * groups

    def peak(accumulation: int) -> int:
        return memory_of(model, train, count, largest_part(share, 4, accumulation), 2).peak

    found = fitting_accumulation(model, train, count, share, 2, 1e9 * limit_gb)
    if found is None:
        assert peak(groups) > 1e9 * limit_gb
    else:
        assert peak(found) <= 1e9 * limit_gb
        assert all(peak(fewer) > 1e9 * limit_gb for fewer in range(1, found))


SMALLEST = ModelConfig(size=8, width=8, latent=8, mapping_layers=1)


def test_no_accumulation_below_the_configured_one_is_proposed() -> None:
    train = TrainConfig(accumulation=3)
    count = parameters_of(SMALLEST, train)
    assert fitting_accumulation(SMALLEST, train, count, 16, 4, 1e12) == 3
    assert fitting_accumulation(SMALLEST, train, count, 8, 4, 1e12) == 2, "there are only two groups to part"
    assert fitting_accumulation(SMALLEST, train, count, 16, 4, 1e6) is None
