"""The fused layer on CUDA: what `fused_linear` computes, by Triton kernels.

`product` reads the pixels once, multiplies them by the weights of their picture and writes the activated result once:
noise, bias and LeakyReLU are applied to the sums in registers. `activation_backward` passes once over the gradient and
leaves everything for two batched products, which the matrix library computes as fast as the device allows.
Shapes: B pictures, P pixels, I channels in, O channels out.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRIALS = 10  # launches that are timed for each way to cut the work, once for each kind of layer
LONGEST_ROW = 1 << 22  # elements from one row to the next
ELEMENTS = 8192  # of a tile of `activation_backward`: 64 for each thread


class Tile(NamedTuple):
    """How a product is cut into tiles: none of this changes what is computed."""

    pixels: int
    channels_out: int
    channels_in: int
    """Summed in one step. These three are powers of two, at least 16."""
    warps: int
    stages: int
    """Steps whose operands are in shared memory at once."""
    programs: int = 1
    """At once on one multiprocessor; more than one hides the writing of results."""
    bulk: bool = False
    """Whole tiles by Hopper's copy engine; needs `bulk_ready` operands."""


# Shared memory holds stages * (pixels + channels_out) * channels_in elements, with `bulk` also the result's tile:
# 227 KiB on Hopper, 163 on A100, 99 on smaller cards. Sums stay in registers: pixels * channels_out / (32 * warps) of
# a thread's 255. A tile of 128 x 256 reads 48 bytes per cycle from the L2 cache at Hopper's full rate, one of
# 128 x 128 reads 64, which is all there is.
HALF_TILES = (
    Tile(128, 256, 64, warps=8, stages=3, bulk=True),
    Tile(256, 128, 64, warps=8, stages=3, bulk=True),
    Tile(128, 128, 64, warps=4, stages=2, programs=2, bulk=True),
    Tile(128, 256, 64, warps=8, stages=3),
    Tile(128, 128, 64, warps=8, stages=3),
    Tile(128, 128, 32, warps=4, stages=3, programs=2),
)
NARROW_TILES = (  # up to 32 channels out, as RGB: all time goes into reading x
    Tile(128, 32, 64, warps=4, stages=4, programs=2),
    Tile(256, 32, 64, warps=8, stages=3),
)
TF32_TILES = (
    Tile(128, 128, 32, warps=8, stages=3, bulk=True),
    Tile(128, 128, 32, warps=8, stages=3),
    Tile(64, 128, 32, warps=4, stages=3, programs=2),
)
FULL_TILES = (Tile(64, 64, 16, warps=4, stages=3, programs=3), Tile(32, 64, 32, warps=4, stages=2, programs=4))


def available(x: Tensor) -> bool:
    """Whether the kernels can take x: on CUDA from Ampere on (tensor cores for bfloat16), with Triton installed."""
    if not x.is_cuda or torch.version.cuda is None:  # ROCm's devices are called CUDA too
        return False
    return x.dtype in DTYPES and _triton_found() and _capability(x.device)[0] >= 8 and _kernels_run(x.device)


def product(
    x: Tensor,
    weight_BIO: Tensor,
    bias_O: Tensor | None,
    noise_BP: Tensor | None,
    slope: float,
    tile: Tile | None = None,
) -> Tensor:
    """leaky_relu(x @ weight + bias + noise), (B, P, O) in the dtype of x; sums, bias and noise in float32.

    x: (B, P, I), or (P, I) if all pictures share it; bfloat16, float16 or float32. weight_BIO: modulated, in the dtype
    of x. noise_BP: (B or 1, P), one number for all channels. slope: of LeakyReLU below zero; 1 for none.
    tile: how to cut the work; by default the fastest of several, timed when a kind of layer is first seen (and not
    while a CUDA graph is captured: let the layer run once before).
    Not differentiable. Raises ValueError or TypeError for shapes, dtypes or devices that do not go together.
    """
    x_BPI = _rows(x if x.ndim == 3 else x[None])
    weight_BIO = _rows(weight_BIO)
    _check(x_BPI, weight_BIO, bias_O, noise_BP)
    if x_BPI.stride(0) == 0:
        x_BPI = x_BPI[:1]  # expanded: the same for all
    y_BPO = x.new_empty(weight_BIO.shape[0], x_BPI.shape[1], weight_BIO.shape[2])
    if y_BPO.numel() == 0:
        return y_BPO
    bias_O = None if bias_O is None else bias_O.float().contiguous()
    noise_BP = None if noise_BP is None else _rows(noise_BP.float())
    launch = functools.partial(_launch, x_BPI, weight_BIO, bias_O, noise_BP, slope, y_BPO)
    with torch.cuda.device_of(x):
        launch(_chosen(launch, x_BPI, weight_BIO, y_BPO) if tile is None else tile)
    return y_BPO


