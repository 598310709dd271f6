"""What an unfinished ingest leaves behind, and what of it counts."""

from pathlib import Path

import pytest

from pipeline.data.manifest import RowGroup, Shard
from pipeline.ingest.records import (
    PartRecord,
    Skipped,
    Superseded,
    check_plan,
    differences,
    misfits,
    plan_of,
    read_plan,
    read_records,
    write_plan,
    write_record,
)
from pipeline.storage import StorageConfig

STORAGE = StorageConfig()
PLAN = plan_of({"size": 16, "tile": None}, "ab" * 32, 3)


def record(number: int) -> PartRecord:
    name = f"shard-{number:05d}-00.parquet"
    shard = Shard(name, 100 + number, "cd" * 32, (RowGroup(name, 0, 5, 4, 90, "ef" * 32),))
    return PartRecord(number, 7, (shard,), (bytes(range(256)),), (Skipped("a.png", "is broken"),), 2)


SIZES = {f"shard-{number:05d}-00.parquet": 100 + number for number in range(3)}


def test_records_come_back_in_order(tmp_path: Path) -> None:
    for number in (2, 0):
        write_record(record(number), PLAN, str(tmp_path), STORAGE)
    assert read_records(PLAN, SIZES, str(tmp_path), STORAGE) == [record(0), record(2)]
    assert read_records(PLAN, SIZES, str(tmp_path / "elsewhere"), STORAGE) == []


def test_what_cannot_be_relied_on_is_as_good_as_none(tmp_path: Path) -> None:
    for number in range(3):
        write_record(record(number), PLAN, str(tmp_path), STORAGE)
    assert read_records(plan_of({}, "", 3), SIZES, str(tmp_path), STORAGE) == [], "another plan's"
    gone = {name: size for name, size in SIZES.items() if "00001" not in name}
    assert [one.number for one in read_records(PLAN, gone, str(tmp_path), STORAGE)] == [0, 2]
    changed = SIZES | {"shard-00000-00.parquet": 99}
    assert [one.number for one in read_records(PLAN, changed, str(tmp_path), STORAGE)] == [1, 2]
    assert misfits(record(0).shards, changed) == ["shard-00000-00.parquet"]
    path = tmp_path / ".ingest" / "part-00002.json"
    for damage in ("", "[]", path.read_text()[:200], path.read_text().replace('"places"', '"place"')):
        path.write_text(damage)
        assert [one.number for one in read_records(PLAN, SIZES, str(tmp_path), STORAGE)] == [0, 1]


def test_a_plan_that_is_not_this_ingests_stops_it(tmp_path: Path) -> None:
    assert read_plan(str(tmp_path), STORAGE) is None
    write_plan(PLAN, str(tmp_path), STORAGE)
    check_plan(PLAN, str(tmp_path), STORAGE)
    other = plan_of({"size": 32, "tile": None}, "ab" * 32, 3)
    with pytest.raises(Superseded, match=r"differs in ingest.size \(there 16, asked for 32\); stop one of them"):
        check_plan(other, str(tmp_path), STORAGE)
    (tmp_path / ".ingest" / "plan.json").unlink()
    with pytest.raises(Superseded, match="another ingest finished or cleared this place"):
        check_plan(PLAN, str(tmp_path), STORAGE)


def test_differences_are_named() -> None:
    assert differences(PLAN, plan_of({"size": 16, "tile": None}, "00" * 32, 3)) == [
        "ingest.source (other files, or files of other sizes)"
    ]
    assert differences(b"[]", PLAN) == differences(b"{", PLAN) == ["its plan.json, which is damaged"]
    assert differences(PLAN.replace(b'"version": 2', b'"version": 1'), PLAN) == ["the version of this program"]
