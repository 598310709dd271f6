"""The generator, or one of its layers, in each of the forms that are compared: each runs in a process of its own.

So no form lives on memory that another has left behind, and what the C library does with freed memory is a form's own.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn

from pipeline.benchmark.clock import finish
from pipeline.benchmark.memory import current_bytes, peak_bytes, reset_peak
from pipeline.benchmark.reference import reference_generator, styled
from pipeline.benchmark.shared import scaled, shared_generator
from pipeline.coordinates import full_grid
from pipeline.models.build import ModelConfig, build_generator
from pipeline.models.cips import Generator, Recompute
from pipeline.models.layers import ModulatedLinear
from pipeline.ops.allocation import keep_freed_memory

Precision = Literal["bf16", "fp32", "tf32"]
FormName = Literal["fast", "shared", "reference"]
"""The pipeline's own; one product shared by all pictures; as published."""
BUILDERS: dict[FormName, Callable[[ModelConfig], Generator]] = {
    "fast": build_generator,
    "shared": shared_generator,
    "reference": reference_generator,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
LATENT = 512


@dataclass(frozen=True)
class Form:
    """One way to compute the same."""

    name: FormName
    precision: Precision
    recompute: Recompute = "layer"
    memory: Literal["kept", "returned"] = "kept"
    """What the C library does with freed memory: as training has it on a CPU, or as it comes."""

    def __str__(self) -> str:
        recompute = f", recompute={self.recompute}" if self.name == "fast" else ""
        return f"{self.name}, {self.precision}{recompute}" + (", memory returned" if self.memory == "returned" else "")


@dataclass(frozen=True)
class Shape:
    """What is computed."""

    size: int
    width: int
    batch: int
    layer: bool
    """One modulated layer alone, not the whole generator."""

    @property
    def forward_flops(self) -> int:
        """Of the products over the pixels, 2 per multiply-add; everything else is less than one percent."""
        if self.layer:
            weights = self.width**2
        else:
            groups = self.size.bit_length() - 2
            weights = 2 * self.width**2 + 2 * groups * self.width**2 + 3 * groups * self.width
        return 2 * self.batch * self.size**2 * weights


class Process:
    """A form in a process of its own, which waits for the next call."""

    def __init__(self, shape: Shape, form: Form, device: torch.device) -> None:
        self._pool = _one_process(partial(_begin, shape, form, str(device), torch.get_num_threads()))

    def seconds(self, backward: bool) -> float:
        """What a forward takes there, and a backward if it is asked for."""
        return self._pool.submit(_seconds, backward).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()


def _one_process(begin: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """Fails, where multiprocessing's own pool would wait for ever, if the process does not start or is killed."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin)


_called: tuple[Callable[[bool], None], torch.device]


def _begin(shape: Shape, form: Form, device_name: str, threads: int) -> None:
    global _called
    device = torch.device(device_name)
    _prepare(form, device, threads)
    _called = work(shape, form, device), device


def _prepare(form: Form, device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    allow_tf32(form.precision)
    if form.memory == "kept" and device.type == "cpu":
        keep_freed_memory()


def _seconds(backward: bool) -> float:
    call, device = _called
    if device.type == "cuda":
        call(backward)  # asks the device for its memory, which takes longer than the call
    finish(device)
    began = time.perf_counter()
    call(backward)
    finish(device)
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other forms' processes need the same device's memory
    return seconds


def work(shape: Shape, form: Form, device: torch.device) -> Callable[[bool], None]:
    """A function that computes forward, and backward if it is asked to; gradients are added up."""
    torch.manual_seed(0)
    return _layer_work(shape, form, device) if shape.layer else _generator_work(shape, form, device)


def _generator_work(shape: Shape, form: Form, device: torch.device) -> Callable[[bool], None]:
    config = ModelConfig(size=shape.size, width=shape.width, latent=LATENT)
    model = BUILDERS[form.name](config).to(device)
    model.recompute = form.recompute
    z_BZ = torch.randn(shape.batch, LATENT, device=device)
    keys_B2 = torch.arange(2 * shape.batch, device=device).view(shape.batch, 2)
    grid_P2 = full_grid(shape.size).to(device)
    gradient_BP3 = torch.randn(shape.batch, shape.size**2, 3, device=device)
    return _forward_and_backward(model, lambda: model(z_BZ, grid_P2, keys_B2), gradient_BP3, form)


def _layer_work(shape: Shape, form: Form, device: torch.device) -> Callable[[bool], None]:
    layer = ModulatedLinear(shape.width, shape.width, LATENT).to(device)
    dtype = DTYPES[form.precision]
    w_BZ = torch.randn(shape.batch, LATENT, device=device)
    x_BPC = torch.randn(shape.batch, shape.size**2, shape.width, device=device).to(dtype)
    noise_BP = torch.randn(shape.batch, shape.size**2, device=device)
    if form.name == "reference":
        x_BCHW = x_BPC.transpose(1, 2).unflatten(2, (shape.size, shape.size)).contiguous().requires_grad_(True)
        noise_B1HW = noise_BP.view(shape.batch, 1, shape.size, shape.size)
        return _forward_and_backward(
            layer, lambda: styled(layer, x_BCHW, w_BZ, noise_B1HW), torch.randn_like(x_BCHW), form
        )
    x_BPC.requires_grad_(True)
    if form.name == "shared":
        return _forward_and_backward(layer, lambda: scaled(layer, x_BPC, w_BZ, noise_BP), torch.randn_like(x_BPC), form)
    keep = form.recompute == "none"
    return _forward_and_backward(
        layer, lambda: layer(x_BPC, w_BZ, noise_BP, keep_weights=keep), torch.randn_like(x_BPC), form
    )


def _forward_and_backward(
    module: nn.Module, forward: Callable[[], Tensor], gradient: Tensor, form: Form
) -> Callable[[bool], None]:
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)  # the model's own memory, before anything is measured

    def call(backward: bool) -> None:
        with torch.autocast(gradient.device.type, torch.bfloat16, enabled=form.precision == "bf16"):
            if not backward:
                with torch.no_grad():
                    forward()
                return
            result = forward()
        result.backward(gradient.to(result.dtype))

    return call


def training_memory(shape: Shape, form: Form, device: torch.device) -> int:
    """Peak bytes of a forward and a backward above the model's own, in a fresh process."""
    with _one_process() as pool:
        return pool.submit(_peak, shape, form, str(device), torch.get_num_threads()).result()


def _peak(shape: Shape, form: Form, device_name: str, threads: int) -> int:
    device = torch.device(device_name)
    _prepare(form, device, threads)
    small = Shape(8, shape.width, shape.batch, shape.layer)
    work(small, form, device)(True)  # code and the libraries' own buffers are loaded
    call = work(shape, form, device)
    reset_peak(device)  # gives free memory back to the system, which is then not the model's own
    before = current_bytes(device)
    call(True)
    return peak_bytes(device) - before


def allow_tf32(precision: Precision) -> None:
    """For products and convolutions of float32 on CUDA, in this process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
