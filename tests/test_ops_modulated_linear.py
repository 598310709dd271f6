import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.ops.modulated_linear import (
    modulated_linear,
    modulated_linear_reference,
    modulated_linear_with_head,
)

B, P, I, O = 3, 70, 24, 20  # noqa: E741
CASES = [(shared, demodulate) for shared in (False, True) for demodulate in (False, True)]


def inputs(dtype: torch.dtype, shared: bool, points: int = P) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(points, I) if shared else (B, points, I), (I, O), (B, I), (O,), (B, points)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("shared", "demodulate"), CASES)
@pytest.mark.parametrize("slope", [1.0, 0.2])
def test_fast_form_equals_equation_2_forward_and_backward(
    dtype: torch.dtype, tolerance: float, shared: bool, demodulate: bool, slope: float
) -> None:
    arguments = inputs(dtype, shared)
    rules: dict[str, Any] = {"demodulate": demodulate, "gain": 1.3, "slope": slope}
    fast = modulated_linear(*arguments, **rules, keep_weights=slope == 1.0)
    reference = modulated_linear_reference(*arguments, **rules)
    assert fast.shape == (B, P, O)
    assert relative(fast, reference) < tolerance
    weight = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad(fast, arguments, weight),
        torch.autograd.grad(reference, arguments, weight),
        strict=True,
    ):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("shared", [False, True])
def test_wide_layers_equal_equation_2_forward_and_backward(shared: bool) -> None:
    """As many channels as the generator has, which another library multiplies on some processors."""
    torch.manual_seed(0)
    shapes = [(300, 512) if shared else (2, 300, 512), (512, 512), (2, 512), (512,), (2, 300)]
    arguments = [torch.randn(shape, requires_grad=True) for shape in shapes]
    fast, reference = modulated_linear(*arguments), modulated_linear_reference(*arguments)
    assert relative(fast, reference) < 1e-5
    weight = torch.randn_like(fast)
    for found, exact in zip(
        torch.autograd.grad(fast, arguments, weight),
        torch.autograd.grad(reference, arguments, weight),
        strict=True,
    ):
        assert relative(found, exact) < 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_bias_and_noise_are_optional(shared: bool) -> None:
    x, weight, style, bias, noise = inputs(torch.float64, shared)
    plain = modulated_linear(x, weight, style)
    torch.testing.assert_close(modulated_linear(x, weight, style, bias), plain + bias)
    torch.testing.assert_close(modulated_linear(x, weight, style, None, noise), plain + noise[:, :, None])
    torch.testing.assert_close(modulated_linear(x, weight, style, bias, noise[:1]), plain + bias + noise[:1, :, None])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("slope", [1.0, 0.2])
def test_twice_differentiable(shared: bool, slope: float) -> None:
    arguments = [argument.detach()[..., :4] for argument in inputs(torch.float64, shared, points=5)]
    arguments[1], arguments[4] = arguments[1][:4], inputs(torch.float64, shared, points=5)[4].detach()
    arguments = [argument.clone().requires_grad_(True) for argument in arguments]
    assert torch.autograd.gradgradcheck(functools.partial(modulated_linear, slope=slope), tuple(arguments))


