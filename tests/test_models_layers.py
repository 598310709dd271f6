import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.models.layers import EqualConv2d, EqualLinear, Mapping, ModulatedLinear, ToRGB
from pipeline.ops.modulated_linear import modulated_linear_reference

ROOT_2 = math.sqrt(2.0)


def lrelu(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.leaky_relu(x, 0.2) * ROOT_2


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
@pytest.mark.parametrize("activate", [False, True])
def test_equal_linear_scales_when_used(lr_mul: float, activate: bool) -> None:
    torch.manual_seed(0)
    layer = EqualLinear(200, 300, bias_init=1.0, lr_mul=lr_mul, activate=activate)
    assert layer.weight.std().item() * lr_mul == pytest.approx(1.0, abs=0.02)
    assert (layer.bias * lr_mul == 1.0).all()
    x = torch.randn(5, 200)
    expected = x @ (layer.weight * (lr_mul / math.sqrt(200))).t() + layer.bias * lr_mul
    torch.testing.assert_close(layer(x), lrelu(expected) if activate else expected)


@pytest.mark.parametrize(("activate", "gain"), [(False, 1.0), (True, 1.0), (True, math.sqrt(0.5))])
def test_equal_conv_scales_when_used(activate: bool, gain: float) -> None:
    torch.manual_seed(0)
    layer = EqualConv2d(20, 30, 3, padding=1, activate=activate, gain=gain)
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    assert layer.weight.std().item() == pytest.approx(1.0, abs=0.05)
    x = torch.randn(2, 20, 8, 8)
    expected = nn.functional.conv2d(x, layer.weight / math.sqrt(20 * 9), layer.bias, padding=1)
    torch.testing.assert_close(layer(x), (lrelu(expected) if activate else expected) * gain)
    assert EqualConv2d(20, 30, 1, bias=False).bias is None


def test_a_step_of_adam_moves_the_mapping_a_hundredth_as_far() -> None:
    """What equalised learning rates are for: the same gradient descent step, another effective size."""
    moved = []
    for lr_mul in (1.0, 0.01):
        torch.manual_seed(0)
        layer = EqualLinear(64, 64, lr_mul=lr_mul)
        x = torch.randn(8, 64)
        before = layer(x).detach()
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, betas=(0.0, 0.99))
        layer(x).square().sum().backward()
        optimizer.step()
        moved.append((layer(x) - before).abs().mean().item())
    assert moved[0] / moved[1] == pytest.approx(100, rel=0.05)


def test_mapping_normalises_its_input_and_keeps_unit_scale() -> None:
    torch.manual_seed(0)
    mapping = Mapping(128, 8)
    z = torch.randn(64, 128)
    torch.testing.assert_close(mapping(z), mapping(z * 5.0), atol=1e-5, rtol=1e-5)
    assert len(mapping.layers) == 8
    assert 0.3 < mapping(z).square().mean() < 3.0


def test_mapping_is_float32_under_autocast() -> None:
    mapping = Mapping(32, 2)
    z = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mapping(z), mapping(z).float())
        w = mapping(z)
    assert torch.equal(w, mapping(z))


@pytest.mark.parametrize("shared", [False, True])
def test_modulated_layer_is_equation_2_then_noise_bias_and_activation(shared: bool) -> None:
    torch.manual_seed(0)
    layer = ModulatedLinear(24, 40, 16)
    assert layer.noise_strength == 0.0 and (layer.bias == 0.0).all() and (layer.affine.bias == 1.0).all()
    nn.init.normal_(layer.bias)
    nn.init.constant_(layer.noise_strength, 0.7)
    x, w, noise = torch.randn(70, 24), torch.randn(3, 16), torch.randn(3, 70)
    x = x if shared else x.repeat(3, 1, 1)
    linear = modulated_linear_reference(x, layer.weight / math.sqrt(24), layer.affine(w))
    torch.testing.assert_close(layer(x, w), lrelu(linear + layer.bias))
    expected = lrelu(linear + 0.7 * noise[:, :, None] + layer.bias)
    torch.testing.assert_close(layer(x, w, noise), expected)


def test_to_rgb_has_no_demodulation_noise_or_activation() -> None:
    torch.manual_seed(0)
    layer = ToRGB(24, 16)
    nn.init.normal_(layer.bias)
    x, w = torch.randn(3, 70, 24), torch.randn(3, 16)
    expected = modulated_linear_reference(x, layer.weight / math.sqrt(24), layer.affine(w), demodulate=False)
    torch.testing.assert_close(layer(x, w), expected + layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, w).dtype == torch.float32


def test_a_layer_with_rgb_is_the_layer_and_its_rgb() -> None:
    torch.manual_seed(0)
    layer, to_rgb = ModulatedLinear(24, 20, 16), ToRGB(20, 16)
    nn.init.normal_(to_rgb.bias)
    x, w, noise = torch.randn(3, 70, 24), torch.randn(3, 16), torch.randn(3, 70)
    y, colours = layer.with_rgb(x, w, noise, to_rgb)
    assert torch.equal(y, layer(x, w, noise))
    torch.testing.assert_close(colours, to_rgb(y, w))
    with torch.autocast("cpu", torch.bfloat16):
        assert [result.dtype for result in layer.with_rgb(x, w, noise, to_rgb)] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("layer", "parameters"),
    [
        (lambda: ModulatedLinear(512, 512, 512), 525_313),
        (lambda: ModulatedLinear(1024, 512, 512), 1_050_113),
        (lambda: ModulatedLinear(512, 256, 512), 393_985),
        (lambda: ModulatedLinear(128, 128, 512), 82_177),
        (lambda: ToRGB(512, 512), 264_195),
        (lambda: ToRGB(128, 512), 66_051),
        (lambda: Mapping(512, 8), 2_101_248),
    ],
)
def test_parameters_of_a_layer(layer: Callable[[], nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in layer().parameters()) == parameters
