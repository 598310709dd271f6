"""Products of pixels by either library: the same numbers, whatever the shape and the processor."""

import pytest
import torch

from pipeline.ops import matrix_product
from pipeline.ops.matrix_product import by_convolution, laid_out, outer, times

SHAPES = [(1, 1024, 128, 128), (1, 700, 256, 128), (1, 64, 512, 512), (3, 256, 256, 256), (1, 100, 16, 3)]

TOLERANCES = {torch.float32: (1e-5, 2e-4), torch.float64: (1e-12, 1e-11), torch.bfloat16: (2e-2, 0.2)}


@pytest.fixture(params=[True, False], ids=["mkl slow", "mkl fast"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Processors of both kinds."""
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64(shape: tuple[int, int, int, int], dtype: torch.dtype, slow: bool) -> None:
    batch, points, channels, channels_out = shape
    generator = torch.Generator().manual_seed(1)
    x, y, weight = (
        torch.randn(batch, *size, generator=generator).to(dtype)
        for size in ((points, channels), (points, channels_out), (channels, channels_out))
    )
    rtol, atol = TOLERANCES[dtype]
    for given in (weight, laid_out(weight)):
        out = torch.empty_like(y)
        times(x, given, out)
        torch.testing.assert_close(out.double(), x.double() @ weight.double(), rtol=rtol, atol=atol)
    backward = torch.empty_like(x)  # the transposed weights are laid out as they are
    times(y, weight.transpose(1, 2), backward)
    torch.testing.assert_close(backward.double(), y.double() @ weight.double().transpose(1, 2), rtol=rtol, atol=atol)
    torch.testing.assert_close(outer(x, y).double(), x.double().transpose(1, 2) @ y.double(), rtol=rtol, atol=atol)


def test_pixels_of_a_larger_tensor_are_not_copied(slow: bool) -> None:
    x, weight, out = torch.randn(2, 2048, 128), torch.randn(2, 128, 128), torch.zeros(2, 2048, 128)
    part = slice(1, 2), slice(500, 1700)
    assert by_convolution(x[part], 128) == slow
    times(x[part], weight[1:], out[part])
    torch.testing.assert_close(out[part], x[part] @ weight[1:], rtol=1e-5, atol=1e-4)
    assert not out[0].any() and not out[1, :500].any() and not out[1, 1700:].any()


@pytest.mark.parametrize(
    ("x", "channels_out"),
    [
        (torch.zeros(1, 2048, 128, dtype=torch.float64), 128),
        (torch.zeros(1, 2048, 128, dtype=torch.bfloat16), 128),
        (torch.zeros(2, 2048, 128), 128),  # pictures with weights of their own
        (torch.zeros(1, 2048, 256)[:, :, ::2], 128),
        (torch.zeros(1, 2048, 128), 3),  # too small to be worth it
    ],
    ids=["float64", "bfloat16", "two pictures", "not contiguous", "small"],
)
def test_what_is_no_convolution(x: torch.Tensor, channels_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: True)
    assert not by_convolution(x, channels_out)


def test_the_processor_decides() -> None:
    x = torch.zeros(1, 2048, 128)
    with open("/proc/cpuinfo") as file:
        intel = "GenuineIntel" in file.read()
    assert by_convolution(x, 128) == (torch.backends.mkl.is_available() and not intel)
