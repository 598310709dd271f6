"""Pictures to a data set: Parquet shards and a manifest, the same bytes for any number of workers.

The source's pictures are cut into parts; each becomes shards of its own, here, in other processes or on other
machines. The manifest is written last: whatever stops an ingest before leaves nothing that a reader would take for a
data set, and a data set that is to be replaced stays whole until then. Running it again goes on with the parts that
are not done.
"""

import contextlib
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from pipeline.data import picture
from pipeline.data.manifest import FOOTERS_NAME, NAME, DataError, Manifest, read_manifest, write_manifest
from pipeline.ingest import place, records
from pipeline.ingest.listing import EXPECTED
from pipeline.ingest.making import Job, Runner, places_of, refuse_if_strict
from pipeline.ingest.parts import Parts
from pipeline.ingest.place import REPORT_NAME
from pipeline.ingest.processes import run_in_processes
from pipeline.ingest.records import PartRecord, Skipped, Superseded
from pipeline.ingest.settings import IngestConfig as IngestConfig
from pipeline.ingest.settings import TileConfig as TileConfig
from pipeline.ingest.settings import stored_parameters
from pipeline.ingest.shards import merge_footers
from pipeline.ingest.sources import Kind, Listing, list_source, open_pictures
from pipeline.storage import StorageConfig, StorageError, exists, join, write_bytes

HEADERS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class IngestReport:
    """What an ingest did; stored beside the manifest."""

    uri: str
    digest: str
    samples: int
    shards: int
    bytes: int
    skipped: tuple[Skipped, ...]
    ignored: tuple[str, ...]
    """What the source holds beside pictures."""
    flat_tiles: int
    """Tiles left out by `minimum_deviation`."""
    seconds: float
    parts: int = 0
    parts_before: int = 0
    """Of them, done by an earlier ingest that was stopped."""
    already_done: bool = False
    """The data set was there, made from the same source with the same settings; nothing was written."""


def ingest(
    config: IngestConfig,
    uri: str,
    storage: StorageConfig,
    progress: bool = True,
    run_parts: Runner = run_in_processes,
) -> IngestReport:
    """Make the data set at `uri` (local or s3://) from `config.source`. run_parts: where the parts are made.

    Raises DataError for a source without usable pictures, for one that overlaps with `uri`, for a picture that
    `strict` does not forgive, for a finished data set or a stranger's file that would be replaced and for a process
    that died; StorageError for places that cannot be read or written. After an error the parts that are done stay,
    and the next ingest goes on from them.
    """
    started = time.monotonic()
    listing = _listed(config, uri, storage)
    if done := _finished(config, listing, uri, storage):
        return done
    parts = _parts(listing, config, storage, progress)
    plan = records.plan_of(stored_parameters(config), listing.fingerprint, len(parts))
    standing = place.manifest_bytes(uri, storage)  # only with ingest.overwrite
    try:
        before = _begin(plan, len(parts), config, uri, storage)
        job = Job(listing.uri, listing.kind, uri, config, storage, plan)
        made = before | _make(job, parts, before, progress, run_parts)
        ordered = [made[number] for number in sorted(made)]
        return _finish(job, listing, ordered, len(before), started)
    except (Superseded, StorageError):
        # Another ingest of the same plan may have finished, and removed what this one was about to use.
        if place.manifest_bytes(uri, storage) != standing and (
            done := _finished(config.model_copy(update={"overwrite": False}), listing, uri, storage)
        ):
            return done
        raise


@dataclasses.dataclass(frozen=True)
class Preview:
    """What an ingest would do."""

    kind: Kind
    pictures: int
    parts: int
    outcome: str
    refused: bool = False
    """It would end with the outcome as its error."""


def preview(config: IngestConfig, uri: str, storage: StorageConfig, progress: bool = True) -> Preview:
    """Looks at the source and at what lies at `uri`, and writes nothing. Raises what `ingest` raises about a source."""
    listing = _listed(config, uri, storage)
    parts = len(_parts(listing, config, storage, progress))
    seen = listing.kind, len(listing.names), parts
    try:
        return Preview(*seen, _outcome(config, listing, parts, uri, storage))
    except DataError as error:
        return Preview(*seen, str(error), refused=True)


