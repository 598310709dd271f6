import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.coordinates import full_grid
from pipeline.models.discriminator import Discriminator, ResidualBlock, images_from_pixels, minibatch_stddev
from pipeline.ops.resample import blur_kernel, blur_reference

ROOT_2 = math.sqrt(2.0)


def small(size: int = 8, group: int = 4) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(size, channel_base=64, channel_max=6, group=group)


@pytest.mark.parametrize("size", [8, 16, 64])
def test_logits(size: int) -> None:
    logits = small(size)(torch.randn(8, 3, size, size))
    assert logits.shape == (8,) and logits.dtype == torch.float32 and logits.isfinite().all()


def test_channels_follow_base_and_maximum() -> None:
    with torch.device("meta"):
        model = Discriminator(256)
    blocks = [block for block in model.blocks if isinstance(block, ResidualBlock)]
    assert [block.conv_0.weight.shape[0] for block in blocks] == [128, 256, 512, 512, 512, 512]
    assert model.from_rgb.weight.shape == (128, 3, 1, 1)
    assert model.last.weight.shape == (512, 513, 3, 3)
    assert model.hidden.weight.shape == (512, 8192)


def test_residual_block_is_what_stylegan2_describes() -> None:
    """Literally: blur at full resolution before each strided convolution, gains applied where they are
    defined."""
    torch.manual_seed(0)
    block = ResidualBlock(5, 7).double()
    torch.nn.init.normal_(block.conv_0.bias)  # type: ignore[arg-type]
    torch.nn.init.normal_(block.conv_1.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 5, 16, 16, dtype=torch.float64)

    def lrelu(y: Tensor) -> Tensor:
        return F.leaky_relu(y, 0.2) * ROOT_2

    main = lrelu(F.conv2d(x, block.conv_0.weight / math.sqrt(45), block.conv_0.bias, padding=1))
    main = blur_reference(main, blur_kernel(), padding=2)
    main = lrelu(F.conv2d(main, block.conv_1.weight / math.sqrt(45), block.conv_1.bias, stride=2))
    skip = blur_reference(x, blur_kernel(), padding=1)
    skip = F.conv2d(skip, block.skip.weight / math.sqrt(5), stride=2)
    assert block(x).shape == (2, 7, 8, 8)
    torch.testing.assert_close(block(x), (main + skip) / ROOT_2)


def test_signal_keeps_its_scale() -> None:
    torch.manual_seed(0)
    model = Discriminator(32, channel_base=2048, channel_max=64)
    x = model.blocks(model.from_rgb(torch.randn(8, 3, 32, 32)))
    assert 0.1 < x.square().mean() < 2.0


def test_stddev_groups_are_contiguous_and_apart() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 5, 4, 4)
    x[4:] *= 3.0
    y = minibatch_stddev(x, 4)
    assert y.shape == (8, 6, 4, 4) and torch.equal(y[:, :5], x)
    for rows in (slice(0, 4), slice(4, 8)):
        expected = (x[rows].var(dim=0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(y[rows, 5], expected.expand(4, 4, 4))
    model = small()
    pictures = torch.randn(8, 3, 8, 8)
    torch.testing.assert_close(model(pictures)[4:], model(pictures[4:]))
    swapped = pictures.clone()
    swapped[3], swapped[4] = pictures[4], pictures[3]
    assert not torch.allclose(model(swapped)[[0, 1, 2]], model(pictures)[[0, 1, 2]], rtol=1e-7, atol=1e-7)


def test_equal_pictures_have_finite_gradients() -> None:
    """The standard deviation is zero there, and its slope would be infinite."""
    pictures = torch.ones(4, 3, 8, 8, requires_grad=True)
    model = small()
    (gradient,) = torch.autograd.grad(model(pictures).sum(), pictures, create_graph=True)
    gradient.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_a_batch_that_is_no_multiple_of_the_group_is_refused(batch: int) -> None:
    with pytest.raises(ValueError, match=f"got {batch} pictures, not a multiple of .* group of 4"):
        small()(torch.randn(batch, 3, 8, 8))
    assert small(group=1)(torch.randn(batch, 3, 8, 8)).shape == (batch,)


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 1, 8, 8), (4, 3, 8, 4)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"built for \(B, 3, 8, 8\), got"):
        small()(torch.randn(shape))


def test_too_few_channels_are_named() -> None:
    with pytest.raises(ValueError, match="channel_base 32 leaves no channel at 64 pixels"):
        Discriminator(64, channel_base=32)


@pytest.mark.parametrize("size", [0, 4, 12, 100])
def test_wrong_sizes_are_named(size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two of at least 8, got {size}"):
        Discriminator(size)


def test_r1_gradient_of_parameters_equals_finite_differences() -> None:
    """The R1 penalty |dD/dx|^2 needs the second derivative of every layer; float64, each parameter tensor
    probed."""
    model = small().double()
    real = torch.randn(4, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)

    def penalty(create_graph: bool) -> Tensor:
        pictures = real.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model(pictures).sum(), pictures, create_graph=create_graph)
        return gradient.square().sum(dim=(1, 2, 3)).mean()

    penalty(create_graph=True).backward()
    torch.manual_seed(1)
    checked = 0
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        step, ends = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
            ends.append(float(penalty(create_graph=False).detach()))
            with torch.no_grad():
                parameter.add_(direction, alpha=-sign * step)
        slope = (ends[0] - ends[1]) / (2 * step)
        exact = float((gradient * direction).sum())
        assert exact == pytest.approx(slope, rel=1e-4, abs=1e-8), name
        checked += exact != 0
    assert checked >= 9  # the weights of all layers; slopes of biases are zero almost everywhere


def test_bfloat16_is_near_and_logits_are_float32() -> None:
    torch.manual_seed(0)
    model = Discriminator(16, channel_base=512, channel_max=32)
    pictures = images_from_pixels(torch.randn(8, 256, 3), 16, 16)
    exact = model(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(pictures)
    assert near.dtype == torch.float32
    assert (near - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


def test_images_from_pixels_is_a_channels_last_view() -> None:
    x, y = full_grid(4).unbind(1)
    pixels = torch.stack([x, y, x + y], dim=-1).expand(2, -1, -1).contiguous()
    images = images_from_pixels(pixels, 4, 4)
    assert images.shape == (2, 3, 4, 4)
    assert images.data_ptr() == pixels.data_ptr()
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images[0, :, 1, 3].tolist() == [3, 1, 4]
    assert images_from_pixels(pixels[:, :8], 2, 4).shape == (2, 3, 2, 4)


def test_blur_kernel_is_no_part_of_the_weights() -> None:
    assert not any("kernel" in name for name in small().state_dict())
