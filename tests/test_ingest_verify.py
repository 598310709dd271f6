"""Verifying finds every kind of damage and names its place."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.data.manifest import DataError, read_manifest, write_manifest
from pipeline.ingest.shards import inspect_shard, merge_footers
from pipeline.ingest.verify import Verified, verify
from pipeline.storage import StorageConfig
from tests.pictures import encoded, make_data, write_data_set
from tests.servers import S3Server

STORAGE = StorageConfig()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_data(tmp_path_factory.mktemp("data"), 40).uri)


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "data"))


def check(data: Path) -> Verified:
    return verify(str(data), STORAGE, threads=2, progress=False)


def first(data: Path) -> Path:
    return next(data.glob("shard-*00000-00.parquet"))


def test_a_whole_data_set_is_all_right(data: Path) -> None:
    manifest = read_manifest(str(data), STORAGE)
    assert check(data) == Verified(
        files=len(manifest.shards) + 2,
        row_groups=10,
        pictures=40,
        bytes=sum(shard.bytes for shard in manifest.shards),
        digest=manifest.digest,
        problems=(),
    )


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def in_picture(data: Path) -> None:
    group = read_manifest(str(data), STORAGE).row_groups[1]
    flip(first(data), group.offset + group.bytes // 2)


def at_the_end(data: Path) -> None:
    flip(first(data), first(data).stat().st_size - 9)  # in the footer's length or last bytes


def truncate(data: Path) -> None:
    first(data).write_bytes(first(data).read_bytes()[:-100])


def swap(data: Path) -> None:
    other = next(data.glob("shard-*00000-01.parquet"))
    content = first(data).read_bytes()
    first(data).write_bytes(other.read_bytes())
    other.write_bytes(content)


def other_footers(data: Path) -> None:
    flip(data / "_metadata", 100)


def rewritten(data: Path) -> None:
    """The same rows in one row group."""
    pq.write_table(pq.read_table(first(data)), first(data), compression="none", use_dictionary=False)


@pytest.mark.parametrize(
    "damage, words",
    [
        (in_picture, ["-00000-00.parquet, row group 1: damaged .its hash"]),
        (truncate, ["-00000-00.parquet: has [0-9]+ bytes, the manifest says", "its footer cannot be read"]),
        (lambda data: first(data).unlink(), ["-00000-00.parquet: missing"]),
        (lambda data: flip(first(data), 0), ["-00000-00.parquet: .*(footer cannot be read|outside of its row)"]),
        (at_the_end, ["-00000-00.parquet: .*(footer cannot be read|outside of its row)"]),
        (swap, ["-00000-00.parquet", "-00000-01.parquet"]),
        (other_footers, ["_metadata: damaged"]),
        (lambda data: (data / "_metadata").unlink(), ["_metadata: missing"]),
        (rewritten, ["-00000-00.parquet: has 1 row groups, the manifest says [0-9]+", "row group 0: has"]),
    ],
)
def test_damage_is_named_with_its_place(data: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    damage(data)
    problems = check(data).problems
    assert problems
    for one in words:
        assert any(re.search(one, problem) for problem in problems), problems
    assert all(str(data) in problem for problem in problems)


def test_only_what_is_damaged_is_named(data: Path) -> None:
    in_picture(data)
    (problem,) = check(data).problems
    assert problem.startswith(f"{first(data)}, row group 1")


def test_wrong_pictures_are_found_though_their_hashes_are_right(tmp_path: Path) -> None:
    pictures = [encoded(number) for number in range(10)]
    pictures[5], pictures[9] = encoded(5, 24), b"no picture"
    write_data_set(str(tmp_path), pictures)
    wrong = check(tmp_path)
    assert wrong.pictures == 10
    shard = first(tmp_path)
    assert list(wrong.problems) == [
        f"{shard}, row group 1, row 1 ('pictures/5.png'): is 24x24, the manifest says 16x16",
        f"{shard}, row group 2, row 1 ('pictures/9.png'): its header cannot be read as JPEG, PNG or WebP "
        f"(UnidentifiedImageError)",
    ]


def test_columns_have_to_agree_with_the_manifest(data: Path) -> None:
    manifest = read_manifest(str(data), STORAGE)
    write_manifest(dataclasses.replace(manifest, width=32), str(data), STORAGE)
    problems = check(data).problems
    assert len(problems) == 80
    assert "its columns say 16x16, the manifest 32x16" in problems[0] and "is 16x16" in problems[1]


def test_footers_have_to_be_those_of_the_shards(data: Path) -> None:
    """Right by its hash and in its number of row groups, and yet not what the shards' own footers give."""
    manifest = read_manifest(str(data), STORAGE)
    shards = [inspect_shard(data / shard.file, shard.file)[1] for shard in manifest.shards]
    summary, footers = merge_footers(shards[::-1])
    (data / "_metadata").write_bytes(summary)
    write_manifest(dataclasses.replace(manifest, footers=footers), str(data), STORAGE)
    assert check(data).problems == (f"{data}/_metadata: differs from the footers of the shards",)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["parameters"].update(quality=94),
        lambda content: content.update(source=content["source"].swapcase()),
        lambda content: content.update(samples=41),
        lambda content: content["shards"][0]["row_groups"][0].update(offset=5),
        lambda content: content["shards"][0].update(file="other.parquet"),
        lambda content: content.update(sha256="0" * 64),
    ],
)
def test_damage_to_the_manifest_is_found_outside_of_the_digest_too(
    data: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(content))
    assert check(data).problems == (), "how it is laid out does not matter"
    change(content)
    (data / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"manifest.json: damaged .its hash differs.*ingest again"):
        check(data)


def test_a_data_set_without_manifest_is_refused(data: Path) -> None:
    content = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(content | {"samples": 1, "height": 8}))
    with pytest.raises(DataError, match="digest does not match"):
        check(data)
    (data / "manifest.json").unlink()
    with pytest.raises(DataError, match="no manifest.json"):
        check(data)


@pytest.mark.integration
def test_data_on_s3_is_verified(original: Path, s3: S3Server) -> None:
    bucket = s3.new_bucket()
    filesystem = s3.filesystem()
    for path in original.iterdir():
        with filesystem.open_output_stream(f"{bucket}/data/{path.name}") as stream:
            stream.write(path.read_bytes())
    uri = f"s3://{bucket}/data"
    assert verify(uri, STORAGE, progress=False) == check(original)
    second = read_manifest(uri, STORAGE).shards[1].file
    filesystem.delete_file(f"{bucket}/data/{second}")
    (problem,) = verify(uri, STORAGE, progress=False).problems
    assert problem == f"{uri}/{second}: missing"