def _outcome(config: IngestConfig, listing: Listing, parts: int, uri: str, storage: StorageConfig) -> str:
    if _same(config, listing, uri, storage):
        return "nothing to do: the data set is there already"
    plan = records.plan_of(stored_parameters(config), listing.fingerprint, parts)
    found = records.read_plan(uri, storage)
    if found == plan:
        done = records.read_records(plan, place.file_sizes(uri, storage), uri, storage)
        what = f"goes on: {len(done)} of {parts} parts are done"
    else:
        place.refuse_foreign(uri, storage)
        what = "a new data set"
        if found is not None:
            differing = "; ".join(records.differences(found, plan))
            what += f"; an unfinished ingest would be cleared, since it differs in {differing}"
    return f"{what}; then replaces the data set that is there" if exists(join(uri, NAME), storage) else what


def _listed(config: IngestConfig, uri: str, storage: StorageConfig) -> Listing:
    """The source, when it and the place for the data set can be used together."""
    if not config.source:
        raise DataError(f"ingest.source is not set; name {EXPECTED}, or a picture to cut into tiles")
    if not uri:
        raise DataError("data.uri is not set; name the folder or s3:// address to write the data set to")
    place.refuse_overlap(config.source, uri, storage)
    listing = list_source(config.source, storage)
    if listing.single and config.tile is None:
        raise DataError(
            f"ingest.source {config.source} is a single picture; set ingest.tile to cut it, or name a collection: "
            f"{EXPECTED}"
        )
    return listing


def _same(config: IngestConfig, listing: Listing, uri: str, storage: StorageConfig) -> Manifest | None:
    """A finished data set that is what this ingest would make; an error if it differs."""
    if config.overwrite or not exists(join(uri, NAME), storage):
        return None
    place.refuse_foreign(uri, storage)
    manifest = read_manifest(uri, storage)
    differing = records.differing_parameters(manifest.parameters, stored_parameters(config))
    if manifest.source != listing.fingerprint:
        differing.append("ingest.source (other files, or files of other sizes)")
    if differing:
        raise DataError(
            f"{uri} already holds a data set that differs in {'; '.join(differing)}; choose another data.uri "
            f"or set ingest.overwrite=true"
        )
    return manifest


def _finished(config: IngestConfig, listing: Listing, uri: str, storage: StorageConfig) -> IngestReport | None:
    """The report of a finished data set that is what this ingest would make; an error if it differs."""
    if (manifest := _same(config, listing, uri, storage)) is None:
        return None
    plan = records.read_plan(uri, storage)
    if plan is None or records.is_for(plan, manifest.parameters, manifest.source):  # else it is being replaced
        place.sweep(manifest, uri, storage)
    return IngestReport(
        uri=uri,
        digest=manifest.digest,
        samples=manifest.samples,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        skipped=(),
        ignored=listing.ignored,
        flat_tiles=0,
        seconds=0.0,
        already_done=True,
    )


def _parts(listing: Listing, config: IngestConfig, storage: StorageConfig, progress: bool) -> Parts:
    """Cuts the source into parts. For tiles, the header of each large picture tells how many it has."""
    names = listing.names if config.tile is None or config.limit is None else listing.names[: config.limit]
    if config.tile is None:
        return Parts(names, config.part_pictures, config.limit)
    with (
        contextlib.closing(open_pictures(listing.uri, listing.kind, storage)) as pictures,
        picture.any_size(),
        ThreadPoolExecutor(HEADERS_AT_ONCE) as pool,
    ):

        def places(name: str) -> int:
            try:
                return places_of(pictures.read(name), config)
            except picture.PictureError:
                return 1

        counts = pool.map(places, names)
        silent = None if progress and len(names) > 1 else True
        found = list(tqdm(counts, "large pictures", len(names), unit=" pictures", disable=silent))
    return Parts(names, config.part_pictures, config.limit, np.array(found))


