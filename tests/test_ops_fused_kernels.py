"""The kernels compiled for Hopper, which needs no GPU: the interpreter takes Python that the compiler refuses."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.ops.fused_triton import ELEMENTS, FULL_TILES, HALF_TILES, NARROW_TILES, TF32_TILES, Tile

triton = pytest.importorskip("triton", reason="needs Triton: Linux only")

NUMBERS = "batch points channels_in channels_out channels".split()
STRIDES = (
    "x_picture x_row weight_picture weight_row noise_picture gradient_picture gradient_row y_picture y_row".split()
)
LARGEST_SHARED = 227 * 1024  # bytes of one program on Hopper


@pytest.fixture(autouse=True)
def compiled_here(tmp_path: Path) -> Iterator[None]:
    """Nothing is taken from an earlier compilation, and nothing is left behind."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


def compiled(kernel: Any, tensors: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> Any:
    """The kernel for compute capability 9.0; strides, and sizes but the batch, are multiples of 16 like a layer's."""
    types = tensors | dict.fromkeys(NUMBERS + STRIDES, "i32") | {"slope": "fp32"}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [
        (position,)
        for position, name in enumerate(kernel.arg_names)
        if name not in constants and name not in ("batch", "slope") and "tensordesc" not in types[name]
    ]
    source = triton.compiler.ASTSource(
        kernel, signature, constants, {position: [["tt.divisibility", 16]] for position in aligned}
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def product_for_hopper(tile: Tile, dtype: str, shared: bool, precision: str = "ieee") -> Any:
    from pipeline.ops.fused_kernels import product_kernel

    sides = {
        "x": (tile.pixels, tile.channels_in),
        "weight": (tile.channels_in, tile.channels_out),
        "y": (tile.pixels, tile.channels_out),
    }
    tensors = {
        name: f"tensordesc<{dtype}[1, {rows}, {columns}]>" if tile.bulk else f"*{dtype}"
        for name, (rows, columns) in sides.items()
    }
    constants = dict(SHARED=shared, BULK=tile.bulk, HAS_BIAS=True, HAS_NOISE=True, PRECISION=precision)
    blocks = dict(BLOCK_P=tile.pixels, BLOCK_O=tile.channels_out, BLOCK_I=tile.channels_in)
    tensors |= {"bias": "*fp32", "noise": "*fp32"}
    return compiled(product_kernel, tensors, constants | blocks, tile.warps, tile.stages)


def stack_bytes(kernel: Any, folder: Path) -> int:
    """Of one thread: more than none means that registers did not suffice."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    found = re.search(r"STACK:(\d+)", subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found
    return int(found[1])


# The likeliest tile with and without the copy engine.
@pytest.mark.parametrize(("tile", "shared"), [(HALF_TILES[0], False), (HALF_TILES[3], True)])
def test_half_precision_runs_on_hopper_s_matrix_units(tile: Tile, shared: bool, tmp_path: Path) -> None:
    kernel = product_for_hopper(tile, "bf16", shared)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    loads = "cp.async.bulk.tensor" if tile.bulk else "cp.async.cg"
    assert loads in kernel.asm["ptx"]
    # Two operands, each loaded ahead: all stages of both are in shared memory.
    assert kernel.metadata.shared >= tile.stages * (tile.pixels + tile.channels_out) * tile.channels_in * 2
    assert kernel.metadata.shared <= LARGEST_SHARED
    assert stack_bytes(kernel, tmp_path) == 0


EVERY_TILE = [(tile, "bf16", "ieee") for tile in (*HALF_TILES, *NARROW_TILES)]
EVERY_TILE += [(tile, "fp32", "ieee") for tile in FULL_TILES] + [(tile, "fp32", "tf32") for tile in TF32_TILES]


@pytest.mark.parametrize(("tile", "dtype", "precision"), EVERY_TILE)
def test_every_tile_that_is_tried_has_code(tile: Tile, dtype: str, precision: str) -> None:
    assert product_for_hopper(tile, dtype, False, precision).metadata.shared <= LARGEST_SHARED


def test_float32_is_never_rounded_to_tf32() -> None:
    ptx = product_for_hopper(FULL_TILES[0], "fp32", False).asm["ptx"]
    assert "fma.rn" in ptx
    assert "tf32" not in ptx and "mma" not in ptx


def test_the_backward_pass_reads_and_writes_16_bytes_at_once(tmp_path: Path) -> None:
    from pipeline.ops.fused_kernels import activation_backward_kernel

    tensors = dict.fromkeys(["gradient", "y", "product_gradient"], "*bf16") | {
        "bias_parts": "*fp32",
        "noise_parts": "*fp32",
    }
    constants = dict(ACTIVE=True, NEED_BIAS=True, NEED_NOISE=True, ROUNDS=4, BLOCK_P=ELEMENTS // 512, BLOCK_O=512)
    kernel = compiled(activation_backward_kernel, tensors, constants, 4, 3)
    assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"]
    assert "atom" not in kernel.asm["ptx"]
    assert stack_bytes(kernel, tmp_path) == 0
