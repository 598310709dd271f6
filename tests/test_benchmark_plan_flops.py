"""What is counted from shapes, against torch's own counter on real forward and backward passes."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.benchmark.plan_flops import discriminator_flops, from_rgb_flops, generator_flops, r1_flops, training_flops
from pipeline.coordinates import full_grid
from pipeline.models.build import DiscriminatorConfig, ModelConfig, build_discriminator, build_generator
from pipeline.models.cips import Recompute
from pipeline.training.losses import r1_penalty
from pipeline.training.settings import PatchConfig, TrainConfig
from pipeline.training.state import build_state
from pipeline.training.step import Updates
from pipeline.training.world import World

MODEL = ModelConfig(
    size=32,
    width=64,
    widths=[64, 64, 64, 32],
    latent=32,
    mapping_layers=2,
    discriminator=DiscriminatorConfig(channel_base=2048, channel_max=96),
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
BATCH = 4


class Untracked(contextlib.nullcontext[None]):
    """Instead of the tracker of modules, which cannot follow R1's gradient of a gradient."""

    parents = frozenset({"Global"})


def counted(call: Callable[[], Any]) -> int:
    """FLOPs of a call by torch's counter, which does not know one operator of ours: the product added in place."""

    def product(total: Any, left: Any, right: Any, out_shape: Any = None, **options: Any) -> int:
        return 2 * left[0] * left[1] * left[2] * right[2]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: product})
    counter.mod_tracker = Untracked()  # type: ignore[assignment]
    with counter:
        call()
    return counter.get_total_flops()


def close(counted: float, computed: float) -> bool:
    return abs(counted / computed - 1) < 0.02


def test_the_generators_are_what_torch_counts() -> None:
    generator = build_generator(MODEL)
    w_BZ, keys_B2 = torch.randn(BATCH, MODEL.latent, requires_grad=True), torch.zeros(BATCH, 2, dtype=torch.int64)
    results = []
    measured = counted(lambda: results.append(generator.synthesis(w_BZ, full_grid(32), keys_B2)))
    forward, backward = generator_flops(MODEL, 32 * 32)
    # On a CPU noise and bias are two more channels of each layer's product; the plan leaves them out.
    measured -= 2 * 2 * BATCH * 32 * 32 * (7 * 64 + 2 * 32)
    assert close(measured, BATCH * forward)
    assert close(counted(lambda: results[0].sum().backward()), BATCH * backward)
    assert not close(measured, BATCH * forward * 1.03), "a few percent more would be noticed"


def test_the_discriminators_are_what_torch_counts() -> None:
    discriminator = build_discriminator(MODEL.discriminator, 32)
    results = []
    images = torch.randn(BATCH, 3, 32, 32)
    learned, blur, blur_back = discriminator_flops(MODEL.discriminator, 32)
    assert close(counted(lambda: results.append(discriminator(images))), BATCH * (learned + blur))
    backward = BATCH * (2 * learned - from_rgb_flops(MODEL.discriminator, 32) + blur_back)
    assert close(counted(lambda: results[0].sum().backward()), backward)
    discriminator.requires_grad_(False)
    through = discriminator(images.requires_grad_(True)).sum()
    assert close(counted(through.backward), BATCH * (learned + blur_back))


def test_r1_is_what_torch_counts() -> None:
    discriminator = build_discriminator(MODEL.discriminator, 32)
    images = torch.randn(BATCH, 3, 32, 32)
    measured = counted(lambda: r1_penalty(discriminator, images).sum().backward())
    assert close(measured, BATCH * r1_flops(MODEL.discriminator, 32))


@pytest.mark.parametrize(("recompute", "patch"), [("none", None), ("layer", 16), ("segment", None)])
def test_a_whole_update_is_what_torch_counts(recompute: Recompute, patch: int | None) -> None:
    train = TrainConfig(
        batch_size=8, precision="fp32", r1_interval=1, recompute=recompute, patch=PatchConfig(size=patch)
    )
    state = build_state(MODEL, train, 0, CPU)
    updates = Updates(train, MODEL, 0, state, World(), CPU)
    pictures_BHWC = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    assert close(counted(lambda: updates(pictures_BHWC)), 8 * training_flops(MODEL, train).total)


def test_the_papers_figures() -> None:
    """275.6 and 222.9 GMAC for a picture of G in uniform and in published widths, and 46.5 of D; 3 TFLOP to train."""
    uniform, published = ModelConfig(), ModelConfig(widths=[512, 512, 512, 512, 512, 256, 128])
    assert generator_flops(uniform, 256**2)[0] / 2e9 == pytest.approx(275.6, rel=1e-3)
    assert generator_flops(published, 256**2)[0] / 2e9 == pytest.approx(222.9, rel=1e-3)
    learned, blur, _ = discriminator_flops(uniform.discriminator, 256)
    assert (learned + blur) / 2e9 == pytest.approx(46.5, rel=0.01)
    assert training_flops(uniform, TrainConfig()).total == pytest.approx(3.0e12, rel=0.02)


def test_r1_costs_by_its_interval_and_nothing_without_weight() -> None:
    rare = training_flops(MODEL, TrainConfig(r1_interval=16))
    often = training_flops(MODEL, TrainConfig(r1_interval=4))
    assert often.r1 == 4 * rare.r1 > 0
    assert training_flops(MODEL, TrainConfig(r1_gamma=0)).r1 == 0
    assert rare.generator + rare.discriminator + rare.r1 == pytest.approx(rare.total)


def test_patches_cost_by_their_pixels() -> None:
    whole, patch = training_flops(MODEL, TrainConfig()), training_flops(MODEL, TrainConfig(patch=PatchConfig(size=16)))
    assert patch.generator_forward == pytest.approx(whole.generator_forward / 4, rel=0.05)
    assert patch.discriminator_forward < whole.discriminator_forward / 2