def _begin(plan: bytes, parts: int, config: IngestConfig, uri: str, storage: StorageConfig) -> dict[int, PartRecord]:
    """The parts that are done already; where they belong to another unfinished ingest, they are removed."""
    found = records.read_plan(uri, storage)
    if found == plan:
        sizes = place.file_sizes(uri, storage)
        done = {record.number: record for record in records.read_records(plan, sizes, uri, storage)}
        if done:
            tqdm.write(f"{uri}: an earlier ingest was stopped; goes on: {len(done)} of {parts} parts are done")
        for record in done.values():
            refuse_if_strict(config, record.skipped)
        return done
    place.refuse_foreign(uri, storage)
    if found is not None:
        differing = "; ".join(records.differences(found, plan))
        tqdm.write(f"{uri}: an unfinished ingest is cleared, since it differs in {differing}")
    records.write_plan(plan, uri, storage)
    place.clear(plan, uri, storage)
    return {}


def _make(
    job: Job, parts: Parts, before: dict[int, PartRecord], progress: bool, run_parts: Runner
) -> dict[int, PartRecord]:
    """The parts that are not done yet, with a progress bar over all."""
    todo = (parts[number] for number in range(len(parts)) if number not in before)
    looked_at = sum(record.places for record in before.values())
    silent = None if progress else True
    with (
        tqdm(desc="ingest", total=parts.places, initial=looked_at, unit=" pictures", disable=silent) as bar,
        contextlib.closing(run_parts(job, todo, bar.update)) as done,
    ):
        return {record.number: record for record in done}


def _finish(job: Job, listing: Listing, parts: list[PartRecord], before: int, started: float) -> IngestReport:
    """The parts become one data set: footers, report, and the manifest last."""
    uri, storage = job.uri, job.storage
    shards = tuple(shard for part in parts for shard in part.shards)
    skipped = tuple(dict.fromkeys(skipped for part in parts for skipped in part.skipped))
    flat_tiles = sum(part.flat_tiles for part in parts)
    if not shards:
        raise DataError(_nothing(listing.uri, skipped, flat_tiles))
    summary, footers = merge_footers([footer for part in parts for footer in part.footers])
    parameters = stored_parameters(job.config)
    manifest = Manifest(job.config.size, job.config.size, shards, parameters, listing.fingerprint, footers)
    report = IngestReport(
        uri=uri,
        digest=manifest.digest,
        samples=manifest.samples,
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        skipped=skipped,
        ignored=listing.ignored,
        flat_tiles=flat_tiles,
        seconds=round(time.monotonic() - started, 3),
        parts=len(parts),
        parts_before=before,
    )
    records.check_plan(job.plan, uri, storage)
    if changed := records.misfits(shards, place.file_sizes(uri, storage)):
        raise DataError(
            f"{join(uri, changed[0])}: missing or of another size than when it was made ({len(changed)} such shards); "
            f"does another ingest write to the same data.uri? Run the same command again to make them anew"
        )
    replaced = place.named_shards(uri, storage) or set()
    write_bytes(join(uri, REPORT_NAME), json.dumps(dataclasses.asdict(report), indent=1).encode(), storage)
    # A data set that stood here is whole up to now, and the new one is as soon as these two are written.
    write_bytes(join(uri, FOOTERS_NAME), summary, storage)
    write_manifest(manifest, uri, storage)
    place.sweep(manifest, uri, storage, replaced)
    return report


def _nothing(source: str, skipped: tuple[Skipped, ...], flat_tiles: int) -> str:
    if skipped:
        first = skipped[0]
        count = len(skipped)
        return f"{source}: none of its {count} pictures can be used; the first, {first.path}, {first.reason}"
    return f"{source}: all {flat_tiles} tiles are flat; lower ingest.tile.minimum_deviation"
