from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.models.build import DiscriminatorConfig, ModelConfig, build_discriminator, build_generator

SHIPPED = [512, 512, 512, 512, 512, 256, 128, 64, 32]  # group widths of the authors' code, largest size


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_paper_default_has_45_9_million_parameters() -> None:
    with torch.device("meta"):
        assert parameters(build_generator(ModelConfig())) == 45_911_076


@pytest.mark.parametrize(
    ("size", "total"),
    [(64, 11_824_154), (128, 18_838_815), (256, 44_317_092), (512, 145_124_329), (1024, 547_846_414)],
)
def test_parameters_of_the_shipped_taper(size: int, total: int) -> None:
    config = ModelConfig(size=size, widths=SHIPPED[: size.bit_length() - 2])
    with torch.device("meta"):
        assert parameters(build_generator(config)) == total


@pytest.mark.parametrize(
    ("size", "total"),
    [(64, 26_488_833), (128, 28_389_121), (256, 28_864_129), (512, 28_982_849), (1024, 29_012_513)],
)
def test_parameters_of_the_discriminator(size: int, total: int) -> None:
    with torch.device("meta"):
        assert parameters(build_discriminator(DiscriminatorConfig(), size)) == total


def test_half_the_channel_base() -> None:
    with torch.device("meta"):
        assert parameters(build_discriminator(DiscriminatorConfig(channel_base=16384), 256)) == 24_001_089


def test_config_reaches_the_modules() -> None:
    config = ModelConfig(
        size=16,
        width=12,
        widths=[10, 8, 6],
        latent=7,
        mapping_layers=3,
        noise="fixed",
        max_pixels_in_flight=64,
    )
    generator = build_generator(config)
    assert (generator.size, generator.latent, generator.widths) == (16, 7, (10, 8, 6))
    assert (generator.noise, generator.max_pixels_in_flight) == ("fixed", 64)
    assert len(generator.mapping.layers) == 3
    assert generator.encoding.embedding.weight.shape == (256, 12)
    assert build_discriminator(DiscriminatorConfig(group=2), 16).group == 2


def test_the_seed_decides_the_start() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(build_generator(ModelConfig(size=8, width=8, latent=8)).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.parametrize("size", [8, 16, 1024])
def test_widths_of_groups(size: int) -> None:
    config = ModelConfig(size=size, width=24)
    assert config.group_widths == [24] * config.groups
    assert 2 ** (config.groups + 1) == size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 4}, "model.size must be a power of two of at least 8 .* got 4"),
        ({"size": 100}, "model.size must be a power of two of at least 8 .* got 100"),
        ({"size": 256, "widths": [512] * 6}, "model.widths must name 7 widths for model.size 256.* got 6"),
        ({"size": 8, "widths": [8, 0]}, "greater than or equal to 1"),
        ({"width": 0}, "greater than or equal to 1"),
        ({"latent": 0}, "greater than or equal to 1"),
        ({"noise": "none"}, "'random', 'fixed' or 'off'"),
        ({"generator": "stylegan"}, "cips"),
        ({"max_pixels_in_flight": 10}, "greater than or equal to 64"),
        (
            {"size": 64, "discriminator": {"channel_base": 32}},
            "channel_base 32 leaves no channel at 64 pixels",
        ),
        ({"wdith": 3}, "wdith"),
        ({"discriminator": {"group": 0}}, "greater than or equal to 1"),
    ],
)
def test_bad_configs_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(values)
