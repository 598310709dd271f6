"""Measures parts of the pipeline on this machine.

    python -m jobs.benchmark loader                      # how fast data can be fed, against bare decoding
    python -m jobs.benchmark loader --data s3://bucket/ffhq256 --threads 4
    python -m jobs.benchmark loader --peers --plot loader.png --json loader.json    # against other loaders
    python -m jobs.benchmark order --help                # how well it shuffles, and what a cluster would read
    python -m jobs.benchmark generator --help            # G alone, against the published form
    python -m jobs.benchmark step --config demo          # an update of training, phase by phase
    python -m jobs.benchmark step --config ffhq256 train.batch_size=4 --updates 4 --compare reference
    python -m jobs.benchmark scaling --config demo --workers 1,2 --ray     # what workers and Ray cost
    python -m jobs.benchmark plan --config ffhq256 --gpus 8 --gpu h200     # a training on paper

S3 is reached as in every job, by the environment's AWS_ENDPOINT_URL and keys.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from jobs.cli import failing_clearly

KINDS = {
    "loader": "images per second, CPU seconds per image and time to the first batch; --peers adds other loaders",
    "order": "quality of the shuffle, and the reads of clusters of any size",
    "generator": "speed and memory of the generator and its layer, against the published form",
    "step": "time of a training update by phase, images per second, share of the matrix product's peak, memory",
    "scaling": "rate of several workers against one, time spent waiting for sums, and what Ray costs",
    "checkpoint": "the pause that a checkpoint costs training, written in the background and beside it synchronously",
    "plan": "memory, time, cost and traffic of a training on any number of GPUs, computed and not measured",
}
"""Each is a module pipeline.benchmark.KIND with `add_arguments(parser)` and `run(args)`."""


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, text in KINDS.items():
        options = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in words[:1]:  # only the kind that is asked for is imported
            module(name).add_arguments(options)
        options.add_argument("--dry-run", action="store_true", help="show what was asked for, and measure nothing")
    args, rest = parser.parse_known_args(words)
    if rest and hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        args.overrides += rest  # settings may stand on both sides of an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.dry_run:
        print("\n".join(f"{name}: {value}" for name, value in vars(args).items() if name != "dry_run"))
        return
    module(args.kind).run(args)


def module(kind: str) -> Any:
    """The code of one kind of benchmark."""
    return importlib.import_module(f"pipeline.benchmark.{kind}")


if __name__ == "__main__":
    main()
