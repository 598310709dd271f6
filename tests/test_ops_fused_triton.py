"""The kernels in Triton's interpreter, which needs no GPU; compiled for Hopper; and on CUDA where there is a device."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import fused_triton
from pipeline.ops.fused_triton import (
    FULL_TILES,
    HALF_TILES,
    NARROW_TILES,
    TF32_TILES,
    Tile,
    activation_backward,
    candidates,
    product,
)
from pipeline.ops.modulated_linear import modulated_linear_reference, modulated_linear_with_head

B, P, I, O = 3, 40, 24, 20  # noqa: E741
SMALL = Tile(16, 16, 16, warps=4, stages=2)  # several tiles of all three dimensions, with parts left over
TILES = [SMALL, SMALL._replace(bulk=True)]

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Interpreter = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """Calls a function in a process where kernels are interpreted: Triton reads the switch when it is imported."""
    pytest.importorskip("triton", reason="needs Triton: Linux only")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(torch.set_num_threads, 1).result()  # starts the process, with the switch
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def inputs(
    shared: bool = False, shape: tuple[int, ...] = (B, P, I, O), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, points, channels_in, channels_out = shape
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn((points, channels_in) if shared else (batch, points, channels_in), generator=draw)
    weight = torch.randn(batch, channels_in, channels_out, generator=draw)
    return x, weight, torch.randn(channels_out, generator=draw), torch.randn(batch, points, generator=draw)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None, slope: float) -> Tensor:
    y = x.double() @ weight.double()
    if bias is not None:
        y = y + bias.double()
    if noise is not None:
        y = y + noise.double()[:, :, None]
    return torch.where(y > 0, y, slope * y)


# ---- in the interpreter --------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shared", [False, True])
def test_product_equals_its_formula(interpreter: Interpreter, shared: bool, tile: Tile) -> None:
    arguments = inputs(shared)
    y = interpreter(product, *arguments, 0.2, tile)
    assert y.dtype == torch.float32
    assert y.shape == (B, P, O)
    assert relative(y, expected(*arguments, 0.2)) < 1e-5


def test_one_picture_s_noise_for_all_and_no_activation(interpreter: Interpreter) -> None:
    x, weight, bias, noise = inputs()
    y = interpreter(product, x, weight, bias, noise[:1], 1.0, SMALL)
    assert relative(y, expected(x, weight, bias, noise[:1], 1.0)) < 1e-5


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_noise", [False, True])
def test_bias_and_noise_are_optional(interpreter: Interpreter, with_bias: bool, with_noise: bool) -> None:
    x, weight, bias, noise = inputs()
    arguments = (x, weight, bias if with_bias else None, noise if with_noise else None, 0.2)
    assert relative(interpreter(product, *arguments, SMALL), expected(*arguments)) < 1e-5


def test_the_default_tile_serves_too(interpreter: Interpreter) -> None:
    arguments = inputs(shape=(2, 150, 70, 90))
    assert relative(interpreter(product, *arguments, 0.2), expected(*arguments, 0.2)) < 1e-5


@given(
    shape=st.tuples(st.integers(1, 3), *[st.integers(1, 36)] * 3), shared=st.booleans(), slope=st.sampled_from([0.2, 1])
)
@settings(max_examples=8)
def test_any_shape(interpreter: Interpreter, shape: tuple[int, ...], shared: bool, slope: float) -> None:
    arguments = inputs(shared, shape)
    assert relative(interpreter(product, *arguments, slope, SMALL), expected(*arguments, slope)) < 1e-5


@pytest.mark.parametrize("tile", TILES)
def test_strides_are_followed_and_nothing_else_is_read(interpreter: Interpreter, tile: Tile) -> None:
    x, weight, bias, noise = inputs()
    exact = expected(x, weight, bias, noise, 0.2)
    wide_x, wide_weight = torch.full((P, B, I + 8), torch.nan), torch.full((B, I + 3, O + 4), torch.nan)
    wide_x[:, :, :I], wide_weight[:, :I, :O] = x.transpose(0, 1), weight
    spread_x, spread_noise = wide_x.transpose(0, 1)[:, :, :I], noise.t().contiguous().t()
    assert relative(interpreter(product, spread_x, wide_weight[:, :I, :O], bias, spread_noise, 0.2, tile), exact) < 1e-5
    weight_BOI = weight.transpose(1, 2).contiguous()
    assert relative(interpreter(product, x, weight_BOI.transpose(1, 2), bias, noise, 0.2, tile), exact) < 1e-5
    assert relative(interpreter(product, x[:1].expand(B, -1, -1), weight, bias, noise, 0.2, tile)[0], exact[0]) < 1e-5


def test_all_programs_together_fill_every_tile_once(interpreter: Interpreter) -> None:
    """One pixel of a picture never leaks into another: with one hot pixel the rest is exactly bias."""
    x, weight, bias, _ = inputs()
    x[:] = 0.0
    x[1, 17, 5] = 1.0
    y = interpreter(product, x, weight, bias, None, 1.0, SMALL)
    hot = y[1, 17].clone()
    y[1, 17] = bias
    assert torch.equal(y, bias.expand(B, P, O))
    torch.testing.assert_close(hot, bias + weight[1, 5])


def layer_by_kernels(arguments: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """A layer with a head, and its gradients, as on CUDA: called in the interpreter's process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_triton, "available", lambda x: True)
        arguments = [argument.requires_grad_(True) for argument in arguments]
        results = modulated_linear_with_head(*arguments, gain=1.3, slope=0.2)
        found = [*results, *torch.autograd.grad(results, arguments, weights)]
    return [tensor.detach() for tensor in found]


