"""The generator alone, or one of its layers: the fast form against others, such as the one that published code has.

    python -m jobs.benchmark generator                                  # mapping to RGB, 64x64, width 512
    python -m jobs.benchmark generator --layer --precisions bf16
    python -m jobs.benchmark generator --size 256 --batch 32            # for a GPU

All forms run in turn (A B C A B C), each in a process of its own, and medians are told. On a CPU the published form
runs twice: with freed memory kept, as it is in training here, and with the C library's own way, to return it.
"""

import argparse
import functools
import json
import math
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from pipeline.benchmark.arguments import count, words
from pipeline.benchmark.forms import (
    DTYPES,
    Form,
    FormName,
    Precision,
    Process,
    Shape,
    allow_tf32,
    training_memory,
)
from pipeline.benchmark.matmul import measured_rate
from pipeline.benchmark.report import aligned, machine
from pipeline.models.cips import Recompute

WARM_UP = 3
"""Rounds before anything is measured: libraries choose their kernels, and all memory has been touched once."""


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
    if "reference" in args.forms and device.type == "cuda":
        forms.append(Form("reference", "tf32"))
    elif "reference" in args.forms:
        forms += [Form("reference", "fp32"), Form("reference", "fp32", memory="returned")]
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
    forward: dict[Form, list[float]] = {form: [] for form in forms}
    both: dict[Form, list[float]] = {form: [] for form in forms}
    rates: dict[Precision, list[float]] = {form.precision: [] for form in forms}
    with ExitStack() as stack:
        processes = {form: stack.enter_context(Process(shape, form, device)) for form in forms}
        for process in processes.values():
            for _ in range(WARM_UP):
                process.seconds(False)
                process.seconds(True)
        bar = stack.enter_context(tqdm(total=rounds * len(forms), desc="benchmark", unit=" runs", disable=None))
        for _ in range(rounds):
            for precision, found in rates.items():
                allow_tf32(precision)
                found.append(measured_rate(DTYPES[precision], device, (shape.batch * shape.size**2, shape.width), 0.5))
            for form, process in processes.items():
                bar.set_postfix_str(str(form))
                forward[form].append(process.seconds(False))
                both[form].append(process.seconds(True))
                bar.update()
    median = {precision: statistics.median(found) for precision, found in rates.items()}
    rows = []
    for form in forms:
        one, two, rate = statistics.median(forward[form]), statistics.median(both[form]), median[form.precision]
        flops = shape.forward_flops
        rows.append(Row(form, one, two, 3 * flops / two / rate, flops / one / rate, None))
    return rows, median


def table(shape: Shape, rows: list[Row]) -> str:
    """The figures as text; the last columns are ratios to the reference of the same run, where it ran."""
    reference = next((row for row in rows if row.form.name == "reference" and row.form.memory == "kept"), None)
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


def _threads() -> str:
    return f"{torch.get_num_threads()} thread(s)"


def _power_of_two(text: str) -> int:
    number = count(text)
    if number < 8 or not math.log2(number).is_integer():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a power of two from 8 on")
    return number
