"""A whole update of training: where its time goes, and how near it is to what the machine's matrix product reaches.

python -m jobs.benchmark step --config demo
python -m jobs.benchmark step --config ffhq256 train.batch_size=4 --updates 4 --rounds 1
python -m jobs.benchmark step --config ffhq256 train.patch.size=64 --compare reference --json step.json
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.benchmark.arguments import count
from pipeline.benchmark.flops import update_flops
from pipeline.benchmark.report import aligned, busy, machine
from pipeline.benchmark.team import run_team
from pipeline.benchmark.updates import DATA_WAIT, OTHER, Case, Measured, measure_updates
from pipeline.config import Config, ConfigError, absolute, load_config, preset_names
from pipeline.data.manifest import DataError, read_manifest
from pipeline.data.stream import DataConfig
from pipeline.storage import MissingError
from pipeline.training import phases as phase

NAMES = {"fast": "", "reference": "reference "}
MB, GIGA = 1e6, 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jobs.benchmark step`."""
    add_config(parser)
    add = parser.add_argument
    add("--updates", type=count, default=16, help="measured in each round; the first has R1 (%(default)s)")
    add("--rounds", type=count, default=3, help="repetitions, each in a new process (%(default)s)")
    add("--threads", type=count, help="of tensor operations (default: as many as there are cores)")
    add("--compare", choices=["reference"], help="put the published form of the generator, in fp32, beside it")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")


def add_config(parser: argparse.ArgumentParser) -> None:
    """What to train: a preset or a file, and settings that replace its own."""
    names = ", ".join(preset_names())
    parser.add_argument("--config", required=True, metavar="PRESET_OR_FILE", help=f"a preset ({names}) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces one setting")