def activation_backward(
    gradient_BPO: Tensor, y_BPO: Tensor, slope: float, need_bias: bool, need_noise: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient of `product`'s result y: that of the sum under LeakyReLU, and of bias and noise if needed.

    Returns (g_BPO in the dtype of the gradient, g summed over B and P or None, g summed over O or None); the sums are
    made of g as returned, in float32, and always in the same order. Without an activation (slope 1) g is the gradient
    itself and y is not read. Raises ValueError or TypeError for shapes or dtypes that do not go together.
    """
    active = slope != 1.0
    if gradient_BPO.ndim != 3 or gradient_BPO.shape != y_BPO.shape:
        raise ValueError(
            f"the gradient is {tuple(gradient_BPO.shape)} and the result {tuple(y_BPO.shape)}: expected (B, P, O) twice"
        )
    for name, tensor in (("gradient", gradient_BPO), ("result", y_BPO)):
        _check_dtype(name, tensor)
    batch, points, channels = gradient_BPO.shape
    gradient_BPO = _rows(gradient_BPO)
    g_BPO = torch.empty_like(gradient_BPO, memory_format=torch.contiguous_format) if active else gradient_BPO
    if not (active or need_bias or need_noise):
        return g_BPO, None, None
    block_o = min(_power_of_two(channels), 512)
    block_p = ELEMENTS // block_o
    rounds = 4  # partial sums of the bias are then a hundredth of what is read and written
    tiles_o, parts = -(-channels // block_o), batch * -(-points // (rounds * block_p))
    sums = functools.partial(torch.empty, dtype=torch.float32, device=gradient_BPO.device)
    bias_parts = sums(parts, channels) if need_bias else None
    noise_parts = sums(tiles_o, batch, points) if need_noise else None
    if g_BPO.numel() > 0:
        from pipeline.ops import fused_kernels  # needs Triton

        y_BPO = _rows(y_BPO)
        with torch.cuda.device_of(gradient_BPO):
            fused_kernels.activation_backward_kernel[(tiles_o * parts,)](
                *(gradient_BPO, y_BPO, g_BPO, bias_parts, noise_parts),
                *(batch, points, channels, *gradient_BPO.stride()[:2], *y_BPO.stride()[:2], slope),
                ACTIVE=active,
                NEED_BIAS=need_bias,
                NEED_NOISE=need_noise,
                ROUNDS=rounds,
                BLOCK_P=block_p,
                BLOCK_O=block_o,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return (
        g_BPO,
        None if bias_parts is None else bias_parts.sum(0),
        None if noise_parts is None else noise_parts.sum(0),
    )


def bulk_ready(*operands: Tensor) -> bool:
    """Whether Hopper's copy engine can address them: start and all strides but the last multiples of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(step * tensor.element_size() % 16 == 0 for step in tensor.stride()[:-1])
        for tensor in operands
    )


