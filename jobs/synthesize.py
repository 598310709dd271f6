"""Draws pictures with a trained generator.

    python -m jobs.synthesize samples --config demo synthesize.out=samples.png
    python -m jobs.synthesize samples --config demo synthesize.model=models:/cips-demo@champion synthesize.size=256
    python -m jobs.synthesize samples --config demo synthesize.truncation=0.7     # the run's latest checkpoint

A picture depends on synthesize.seed and its number alone. Kinds: samples.
"""

import argparse
import sys
from collections.abc import Sequence

from jobs.cli import failing_clearly, parse
from jobs.models import load_generator
from pipeline.config import Config, absolute
from pipeline.models.summary import summary_table
from pipeline.synthesis.generate import generate, write_pictures
from pipeline.training.local import local_device

KINDS = ("samples",)


def _kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=f"what to draw: {', '.join(KINDS)}")


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if not any(word in KINDS for word in words):
        words.insert(0, KINDS[0])
    config, args = parse(__doc__, words, _kind)
    if args.dry_run:
        print(summary_table(config.model))
    else:
        print(f"drew {config.synthesize.images} pictures to {run(config)}")


def run(config: Config) -> str:
    """Draws what the configuration asks for and returns where it lies."""
    generator = load_generator(config.synthesize.model, config).to(local_device())
    settings = config.synthesize.model_copy(update={"out": absolute(config.synthesize.out)})
    return write_pictures(generate(generator, settings), settings, config.storage)


if __name__ == "__main__":
    main()