def with_head(dtype: torch.dtype, shared: bool, points: int = P) -> list[Tensor]:
    return [*inputs(dtype, shared, points), torch.randn(B, O, 3, dtype=dtype, requires_grad=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("used", [[0], [1], [0, 1]])
@pytest.mark.parametrize("shared", [False, True])
def test_a_head_is_one_more_product_forward_and_backward(
    dtype: torch.dtype, tolerance: float, used: list[int], shared: bool
) -> None:
    """Also where only one of the two results is used, as the last layer's head."""
    arguments = with_head(dtype, shared)
    fast = modulated_linear_with_head(*arguments, gain=1.3, slope=0.2)
    y_BPO = modulated_linear_reference(*arguments[:5], gain=1.3, slope=0.2)
    reference = [y_BPO, y_BPO @ arguments[5]]
    weights = [torch.randn_like(reference[number]) for number in used]
    for number in used:
        assert relative(fast[number], reference[number]) < tolerance
    found, exact = (
        torch.autograd.grad([results[number] for number in used], arguments, weights, allow_unused=True)
        for results in (fast, reference)
    )
    assert (found[5] is None) == (used == [0])
    for one, other in zip(found, exact, strict=True):
        assert (one is None) == (other is None)
        assert one is None or relative(one, other) < tolerance


@pytest.mark.parametrize("used", [[0], [1], [0, 1]])
def test_a_head_is_twice_differentiable(used: list[int]) -> None:
    arguments = [argument.detach()[..., :4] for argument in inputs(torch.float64, False, points=5)]
    arguments[1], arguments[4] = arguments[1][:4], torch.randn(B, 5, dtype=torch.float64)
    arguments = [argument.clone().requires_grad_(True) for argument in arguments]
    head_BOR = torch.randn(B, 4, 3, dtype=torch.float64, requires_grad=True)

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        both = modulated_linear_with_head(*tensors, slope=0.2)
        return tuple(both[number] for number in used)

    assert torch.autograd.gradgradcheck(results, (*arguments, head_BOR))


def test_under_autocast_a_heads_gradients_are_float32_and_near() -> None:
    arguments = with_head(torch.float32, shared=False)
    with torch.autocast("cpu", torch.bfloat16):
        _, result_BPR = modulated_linear_with_head(*arguments)
    assert result_BPR.dtype == torch.bfloat16
    weight = torch.randn(result_BPR.shape)
    gradients = torch.autograd.grad(result_BPR, arguments, weight.to(torch.bfloat16))
    y_BPO = modulated_linear_reference(*arguments[:5])
    for a, b in zip(gradients, torch.autograd.grad(y_BPO @ arguments[5], arguments, weight), strict=True):
        assert a.dtype == torch.float32 and relative(a, b) < 0.03


def test_demodulation_gives_unit_variance() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 20_000, 64)
    weight, style = torch.randn(64, 32) * 7.0, torch.rand(2, 64) * 3.0 + 0.1
    y = modulated_linear(x, weight, style)
    assert y.square().mean((1, 2)).sub(1.0).abs().max() < 1e-2
    assert modulated_linear(x, weight, style, demodulate=False).square().mean() > 100.0


@pytest.mark.parametrize("shared", [False, True])
def test_autocast_rounds_the_weights_once(shared: bool) -> None:
    """With x the identity the result is the weights: float32 demodulation, then one rounding to bfloat16."""
    _, weight, style, _, _ = (argument.detach() for argument in inputs(torch.float32, shared))
    identity = torch.eye(I) if shared else torch.eye(I).expand(B, I, I)
    with torch.autocast("cpu", torch.bfloat16):
        y = modulated_linear(identity, weight, style, gain=1.4)
    assert y.dtype == torch.bfloat16
    exact = modulated_linear_reference(identity.double(), weight.double(), style.double(), gain=1.4)
    assert ((y.double() - exact).abs() / exact.abs()).max() < 1.01 * 2.0**-8  # half a unit in the last place


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("slope", [1.0, 0.2])
def test_autocast_gradients_are_float32_and_near(shared: bool, slope: float) -> None:
    arguments = inputs(torch.float32, shared)
    with torch.autocast("cpu", torch.bfloat16):
        y = modulated_linear(*arguments, slope=slope)
    weight = torch.randn(y.shape)
    gradients = torch.autograd.grad(y, arguments, weight.to(y.dtype))
    exact = torch.autograd.grad(modulated_linear_reference(*arguments, slope=slope), arguments, weight)
    for a, b in zip(gradients, exact, strict=True):
        assert a.dtype == torch.float32
        assert_near_in_bf16(a, b, slope)


def assert_near_in_bf16(gradient: Tensor, exact: Tensor, slope: float) -> None:
    """Each number, without a kink; with one in their sum, for rounding changes the sign of a few next to zero."""
    if slope == 1.0:
        assert relative(gradient, exact) < 0.03
    else:
        assert (gradient - exact).norm() < 0.1 * exact.norm()  # 0.05 was seen


@pytest.mark.parametrize("shared", [False, True])
def test_only_what_needs_a_gradient_gets_one(shared: bool) -> None:
    arguments = inputs(torch.float64, shared)
    whole = torch.autograd.grad(modulated_linear(*arguments, slope=0.2).sum(), arguments)
    for chosen in range(len(arguments)):
        one = [argument.detach().requires_grad_(number == chosen) for number, argument in enumerate(arguments)]
        (gradient,) = torch.autograd.grad(modulated_linear(*one, slope=0.2).sum(), one[chosen])
        assert relative(gradient, whole[chosen]) < 1e-12


@pytest.mark.parametrize("keep_weights", [False, True])
def test_one_tensor_of_the_pixels_size_is_kept(keep_weights: bool) -> None:
    """The result, which the next layer keeps as its input anyway; and the modulated weights only on demand."""
    arguments = inputs(torch.float32, shared=False, points=4096)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = modulated_linear(*arguments, slope=0.2, keep_weights=keep_weights)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= y.numel()}
    assert large == {y.data_ptr(), arguments[0].data_ptr()}
    assert ((B, I, O) in {tuple(tensor.shape) for tensor in kept}) == keep_weights


@pytest.mark.parametrize("keep_weights", [False, True])
def test_a_backward_under_autocast_is_the_same(keep_weights: bool) -> None:
    arguments = inputs(torch.float32, shared=False)
    gradients = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = modulated_linear(*arguments, slope=0.2, keep_weights=keep_weights)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(y, arguments, torch.ones_like(y)))
    for outside, one in zip(*gradients, strict=True):
        assert torch.equal(outside, one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slope", [1.0, 0.2])
@pytest.mark.parametrize("one_noise", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shared", [False, True])
def test_cuda_equals_equation_2_in_float64(
    dtype: torch.dtype, tolerance: float, shared: bool, one_noise: bool, slope: float
) -> None:
    exact = with_head(torch.float64, shared, points=300)
    if one_noise:
        exact[4] = exact[4].detach()[:1].requires_grad_(True)
    arguments = [argument.detach().cuda().float().requires_grad_(True) for argument in exact]
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        fast = modulated_linear_with_head(*arguments, gain=1.3, slope=slope)
    y_BPO = modulated_linear_reference(*exact[:5], gain=1.3, slope=slope)
    reference = [y_BPO, y_BPO @ exact[5]]
    for one, other in zip(fast, reference, strict=True):
        assert one.dtype == dtype and relative(one.cpu().double(), other) < tolerance
    weights = [torch.randn_like(other) for other in reference]
    found = torch.autograd.grad(fast, arguments, [weight.to("cuda", dtype) for weight in weights])
    for one, other in zip(found, torch.autograd.grad(reference, exact, weights), strict=True):
        if dtype == torch.bfloat16:
            assert_near_in_bf16(one.cpu().double(), other, slope)
        else:
            assert relative(one.cpu().double(), other) < tolerance
