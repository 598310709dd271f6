"""What an ingest leaves on its way in `.ingest` beside the shards, so that it goes on where it was stopped.

`plan.json` says what is being made, `part-00012.json` that a part is done. The folder goes when the manifest stands.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.data.manifest import VERSION, DataError, Shard, shard_from_dict, shard_to_dict
from pipeline.storage import MissingError, StorageConfig, join, list_names, read_bytes, write_bytes

FOLDER = ".ingest"
PLAN_NAME = "plan.json"
READS_AT_ONCE = 16


class Superseded(DataError):
    """Another ingest has begun, or ended, at the same place."""


@dataclass(frozen=True)
class Skipped:
    """A source picture that could not be used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class PartRecord:
    """A part that is done."""

    number: int
    places: int
    """Pictures, or places of tiles, that were looked at."""
    shards: tuple[Shard, ...]
    footers: tuple[bytes, ...]
    """Of each shard, as `merge_footers` takes them."""
    skipped: tuple[Skipped, ...]
    flat_tiles: int
    """Tiles left out by `minimum_deviation`."""


def plan_of(parameters: dict[str, Any], source: str, parts: int) -> bytes:
    """What identifies an ingest: two of the same plan make the same bytes. source: its fingerprint."""
    content = {"version": VERSION, "parameters": parameters, "source": source, "parts": parts}
    return json.dumps(content, indent=1, sort_keys=True).encode()


def differences(plan: bytes, other: bytes) -> list[str]:
    """The settings in which the plan that was found (`plan`) differs from the one asked for."""
    try:
        there, asked = json.loads(plan), json.loads(other)
        differing = differing_parameters(there["parameters"], asked["parameters"])
        if there["source"] != asked["source"]:
            differing.append("ingest.source (other files, or files of other sizes)")
        return differing or ["the version of this program"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"its {PLAN_NAME}, which is damaged"]


def differing_parameters(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Names the settings that differ, with both values."""
    return [
        f"ingest.{key} (there {there.get(key)}, asked for {value})"
        for key, value in asked.items()
        if there.get(key) != value
    ]


def shard_prefix(plan: bytes) -> str:
    """What the names of its shards begin with: those of two plans never meet."""
    return f"shard-{_hash(plan)[:8]}"


def is_for(plan: bytes, parameters: dict[str, Any], source: str) -> bool:
    """Whether the plan that was found, as far as it can be read, has these settings and this source."""
    try:
        content = json.loads(plan)
        return bool(content["parameters"] == parameters and content["source"] == source)
    except (ValueError, KeyError, TypeError):
        return True


def read_plan(uri: str, storage: StorageConfig) -> bytes | None:
    """The plan of an ingest that is unfinished at `uri`, if there is one."""
    try:
        return read_bytes(join(uri, FOLDER, PLAN_NAME), storage)
    except MissingError:
        return None


def write_plan(plan: bytes, uri: str, storage: StorageConfig) -> None:
    """From now on parts that are done are kept."""
    write_bytes(join(uri, FOLDER, PLAN_NAME), plan, storage)


def check_plan(plan: bytes, uri: str, storage: StorageConfig) -> None:
    """Raises Superseded where the ingest of this plan has lost its place to another."""
    found = read_plan(uri, storage)
    if found == plan:
        return
    if found is None:
        raise Superseded(f"{uri}: another ingest finished or cleared this place; run the same command again to see")
    raise Superseded(
        f"{uri}: another ingest has begun at the same place and differs in {'; '.join(differences(found, plan))}; "
        f"stop one of them or give each a data.uri of its own"
    )


def write_record(record: PartRecord, plan: bytes, uri: str, storage: StorageConfig) -> None:
    """Call it when the part's shards are stored."""
    content = {
        "plan": _hash(plan),
        "part": record.number,
        "places": record.places,
        "shards": [shard_to_dict(shard) for shard in record.shards],
        "footers": [base64.b64encode(footer).decode() for footer in record.footers],
        "skipped": [asdict(skipped) for skipped in record.skipped],
        "flat_tiles": record.flat_tiles,
    }
    write_bytes(join(uri, FOLDER, f"part-{record.number:05d}.json"), json.dumps(content, indent=1).encode(), storage)


def read_records(plan: bytes, sizes: dict[str, int], uri: str, storage: StorageConfig) -> list[PartRecord]:
    """The parts of this plan that are done, in order. sizes: bytes of the files at `uri`, by name.

    A record that is damaged, of another plan, or whose shards are not there is as good as none.
    """
    names = [name for name in list_names(join(uri, FOLDER), storage) if name.startswith("part-")]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        contents = pool.map(lambda name: _read(join(uri, FOLDER, name), storage), names)
        records = [_parse(content, plan) for content in contents if content is not None]
    done = {record.number: record for record in records if record and not misfits(record.shards, sizes)}
    return [done[number] for number in sorted(done)]


def misfits(shards: Iterable[Shard], sizes: dict[str, int]) -> list[str]:
    """Names of shards that are missing or have another size than they should."""
    return [shard.file for shard in shards if sizes.get(shard.file) != shard.bytes]


def _read(place: str, storage: StorageConfig) -> bytes | None:
    try:
        return read_bytes(place, storage)
    except MissingError:  # an ingest that runs at the same time has just finished
        return None


def _parse(data: bytes, plan: bytes) -> PartRecord | None:
    try:
        content = json.loads(data)
        if content["plan"] != _hash(plan):
            return None
        return PartRecord(
            number=content["part"],
            places=content["places"],
            shards=tuple(shard_from_dict(shard) for shard in content["shards"]),
            footers=tuple(base64.b64decode(footer, validate=True) for footer in content["footers"]),
            skipped=tuple(Skipped(**skipped) for skipped in content["skipped"]),
            flat_tiles=content["flat_tiles"],
        )
    except (ValueError, KeyError, TypeError):
        return None


def _hash(plan: bytes) -> str:
    return hashlib.sha256(plan).hexdigest()