@pytest.mark.parametrize("shared", [False, True])
def test_a_whole_layer_and_its_gradients_are_those_of_equation_2(interpreter: Interpreter, shared: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = [(P, I) if shared else (B, P, I), (I, O), (B, I), (O,), (B, P), (B, O, 3)]
    exact = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    y_BPO = modulated_linear_reference(*exact[:5], gain=1.3, slope=0.2)
    reference = [y_BPO, y_BPO @ exact[5]]
    weights = [torch.randn(result.shape, generator=draw, dtype=torch.float64) for result in reference]
    wanted = [*reference, *torch.autograd.grad(reference, exact, weights)]
    found = interpreter(
        layer_by_kernels, [one.detach().float() for one in exact], [weight.float() for weight in weights]
    )
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert relative(one, other.detach()) < 1e-5, number


def test_nothing_in_is_nothing_out() -> None:
    x, weight, bias, noise = inputs(shape=(B, 0, I, O))
    assert product(x, weight, bias, noise, 0.2).shape == (B, 0, O)


def gradients(y: Tensor, gradient: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.where(y > 0, gradient, (slope * gradient.float()).to(gradient.dtype))
    return g, g.double().sum((0, 1)), g.double().sum(2)


# Interpreted, bfloat16 is cut off and not rounded: a slope of 1/4 needs neither.
@pytest.mark.parametrize(("dtype", "slope"), [(torch.float32, 0.2), (torch.bfloat16, 0.25)])
@pytest.mark.parametrize("shape", [(B, P, O), (2, 301, 130), (1, 70, 1030), (2, 1, 1)])
def test_activation_backward(
    interpreter: Interpreter, dtype: torch.dtype, slope: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    y, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    y[:, ::3] = 0.0
    g, bias, noise = interpreter(activation_backward, gradient, y, slope, True, True)
    exact, exact_bias, exact_noise = gradients(y, gradient, slope)
    assert g.dtype == dtype
    assert torch.equal(g, exact)
    assert bias.dtype == noise.dtype == torch.float32
    assert relative(bias, exact_bias) < 1e-5
    assert relative(noise, exact_noise) < 1e-5


def test_what_is_not_needed_is_not_made(interpreter: Interpreter) -> None:
    y, gradient = torch.randn(B, P, O), torch.randn(B, P, O)
    exact, exact_bias, exact_noise = gradients(y, gradient, 0.2)
    g, bias, noise = interpreter(activation_backward, gradient, y, 0.2, True, False)
    assert noise is None and relative(bias, exact_bias) < 1e-5
    g, bias, noise = interpreter(activation_backward, gradient, y, 0.2, False, True)
    assert bias is None and relative(noise, exact_noise) < 1e-5
    assert torch.equal(g, exact)
    assert activation_backward(gradient, y, 1.0, False, False) == (gradient, None, None)


def test_without_an_activation_only_the_sums_are_made(interpreter: Interpreter) -> None:
    y, gradient = torch.full((B, P, O), float("nan")), torch.randn(B, P, O)
    g, bias, noise = interpreter(activation_backward, gradient, y, 1.0, True, True)
    assert torch.equal(g, gradient)
    assert relative(bias, gradient.sum((0, 1))) < 1e-5
    assert relative(noise, gradient.sum(2)) < 1e-5


def test_gradients_of_any_strides(interpreter: Interpreter) -> None:
    y, one = torch.randn(P, B, O).transpose(0, 1), torch.tensor(3.0).expand(B, P, O)
    g, bias, _ = interpreter(activation_backward, one, y, 0.2, True, False)
    exact, exact_bias, _ = gradients(y, one, 0.2)
    assert g.is_contiguous() and torch.equal(g, exact)
    assert relative(bias, exact_bias) < 1e-5


# ---- what needs no kernel ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(B, P, I).double()}, TypeError, "x is torch.float64: expected bfloat16"),
        ({1: torch.zeros(B, I, O).bfloat16()}, TypeError, "weight is torch.bfloat16: expected torch.float32"),
        ({1: torch.zeros(B, I + 1, O)}, ValueError, "expected .B, P, I. or .P, I., and .B, I, O."),
        ({0: torch.zeros(2, P, I)}, ValueError, "x has 2 pictures and weight 3"),
        ({2: torch.zeros(O + 1)}, ValueError, r"bias is \(21,\): expected \(20,\)"),
        ({3: torch.zeros(2, P)}, ValueError, r"noise is \(2, 40\): expected \(3, 40\) or \(1, 40\)"),
        ({2: torch.zeros(O, device="meta")}, ValueError, "bias is on meta: expected cpu"),
    ],
)
def test_bad_input_is_named(change: dict[int, Tensor], error: type[Exception], message: str) -> None:
    arguments = list(inputs())
    for position, tensor in change.items():
        arguments[position] = tensor
    x, weight, bias, noise = arguments
    with pytest.raises(error, match=message):
        product(x, weight, bias, noise, 0.2)


def test_bad_gradients_are_named() -> None:
    with pytest.raises(ValueError, match=r"the gradient is \(3, 40, 20\) and the result \(3, 40, 21\)"):
        activation_backward(torch.zeros(B, P, O), torch.zeros(B, P, O + 1), 0.2, True, True)
    with pytest.raises(TypeError, match="gradient is torch.float64"):
        activation_backward(torch.zeros(B, P, O).double(), torch.zeros(B, P, O), 0.2, True, True)


def test_a_cpu_and_float64_are_for_the_other_form() -> None:
    assert not fused_triton.available(torch.zeros(1))
    assert not fused_triton.available(torch.zeros(1, device="meta"))


def test_the_module_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import pipeline.ops.fused_triton"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.sampled_from(fused_triton.DTYPES), st.integers(1, 3000), st.integers(1, 3000), st.booleans())
def test_tiles_are_legal_and_not_wider_than_the_layer(dtype: torch.dtype, width: int, out: int, bulk: bool) -> None:
    tiles = candidates(dtype, width, out, bulk)
    assert tiles and len(set(tiles)) == len(tiles)
    for tile in tiles:
        for size in tile[:3]:
            assert size >= 16 and size.bit_count() == 1
        assert tile.channels_in < max(32, 2 * width) and tile.channels_out < max(32, 2 * out)
        assert bulk or not tile.bulk


@pytest.mark.parametrize("tile", sorted({*HALF_TILES, *NARROW_TILES, *TF32_TILES, *FULL_TILES}))
def test_tiles_have_room_on_hopper(tile: Tile) -> None:
    """Shared memory and sums for all programs of one multiprocessor: 227 KiB, and half of 65,536 registers."""
    size = 2 if tile in HALF_TILES + NARROW_TILES else 4
    shared = tile.stages * (tile.pixels + tile.channels_out) * tile.channels_in * size
    result = tile.pixels * tile.channels_out
    assert tile.programs * (shared + tile.bulk * result * size + 1024) <= 227 * 1024
    assert tile.programs * result <= 1 << 15


# ---- on CUDA -------------------------------------------------------------------------------------


@pytest.fixture
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


ON_CUDA = [(torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float32, 1e-5)]


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), ON_CUDA)
@pytest.mark.parametrize("shape", [(2, 1000, 512, 512), (3, 257, 1024, 256), (2, 130, 70, 90), (2, 400, 512, 3)])
@pytest.mark.parametrize("shared", [False, True])
def test_every_tile_on_cuda_against_float64(
    exact_float32: None, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], shared: bool
) -> None:
    from triton.runtime.errors import OutOfResources

    x, weight, bias, noise = (tensor.cuda() for tensor in inputs(shared, shape))
    x, weight = x.to(dtype), (weight / shape[2] ** 0.5).to(dtype)
    exact = expected(x, weight, bias, noise, 0.2)
    bulk = torch.cuda.get_device_capability()[0] >= 9 and fused_triton.bulk_ready(x, weight, exact.to(dtype))
    smallest = Tile(32, 32, 32, warps=4, stages=2)
    for tile in [None, smallest, *candidates(dtype, shape[2], shape[3], bulk)]:
        try:
            y = product(x, weight, bias, noise, 0.2, tile)
        except OutOfResources:
            assert tile not in (None, smallest)  # the others need not have room on every device
            continue
        assert y.dtype == dtype
        assert relative(y, exact) < tolerance, tile


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("dtype", fused_triton.DTYPES)
@pytest.mark.parametrize("shape", [(2, 1000, 512), (3, 257, 130), (1, 70, 1030)])
def test_activation_backward_on_cuda(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    y, gradient = torch.randn(shape, device="cuda").to(dtype), torch.randn(shape, device="cuda").to(dtype)
    y[:, ::3] = 0.0
    first, second = (activation_backward(gradient, y, 0.2, True, True) for _ in range(2))
    exact, exact_bias, exact_noise = gradients(y, gradient, 0.2)
    g, bias, noise = first
    assert bias is not None and noise is not None
    assert relative(g, exact) < 1e-6
    assert relative(bias, exact_bias) < 1e-5
    assert relative(noise, exact_noise) < 1e-5
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@on_cuda
def test_a_cuda_graph_replays_the_layer() -> None:
    x, weight, bias, noise = (tensor.cuda() for tensor in inputs(shape=(2, 1000, 128, 128)))
    product(x, weight, bias, noise, 0.2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x, weight, bias, noise, 0.2)
    x.mul_(2.0)
    graph.replay()
    assert torch.equal(y, product(x, weight, bias, noise, 0.2))


@pytest.mark.gpu
@on_cuda
def test_more_elements_than_32_bits_can_count() -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free device memory")
    batch, points, width = 33, 1 << 16, 1024
    x = torch.randn(points, 64, device="cuda").bfloat16()
    weight = torch.randn(batch, 64, width, device="cuda").bfloat16() / 8
    bulk = torch.cuda.get_device_capability()[0] >= 9
    for tile in [tile for tile in candidates(x.dtype, 64, width, bulk) if tile.stages <= 3][:: 3 if bulk else 1][:2]:
        y = product(x, weight, None, None, 0.2, tile)
        assert torch.equal(y[-1:], product(x, weight[-1:], None, None, 0.2, tile))
    g, bias, noise = activation_backward(y, y, 0.2, True, True)
    last, _, last_noise = activation_backward(y[-1:], y[-1:], 0.2, True, True)
    assert torch.equal(g[-1:], last) and noise is not None and last_noise is not None
    assert torch.equal(noise[-1:], last_noise)


def test_where_triton_cannot_compile_torch_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*_: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused_triton, "product", no_compiler)
    fused_triton._kernels_run.cache_clear()
    assert not fused_triton._kernels_run(torch.device("cpu"))
    fused_triton._kernels_run.cache_clear()
    assert "Failed to find C compiler\nthey want a C compiler" in capsys.readouterr().out
