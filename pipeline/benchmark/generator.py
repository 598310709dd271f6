"""The generator alone, or one of its layers: the fast form against others, such as the one that published code has.

    python -m jobs.benchmark generator                                  # mapping to RGB, 64x64, width 512
    python -m jobs.benchmark generator --layer --precisions bf16
    python -m jobs.benchmark generator --size 256 --batch 32            # for a GPU

All forms run in turn (A B C A B C) in one process, and medians are told. Memory is measured in a process for each.
"""

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.benchmark.arguments import count, words
from pipeline.benchmark.clock import finish
from pipeline.benchmark.matmul import measured_rate
from pipeline.benchmark.memory import current_bytes, peak_bytes, reset_peak
from pipeline.benchmark.reference import reference_generator, styled
from pipeline.benchmark.report import aligned, machine
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

    def __str__(self) -> str:
        return f"{self.name}, {self.precision}" + (f", recompute={self.recompute}" if self.name == "fast" else "")


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


@dataclass
class Row:
    """What was measured of a form."""

    form: Form
    forward_seconds: float
    both_seconds: float
    """Forward and backward."""
    both_share: float
    """Of the measured rate of matrix products in the same precision."""
    forward_share: float
    peak_bytes: int | None
    """Above the parameters and their gradients, in training; None where it was not asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jobs.benchmark generator`."""
    add = parser.add_argument
    add("--size", type=_power_of_two, default=64, help="side of the pictures in pixels (default %(default)s)")
    add("--width", type=count, default=512, help="channels of all layers (default %(default)s)")
    add("--batch", type=count, default=4, help="pictures at once (default %(default)s)")
    add("--layer", action="store_true", help="one modulated layer of this width instead of the whole generator")
    add(
        "--precisions",
        type=functools.partial(words, known=tuple(DTYPES)),
        help="of bf16, fp32 and tf32 (default: bf16,fp32)",
    )
    add(
        "--recompute",
        type=functools.partial(words, known=get_args(Recompute)),
        default=["layer"],
        help="of none, layer and segment (default layer)",
    )
    add(
        "--forms",
        type=functools.partial(words, known=get_args(FormName)),
        default=["fast", "reference"],
        help="of fast, shared (one product for all pictures between two scalings) and reference, the published form, "
        "with which all are compared (default fast,reference)",
    )
    add("--memory", action="store_true", help="measure peak memory as well, each form in a process of its own")
    add("--rounds", type=count, default=5, help="repetitions of everything (default %(default)s)")
    add("--threads", type=count, help="of the processor (default: torch's own choice)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    add("--json", metavar="FILE", help="write everything that was measured")


def run(args: argparse.Namespace) -> None:
    """Measures what the arguments ask for, and prints a table."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = Shape(args.size, args.width, args.batch, args.layer)
    precisions: list[Precision] = args.precisions or ["bf16", "fp32"]
    forms = []
    if "fast" in args.forms:
        forms += [Form("fast", precision, recompute) for precision in precisions for recompute in args.recompute]
    if "shared" in args.forms:
        forms += [Form("shared", precision) for precision in precisions]
    if "reference" in args.forms:
        forms.append(Form("reference", "tf32" if device.type == "cuda" else "fp32"))
    rows, rates = measure(shape, forms, args.rounds, device)
    if args.memory:
        for row in tqdm(rows, desc="memory", unit=" forms", disable=None):
            row.peak_bytes = training_memory(shape, row.form, device)
    what = "one modulated layer" if shape.layer else "the whole generator, mapping to RGB"
    about = machine()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{about['cpu']}, {_threads()}"
    print(f"\n{where}, torch {torch.__version__}; {what}, {shape.size}x{shape.size}, width {shape.width}, ", end="")
    print(f"batch {shape.batch}; median of {args.rounds} rounds\n")
    print(table(shape, rows))
    for precision, rate in rates.items():
        print(f"- matrix products in {precision} reach {rate / 1e9:,.0f} GFLOP/s in this run")
    if args.json:
        content = {"machine": about, "shape": asdict(shape), "rates": rates, "rows": [asdict(row) for row in rows]}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


def measure(
    shape: Shape, forms: list[Form], rounds: int, device: torch.device
) -> tuple[list[Row], dict[Precision, float]]:
    """Every form in every round, in turn, with the rate of matrix products beside them."""
    works = {form: work(shape, form, device) for form in forms}
    forward: dict[Form, list[float]] = {form: [] for form in forms}
    both: dict[Form, list[float]] = {form: [] for form in forms}
    rates: dict[Precision, list[float]] = {form.precision: [] for form in forms}
    for form in forms:  # libraries choose their kernels in the first
        _allow_tf32(form.precision)
        works[form](False)
        works[form](True)
    with tqdm(total=rounds * len(forms), desc="benchmark", unit=" runs", disable=None) as bar:
        for _ in range(rounds):
            for precision, found in rates.items():
                _allow_tf32(precision)
                found.append(measured_rate(DTYPES[precision], device, (shape.batch * shape.size**2, shape.width), 0.5))
            for form in forms:
                bar.set_postfix_str(str(form))
                _allow_tf32(form.precision)
                forward[form].append(_seconds(works[form], False, device))
                both[form].append(_seconds(works[form], True, device))
                bar.update()
    median = {precision: statistics.median(found) for precision, found in rates.items()}
    rows = []
    for form in forms:
        one, two, rate = statistics.median(forward[form]), statistics.median(both[form]), median[form.precision]
        flops = shape.forward_flops
        rows.append(Row(form, one, two, 3 * flops / two / rate, flops / one / rate, None))
    return rows, median


def work(shape: Shape, form: Form, device: torch.device) -> Callable[[bool], None]:
    """A function that computes forward, and backward if it is asked to; gradients are added up."""
    if device.type == "cpu":
        keep_freed_memory()  # as training does; the same for all forms, whatever ran before
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
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (shape, form, str(device), torch.get_num_threads()))


def _peak(shape: Shape, form: Form, device_name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    _allow_tf32(form.precision)
    small = Shape(8, shape.width, shape.batch, shape.layer)
    work(small, form, device)(True)  # code and the libraries' own buffers are loaded
    call = work(shape, form, device)
    reset_peak(device)  # gives free memory back to the system, which is then not the model's own
    before = current_bytes(device)
    call(True)
    return peak_bytes(device) - before


def table(shape: Shape, rows: list[Row]) -> str:
    """The figures as text; the last columns are ratios to the reference of the same run, where it ran."""
    reference = next((row for row in rows if row.form.name == "reference"), None)
    head = ["", "forward ms", "of rate", "with backward ms", "of rate", "img/s", "times reference", "peak MB", "of its"]
    body = []
    for row in sorted(rows, key=lambda row: row.both_seconds):
        times = f"{reference.both_seconds / row.both_seconds:.2f}" if reference else "-"
        memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
        share = (
            f"{row.peak_bytes / reference.peak_bytes:.2f}"
            if reference and reference.peak_bytes and row.peak_bytes
            else "-"
        )
        body.append(
            [
                str(row.form),
                f"{1e3 * row.forward_seconds:,.0f}",
                f"{row.forward_share:.0%}",
                f"{1e3 * row.both_seconds:,.0f}",
                f"{row.both_share:.0%}",
                f"{shape.batch / row.both_seconds:,.1f}",
                times,
                memory,
                share,
            ]
        )
    return aligned(head, body)


def _seconds(call: Callable[[bool], None], backward: bool, device: torch.device) -> float:
    finish(device)
    began = time.perf_counter()
    call(backward)
    finish(device)
    return time.perf_counter() - began


def _allow_tf32(precision: Precision) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _threads() -> str:
    return f"{torch.get_num_threads()} thread(s)"


def _power_of_two(text: str) -> int:
    number = count(text)
    if number < 8 or not math.log2(number).is_integer():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a power of two from 8 on")
    return number
