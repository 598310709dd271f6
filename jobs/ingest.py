"""Turns pictures into sharded Parquet with a manifest; checks and describes what is there.

    python -m jobs.ingest --config ffhq256 ingest.source=images1024x1024 data.uri=s3://bucket/ffhq256
    python -m jobs.ingest --config ffhq256 ... cluster.address=auto       # on a Ray cluster; submitted ones are anyway
    python -m jobs.ingest --config ffhq256 data.uri=s3://bucket/ffhq256 --verify
    python -m jobs.ingest --config ffhq256 data.uri=s3://bucket/ffhq256 --describe --sheet ffhq256.png

Corrupt pictures are skipped and listed in ingest-report.json beside the shards; ingest.strict=true fails instead.
An ingest that was interrupted leaves no manifest, so nothing mistakes it for a finished one; the same command goes on
where it was. ingest.overwrite=true replaces a data set only when the new one is whole. --dry-run lists the source and
says what would happen. --verify reads everything again and ends with code 1 if anything differs from the manifest.
"""

import argparse
import sys
from collections.abc import Sequence

from jobs.cli import FAILURE, failing_clearly, going_on, parse
from pipeline.config import Config, ConfigError, absolute
from pipeline.config_cluster import LOCAL, address_of
from pipeline.data.manifest import DataError
from pipeline.ingest.describe import Description, as_text, describe
from pipeline.ingest.ingest import IngestConfig, IngestReport, Preview, ingest, preview
from pipeline.ingest.making import Runner
from pipeline.ingest.processes import run_in_processes, worker_count
from pipeline.ingest.verify import Verified, verify
from pipeline.storage import join, write_bytes

SHOWN_PROBLEMS, SHOWN_SKIPPED = 20, 10


def _actions(parser: argparse.ArgumentParser) -> None:
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--verify", action="store_true", help="ingest nothing; check the data set at data.uri")
    instead.add_argument("--describe", action="store_true", help="ingest nothing; a table, and a sheet of pictures")
    parser.add_argument("--sheet", metavar="FILE", help="of --describe, PNG; else run.dir/contact-sheet-DIGEST.png")


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse(__doc__, argv, _actions)
    if args.sheet and not args.describe:
        raise ConfigError(f"--sheet {args.sheet}: is where --describe puts its sheet; add --describe or leave it out")
    if args.dry_run:
        if not (args.verify or args.describe):
            report_preview(preview(*_addresses(config), config.storage))
    elif args.verify:
        checked = verify(_data_uri(config), config.storage, config.data.threads)
        report_verified(checked)
        if checked.problems:
            sys.exit(FAILURE)
    elif args.describe:
        found = describe(_data_uri(config), config.storage, config.data.threads)
        report_description(found, args.sheet or default_sheet(config, found), config)
    else:
        with going_on():
            done = run(config)
        report(done)


def run(config: Config) -> IngestReport:
    """Writes the data set of a configuration."""
    settings, uri = _addresses(config)
    return ingest(settings, uri, config.storage, run_parts=runner(config))


def _addresses(config: Config) -> tuple[IngestConfig, str]:
    """What to ingest and where to, independent of the working directory."""
    if config.ingest.source is None or not config.data.uri:
        raise ConfigError("ingest.source and data.uri must say where the pictures are and where the shards go")
    settings = config.ingest.model_copy(update={"source": absolute(config.ingest.source)})
    return settings, absolute(config.data.uri)


def runner(config: Config) -> Runner:
    """Tasks of the Ray cluster at `cluster.address` or RAY_ADDRESS, else processes of this machine; says which."""
    address = address_of(config.cluster)
    if address == LOCAL:
        count = worker_count(config.ingest.workers)
        print(f"ingest with up to {count} process{'es' if count > 1 else ''} on this machine", flush=True)
        return run_in_processes
    from pipeline.cluster.ingest import ray_runner

    print(f"ingest as tasks of the Ray cluster at {address}", flush=True)
    return ray_runner(config.cluster)


def report_preview(found: Preview) -> None:
    """Says what would happen; ends the process with code 1 where that is an error."""
    print(f"source: {found.kind} of {found.pictures} pictures, {found.parts} part(s)", flush=True)
    if found.refused:
        raise DataError(found.outcome)
    print(f"would be: {found.outcome}")


def report(done: IngestReport) -> None:
    """Says what came of it."""
    verb = "found" if done.already_done else "wrote"
    print(
        f"{verb} {done.samples} pictures in {done.shards} shard(s), {done.bytes / 1e6:.1f} MB, at {done.uri}\n"
        f"digest {done.digest}"
    )
    for skipped in done.skipped[:SHOWN_SKIPPED]:
        print(f"skipped {skipped.path}: {skipped.reason}")
    if len(done.skipped) > SHOWN_SKIPPED:
        print(f"... and {len(done.skipped) - SHOWN_SKIPPED} more, in ingest-report.json")


def report_verified(checked: Verified) -> None:
    """Says what was checked, and what is wrong."""
    print(
        f"checked {checked.files} files with {checked.bytes / 1e6:.1f} MB of shards: sizes and hashes, "
        f"{checked.row_groups} row groups, headers of {checked.pictures} pictures\ndigest {checked.digest}"
    )
    for problem in checked.problems[:SHOWN_PROBLEMS]:
        print(f"wrong: {problem}")
    if len(checked.problems) > SHOWN_PROBLEMS:
        print(f"... and {len(checked.problems) - SHOWN_PROBLEMS} more")
    count = len(checked.problems)
    print(
        f"{count} problem(s): restore the files, or ingest again with ingest.overwrite=true" if count else "all right"
    )


def report_description(found: Description, sheet: str, config: Config) -> None:
    """Prints the table and stores the contact sheet."""
    write_bytes(sheet, found.sheet, config.storage)
    print(f"{as_text(found.table)}\ncontact sheet at {sheet}")


def default_sheet(config: Config, found: Description) -> str:
    """Beside the runs."""
    return join(config.run.dir, f"contact-sheet-{found.digest[:8]}.png")


def _data_uri(config: Config) -> str:
    if not config.data.uri:
        raise ConfigError("data.uri is empty: expected the folder that jobs.ingest wrote, local or s3://")
    return absolute(config.data.uri)


if __name__ == "__main__":
    main()
