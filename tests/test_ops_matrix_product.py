"""Products of pixels by either library: the same numbers, whatever the shape and the processor."""

import pytest
import torch

from pipeline.ops import matrix_product
from pipeline.ops.matrix_product import _picture, by_convolution, is_intel, laid_out, sum_of_outer_products, times

SHAPES = [(1, 1024, 256, 256), (2, 700, 512, 128), (1, 64, 512, 512), (3, 256, 256, 256), (1, 200, 16, 3)]
TOLERANCES = {torch.float32: (1e-5, 2e-4), torch.float64: (1e-12, 1e-11), torch.bfloat16: (2e-2, 0.2)}


@pytest.fixture(params=[True, False], ids=["mkl slow", "mkl fast"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Processors of both kinds."""
    monkeypatch.setattr(matrix_product, "mkl_is_slow", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, threads: int, slow: bool
) -> None:
    batch, points, channels, channels_out = shape
    generator = torch.Generator().manual_seed(1)
    x, y, weight = (
        torch.randn(batch, *size, generator=generator).to(dtype)
        for size in ((points, channels), (points, channels_out), (channels, channels_out))
    )
    rtol, atol = TOLERANCES[dtype]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for given in (weight, laid_out(weight, x)):
            out = torch.empty_like(y)
            times(x, given, out)
            torch.testing.assert_close(out.double(), x.double() @ weight.double(), rtol=rtol, atol=atol)
        backward = torch.empty_like(x)  # the transposed weights are laid out as they are
        times(y, weight.transpose(1, 2), backward)
        torch.testing.assert_close(
            backward.double(), y.double() @ weight.double().transpose(1, 2), rtol=rtol, atol=atol
        )
        summed = sum_of_outer_products(x, y)
        torch.testing.assert_close(summed.double(), x.double().transpose(1, 2) @ y.double(), rtol=rtol, atol=atol)
    finally:
        torch.set_num_threads(before)


def test_parts_of_larger_tensors_are_read_and_written_in_place(slow: bool) -> None:
    x, weight, out = torch.randn(2, 2048, 256), torch.randn(2, 256, 256), torch.zeros(2, 2048, 256)
    part = slice(1, 2), slice(500, 1700)
    assert by_convolution(x[part], 256) == slow
    assert _picture(x[part][0]).data_ptr() == x[part].data_ptr()
    times(x[part], weight[1:], out[part])
    torch.testing.assert_close(out[part], x[part] @ weight[1:], rtol=1e-5, atol=2e-4)
    assert not out[0].any() and not out[1, :500].any() and not out[1, 1700:].any()


def test_what_is_no_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_product, "mkl_is_slow", lambda: True)
    x = torch.zeros(2, 2048, 256)
    assert by_convolution(x, 256)
    assert not by_convolution(x.double(), 256)
    assert not by_convolution(x.bfloat16(), 256)
    assert not by_convolution(x[:, :127], 256)
    assert not by_convolution(x, 3)
    monkeypatch.setattr(matrix_product, "mkl_is_slow", lambda: False)
    assert not by_convolution(x, 256)


def test_the_processors_maker_is_read() -> None:
    assert is_intel("processor : 0\nvendor_id : GenuineIntel\n")
    assert not is_intel("processor : 0\nvendor_id : AuthenticAMD\n")
    assert not is_intel("processor : 0\nBogoMIPS : 243.75\n")  # ARM
