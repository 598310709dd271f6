"""One part by itself: what it stores, what it tells, and that it needs nothing but its plan."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.data.picture import PictureError
from pipeline.ingest.making import Job, make_part, places_of
from pipeline.ingest.parts import Part, Piece
from pipeline.ingest.records import PartRecord, Skipped, Superseded, read_records, shard_prefix, write_plan
from pipeline.ingest.settings import IngestConfig, TileConfig
from pipeline.ingest.sources import open_pictures
from pipeline.storage import StorageConfig
from tests.pictures import encoded, picture_files, write_folder

STORAGE = StorageConfig()
PLAN = b"a plan"


def job(folder: Path, files: dict[str, bytes], **settings: object) -> Job:
    source = str(write_folder(folder / "in", files))
    config = IngestConfig.model_validate({"source": source, "size": 16} | settings)
    return Job(source, "folder", str(folder / "out"), config, STORAGE, PLAN)


def make(given: Job, names: Sequence[str], number: int = 3, last: int = 1) -> tuple[PartRecord, int]:
    """The record, and the places that were told of."""
    ticks: list[int] = []
    pictures = open_pictures(given.source, given.kind, given.storage)
    part = Part(number, tuple(Piece(name, 0, last) for name in names))
    record = make_part(given, part, pictures, ticks.append)
    return record, sum(ticks)


def test_a_part_is_stored_and_then_recorded(tmp_path: Path) -> None:
    files = picture_files(6) | {"bad.png": b"no picture"}
    given = job(tmp_path, files, row_group_rows=2)
    write_plan(PLAN, given.uri, STORAGE)
    record, ticks = make(given, sorted(files))
    assert (record.number, record.places, ticks, record.flat_tiles) == (3, 7, 7, 0)
    (shard,) = record.shards
    assert shard.file == f"{shard_prefix(PLAN)}-00003-00.parquet" and [group.rows for group in shard.row_groups] == [
        2,
        2,
        2,
    ]
    assert [skipped.path for skipped in record.skipped] == ["bad.png"]
    assert read_records(PLAN, {shard.file: shard.bytes}, given.uri, STORAGE) == [record]
    assert make(given, sorted(files))[0] == record, "made again it is the same"


def test_a_part_of_an_ingest_that_lost_its_place_is_not_made(tmp_path: Path) -> None:
    given = job(tmp_path, picture_files(2))
    with pytest.raises(Superseded, match="another ingest finished or cleared"):
        make(given, ["part-0/0000.png"])
    write_plan(PLAN, given.uri, STORAGE)
    with pytest.raises(Superseded, match="another ingest has begun"):
        make(dataclasses.replace(given, plan=b"another plan"), ["part-0/0000.png"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".ingest"]


def test_a_part_may_come_to_nothing(tmp_path: Path) -> None:
    given = job(tmp_path, {"a.png": b"no picture"}, tile={"size": 16})
    write_plan(PLAN, given.uri, STORAGE)
    record, ticks = make(given, ["a.png"], last=5)
    assert (record.shards, record.footers, ticks) == ((), (), 5)
    assert [type(skipped) for skipped in record.skipped] == [Skipped], "named once, not for each tile"


def test_places_are_tiles() -> None:
    config = IngestConfig(size=16, tile=TileConfig(size=16, stride=8, latitude=90))
    assert places_of(encoded(1, 32), config) == 9
    assert places_of(encoded(1, 8), config) == 1 and places_of(b"no picture", config) == 1


def test_pictures_that_cannot_be_read_are_skipped(tmp_path: Path) -> None:
    class Damaged:
        """An archive with a broken member."""

        def read(self, name: str) -> bytes:
            if name == "b":
                raise PictureError("cannot be unpacked")
            return encoded(1)

        def close(self) -> None:
            pass

    given = job(tmp_path, {"x.png": encoded(1)})
    write_plan(PLAN, given.uri, STORAGE)
    record = make_part(given, Part(0, tuple(Piece(name, 0, 1) for name in "abc")), Damaged(), lambda count: None)
    assert record.skipped == (Skipped("b", "cannot be unpacked"),) and record.shards[0].rows == 2
