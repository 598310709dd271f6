import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import fused_linear, matrix_product
from pipeline.ops.fused_linear import activation_backward, blocks, product, product_backward
from pipeline.ops.matrix_product import SMALLEST_PICTURE, by_convolution


def plain(arguments: list[Tensor], slope: float) -> Tensor:
    x, weight_BIO, bias_O, noise_BP = arguments
    return F.leaky_relu(x @ weight_BIO + bias_O + noise_BP[:, :, None], slope)


def inputs(batch: int, points: int, shared: bool) -> list[Tensor]:
    torch.manual_seed(batch + points)
    shapes = [(points, 12) if shared else (batch, points, 12), (batch, 12, 8), (8,), (batch, points)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@given(
    batch=st.integers(1, 9),
    points=st.integers(1, 3000),
    channels=st.sampled_from([1, 3, 64, 512]),
    most=st.sampled_from([1, 4096, 1 << 16, 1 << 22]),
)
@settings(deadline=None)
def test_blocks_cover_every_pixel_once(batch: int, points: int, channels: int, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_linear, "BLOCK_BYTES", most)
        seen = torch.zeros(batch, points, dtype=torch.int64)
        for pictures, pixels in blocks(torch.empty(batch, points, channels)):
            part = seen[pictures, pixels]
            assert part.shape[1] >= min(points, SMALLEST_PICTURE) / 2 or part.shape[1] == points
            part += 1
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("batch", "points"), [(1, 1), (5, 20), (5, 70), (3, 1000)])
def test_many_blocks_equal_the_plain_form(
    head: bool, shared: bool, batch: int, points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear, "BLOCK_BYTES", 128 * 8 * 8)  # 128 pixels at once
    arguments = inputs(batch, points, shared)
    x, weight, bias, noise = (argument.detach() for argument in arguments)
    head_BOR = torch.randn(batch, 8, 3, dtype=torch.float64, requires_grad=True) if head else None
    rounded_BOR = None if head_BOR is None else head_BOR.detach()
    y_BPO, result_BPR = product(x, weight, bias, noise, 0.2, rounded_BOR)
    expected = [plain(arguments, 0.2)]
    torch.testing.assert_close(y_BPO, expected[0], rtol=1e-12, atol=1e-12)
    if head_BOR is not None:
        arguments.append(head_BOR)
        expected.append(expected[0] @ head_BOR)
        torch.testing.assert_close(result_BPR, expected[1], rtol=1e-12, atol=1e-12)
    needs = (True,) * 5
    for used in ([0], [0, 1], [1]) if head else ([0],):  # y, both, the head alone
        gradients = [torch.randn_like(result) if number in used else None for number, result in enumerate(expected)]
        pair = (gradients[0], gradients[1] if head else None)
        found = product_backward(pair, x, y_BPO, weight, rounded_BOR, 0.2, needs)
        outputs, given = [expected[number] for number in used], [gradients[number] for number in used]
        exact = torch.autograd.grad(outputs, arguments, given, retain_graph=True, allow_unused=True)
        for one, other in zip(found, exact, strict=False):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", [False, True])
def test_bfloat16_is_rounded_after_the_product_and_after_the_sum(shared: bool) -> None:
    x, weight, bias, noise = (argument.detach().bfloat16() for argument in inputs(3, 400, shared))
    found, _ = product(x, weight, bias, noise, 0.2)
    x, weight, bias, noise = (one.double() for one in (x, weight, bias, noise))
    exact = plain([x, weight, bias, noise], 0.2)
    size = (x @ weight).abs() + bias.abs() + noise.abs()[:, :, None]
    assert ((found.double() - exact).abs() <= size * 2.0**-7).all()  # each rounding moves a number by 2^-8 of it


def test_the_product_of_a_pixel_does_not_depend_on_its_block() -> None:
    x, weight, bias, noise = (argument.detach().float() for argument in inputs(2, 9000, shared=False))
    order = torch.randperm(9000)
    head = torch.randn(2, 8, 3)
    whole = product(x, weight, bias, noise, 0.2, head)
    for one, other in zip(product(x[:, order], weight, bias, noise[:, order], 0.2, head), whole, strict=True):
        assert one is not None and other is not None and torch.equal(one, other[:, order])


@pytest.fixture(params=[True, False], ids=["by convolution", "by MKL"])
def convolution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Processors of both kinds."""
    monkeypatch.setattr(matrix_product, "mkl_is_slow", lambda: request.param)
    return bool(request.param)


def wide_inputs(points: int, shared: bool) -> list[Tensor]:
    """Of as many channels as convolutions are worth it for."""
    torch.manual_seed(points)
    shapes = [(points, 256) if shared else (3, points, 256), (3, 256, 256), (256,), (3, points)]
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("slope", [0.2, 1.0])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("points", [700, 200])  # parts of one picture, several pictures at once
def test_either_library_comes_to_the_numbers_of_float64(
    points: int, shared: bool, slope: float, convolution: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear, "BLOCK_BYTES", 400 * 256 * 4)  # 400 pixels at once
    x, weight, bias, noise = wide_inputs(points, shared)
    assert by_convolution(x.expand(3, -1, -1), 256) == convolution
    y_BPO, _ = product(x, weight, bias, noise, slope)
    exact = [one.double().requires_grad_() for one in (x, weight, bias, noise)]
    expected = plain(exact, slope)
    torch.testing.assert_close(y_BPO.double(), expected, rtol=1e-5, atol=1e-4)
    gradient = torch.randn_like(y_BPO)
    found = product_backward((gradient, None), x, y_BPO, weight, None, slope, (True,) * 4 + (False,))
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    for one, other in zip(found, wanted, strict=False):
        assert one is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-3)


def test_which_other_pixels_there_are_changes_no_bit(convolution: bool) -> None:
    x, weight, bias, noise = wide_inputs(3000, shared=False)
    whole, _ = product(x, weight, bias, noise, 0.2)
    for points in (SMALLEST_PICTURE, SMALLEST_PICTURE + 3, 1000, 2999):
        chosen = torch.randperm(3000)[:points]
        part, _ = product(x[:, chosen], weight, bias, noise[:, chosen], 0.2)
        assert torch.equal(part, whole[:, chosen]), points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_at_zero_the_slope_below_counts_and_sums_are_exact(dtype: torch.dtype) -> None:
    y = torch.tensor([[[0.0, -1.0, 2.0]]], dtype=dtype)
    gradient, bias, noise = activation_backward(torch.ones_like(y), y, 0.25, True, True)
    assert gradient.tolist() == [[[0.25, 0.25, 1.0]]]
    assert bias is not None and bias.tolist() == [0.25, 0.25, 1.0]
    assert noise is not None and noise.tolist() == [[1.5]] and noise.dtype == torch.promote_types(dtype, torch.float32)
    assert activation_backward(y, y, 1.0, False, False) == (y, None, None)