def _launch(
    x_BPI: Tensor,
    weight_BIO: Tensor,
    bias_O: Tensor | None,
    noise_BP: Tensor | None,
    slope: float,
    y_BPO: Tensor,
    tile: Tile,
) -> None:
    from pipeline.ops import fused_kernels  # needs Triton

    batch, points, channels = y_BPO.shape
    operands = {"x": x_BPI, "weight": weight_BIO, "y": y_BPO}
    if tile.bulk:
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = {
            "x": (tile.pixels, tile.channels_in),
            "weight": (tile.channels_in, tile.channels_out),
            "y": (tile.pixels, tile.channels_out),
        }
        operands = {name: TensorDescriptor.from_tensor(operands[name], [1, *block]) for name, block in blocks.items()}
    tiles = batch * -(-points // tile.pixels) * -(-channels // tile.channels_out)
    fused_kernels.product_kernel[(min(tiles, tile.programs * _processors(x_BPI.device)),)](
        **operands,
        bias=bias_O,
        noise=noise_BP,
        batch=batch,
        points=points,
        channels_in=x_BPI.shape[2],
        channels_out=channels,
        x_picture=x_BPI.stride(0),
        x_row=x_BPI.stride(1),
        weight_picture=weight_BIO.stride(0),
        weight_row=weight_BIO.stride(1),
        noise_picture=0 if noise_BP is None or noise_BP.shape[0] == 1 else noise_BP.stride(0),
        slope=slope,
        SHARED=x_BPI.shape[0] == 1,
        BULK=tile.bulk,
        HAS_BIAS=bias_O is not None,
        HAS_NOISE=noise_BP is not None,
        PRECISION="tf32" if _tf32(x_BPI.dtype) else "ieee",
        BLOCK_P=tile.pixels,
        BLOCK_O=tile.channels_out,
        BLOCK_I=tile.channels_in,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # said, because Triton's default is about to change
    )


# ---- which tile ----------------------------------------------------------------------------------


def candidates(dtype: torch.dtype, channels_in: int, channels_out: int, bulk: bool) -> list[Tile]:
    """Ways to cut a product worth trying, the likeliest first. bulk: whether the copy engine can be used."""
    tiles: tuple[Tile, ...]
    if dtype == torch.float32:
        tiles = TF32_TILES if _tf32(dtype) else FULL_TILES
    else:
        tiles = HALF_TILES if channels_out > NARROW_TILES[0].channels_out else NARROW_TILES
    narrow = (
        tile._replace(
            channels_in=min(tile.channels_in, _power_of_two(channels_in)),
            channels_out=min(tile.channels_out, _power_of_two(channels_out)),
        )
        for tile in tiles
        if bulk or not tile.bulk
    )
    return list(dict.fromkeys(narrow))


_CHOSEN: dict[tuple[object, ...], Tile] = {}


def _chosen(launch: Callable[[Tile], None], x_BPI: Tensor, weight_BIO: Tensor, y_BPO: Tensor) -> Tile:
    """The fastest tile for this kind of layer on this device; the likeliest where nothing can be timed."""
    batch, points, channels_out = y_BPO.shape
    device, channels_in = x_BPI.device, x_BPI.shape[2]
    bulk = x_BPI.is_cuda and _capability(device)[0] >= 9 and bulk_ready(x_BPI, weight_BIO, y_BPO)
    tiles = candidates(x_BPI.dtype, channels_in, channels_out, bulk)
    kind = (device, *tiles, x_BPI.shape[0] == 1, channels_in, channels_out, (batch * points).bit_length())
    if kind in _CHOSEN:
        return _CHOSEN[kind]
    if not x_BPI.is_cuda or torch.cuda.is_current_stream_capturing():
        return tiles[0]
    seconds = {tile: _seconds(launch, tile) for tile in tiles}
    _CHOSEN[kind] = min(tiles, key=lambda tile: seconds[tile])
    return _CHOSEN[kind]


def _seconds(launch: Callable[[Tile], None], tile: Tile) -> float:
    """Of TRIALS launches; infinite for a tile that this device has no room for, or no code."""
    from triton.runtime.errors import OutOfResources, PTXASError

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    try:
        launch(tile)  # compiles
    except (OutOfResources, PTXASError):
        return math.inf
    start.record()
    for _ in range(TRIALS):
        launch(tile)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000.0


# ---- small facts and checks ----------------------------------------------------------------------


@functools.cache
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels_run(device: torch.device) -> bool:
    """Whether a small product comes out right: Triton compiles at first use, for which a machine may lack tools."""
    ones = torch.ones(1, 16, 16, device=device)
    try:
        return bool((product(ones, ones, None, None, 1.0) == 16).all())
    except Exception as error:
        print(f"the slower products of torch are used, since Triton's kernels do not run: {error}", flush=True)
        print("they want a C compiler and Python's headers: apt-get install build-essential python3-dev", flush=True)
        return False


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _processors(device: torch.device) -> int:
    # In Triton's interpreter a few programs with several tiles each do what a device does.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _power_of_two(size: int) -> int:
    """The smallest that is not below size, and at least 16: matrix instructions take no less."""
    return max(16, 1 << (size - 1).bit_length())


def _rows(tensor: Tensor) -> Tensor:
    """As the kernels read it: the last dimension contiguous, the rows of one tile within 2^31 elements."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) < LONGEST_ROW else tensor.contiguous()


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}: expected bfloat16, float16 or float32, or use ops.fused_linear")


def _check(x_BPI: Tensor, weight_BIO: Tensor, bias_O: Tensor | None, noise_BP: Tensor | None) -> None:
    _check_dtype("x", x_BPI)
    if weight_BIO.dtype != x_BPI.dtype:
        raise TypeError(f"weight is {weight_BIO.dtype}: expected {x_BPI.dtype}, the dtype of x")
    if x_BPI.ndim != 3 or weight_BIO.ndim != 3 or x_BPI.shape[2] != weight_BIO.shape[1]:
        raise ValueError(
            f"x is {tuple(x_BPI.shape)}, weight {tuple(weight_BIO.shape)}: expected (B, P, I) or (P, I), and (B, I, O)"
        )
    batch, _, channels = weight_BIO.shape
    points = x_BPI.shape[1]
    if x_BPI.shape[0] not in (1, batch):
        raise ValueError(f"x has {x_BPI.shape[0]} pictures and weight {batch}: expected as many, or one x for all")
    if bias_O is not None and bias_O.shape != (channels,):
        raise ValueError(f"bias is {tuple(bias_O.shape)}: expected ({channels},), one number for each channel out")
    if noise_BP is not None and noise_BP.shape not in ((batch, points), (1, points)):
        raise ValueError(f"noise is {tuple(noise_BP.shape)}: expected ({batch}, {points}) or (1, {points})")
    for name, tensor in (("weight", weight_BIO), ("bias", bias_O), ("noise", noise_BP)):
        if tensor is not None and tensor.device != x_BPI.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {x_BPI.device}, where x is")
