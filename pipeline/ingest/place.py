"""What lies where a data set goes: which of it an ingest made, and may replace or remove. All else is left alone."""

import json
import os
import re
from collections.abc import Collection
from pathlib import PurePosixPath

import pyarrow.fs as pafs

from pipeline.data.manifest import FOOTERS_NAME, NAME, DataError, Manifest, read_manifest
from pipeline.ingest import records
from pipeline.storage import (
    MissingError,
    StorageConfig,
    arrow_filesystem,
    delete,
    exists,
    explained,
    is_remote,
    join,
    list_names,
    read_bytes,
)

REPORT_NAME = "ingest-report.json"
SHARD = r"shard-[0-9a-f]{8}-\d{5,}-\d{2,}\.parquet"
OWN = re.compile(rf"{SHARD}|\.({SHARD}|{FOOTERS_NAME}|{re.escape(NAME)}|{re.escape(REPORT_NAME)})\.partial-\d+")
MANIFEST_KEYS = {"version", "digest", "shards"}


def refuse_overlap(source: str, uri: str, storage: StorageConfig) -> None:
    """Raises DataError where the source is the place of the data set, or one lies inside the other."""
    there, here = _parts(source, storage), _parts(uri, storage)
    shared = min(len(there), len(here))
    if there[:shared] != here[:shared]:
        return
    how = "are the same place" if there == here else "lie one inside the other"
    raise DataError(
        f"ingest.source {source} and data.uri {uri} {how}, so that the data set would mix with the pictures; set "
        f"data.uri to a folder of its own beside the source"
    )


def refuse_foreign(uri: str, storage: StorageConfig) -> None:
    """Raises DataError where files that an ingest would replace were not written by one."""
    names = list_names(uri, storage)
    found = sorted({NAME, FOOTERS_NAME, REPORT_NAME} & set(names))
    if not found or any(OWN.fullmatch(name) for name in names) or records.read_plan(uri, storage) is not None:
        return
    content = manifest_bytes(uri, storage)
    if content is None or not is_manifest(content):
        raise DataError(
            f"{join(uri, found[0])}: would be replaced, but nothing says that jobs.ingest wrote it; choose another "
            f"data.uri, or move the file away"
        )


def is_manifest(data: bytes) -> bool:
    """Whether it is a manifest of a data set of ours, of any version, be it damaged in its details."""
    try:
        content = json.loads(data)
    except ValueError:
        return False
    return isinstance(content, dict) and content.keys() >= MANIFEST_KEYS


def manifest_bytes(uri: str, storage: StorageConfig) -> bytes | None:
    """The manifest that stands there, unread; None where there is none."""
    try:
        return read_bytes(join(uri, NAME), storage)
    except MissingError:
        return None


def named_shards(uri: str, storage: StorageConfig) -> set[str] | None:
    """The shards of the data set that stands there; None where its manifest cannot be read."""
    try:
        return {shard.file for shard in read_manifest(uri, storage).shards}
    except DataError:
        return None if exists(join(uri, NAME), storage) else set()


def clear(plan: bytes, uri: str, storage: StorageConfig) -> None:
    """Remove the shards of unfinished ingests of other plans; a data set that stands keeps its own."""
    if (kept := named_shards(uri, storage)) is None:
        return  # which shards are the data set's is not known
    mine = records.shard_prefix(plan)  # another process may have begun with the same plan
    for name in list_names(uri, storage):
        if OWN.fullmatch(name) and name not in kept and not name.lstrip(".").startswith(mine):
            delete(join(uri, name), storage)


def sweep(manifest: Manifest, uri: str, storage: StorageConfig, replaced: Collection[str] = ()) -> None:
    """Remove what the finished data set does not need: notes on the way, files that a kill left half written.

    replaced: shards of the data set that stood there before.
    """
    wanted = {shard.file for shard in manifest.shards}
    for name in list_names(uri, storage):
        if name == records.FOLDER or ((OWN.fullmatch(name) or name in replaced) and name not in wanted):
            delete(join(uri, name), storage)


def file_sizes(uri: str, storage: StorageConfig) -> dict[str, int]:
    """Bytes of the files directly at `uri`, by name."""
    with explained(uri, storage):
        filesystem, path = arrow_filesystem(uri, storage)
        found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return {info.base_name: info.size for info in found if info.type == pafs.FileType.File}


def _parts(uri: str, storage: StorageConfig) -> tuple[str, ...]:
    """A place as the folders on the way to it; links are followed."""
    if is_remote(uri):
        return "s3:", *(part for part in uri.removeprefix("s3://").split("/") if part)
    return PurePosixPath(os.path.realpath(arrow_filesystem(uri, storage)[1])).parts
