"""On the CPU, for which torch.compile writes C++; the code that it is given is the same on every device."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from pipeline.ops import fused_compiled, fused_linear

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_passes_equal_the_plain_form(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    for points, shared in ((70, False), (33, True)):
        x = torch.randn((points, 12) if shared else (3, points, 12)).to(dtype)
        weight, bias, noise = torch.randn(3, 12, 8).to(dtype), torch.randn(8), torch.randn(3, points)
        y_BPO = fused_compiled.product(x, weight, bias, noise, 0.2)
        exact = F.leaky_relu(x.double() @ weight.double() + bias + noise[:, :, None], 0.2)
        assert y_BPO.dtype == dtype
        assert (y_BPO - exact).abs().max() < tolerance * exact.abs().max()
        gradient = torch.randn_like(y_BPO)
        found = fused_compiled.activation_backward(gradient, y_BPO, 0.2, True, True)
        expected = fused_linear.activation_backward(gradient.double(), y_BPO.double(), 0.2, True, True)
        for one, other in zip(found, expected, strict=True):
            assert one is not None and other is not None
            assert (one - other).abs().max() < tolerance * other.abs().max()


def test_on_a_cpu_it_is_not_the_choice() -> None:
    assert not fused_compiled.available(torch.ones(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_compiles() -> None:
    assert fused_compiled.available(torch.ones(1, device="cuda"))
