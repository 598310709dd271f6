import pytest
import torch

from pipeline.ops.resample import blur, blur_kernel, blur_reference

CASES = [(height, width, padding, stride) for height, width in ((8, 8), (9, 6)) for padding, stride in ((1, 2), (2, 1))]


def test_kernel_is_the_outer_product_of_1_3_3_1() -> None:
    kernel = blur_kernel()
    assert kernel.sum() == 1.0
    assert (kernel * 64).tolist() == [[1, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]


@pytest.mark.parametrize(("height", "width", "padding", "stride"), CASES)
def test_blur_and_its_gradient_equal_the_reference(height: int, width: int, padding: int, stride: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    fast, reference = (f(x, blur_kernel(), padding, stride) for f in (blur, blur_reference))
    assert fast.shape[2:] == tuple((n + 2 * padding - 4) // stride + 1 for n in (height, width))
    torch.testing.assert_close(fast, reference)
    weight = torch.randn_like(fast)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, weight)[0] for y in (fast, reference)))


@pytest.mark.parametrize(("height", "width", "padding", "stride"), CASES)
def test_twice_differentiable(height: int, width: int, padding: int, stride: int) -> None:
    x = torch.randn(1, 2, height, width, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return blur(x, blur_kernel(), padding, stride)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_constant_pictures_stay_constant_inside_and_channels_stay_apart() -> None:
    x = torch.zeros(1, 2, 8, 8)
    x[:, 0] = 5.0
    y = blur(x, blur_kernel(), padding=1)
    torch.testing.assert_close(y[:, 0, 1:-1, 1:-1], torch.full((1, 5, 5), 5.0))
    assert y[:, 1].abs().max() == 0.0


def test_channels_last_and_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = blur(x, blur_kernel(), padding=1, stride=2)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    weight = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, weight)
    (exact,) = torch.autograd.grad(blur_reference(x, blur_kernel(), 1, 2), x, weight.float())
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, exact, atol=0.02, rtol=0.02)
