"""Decides whether a registered generator becomes the champion: only with a smaller distance under the same protocol.

    python -m jobs.promote --config demo                # the newest version of tracking.model_name
    python -m jobs.promote --config demo --version 3

The champion before becomes `previous`; a version that does not win becomes `challenger`. Take a model with
`models:/NAME@champion`.
"""

import argparse
from collections.abc import Sequence

from jobs.cli import failing_clearly, parse
from pipeline.config import Config


def _version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", help="the version to promote; the newest unless given")


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse(__doc__, argv, _version)
    if not args.dry_run:
        print(run(config, args.version))


def run(config: Config, version: str | None = None) -> str:
    """Promotes a version and says what was done."""
    from pipeline.tracking.registry import newest_version, promote

    uri, name = config.tracking_uri, config.tracking.model_name
    return promote(uri, name, version or newest_version(uri, name)).describe()


if __name__ == "__main__":
    main()
