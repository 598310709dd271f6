"""The order of samples: how well it shuffles, and what it costs a cluster that is not here.

python -m jobs.benchmark order                                        # both
python -m jobs.benchmark order --quality --plot quality.png
python -m jobs.benchmark order --manifest s3://bucket/ffhq256 --workers 1,8,64
python -m jobs.benchmark order --samples 5000000 --picture-bytes 120000 --bandwidth-mb 50
"""

import argparse
import functools
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.benchmark.arguments import amount, count, counts, whole
from pipeline.benchmark.shuffle import NEAR, Quality, ratios
from pipeline.benchmark.simulate import FOOTERS_BYTES, FOOTERS_LIMIT, Cluster, Report, Shape, imagined, simulate
from pipeline.benchmark.study import LIMIT, ROWS, WORKERS, Point, Setting, point, setting, spreads
from pipeline.benchmark.walk import GROUP
from pipeline.data.manifest import NAME, read_manifest
from pipeline.data.stream import DataConfig
from pipeline.layering import ConfigError
from pipeline.storage import StorageConfig

SHAPES = {"FFHQ": 70_000, "LSUN-scale": 3_000_000, "2 billion": 2_000_000_000}
PICTURE_BYTES = 30_000
"""A photograph of 256x256 pixels as a good JPEG: an assumption, not a measurement."""
REQUESTS_LIMIT = 5_500
"""GETs per second that S3 promises for one prefix."""
MB = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jobs.benchmark order`."""
    data = DataConfig()
    add = parser.add_argument
    add("--quality", action="store_true", help="only the quality of the shuffle; the default is both parts")
    add("--manifest", metavar="URI", help="simulate this data set (its folder or its manifest.json)")
    add("--samples", type=count, help="simulate an imagined data set of so many pictures")
    add("--picture-bytes", type=count, default=PICTURE_BYTES, help="mean size of an imagined picture (%(default)s)")
    add("--workers", type=counts, default=[1, 8, 64, 512], help="numbers of workers to simulate (1,8,64,512)")
    add("--batch-size", type=count, default=32, help="pictures of the global batch, grown where needed (%(default)s)")
    add("--latency-ms", type=amount, default=30.0, help="from a request to its first byte (%(default)s)")
    add("--bandwidth-mb", type=amount, default=100.0, help="MB per second that one worker receives (%(default)s)")
    add("--images-per-second", type=amount, default=200.0, help="trained on by one worker (%(default)s)")
    add("--spread", type=count, default=data.shuffle_row_groups, help="data.shuffle_row_groups (%(default)s)")
    add("--read-ahead", type=whole, default=data.read_ahead, help="data.read_ahead (%(default)s)")
    add("--threads", type=count, default=data.threads, help="data.threads (%(default)s)")
    add("--exact-samples", type=whole, default=4_000_000, help="walk epochs up to this size whole (%(default)s)")
    add("--groups", type=counts, default=[100, 300, 1000], help=f"row groups of {ROWS} for quality (100,300,1000)")
    add("--quality-batches", type=counts, default=[32, 64], help="batch sizes for quality (32,64)")
    add(
        "--epochs",
        type=functools.partial(whole, least=2),
        help="epochs to measure quality over (default: about 2 million samples)",
    )
    add("--seed", type=whole, default=0, help="of all orders and permutations (%(default)s)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the quality of the shuffle")


def run(args: argparse.Namespace) -> None:
    """Prints the tables, and draws the plot. Raises DataError and StorageError where a manifest cannot be read."""
    asked = args.manifest is not None or args.samples is not None
    if args.quality or args.plot or not asked:
        show_quality(args)
    if asked or not args.quality:
        shapes = _shapes(args)
        print(SIMULATION_TEXT)
        for shape in shapes:
            show_simulation(shape, args)


# ---- quality -------------------------------------------------------------------------------------


def show_quality(args: argparse.Namespace) -> None:
    """Measures and prints the quality of the order for each data set and batch size."""
    for groups, batch_size in itertools.product(args.groups, args.quality_batches):
        _check_batch(groups, batch_size)
    if args.plot:
        _check_plot(args.plot)
    print(QUALITY_TEXT)
    results = []
    for groups in args.groups:
        for batch_size in args.quality_batches:
            case = setting(groups, batch_size, args.epochs, args.seed)
            chosen = spreads(groups, batch_size, [args.spread])
            bar = tqdm(chosen, desc=f"{groups} row groups, batch {batch_size}", leave=False, unit="order")
            points = [point(case, spread, args.seed) for spread in bar]
            results.append((case, points))
            print(f"\n{groups} row groups of {ROWS}, batch {batch_size}, {case.epochs} epochs")
            print(table(QUALITY_HEADER, list(quality_rows(case, points, args.spread))), flush=True)
    if args.plot:
        from pipeline.benchmark.shuffle_plot import draw

        draw(results, args.spread, args.plot)
        print(f"\nplot: {args.plot}")


QUALITY_TEXT = f"""Quality of the shuffle, as multiples of a full permutation in each epoch (1 = the same; closed form).
  memory       row groups that a worker holds, with {WORKERS[0]} and with {WORKERS[1]} workers
  one group    pairs of one batch that come from one row group; at most {LIMIT} wanted, less is fine
  meet again   pairs of one batch that meet in one of the next epoch, too (+- standard error); at most {LIMIT} wanted
  travel       mean |place in epoch e + 1 - place in epoch e|
  same batch   stored neighbours (i, i + 1) that are in one batch
  near         stored neighbours at most {NEAR} batches apart: above 1 where memory is small, for a row group is used up
               within (its rows x spread) batches
  apart        distance of stored neighbours in % of the epoch: 5th percentile, median, 95th (not a multiple)"""
QUALITY_HEADER = (
    "spread",
    "memory",
    "one group",
    "meet again",
    "travel",
    "same batch",
    "near",
    "apart %",
    f"<= {LIMIT}",
)


def quality_rows(case: Setting, points: Sequence[Point], default: int) -> Iterator[Sequence[str]]:
    """Cells of the table of one data set; the closed form stands first, in absolute numbers."""
    exact = case.closed_form
    shares = [f"{100 * share:.4f}%" for share in astuple(exact)[:5]]
    yield ("closed form", "all", *shares, _apart(exact), "")
    measured = ratios(case.permutation, exact)
    yield ("permutation", "all", *_multiples(measured, case.permutation_errors, exact), _apart(case.permutation), "yes")
    for one in points:
        name = f"{one.spread}{' (chosen)' if one.spread == default else ''}"
        memory = " / ".join(map(str, one.memory))
        cells = _multiples(ratios(one.quality, exact), one.errors, exact)
        yield (name, memory, *cells, _apart(one.quality), "yes" if one.within(exact) else "NO")


def _check_batch(groups: int, batch_size: int) -> None:
    least = GROUP * max(WORKERS)
    if batch_size < least or batch_size % GROUP or groups * ROWS % batch_size:
        raise ConfigError(
            f"--quality-batches is {batch_size}: expected a multiple of {GROUP} from {least} up that divides the "
            f"{groups * ROWS} samples of {groups} row groups, such as 32, 64 or 128"
        )


def _check_plot(path: Path) -> None:
    """Before a minute of work, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot draws with matplotlib, which is not installed: pip install matplotlib")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot is {path}: there is no folder {path.parent}; make it, or name another")


def _multiples(values: Quality, errors: Quality, reference: Quality) -> list[str]:
    error = errors.meet_again / reference.meet_again
    meet_again = f"{values.meet_again:.3f}" + ("" if np.isnan(error) else f" +- {error:.3f}")
    return [
        f"{values.one_group:.3f}",
        meet_again,
        f"{values.travel:.3f}",
        f"{values.same_batch:.3f}",
        f"{values.near:.3f}",
    ]


def _apart(quality: Quality) -> str:
    return " ".join(f"{100 * part:.1f}" for part in (quality.apart_low, quality.apart_median, quality.apart_high))


# ---- simulator -----------------------------------------------------------------------------------


def show_simulation(shape: Shape, args: argparse.Namespace) -> None:
    """Simulates each number of workers on one data set, and prints what it found."""
    reports = []
    for workers in args.workers:
        cluster = Cluster(
            workers=workers,
            latency_s=args.latency_ms / 1000,
            bandwidth=args.bandwidth_mb * MB,
            images_per_second=args.images_per_second,
            threads=args.threads,
            read_ahead=args.read_ahead,
        )
        reports.append(
            simulate(
                shape, cluster, args.batch_size, args.spread, args.seed, exact_samples=args.exact_samples, show=True
            )
        )
    total = shape.bytes.sum() / MB
    print(
        f"\n{shape.name}: {shape.samples:,} pictures in {len(shape.rows):,} row groups, {total:,.0f} MB; spread "
        f"{args.spread}, {args.read_ahead} row groups read ahead by {args.threads} threads; each worker: "
        f"{args.latency_ms:g} ms, {args.bandwidth_mb:g} MB/s, {args.images_per_second:g} images/s"
    )
    print(table(SIMULATION_HEADER, [simulation_row(report) for report in reports]))
    for note in notes(shape, reports, args.batch_size, args.bandwidth_mb * MB):
        print(f"  {note}")


SIMULATION_TEXT = """
Simulated clusters: the real order, counted for imagined workers.
  row groups opened by a worker   per epoch: least / mean / most over the workers
  bytes read     by all workers in an epoch, as a multiple of the data set; 1 + W/R: W workers, R row groups
  GET/s          to the bucket as a whole, over an epoch; peak: in the busiest second, when a run or an epoch begins
  open           most row groups that a worker draws from at a time; buffer: with those read ahead
  first batch    from the start: manifest and footers (sizes estimated), planning, the first row groups
  plan           part of it, measured here: making the order and finding a place in epoch 1000
  waiting        share of the time after the first batch in which training waits for data"""
SIMULATION_HEADER = (
    "workers",
    "batch",
    "row groups opened by a worker",
    "bytes read",
    "1 + W/R",
    "GET/s",
    "peak GET/s",
    "open",
    "buffer MB",
    "first batch s",
    "plan s",
    "waiting",
)


def simulation_row(report: Report) -> Sequence[str]:
    """Cells of the table for one number of workers."""
    low, mean, high = report.opened
    sampled = "" if report.exact else "~"
    return (
        f"{report.workers}",
        f"{report.batch_size}",
        f"{sampled}{low:,.0f} / {mean:,.1f} / {high:,.0f}",
        f"{sampled}{report.read_ratio:.6f} x",
        f"{report.ratio_bound:.6f} x",
        f"{report.requests_per_second:,.1f}",
        f"{report.peak_requests:,.0f}",
        f"{report.open_groups}",
        f"{report.buffer_bytes / MB:,.0f}",
        f"{report.first_batch_s:.2f}",
        f"{report.plan_s:.3f}",
        f"{100 * report.waiting:.1f}%",
    )


def notes(shape: Shape, reports: Sequence[Report], batch_size: int, bandwidth: float) -> Iterator[str]:
    """What a reader of the table should know, one line each."""
    sampled = [report for report in reports if not report.exact]
    if sampled:
        walked = ", ".join(f"{report.walked} of {report.workers}" for report in sampled)
        yield (
            f"~ projected from the beginning and the end of one epoch and from some of the workers ({walked}); "
            "the spread of least and most is that of the projection"
        )
    for report in reports:
        if report.batch_size != batch_size:
            yield (
                f"{report.workers} workers: a batch of {batch_size} has too few minibatch-stddev groups of {GROUP}; "
                f"shown for a batch of {report.batch_size}, the least that they need"
            )
    if any(report.read_ratio > report.ratio_bound for report in reports) and len(set(shape.bytes.tolist())) > 1:
        yield "1 + W/R counts row groups; in bytes a little more is read when those read twice are larger than the mean"
    for report in reports:
        if report.bytes_per_second > bandwidth:
            yield (
                f"{report.workers} workers: each would need {report.bytes_per_second / MB:,.1f} MB/s and has "
                f"{bandwidth / MB:,.1f}"
            )
        if report.peak_requests > REQUESTS_LIMIT:
            yield (
                f"{report.workers} workers: {report.peak_requests:,.0f} GETs in a second, S3 promises "
                f"{REQUESTS_LIMIT:,} for a prefix; expect some 503 SlowDown, which are tried again"
            )
    if len(shape.rows) * FOOTERS_BYTES > FOOTERS_LIMIT:
        rows = int(np.ceil(shape.samples * FOOTERS_BYTES / FOOTERS_LIMIT / 64)) * 64
        size, limit = (number / MB for number in (len(shape.rows) * FOOTERS_BYTES, FOOTERS_LIMIT))
        yield (
            f"the footers of {len(shape.rows):,} row groups are about {size:,.0f} MB, more than Parquet reads from one "
            f"file ({limit:,.0f} MB); ingest with row groups of {rows} pictures or more (ingest.row_group_rows and "
            f"ingest.row_group_bytes)"
        )


def _shapes(args: argparse.Namespace) -> list[Shape]:
    if args.manifest is not None:
        uri = args.manifest.removesuffix(NAME).rstrip("/")
        manifest = read_manifest(uri, StorageConfig())
        rows = np.array([group.rows for group in manifest.row_groups], dtype=np.int64)
        sizes = np.array([group.bytes for group in manifest.row_groups], dtype=np.int64)
        return [Shape(uri, rows, sizes, manifest.digest)]
    wanted = SHAPES if args.samples is None else {"imagined": args.samples}
    print(
        f"\nassumed: pictures of {args.picture_bytes:,} bytes each, in row groups as jobs.ingest makes them by default"
    )
    return [imagined(name, samples, args.picture_bytes) for name, samples in wanted.items()]


# ---- text ----------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell, aligned right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows))
    return "\n".join(f"  {line}" for line in lines)
