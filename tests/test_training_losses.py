"""The losses against closed forms, and R1's double backward against finite differences."""

import math

import torch
from torch import nn

from pipeline.models.build import DiscriminatorConfig, build_discriminator
from pipeline.training.losses import discriminator_loss, generator_loss, r1_penalty


def test_losses_of_an_undecided_discriminator() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.allclose(discriminator_loss(zero, zero), torch.full((3,), 2 * math.log(2), dtype=torch.float64))
    assert torch.allclose(generator_loss(zero), torch.full((3,), math.log(2), dtype=torch.float64))


def test_losses_reward_the_right_side() -> None:
    real, fake = torch.tensor([4.0]), torch.tensor([-4.0])
    assert discriminator_loss(real, fake) < discriminator_loss(fake, real)
    assert generator_loss(real) < generator_loss(fake)


def test_r1_of_a_linear_discriminator_is_its_squared_weight() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, dtype=torch.float64), nn.Flatten(0))
    pictures = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    penalty_B = r1_penalty(linear, pictures)
    weight = linear.get_parameter("1.weight")
    assert torch.allclose(penalty_B, weight.square().sum().expand(5))
    penalty_B.mean().backward()
    assert weight.grad is not None and torch.allclose(weight.grad, 2 * weight)


def test_r1_double_backward_against_finite_differences() -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(DiscriminatorConfig(channel_base=64, channel_max=8), 8).double()
    pictures = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    r1_penalty(discriminator, pictures).sum().backward()
    epsilon = 1e-6
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None, f"{name} has no part in the graph: DDP would wait for it"
        index = int(parameter.grad.abs().argmax())
        flat = parameter.data.view(-1)
        value, ends = flat[index].item(), []
        for sign in (1, -1):
            flat[index] = value + sign * epsilon
            ends.append(r1_penalty(discriminator, pictures).sum().item())
        flat[index] = value
        slope = (ends[0] - ends[1]) / (2 * epsilon)
        assert math.isclose(slope, parameter.grad.view(-1)[index].item(), rel_tol=1e-4, abs_tol=1e-7), name
