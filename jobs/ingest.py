"""Turns pictures into sharded Parquet with a manifest.

    python -m jobs.ingest --config ffhq256 ingest.source=images1024x1024 data.uri=s3://bucket/ffhq256
    python -m jobs.ingest --config demo data.uri=runs/demo/data

Corrupt pictures are skipped and listed in ingest-report.json beside the shards; ingest.strict=true fails instead.
An ingest that was interrupted leaves no manifest, so nothing mistakes it for a finished one.
"""

from collections.abc import Sequence

from jobs.cli import failing_clearly, parse
from pipeline.config import Config, ConfigError, absolute
from pipeline.data.ingest import IngestReport, ingest


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse(__doc__, argv)
    if not args.dry_run:
        report(run(config))


def run(config: Config) -> IngestReport:
    """Writes the data set of a configuration."""
    if config.ingest.source is None or not config.data.uri:
        raise ConfigError("ingest.source and data.uri must say where the pictures are and where the shards go")
    source = config.ingest.model_copy(update={"source": absolute(config.ingest.source)})
    return ingest(source, absolute(config.data.uri), config.storage)


def report(done: IngestReport) -> None:
    """Says what came of it."""
    verb = "found" if done.already_done else "wrote"
    print(
        f"{verb} {done.samples} pictures in {done.shards} shard(s), {done.bytes / 1e6:.1f} MB, at {done.uri}\n"
        f"digest {done.digest}"
    )
    for skipped in done.skipped[:10]:
        print(f"skipped {skipped.path}: {skipped.reason}")
    if len(done.skipped) > 10:
        print(f"... and {len(done.skipped) - 10} more, in ingest-report.json")


if __name__ == "__main__":
    main()