def run(args: argparse.Namespace) -> None:
    """Measures, in turn where two forms are compared, and prints the table. Raises ConfigError."""
    check_folder(args.json)
    config = load_config(args.config, args.overrides)
    data = stored_data(config)
    cores = len(os.sched_getaffinity(0))
    threads = args.threads or cores
    case = Case(
        config.model,
        config.train,
        config.run.seed,
        args.updates,
        data,
        config.storage,
    )
    about = machine()
    forms = ["fast"] + ([args.compare] if args.compare else [])
    runs: dict[str, list[Measured]] = {form: [] for form in forms}
    with tqdm(total=args.rounds * len(forms), desc="benchmark", unit=" runs", disable=None) as bar:
        for _ in range(args.rounds):
            for form in forms:
                one = dataclasses.replace(case, reference=form == "reference")
                runs[form] += run_team(measure_updates, one, threads=threads)
                bar.update()
    results = {form: median(measured) for form, measured in runs.items()}
    flops = update_flops(config.model, config.train)
    print(
        f"\n{describe(config)}\n{about['cpu']}, {cores} cores, {device_name()}; {threads} threads; "
        f"median of {args.rounds} round(s) of {args.updates} updates"
    )
    for line in conclusions(config, results, flops, data is not None):
        print(line)
    print(busy(about), end="")
    if args.json:
        content = {
            "machine": about | {"device": device_name(), "threads": threads},
            "config": config.model_dump(mode="json"),
            "updates": args.updates,
            "flops_per_picture": flops,
            "runs": {form: [dataclasses.asdict(one) for one in measured] for form, measured in runs.items()},
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {args.json}")


def conclusions(config: Config, results: dict[str, Measured], flops: dict[str, float], data: bool) -> Iterator[str]:
    """The lines of the report."""
    batch = config.train.batch_size
    header = ["phase"]
    for form in results:
        header += [f"{NAMES[form]}ms", "share", "GFLOP/s", "of peak"]
    names = [*phase.MEANING, OTHER, *([DATA_WAIT] if data else [])]
    names = [name for name in names if any(name in measured.seconds for measured in results.values())]
    rows = []
    for name in names:
        row = [name]
        for measured in results.values():
            row += cells(name, measured, flops, batch)
        rows.append(row)
    last = ["update"]
    for measured in results.values():
        total = sum(flops.values()) * batch / measured.total
        last += [
            f"{1e3 * measured.total:.1f}",
            "100%",
            f"{total / GIGA:.0f}",
            f"{share_of_peak(measured, flops, batch):.0%}",
        ]
    yield aligned(header, [*rows, last])
    yield ""
    for form, measured in results.items():
        rates = ", ".join(f"{name} {rate / GIGA:.0f} GFLOP/s" for name, rate in measured.rates.items())
        yield (
            f"{form}: {batch / measured.total:.2f} images/s; matrix products in {measured.precision}; peak memory "
            f"{measured.peak_bytes / MB:,.0f} MB, {measured.above_bytes / MB:,.0f} MB of it above weights and moments; "
            f"the machine's matrix product: {rates}"
        )
    if len(results) == 2:
        fast, reference = results.values()
        yield (
            f"against the reference: {reference.total / fast.total:.2f} times as fast, "
            f"{fast.above_bytes / max(1, reference.above_bytes):.2f} of its memory above weights and moments"
        )
    yield f"{sum(flops.values()) / GIGA:.1f} GFLOP for each picture of the batch: what the mathematics needs"
    if not data:
        yield f"data wait: not measured, there is no data set at {config.data.uri or '(data.uri is empty)'}"
    for name, text in phase.MEANING.items():
        if name in names:
            yield f"  {name}: {text}"


def cells(name: str, measured: Measured, flops: dict[str, float], batch: int) -> list[str]:
    """A phase's milliseconds, share of the update, GFLOP/s, and share of the peak of its precision."""
    seconds = measured.seconds.get(name, 0.0)
    found = [f"{1e3 * seconds:.1f}", f"{seconds / measured.total:.0%}"]
    if name not in flops or not seconds:
        return [*found, "", ""]
    rate = flops[name] * batch / seconds
    return [*found, f"{rate / GIGA:.0f}", f"{rate / peak_of(name, measured):.0%}"]


def share_of_peak(measured: Measured, flops: dict[str, float], batch: int) -> float:
    """Time that the machine's own matrix product would take for the same work, over the time taken."""
    least = sum(batch * amount / peak_of(name, measured) for name, amount in flops.items())
    return least / measured.total


def peak_of(name: str, measured: Measured) -> float:
    """The matrix product's FLOP/s in the precision of a phase: R1 is fp32 always."""
    return measured.rates["fp32" if name == phase.D_R1 else measured.precision]


def median(measured: Sequence[Measured]) -> Measured:
    """Each number's median over the rounds."""
    first = measured[0]
    return Measured(
        {name: statistics.median(one.seconds[name] for one in measured) for name in first.seconds},
        int(statistics.median(one.peak_bytes for one in measured)),
        int(statistics.median(one.above_bytes for one in measured)),
        {name: statistics.median(one.rates[name] for one in measured) for name in first.rates},
        first.precision,
    )


def describe(config: Config) -> str:
    """What is trained, in one line."""
    size, patch = config.model.size, config.train.patch.size
    what = f"patches of {patch}x{patch} from {size}x{size}" if patch else f"{size}x{size} pixels"
    return (
        f"{config.run.name}: batch {config.train.batch_size} of {what}, width {config.model.width}, in "
        f"{config.train.accumulation} part(s)"
    )


def stored_data(config: Config) -> DataConfig | None:
    """Where the data set is, if there is one at data.uri. One that is damaged is an error here as in training."""
    if not config.data.uri:
        return None
    found = config.data.model_copy(update={"uri": absolute(config.data.uri)})
    try:
        read_manifest(found.uri, config.storage)
    except DataError as error:
        if isinstance(error.__cause__, MissingError):
            return None
        raise
    return found


def device_name() -> str:
    """What computes."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def check_folder(path: Path | None) -> None:
    """Before minutes of work, not after them."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.absolute().parent}; make it, or name another")
