"""Operations of an update, by phase, against torch's own counter."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.benchmark.flops import update_flops
from pipeline.benchmark.plan_flops import training_flops
from pipeline.benchmark.reference import reference_generator
from pipeline.coordinates import full_grid
from pipeline.models.build import DiscriminatorConfig, ModelConfig, build_discriminator
from pipeline.training import phases as phase
from pipeline.training.settings import TrainConfig

MODEL = ModelConfig(
    size=32, width=32, latent=16, mapping_layers=2, discriminator=DiscriminatorConfig(channel_base=512, channel_max=32)
)


def settings(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"batch_size": 4, "precision": "fp32", "r1_interval": 4} | changes)


def counted(run: Callable[[], object]) -> float:
    """What runs for one of four pictures."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 4


@pytest.mark.parametrize("changes", [{}, {"patch": {"size": 16}}, {"r1_gamma": 0}], ids=["whole", "patch", "no R1"])
def test_phases_add_up_to_the_whole(changes: dict[str, object]) -> None:
    found = update_flops(MODEL, settings(**changes))
    assert sum(found.values()) == pytest.approx(training_flops(MODEL, settings(**changes)).total)
    assert (phase.D_R1 in found) == ("r1_gamma" not in changes)


def test_phases_of_d_are_what_torch_counts() -> None:
    found = update_flops(MODEL, settings())
    discriminator = build_discriminator(MODEL.discriminator, 32)

    real_BCHW, fake_BCHW = torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 32, 32)
    main = counted(lambda: discriminator(torch.cat([real_BCHW, fake_BCHW])).sum().backward())
    assert found[phase.D_MAIN] == pytest.approx(main, rel=0.01)
    discriminator.requires_grad_(False)
    forward = counted(lambda: discriminator(fake_BCHW))
    assert found[phase.D_FOR_G] == pytest.approx(forward, rel=0.01)
    both = counted(lambda: discriminator(fake_BCHW.requires_grad_(True)).sum().backward())
    generator_backward = 2 * found[phase.G_FORWARD]
    assert found[phase.G_BACKWARD] == pytest.approx(both - forward + generator_backward, rel=0.01)


def test_phases_of_g_are_what_torch_counts_in_the_published_form() -> None:
    found = update_flops(MODEL, settings())
    generator = reference_generator(MODEL)
    z_BZ, keys_B2 = torch.randn(4, 16), torch.zeros(4, 2, dtype=torch.int64)
    with torch.no_grad():
        forward = counted(lambda: generator(z_BZ, full_grid(32), keys_B2))
    assert found[phase.G_FOR_D] == found[phase.G_FORWARD] == pytest.approx(forward, rel=0.05)
