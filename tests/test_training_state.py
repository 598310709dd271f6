"""Adam's published numbers, the running average's formula, and a state that survives being written down."""

import math

import pytest
import torch

from pipeline.models.build import DiscriminatorConfig, ModelConfig
from pipeline.training.settings import TrainConfig
from pipeline.training.state import average_decay, build_state
from tests.small import SMALL_MODEL, small_train


def test_lazy_rescaling_gives_the_published_adam() -> None:
    state = build_state(SMALL_MODEL, TrainConfig(batch_size=8), 0, torch.device("cpu"))
    generator = state.optimizer_generator.defaults
    discriminator = state.optimizer_discriminator.defaults
    assert generator["lr"] == pytest.approx(0.0016)
    assert generator["betas"] == pytest.approx((0.0, 0.99**0.8))
    assert discriminator["lr"] == pytest.approx(0.002 * 16 / 17)
    assert discriminator["betas"] == pytest.approx((0.0, 0.99 ** (16 / 17)))


def test_without_rescaling_adam_is_the_papers() -> None:
    state = build_state(SMALL_MODEL, small_train(lazy_rescale=False, learning_rate=0.002), 0, torch.device("cpu"))
    for optimizer in (state.optimizer_generator, state.optimizer_discriminator):
        assert optimizer.defaults["lr"] == 0.002
        assert optimizer.defaults["betas"] == (0.0, 0.99)


def test_average_has_the_published_half_life() -> None:
    assert average_decay(TrainConfig(batch_size=32, ema_kimg=10), 10**9) == pytest.approx(0.5 ** (32 / 10_000))
    assert average_decay(TrainConfig(batch_size=32, ema_kimg=10), 0) == pytest.approx(0.997784, abs=1e-6)


def test_average_ramps_with_the_images_seen() -> None:
    train = TrainConfig(batch_size=32, ema_kimg=10, ema_rampup=0.05)
    assert average_decay(train, 0) == 0.0
    assert average_decay(train, 20_000) == pytest.approx(0.5 ** (32 / 1000))
    assert average_decay(train, 10**9) == pytest.approx(0.5 ** (32 / 10_000))
    decays = [average_decay(train, seen) for seen in range(0, 400_000, 3200)]
    assert decays == sorted(decays)


def test_the_same_seed_builds_the_same_weights_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (build_state(SMALL_MODEL, small_train(), seed, torch.device("cpu")) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for name, value in first.tensors().items():
        assert torch.equal(value, second.tensors()[name])
    assert not torch.equal(first.tensors()["generator.first.weight"], other.tensors()["generator.first.weight"])


def test_state_round_trip_keeps_every_tensor_and_its_memory_format() -> None:
    state = build_state(SMALL_MODEL, small_train(), 0, torch.device("cpu"))
    for module, optimizer in (
        (state.generator, state.optimizer_generator),
        (state.discriminator, state.optimizer_discriminator),
    ):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
    saved = {name: value.clone().contiguous() for name, value in state.tensors().items()}
    restored = build_state(SMALL_MODEL, small_train(), 1, torch.device("cpu"))
    restored.load(saved, 8)
    assert restored.images_seen == 8
    assert restored.tensors().keys() == saved.keys()
    for name, value in restored.tensors().items():
        assert torch.equal(value, saved[name]), name
    for parameter in restored.discriminator.parameters():
        assert restored.optimizer_discriminator.state[parameter]["exp_avg"].stride() == parameter.stride()


def test_missing_adam_state_is_named() -> None:
    state = build_state(SMALL_MODEL, small_train(), 0, torch.device("cpu"))
    saved = {name: value for name, value in state.tensors().items() if not name.startswith("adam.")}
    with pytest.raises(KeyError, match="no Adam state of the generator"):
        state.load(saved, 8)


def test_total_images_are_whole_updates() -> None:
    train = TrainConfig(total_kimg=0.1, batch_size=32)
    assert train.total_images == 128
    assert math.isclose(train.period(0.001), 32)
    assert train.period(4) == 4000


def test_patch_discriminator_is_built_at_the_patch() -> None:
    model = ModelConfig(
        size=32, width=8, latent=8, mapping_layers=1, discriminator=DiscriminatorConfig(channel_base=64)
    )
    whole = build_state(model, small_train(), 0, torch.device("cpu")).discriminator
    patch = build_state(model, small_train(patch={"size": 16}), 0, torch.device("cpu")).discriminator
    assert sum(p.numel() for p in patch.parameters()) < sum(p.numel() for p in whole.parameters())
